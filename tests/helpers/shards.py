"""Fits with sharded parameters, which torchrun runs for test_fsdp.py.

torchrun --nproc-per-node=2 -m helpers.shards FOLDER CASE ...     as helpers/ranks

On one process, or with KIND=ddp, the parameters are whole.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import minikeras
from helpers.launch import cases_of, save_results
from helpers.metrics import Scaled
from helpers.models import Net
from helpers.ranks.common import METRICS, RANK, Two, Uneven, doubles, uneven_batches
from helpers.seeds import seed
from minikeras.distributed import gradients


class Deep(minikeras.Model):
    """Blocks in a ModuleList, one in another, and layers next to them."""

    def __init__(self):
        super().__init__()
        self.begin = nn.Linear(2, 5)
        self.end = nn.Linear(5, 1)
        inner = nn.ModuleList([nn.Linear(5, 5), nn.Tanh()])
        self.blocks = nn.ModuleList([Chain(inner), nn.Sequential(nn.Linear(5, 5), nn.Tanh())])

    def forward(self, x):
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(self.end(x))


class Chain(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def compiled(model=None, loss_func=None, optimizer=None, metrics_dict=METRICS, **kwargs):
    model = (Deep() if model is None else model).double()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.05)
    kind = os.environ.get("KIND", "fsdp") if "RANK" in os.environ else "auto"
    if kind != "fsdp":
        kwargs.pop("fsdp_blocks", None)
    model.compile(
        loss_func or nn.BCELoss(), optimizer, metrics_dict, device="cpu", distributed=kind, **kwargs
    )
    return model


def found(model, dfhistory, dl=None, **more):
    """Return what must be the same, with whole weights under their plain names."""
    path = Path(os.environ["FOLDER"], f"{os.environ.get('WORLD_SIZE', '1')}.pt")
    model.save(path)
    outputs = None if dl is None else model.predict(dl)
    return {
        "history": dfhistory.to_dict("list"),
        "weights": dict(torch.load(path)),
        "outputs": outputs,
        **more,
    }


def arrays(size):
    seed(RANK)
    model = compiled()
    before = [weight.detach().clone() for weight in model.parameters()]
    dfhistory = model.fit(3, doubles(100), doubles(37), batch_size=12 // size, verbose=0)
    weights = list(model.parameters())
    moved = all(
        not torch.equal(local(a), local(b))
        for a, b in zip(before, weights, strict=True)
        if local(a).numel()
    )
    assert moved
    assert (
        size == 1 or os.environ.get("KIND") == "ddp" or all(hasattr(w, "to_local") for w in weights)
    )
    return found(
        model, dfhistory, doubles(37), evaluated=model.evaluate(doubles(37), batch_size=12 // size)
    )


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def penalties(size):
    seed()
    model = Deep().double()
    loss = Scaled(torch.float64)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    model = compiled(
        model, minikeras.Regularized(loss, model, l1=0.01, l2=0.01), optimizer, clip_grad_norm=0.1
    )
    dfhistory = model.fit(2, doubles(45), doubles(17), batch_size=12 // size, verbose=0)
    return found(model, dfhistory, scale=loss.scale.detach())


class Weighed(nn.Module):
    """Its parameters stay whole, and are sent in several buckets."""

    def __init__(self):
        super().__init__()
        self.logs = nn.ParameterList(torch.zeros(4, dtype=torch.float64) for _ in range(4))

    def forward(self, y_pred, y_true):
        scale = sum(log.mean() for log in self.logs)
        return (y_pred - y_true).square().mean() * torch.exp(-scale) + scale


def whole_parameters_beside(size):
    seed()
    model = Deep().double()
    loss = Weighed()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    model = compiled(model, loss, optimizer)
    before = gradients.SMALL_BUCKET, gradients.BUCKET
    gradients.SMALL_BUCKET = gradients.BUCKET = 8
    try:
        dfhistory = model.fit(2, doubles(45), batch_size=12 // size, verbose=0)
    finally:
        gradients.SMALL_BUCKET, gradients.BUCKET = before
    return found(model, dfhistory, logs=[log.detach() for log in loss.logs])


def big_steps(size):
    seed()
    model = compiled(accumulate=2, clip_grad_value=0.2, clip_grad_norm=0.1)
    return found(model, model.fit(2, doubles(61), batch_size=12 // size, verbose=0))


def half(size):
    seed()
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
    kind = os.environ.get("KIND", "fsdp")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model.compile(nn.MSELoss(), optimizer, device="cpu", distributed=kind, precision="bf16")
    data = tuple(part.float() for part in doubles(45))
    return found(model, model.fit(2, data, batch_size=12 // size, verbose=0))


def by_the_user(size):
    """The user calls fully_shard before compile."""
    seed()
    model = Deep().double()
    if size > 1 and os.environ.get("KIND") != "ddp":
        fully_shard(model.blocks[0])
        fully_shard(model)
        said = ""
        try:
            model.compile(nn.BCELoss(), device="cpu", distributed=None)
        except ValueError as error:
            said = str(error)
        assert "are in parts in several processes" in said
    model.compile(nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=0.1), METRICS, device="cpu")
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


def fewer_rows_than_processes(size):
    seed()
    model = compiled()
    return found(
        model, model.fit(2, doubles(5), doubles(1), batch_size=6 // size, verbose=0), doubles(1)
    )


def uneven(size):
    seed()
    model = compiled()
    if size > 1:
        return found(
            model, model.fit(2, DataLoader(Uneven(), 4), DataLoader(Uneven(), 4), verbose=0)
        )
    batches = uneven_batches()
    return found(model, model.fit(2, batches, batches, verbose=0))


def two_optimizers(size):
    seed()
    model = Two().double()
    optimizers = {
        "g": torch.optim.Adam(model.g.parameters()),
        "d": torch.optim.SGD(model.d.parameters(), lr=0.1),
    }
    model = compiled(model, optimizer=optimizers, metrics_dict={}, fsdp_blocks=(nn.Linear,))
    dfhistory = model.fit(2, doubles(45), batch_size=12 // size, verbose=0)
    return found(model, dfhistory, doubles(7))


def callbacks(size):
    seed()
    model = compiled()
    stop = minikeras.EarlyStopping(
        "val_loss", patience=2, min_delta=0.02, restore_best_weights=True
    )
    path = Path(os.environ["FOLDER"], f"kept{size}.pt")
    save = minikeras.ModelCheckpoint(path, "val_loss", save_best_only=True)
    average = minikeras.EMA(0.9, evaluate=True)
    rates = minikeras.LRScheduler(torch.optim.lr_scheduler.StepLR(model.optimizer, 2, 0.5))
    listed = [average, stop, save, rates]
    dfhistory = model.fit(
        20, doubles(60), doubles(30), batch_size=12 // size, callbacks=listed, verbose=0
    )
    result = found(model, dfhistory, kept=dict(torch.load(path)))
    model.load(path)
    return result | {"evaluated": model.evaluate(doubles(30))}


class Shared(Deep):
    """A block that is called twice, a block in two others, and tied weights beside the blocks."""

    def __init__(self):
        super().__init__()
        self.blocks[1][0] = self.blocks[0].parts[0]
        self.blocks.append(self.blocks[1])
        self.twin = nn.Linear(2, 5)
        self.twin.weight = self.begin.weight

    def forward(self, x):
        return super().forward(x + self.twin(x)[:, :2])


def shared_layers(size):
    seed()
    model = compiled(Shared())
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0), doubles(5)[0])


def compiled_again(size):
    """compile with an optimizer that has state, then compile again with sharded parameters."""
    seed()
    model = Deep().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    X, y = doubles(16)
    nn.functional.binary_cross_entropy(model(X), y).backward()
    optimizer.step()
    model = compiled(model, optimizer=optimizer)
    model.fit(1, doubles(45), batch_size=12 // size, verbose=0)
    model = compiled(model, optimizer=optimizer)
    return found(model, model.fit(1, doubles(45), batch_size=12 // size, verbose=0))


def nan_on_one(size):
    seed()
    X, y = doubles(24)
    y = y.clone()
    y[17] = torch.nan
    model = compiled(loss_func=nn.MSELoss())
    try:
        model.fit(1, [(X, y)] if size == 1 else [(X[:12], y[:12]), (X[12:], y[12:])], verbose=0)
    except FloatingPointError as error:
        said = "the weights are those from before this step" in str(error).lower()
    return found(model, model.fit(1, doubles(24), batch_size=12 // size, verbose=0), said=said)


def refused(size):
    """Return the errors of what sharded parameters cannot do."""
    said = []
    for more in (
        {"jit": True},
        {"precision": "fp16"},
        {"fsdp_blocks": nn.Conv1d},
        {"fsdp_blocks": "Linear"},
    ):
        try:
            Net().compile(nn.BCELoss(), device="cpu", distributed="fsdp", **more)
        except (ValueError, TypeError) as error:
            said.append(str(error))
    model = Two()
    optimizers = {
        "g": torch.optim.SGD(model.g.parameters()),
        "d": torch.optim.SGD(model.d.parameters()),
    }
    model.compile(nn.BCELoss(), optimizers, device="cpu", distributed="fsdp")
    try:
        model.fit(1, (torch.zeros(8, 2), torch.zeros(8, 1)), verbose=0)
    except RuntimeError as error:
        said.append(error.__notes__[0])
    model = Bare()
    model.compile(nn.BCELoss(), device="cpu", distributed="fsdp")
    try:
        model.fit(1, (torch.zeros(8, 2), torch.zeros(8, 1)), verbose=0)
    except RuntimeError as error:
        said.append(str(error))
    for model in shared_over_blocks():
        try:
            model.compile(nn.BCELoss(), device="cpu", distributed="fsdp")
        except ValueError as error:
            said.append(str(error))
    model = Deep()
    for name in ("Adafactor", "Muon", "Rprop"):
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        optimizer = getattr(torch.optim, name, torch.optim.Rprop)(matrices)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # biases are in no optimizer
            model.compile(nn.BCELoss(), optimizer, device="cpu", distributed="fsdp")
        try:
            model.fit(1, (torch.zeros(8, 2), torch.zeros(8, 1)), verbose=0)
        except RuntimeError as error:
            said.append(error.__notes__[0])
    return {"said": said}


def shared_over_blocks():
    """Yield models in which two blocks, or a block and the rest, have a parameter in common."""
    model = Deep()
    model.blocks[1][0].weight = model.blocks[0].parts[0].weight
    yield model
    model = Deep()
    model.blocks.append(nn.Sequential(model.blocks[1][0]))
    yield model
    model = Deep()
    model.first = model.blocks[1][0]
    yield model


class Bare(Net):
    """A step with a bare backward."""

    def train_step(self, features, labels):
        self.compute_loss(self(features), labels).backward()
        self.optimizer_step()


def carried_on(size):
    """Resume the same file, by one process or several; KILL is "RANK SIGNAL EPOCH BATCH"."""
    seed()
    model = compiled(accumulate=2)
    at = Path(os.environ["FOLDER"], "run.pt")
    average = minikeras.EMA(0.9)
    stop = minikeras.LambdaCallback(on_epoch_end=lambda epoch, logs: check(epoch))
    more = {"checkpoint": at, "checkpoint_every": 1} if "PART" in os.environ else {}
    rank, number, *moment = map(int, os.environ.get("KILL", "-1 0 0 0").split())

    def check(epoch):
        if str(epoch) == os.environ.get("PART"):
            raise KeyboardInterrupt

    def kill(batch, logs):
        if rank == RANK and moment == [len(model._run.epochs) + 1, batch]:
            os.kill(os.getpid(), number)

    killer = minikeras.LambdaCallback(on_batch_end=kill)
    best = minikeras.EarlyStopping("loss", patience=9, restore_best_weights=True)
    dl = DataLoader(torch.utils.data.TensorDataset(*doubles(45)), 12 // size, shuffle=True)
    try:
        dfhistory = model.fit(3, dl, callbacks=[average, best, stop, killer], verbose=0, **more)
    except KeyboardInterrupt:
        return {}
    return found(model, dfhistory)


CASES = cases_of(sys.modules[__name__])

if __name__ == "__main__":
    # a thread that waits for the GIL as the process ends, waits its longest
    sys.setswitchinterval(60)
    save_results(CASES, sys.argv[1], sys.argv[2:])
