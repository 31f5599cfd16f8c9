"""Exported programs, and fit where the caller has switched gradients off."""

import pytest
import torch
from helpers.models import compiled
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import minikeras

X = torch.randn(20, 3)
Y = torch.randn(20, 1)


def linear(**kwargs):
    torch.manual_seed(0)
    return compiled(minikeras.Model(nn.Linear(3, 1)), nn.MSELoss(), **kwargs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_trains_though_the_caller_has_switched_gradients_off(mode):
    expected = linear()
    expected.fit(2, (X, Y), (X, Y), verbose=0)
    model = linear()
    with mode():
        dfhistory = model.fit(2, (X, Y), (X, Y), verbose=0)
        assert not torch.is_grad_enabled()
    assert dfhistory.to_dict() == expected.history.to_dict()
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "model.pt2"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    minikeras.Model(net).export(path, X)
    return torch.export.load(path).module(), net.eval()


def test_exported_program_predicts_and_evaluates(program):
    theirs, net = program
    model = compiled(minikeras.Model(theirs), nn.MSELoss())
    with torch.no_grad():
        torch.testing.assert_close(model.predict(X), net(X))
        assert model.evaluate((X, Y))["val_loss"] == pytest.approx(
            ((net(X) - Y) ** 2).mean().item(), rel=1e-6
        )
    assert model.training


def test_exported_program_is_refused_by_fit_and_both_remedies_train(program):
    theirs, net = program
    model = compiled(minikeras.Model(theirs), nn.MSELoss())
    with pytest.raises(
        ValueError,
        match=r"^net is a program of torch.export, which has no train mode.*exported from",
    ):
        model.fit(1, (X, Y), verbose=0)
    compiled(minikeras.Model(net.train()), nn.MSELoss()).fit(1, (X, Y), verbose=0)
    theirs.requires_grad_(False)
    model = compiled(
        minikeras.Model(nn.Sequential(theirs, nn.Dropout(0.1), nn.Linear(1, 1))), nn.MSELoss()
    )
    losses = model.fit(20, (X, Y), (X, Y), verbose=0)["val_loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert model.net[1].training
    model.eval()
    assert not model.net[1].training


class Packed(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        return PackedSequence(self.fc(x.data), *x[1:])


def test_packed_sequence_outputs_are_float32_under_bf16_as_tensors_are():
    model = compiled(Packed(), lambda p, t: p.data.mean(), precision="bf16")
    outputs = model.predict([pack_sequence([X[:4], X[:2]])])
    assert outputs.data.dtype == torch.float32


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x):
        parameters, buffers = torch.func.stack_module_state(list(self.nets))

        def one(parameters, buffers):
            return torch.func.functional_call(self.nets[0], (parameters, buffers), (x,))

        return torch.vmap(one)(parameters, buffers).mean(0)


def test_summary_of_a_vmap_shows_what_one_of_its_calls_gives(capsys):
    result = minikeras.summary(Ensemble(), (4,))
    shapes = {row.layer: row.output_shape for row in result.rows}
    assert shapes == {"": [-1, 1], "nets": None, "nets.0": [-1, 1], "nets.1": None, "nets.2": None}
    assert result.total_params == 15
    assert "nets" in capsys.readouterr().out


def test_metric_may_return_an_array_of_no_dimension():
    metric = {"mae": lambda y_pred, y_true: (y_pred - y_true).abs().mean().numpy()}
    model = linear(metrics_dict=metric)
    expected = (model.predict(X) - Y).abs().mean().item()
    assert model.evaluate((X, Y), batch_size=8)["val_mae"] == pytest.approx(expected, rel=1e-6)
