"""Differences between two processes, planted one by one: what each of them is told."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from helpers.compare import copy_weights
from helpers.models import points
from helpers.ranks.common import RANK, Two
from helpers.seeds import seed

X, Y = points(32)
LAST = RANK > 0  # the process that differs


class Net(nn.Module):
    """Two layers of one size, which can be registered in another order."""

    def __init__(self, order="ab"):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(2, 2))
        self.end = nn.Linear(2, 1)

    def forward(self, x):
        return torch.sigmoid(self.end(self.b(torch.tanh(self.a(x)))))


def compiled(net=None, rate=0.1, loss_func=None, optimizer=None, metrics_dict=None, **kwargs):
    """Return a compiled model; the same in all processes but for what is passed."""
    seed()
    model = minikeras.Model(Net() if net is None else net)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), rate)
    elif callable(optimizer):
        optimizer = optimizer(model)
    model.compile(loss_func or nn.MSELoss(), optimizer, metrics_dict, device="cpu", **kwargs)
    return model


def fit(model=None, data=(X, Y), epochs=2, **kwargs):
    model = compiled() if model is None else model
    return model, lambda: model.fit(epochs, data, **{"batch_size": 8, "verbose": 0, **kwargs})


def with_buffer(shape):
    net = Net()
    net.register_buffer("seen", torch.zeros(shape))
    return net


def layers(*middle):
    return nn.Sequential(nn.Linear(2, 4), *middle, nn.Linear(4, 1))


def freeze_a_weight(model):
    model.net.a.weight.requires_grad_(False)
    return model


def in_eval(model):
    model.net[1].eval()
    return model


def on_last(change):
    """Return a function that changes a value in the last process only."""
    return lambda value: change(value) if LAST else value


def trained_again(model):
    """Change a weight of the last process after a fit: all have had the same until then."""
    model.fit(1, (X, Y), batch_size=8, verbose=0)
    if LAST:
        with torch.no_grad():
            model.net.b.weight[0, 0] += 1
    return model


def another_row(model):
    model.fit(1 + LAST, (X, Y), batch_size=8, verbose=0)
    return model


def callback(**functions):
    return [minikeras.LambdaCallback(**functions)]


def changes_rate(model):
    def change(batch, logs):
        if LAST and batch == 2:
            model.optimizer.param_groups[0]["lr"] = 0.05

    return fit(model, callbacks=callback(on_batch_end=change))


def freezes(model, **kwargs):
    def freeze(epoch):
        model.net.a.requires_grad_(not (LAST and epoch == 2))

    return fit(model, callbacks=callback(on_epoch_begin=freeze), **kwargs)


class FreezesOne(Net):
    """From its third batch on it trains a layer that differs between processes."""

    batches = 0

    def forward(self, x):
        self.batches += self.training
        if self.batches >= 3:
            (self.a if LAST else self.b).requires_grad_(requires_grad=False)
        return super().forward(x)


def permutes(model):
    def permute(epoch, logs):
        if LAST:
            weight = model.net.a.weight.detach()
            weight.copy_(weight.flip(0))

    return fit(model, callbacks=callback(on_epoch_end=permute))


def edits(model):
    def edit(epoch, logs):
        if LAST:
            nn.init.zeros_(model.net.end.bias)

    return fit(model, callbacks=callback(on_epoch_end=edit))


class Draws(Two):
    """A step that chooses its optimizer by a number that differs between processes."""

    def train_step(self, features, labels):
        loss = self.compute_loss(self(features), labels)
        name = "g" if LAST else "d"
        self.backward(loss, name)
        self.optimizer_step(name)
        return {"loss": loss}


def draws():
    seed()
    model = Draws()
    optimizers = {name: torch.optim.SGD(getattr(model, name).parameters(), 0.1) for name in "gd"}
    model.compile(nn.MSELoss(), optimizers, device="cpu")
    return fit(model)


def verb(one, other):
    """Return a call of one verb in the first process, and of another one in the last."""
    model = compiled()
    path = Path(os.environ["FOLDER"], "planted.pt")
    calls = {
        "fit": lambda: model.fit(1, (X, Y), verbose=0),
        "evaluate": lambda: model.evaluate((X, Y)),
        "predict": lambda: model.predict(X),
        "save": lambda: model.save(path),
    }
    return model, calls[other if LAST else one]


def alone_in_a_callback(name):
    model = compiled()
    _, alone = verb(name, name)

    def call(epoch, logs):
        if not LAST:
            alone()

    return fit(model, callbacks=callback(on_epoch_end=call))


def checkpoint_on_one():
    path = Path(os.environ["FOLDER"], "planted run.pt")
    return fit(checkpoint=path if LAST else None)


def batches(size):
    return DataLoader(TensorDataset(X, Y), size)


def metric(y_pred, y_true):
    return y_pred.mean()


# name -> (how to set it up, what the message says of the first process, and of the last)
PLANTED = {
    "wider": (
        lambda: fit(
            compiled(layers(nn.Linear(4, 5 if LAST else 4), nn.Linear(5 if LAST else 4, 4)))
        ),
        "1.weight (4, 4) float32 in process 0",
        "1.weight (5, 4) float32 in process 1",
    ),
    "deeper": (
        lambda: fit(compiled(layers(*[nn.Linear(4, 4) for _ in range(1 + LAST)]))),
        "parameter 5 is net.2.weight (1, 4) float32 in process 0",
        "net.2.weight (4, 4) float32 in process 1",
    ),
    "another order": (
        lambda: fit(compiled(Net("ba" if LAST else "ab"))),
        "parameter 1 is net.a.weight (2, 2) float32 in process 0",
        "net.b.weight (2, 2) float32 in process 1",
    ),
    "another activation": (
        lambda: fit(compiled(layers(nn.ReLU() if LAST else nn.Tanh()))),
        "layer net.1 is Tanh() in process 0",
        "ReLU() in process 1",
    ),
    "more dropout": (
        lambda: fit(compiled(layers(nn.Dropout(0.5 if LAST else 0.1)))),
        "layer net.1 is Dropout(p=0.1, inplace=False) in process 0",
        "Dropout(p=0.5, inplace=False) in process 1",
    ),
    "another type": (
        lambda: fit(compiled(Net().double() if LAST else Net()), (X, Y)),
        "net.a.weight (2, 2) float32 in process 0",
        "net.a.weight (2, 2) float64 in process 1",
    ),
    "another layout": (
        lambda: fit(
            compiled(
                nn.Conv2d(2, 2, 2).to(
                    memory_format=torch.channels_last if LAST else torch.contiguous_format
                )
            )
        ),
        "net.weight (2, 2, 2, 2) float32 in process 0",
        "net.weight (2, 2, 2, 2) float32 strides (8, 1, 4, 2) in process 1",
    ),
    "no buffer": (
        lambda: fit(compiled(Net() if LAST else with_buffer(3))),
        "buffer 1 is net.seen (3,) float32 in process 0",
        "nothing in process 1",
    ),
    "another buffer": (
        lambda: fit(compiled(with_buffer(4 if LAST else 3))),
        "buffer 1 is net.seen (3,) float32 in process 0",
        "net.seen (4,) float32 in process 1",
    ),
    "frozen": (
        lambda: fit(on_last(freeze_a_weight)(compiled())),
        "requires_grad of net.a.weight is True in process 0",
        "False in process 1",
    ),
    "in eval mode": (
        lambda: fit(on_last(in_eval)(compiled(layers(nn.BatchNorm1d(4))))),
        "in_eval_mode is nothing in process 0",
        "'net.1' in process 1",
    ),
    "fewer parameters to train": (
        lambda: fit(
            compiled(
                optimizer=lambda model: torch.optim.SGD(
                    [*model.parameters()][: 5 if LAST else 6], 0.1
                )
            )
        ),
        "parameters in the optimizer is 6: net.a.weight",
        "5: net.a.weight",
    ),
    "another optimizer": (
        lambda: fit(
            compiled(
                optimizer=lambda model: (torch.optim.Adam if LAST else torch.optim.SGD)(
                    model.parameters(), 0.1
                )
            )
        ),
        "the class of the optimizer is SGD in process 0",
        "Adam in process 1",
    ),
    "another learning rate": (
        lambda: fit(compiled(rate=0.5 if LAST else 0.1)),
        "lr of the optimizer is 0.1 in process 0",
        "0.5 in process 1",
    ),
    "another loss": (
        lambda: fit(compiled(loss_func=nn.L1Loss() if LAST else nn.MSELoss())),
        "loss_func is MSELoss in process 0",
        "L1Loss in process 1",
    ),
    "another metric": (
        lambda: fit(compiled(metrics_dict={"mean": metric} if LAST else None)),
        "loss and metrics_dict is loss in process 0",
        "loss, mean in process 1",
    ),
    "accumulate": (
        lambda: fit(compiled(accumulate=2 if LAST else 1)),
        "compile's accumulate is 1 in process 0",
        "2 in process 1",
    ),
    "clip_grad_norm": (
        lambda: fit(compiled(clip_grad_norm=0.5 if LAST else None)),
        "compile's clip_grad_norm is None in process 0",
        "0.5 in process 1",
    ),
    "precision": (
        lambda: fit(compiled(precision="bf16" if LAST else "fp32")),
        "compile's precision is 'fp32' in process 0",
        "'bf16' in process 1",
    ),
    "batch_size": (
        lambda: fit(batch_size=4 if LAST else 8),
        "batch_size is 8 in process 0",
        "4 in process 1",
    ),
    "batch_size of a loader": (
        lambda: fit(data=batches(4 if LAST else 8), batch_size=None),
        "batch_size of dl_train is 8 in process 0",
        "4 in process 1",
    ),
    "epochs": (
        lambda: fit(epochs=3 if LAST else 2),
        "epochs is 2 in process 0",
        "3 in process 1",
    ),
    "steps_per_epoch": (
        lambda: fit(steps_per_epoch=2 if LAST else 1),
        "steps_per_epoch is 1 in process 0",
        "2 in process 1",
    ),
    "validation_freq": (
        lambda: fit(dl_val=(X, Y), validation_freq=2 if LAST else 1),
        "validation_freq is 1 in process 0",
        "2 in process 1",
    ),
    "no validation data": (
        lambda: fit(dl_val=None if LAST else batches(8)),
        "dl_val is DataLoader in process 0",
        "nothing in process 1",
    ),
    "rows": (
        lambda: fit(data=(X[:16], Y[:16]) if LAST else (X, Y)),
        "batches in dl_train is 2 in process 0",
        "1 in process 1",
    ),
    "checkpoint": (checkpoint_on_one, "checkpoint is False in process 0", "True in process 1"),
    "on_nan": (
        lambda: fit(on_nan="stop" if LAST else "raise"),
        "on_nan is 'raise' in process 0",
        "'stop' in process 1",
    ),
    "weights": (
        lambda: fit(trained_again(compiled())),
        "parameter net.b.weight has norm",
        "in process 1",
    ),
    "fit and evaluate": (
        lambda: verb("fit", "evaluate"),
        "fit (beginning) in process 0",
        "evaluate (beginning) in process 1",
    ),
    "save and fit": (
        lambda: verb("save", "fit"),
        "save (beginning) in process 0",
        "fit (beginning) in process 1",
    ),
    "predict and evaluate": (
        lambda: verb("predict", "evaluate"),
        "predict (beginning) in process 0",
        "evaluate (beginning) in process 1",
    ),
}
# differences that come up during a fit
DURING = {
    "a learning rate set in one": (
        lambda: changes_rate(compiled()),
        "lr of the optimizer is 0.1 in process 0",
        "0.05 in process 1",
    ),
    "frozen in one": (
        lambda: freezes(compiled()),
        "requires_grad of net.a.weight is True in process 0",
        "False in process 1",
    ),
    "frozen in one, in the middle of a pass over the data": (
        lambda: freezes(compiled(), steps_per_epoch=2, batch_size=2),
        "requires_grad of net.a.weight is True in process 0",
        "False in process 1",
    ),
    "weights set in one": (
        lambda: edits(compiled()),
        "parameter net.end.bias has norm 0",
        "norm 0 in process 1",
    ),
    "rows of a weight in another order in one": (
        lambda: permutes(compiled()),
        "the weights of the processes have come to differ in this epoch: parameter net.a.weight",
        "in process 1",
    ),
    "another layer frozen in forward": (
        lambda: fit(compiled(FreezesOne())),
        "training of net.a.weight is True in process 0, False in process 1",
        "training of net.b.weight is False in process 0, True in process 1",
    ),
    "another optimizer's step": (
        draws,
        "'d' in process 0",
        "'g' in process 1",
    ),
    "evaluate in a callback of one": (
        lambda: alone_in_a_callback("evaluate"),
        "evaluate in fit (beginning) in process 0",
        "fit (end of an epoch) in process 1",
    ),
    "save in a callback of one": (
        lambda: alone_in_a_callback("save"),
        "save in fit (beginning) in process 0",
        "fit (end of an epoch) in process 1",
    ),
}


def planted(size):
    """Return what is said about each difference, and whether a weight has moved before."""
    said = {}
    for name, (set_up, *_) in {**PLANTED, **DURING}.items():
        model, call = set_up()
        before = copy_weights(model)
        try:
            call()
            message = "nothing"
        except (ValueError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
        same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        said[name] = [message, same]
    return said
