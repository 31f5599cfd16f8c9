"""What a checkpoint holds next to weights: parameter groups of callbacks, state of the loss."""

import pytest
import torch
from helpers.exact import X, assert_exact, start
from torch import nn

import minikeras
from minikeras import CheckpointError
from minikeras.checkpoint import fits

pytestmark = pytest.mark.usefixtures("quick_disk")


class Halves(minikeras.Callback):
    """Acts on the rate, the weights and the random state, and sets up what the epoch needs."""

    def on_epoch_begin(self, epoch):
        self.batches = 0
        self.model.optimizer.param_groups[0]["lr"] *= 0.5
        with torch.no_grad():
            next(self.model.parameters()).add_(torch.rand(()))

    def on_batch_end(self, batch, logs):
        self.batches += 1

    def on_epoch_end(self, epoch, logs):
        assert self.batches > 0


class Counted(minikeras.Callback):
    epochs = 0

    def on_epoch_begin(self, epoch):
        self.epochs += 1

    def on_epoch_end(self, epoch, logs):
        logs["epochs"] = self.epochs

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def test_resumed_epoch_does_not_begin_twice(tmp_path):
    assert_exact(lambda: {"callbacks": lambda: [Halves(), Counted()]}, tmp_path, kills=(1, 3, 4, 8))


class Unfreezes(minikeras.Callback):
    """Add a layer to the optimizer in epochs 2 and 3, with a learning rate of its own."""

    def on_epoch_begin(self, epoch):
        layers = {2: 2, 3: 0}
        if epoch in layers:
            layer = self.model.net[layers[epoch]].requires_grad_(True)
            self.model.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.01})
        if epoch == 3:
            self.model.optimizer.param_groups[1]["lr"] = 0.005


def frozen_net():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    return net


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)]
)
def test_resumed_fit_has_the_groups_that_a_callback_added(optimizer, tmp_path):
    def make():
        return {
            "net": frozen_net,
            "optimizer": lambda trained: optimizer(trained[-2:], lr=0.01),
            "callbacks": lambda: [Unfreezes()],
        }

    assert_exact(make, tmp_path, kills=(2, 3, 4, 6, 7, 10), epochs=4)


def test_resumed_fit_has_the_groups_that_a_callback_added_in_a_window_of_accumulate(tmp_path):
    def make():
        return {
            "net": frozen_net,
            "compile": {"accumulate": 3},
            "optimizer": lambda trained: torch.optim.Adam(trained[-2:], lr=0.01),
            "callbacks": lambda: [Unfreezes()],
        }

    assert_exact(make, tmp_path, kills=(3, 4, 6, 7), epochs=3)


def test_resumed_fit_refuses_the_groups_of_another_script(tmp_path):
    def halves(trained):
        return torch.optim.SGD([{"params": trained[:1]}, {"params": trained[1:]}], lr=0.1)

    start(lambda: {"optimizer": halves}, tmp_path / "run.pt", epochs=1)
    fits.USES.clear()  # in another process
    with pytest.raises(CheckpointError, match="another optimizer: SGD"):
        start(dict, tmp_path / "run.pt", epochs=2)


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(1), persistent=False)
        self.plain = torch.zeros(1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_pred, y_true):
        self.center.mul_(0.9).add_(0.1 * y_pred.detach().mean(0))
        self.plain = self.plain * 0.9 + 0.1
        loss = ((y_pred - self.center - self.plain - y_true) ** 2).mean()
        return loss * self.scale.exp() + self.scale**2


class FreezesTheLoss(minikeras.Callback):
    def on_epoch_begin(self, epoch):
        if epoch == 2:
            self.model._run.loss_func.scale.requires_grad_(False)


def test_checkpoint_holds_hidden_buffers_and_frozen_parameters_of_a_loss(tmp_path):
    assert_exact(
        lambda: {"loss": Centered, "callbacks": lambda: [FreezesTheLoss()]},
        tmp_path,
        kills=(1, 4, 7),
    )


class LateCenter(nn.Module):
    """Its buffers are None until the first batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean(dim=0)
        if self.scale is None:
            self.scale = x.std(dim=0)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(dim=0))
        return self.layer((x - self.mean) / self.scale)


class LateLoss(LateCenter):
    def forward(self, y_pred, y_true):
        if self.mean is None:
            self.mean = y_true.mean()
        return ((y_pred - y_true - 0.1 * self.mean) ** 2).mean() + 0.01 * (
            self.layer.weight**2
        ).sum()


@pytest.mark.parametrize("part", ["net", "loss"])
def test_checkpoint_holds_buffers_that_come_with_the_first_batch(part, tmp_path):
    assert_exact(
        lambda: {part: {"net": LateCenter, "loss": LateLoss}[part]}, tmp_path, kills=(1, 4)
    )


def test_load_fills_buffers_that_come_with_the_first_batch(tmp_path):
    model = minikeras.Model(LateCenter())
    other = minikeras.Model(LateCenter())
    model(X)
    model.save(tmp_path / "weights.pt")
    other.load(tmp_path / "weights.pt")
    model.eval()
    other.eval()
    assert torch.equal(other(X), model(X))
    assert other.state_dict().keys() == model.state_dict().keys()


class MaybeBiased(nn.Module):
    def __init__(self, biased, registered=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1))
        if registered:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.ones(1)) if biased else None

    def forward(self, x):
        return x @ self.weight + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("registered", [True, False])
def test_load_does_not_take_a_parameter_that_is_none_for_such_a_buffer(registered, tmp_path):
    minikeras.Model(MaybeBiased(True)).save(tmp_path / "weights.pt")
    model = minikeras.Model(MaybeBiased(False, registered))
    with pytest.raises(CheckpointError, match=r"unexpected: net\.bias"):
        model.load(tmp_path / "weights.pt")
    assert model.net.bias is None
