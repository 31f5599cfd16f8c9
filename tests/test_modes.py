"""Layers that the user has put into eval mode stay there while the rest trains."""

import copy

import pytest
import torch
from helpers.compare import assert_same_weights
from helpers.interruptions import Stopped
from helpers.models import points
from torch import nn

import minikeras
from minikeras import LambdaCallback

X, y = points(64)


def body_and_head():
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Linear(4, 1)
    )


def fitted(net, epochs=2, model=None, jit=False, **kwargs):
    model = minikeras.Model(net) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.compile(nn.MSELoss(), optimizer, device="cpu", jit=jit)
    model.fit(epochs, [(X, y)], verbose=kwargs.pop("verbose", 0), **kwargs)
    return model


def trained_by_hand(net, epochs=2, frozen=True):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(epochs):
        net.train()
        if frozen:
            net[0].eval()
        optimizer.zero_grad()
        nn.functional.mse_loss(net(X), y).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("jit", [False, {"backend": "eager"}], ids=["eager", "jit"])
def test_eval_mode_of_a_part_stays_as_in_a_hand_written_loop(jit):
    net = body_and_head()
    expected = trained_by_hand(copy.deepcopy(net))
    net[0].eval()
    fitted(net, jit=jit, dl_val=[(X, y)])
    assert_same_weights(net, expected, 1e-6 if jit else 0)  # a graph rounds otherwise
    assert [net.training, net[0].training, net[1].training] == [True, False, True]


@pytest.mark.parametrize(
    "wholly", [lambda net: net.eval(), lambda net: minikeras.Model(net).eval()]
)
def test_eval_mode_of_the_whole_model_is_train_mode_in_fit(wholly):
    net = body_and_head()
    twin = copy.deepcopy(net)
    torch.manual_seed(1)
    expected = trained_by_hand(twin, frozen=False)
    wholly(net)
    torch.manual_seed(1)
    fitted(net)
    assert_same_weights(net, expected, 0)
    assert not any(module.training for module in net.modules())


def test_train_mode_of_a_child_of_a_part_in_eval_mode_stays():
    net = body_and_head()
    net[0].eval()
    net[0][2].train()
    seen = []
    look = LambdaCallback(
        on_batch_end=lambda batch, logs: seen.append([m.training for m in net[0]])
    )
    fitted(net, callbacks=[look])
    assert seen == [[False, False, True]] * 2


def test_eval_mode_or_train_mode_set_by_a_callback_stays():
    net = body_and_head()
    seen = []

    def decide(epoch):
        if epoch == 2:
            net[0].eval()
        if epoch == 4:
            net[0].train()

    look = LambdaCallback(
        on_epoch_begin=decide, on_batch_end=lambda batch, logs: seen.append(net[0].training)
    )
    fitted(net, epochs=5, callbacks=[look], dl_val=[(X, y)])
    assert seen == [True, False, False, True, True]


def test_eval_mode_of_the_whole_model_left_by_a_callback_does_not_end_the_training():
    net = body_and_head()
    seen = []
    net[0].eval()
    look = LambdaCallback(
        on_epoch_end=lambda epoch, logs: net.eval(),
        on_batch_end=lambda batch, logs: seen.append([net[0].training, net[1].training]),
    )
    fitted(net, epochs=3, callbacks=[look])
    assert seen == [[False, True]] * 3


class Thawing(minikeras.Model):
    """Its own train method keeps the body in eval mode for the first two epochs."""

    epoch = 0

    def train(self, mode=True):
        super().train(mode)
        self.epoch += mode
        if self.epoch <= 2:
            self.net[0].eval()
        return self


def test_train_method_of_the_user_decides_the_modes():
    net = body_and_head()
    seen = []
    look = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(net[0].training))
    fitted(net, epochs=4, model=Thawing(net), callbacks=[look])
    assert seen == [False, False, True, True]


def test_eval_mode_that_stays_is_printed_in_a_line(capsys):
    net = body_and_head()
    fitted(net, verbose=2)
    assert "eval" not in capsys.readouterr().out
    net[0].eval()
    fitted(net, verbose=2)
    assert "in eval mode, as you left them: net.0\n" in capsys.readouterr().out


@pytest.mark.parametrize("every", [None, 1])
def test_modes_that_a_callback_set_are_those_of_the_resumed_fit(tmp_path, every):
    batches = [(X[:32], y[:32]), (X[32:], y[32:])]

    def fit(path, stop_in=None):
        torch.manual_seed(0)
        net = body_and_head()
        net[0].eval()
        model = minikeras.Model(net)
        model.compile(nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")

        def thaw(batch, logs):
            if batch == 1 and len(model._run.epochs) == 1:
                net[0].train()

        def stop(batch, logs):
            if stop_in == (len(model._run.epochs) + 1, batch):
                raise Stopped

        callbacks = [LambdaCallback(on_batch_end=thaw), LambdaCallback(on_batch_end=stop)]
        options = {"checkpoint": path, "checkpoint_every": every, "callbacks": callbacks}
        model.fit(3, batches, batches, verbose=0, **options)
        return model

    expected = fit(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        fit(tmp_path / "run.pt", stop_in=(3, 2))
    assert_same_weights(fit(tmp_path / "run.pt"), expected, 0)
