"""Cases of data, models and optimizers: several processes find what one finds."""

import json
import os

import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    TensorDataset,
)

import minikeras
from helpers.metrics import Scaled
from helpers.models import Net
from helpers.ranks.common import RANK, Two, compiled, doubles, fitted, found, row_by_row
from helpers.seeds import seed


def arrays(size):
    seed()
    model = compiled()
    dfhistory = model.fit(3, doubles(100), doubles(37), batch_size=12 // size, verbose=0)
    return found(model, dfhistory, doubles(37))


class Boxes(nn.Module):
    """Images of any size in a list; a dict for each in eval mode and not for the loss alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, images):
        return [
            {"score": self.fc(image.mean((1, 2))), "size": torch.tensor(image.shape)}
            for image in images
        ]


def box_loss(y_pred, y_true):
    scores = torch.stack([found["score"][0] for found in y_pred])
    return ((scores - torch.stack([found["value"] for found in y_true])) ** 2).mean()


def detection(size):
    """Lists of images and of dicts, and a list of dicts for the rows."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(29):
        image = torch.rand(3, 4 + row % 5, 5, generator=generator, dtype=torch.float64)
        rows.append((image, {"boxes": torch.zeros(1 + row % 4, 4), "value": image.sum() / 50}))
    data = DataLoader(
        rows, 12 // size, collate_fn=lambda found: tuple(map(list, zip(*found, strict=True)))
    )
    seed()
    model = compiled(minikeras.Model(Boxes()), box_loss, metrics_dict={"again": box_loss})
    return found(model, model.fit(2, data, data, verbose=0), data, evaluated=model.evaluate(data))


def loader_in_memory(size):
    train = DataLoader(TensorDataset(*doubles(100)), 12 // size, shuffle=True)
    return fitted(train, DataLoader(TensorDataset(*doubles(37)), 12 // size))


def loader_by_rows(size):
    return fitted(
        DataLoader(row_by_row(100), 12 // size, shuffle=True),
        DataLoader(row_by_row(37), 12 // size),
    )


def loader_with_workers(size):
    train = DataLoader(row_by_row(100), 12 // size, shuffle=True, num_workers=2)
    return fitted(train, DataLoader(row_by_row(37), 12 // size, num_workers=1))


def loader_with_a_generator(size):
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    return fitted(
        DataLoader(row_by_row(50), 12 // size, shuffle=True, generator=generator),
        drop(50, 12 // size),
    )


def drop(rows, batch):
    return DataLoader(row_by_row(rows), batch, drop_last=True)


def fewer_rows_than_processes(size):
    return fitted(
        DataLoader(row_by_row(5), 6 // size), DataLoader(TensorDataset(*doubles(1)), 6 // size)
    )


def odd(size, world=None):
    """Run what hypothesis has drawn; `world` is the number of processes that one stands for."""
    return [odd_one(size, world or size, **case) for case in json.loads(os.environ["ODD"])]


def odd_one(size, world, kind, rows, val, batch, shuffle, drop_last):
    batch = batch * world // size
    try:
        if kind == "arrays":
            seed()
            model = compiled()
            return found(
                model,
                model.fit(2, doubles(rows), doubles(val), batch_size=batch, verbose=0),
                doubles(val),
            )
        data = row_by_row(rows) if kind == "rows" else TensorDataset(*doubles(rows))
        train = DataLoader(data, batch, shuffle, drop_last=drop_last)
        return fitted(train, DataLoader(row_by_row(val), batch))
    except ValueError as error:
        return {"error": str(error)}


def batch_sampler(size):
    seed()
    sampler = Pieces(60, 12 // size)
    model = compiled()
    return found(model, model.fit(2, DataLoader(row_by_row(60), batch_sampler=sampler), verbose=0))


def shared_out_by_the_user(size):
    """Samplers that know the ranks: in a batch sampler, or of a custom class."""
    seed()
    model = compiled()
    rank = 0 if size == 1 else RANK
    by_batches = BatchSampler(
        DistributedSampler(range(48), size, rank, shuffle=False), 12 // size, False
    )
    model.fit(1, DataLoader(row_by_row(48), batch_sampler=by_batches), verbose=0)
    loader = DataLoader(row_by_row(48), 12 // size, sampler=Strided(48, size, rank))
    return found(model, model.fit(1, loader, verbose=0))


class Strided:
    def __init__(self, rows, size, rank):
        self.rows = rows
        self.num_replicas = size
        self.rank = rank

    def __len__(self):
        return self.rows // self.num_replicas

    def __iter__(self):
        return iter(range(self.rank, self.rows, self.num_replicas))


def odd_buffers(size):
    seed()
    model = Net()
    model.register_buffer("small", torch.tensor([1, 2, 3], dtype=torch.int16))
    model.register_buffer("one", torch.tensor(7, dtype=torch.uint16))
    model = compiled(model)
    return found(model, model.fit(1, doubles(24), batch_size=12 // size, verbose=0))


class Pieces:
    """A custom batch sampler."""

    def __init__(self, rows, batch):
        self.rows = rows
        self.batch = batch

    def __len__(self):
        return self.rows // self.batch

    def __iter__(self):
        return iter([part.tolist() for part in torch.randperm(self.rows).split(self.batch)])


def list_of_batches(size):
    X, y = doubles(64)
    return fitted(list(zip(X.split(8 // size), y.split(8 // size), strict=True)), doubles(9))


def steps_per_epoch(size):
    seed()
    model = compiled()
    data = DataLoader(row_by_row(50), 12 // size, shuffle=True)
    return found(model, model.fit(4, data, steps_per_epoch=3, verbose=0))


def two_optimizers(size):
    seed()
    model = Two().double()
    optimizers = {
        "g": torch.optim.Adam(model.g.parameters()),
        "d": torch.optim.SGD(model.d.parameters(), lr=0.1),
    }
    model = compiled(model, optimizer=optimizers, metrics_dict={})
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


def shared_between_optimizers(size):
    """A parameter that two optimizers train: the first one steps with its gradient."""
    seed()
    model = Net().double()
    optimizers = {
        "all": torch.optim.SGD(model.parameters(), lr=0.5),
        "first": torch.optim.SGD(model.fc1.parameters(), lr=0.1),
    }
    model = compiled(model, optimizer=optimizers)
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


def own_parameters(size):
    seed()
    model = Net().double()
    loss = Scaled(torch.float64)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    model = compiled(model, minikeras.Regularized(loss, model, l1=0.01, l2=0.01), optimizer)
    return found(
        model,
        model.fit(2, doubles(45), batch_size=12 // size, verbose=0),
        scale=loss.scale.detach(),
    )


class TwoOutputs(nn.Module):
    """Two outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.b = nn.Linear(2, 1)

    def forward(self, x):
        return {"a": self.a(x), "b": torch.sigmoid(self.b(x))}


def above(y_pred, y_true):
    """A loss over the rows above 0 alone."""
    counts = (y_true > 0).double()
    return minikeras.Average((counts * (y_pred - y_true) ** 2).sum(), counts.sum())


def losses_by_name(size):
    """Means over rows from all parts; and one Average that is trained alone."""
    X, y = doubles(61)
    data = (X, {"a": X.sum(1, keepdim=True), "b": y})
    loss = Scaled(torch.float64)
    results = []
    for losses in ({"a": nn.MSELoss(), "b": (loss, 0.5)}, {"a": above, "b": (loss, 0.0)}):
        seed()
        net = minikeras.Model(TwoOutputs()).double()
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)
        metrics = {"b": {"mae": nn.L1Loss()}}
        model = compiled(net, minikeras.Regularized(losses, net, l2=0.01), optimizer, metrics)
        dfhistory = model.fit(2, data, data, batch_size=12 // size, verbose=0)
        results.append(found(model, dfhistory, scale=loss.scale.detach().clone()))
    return results


class Sometimes(Net):
    """A layer used in some batches of a process only, and one never used; penalties reach both."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.fc1(x) + (self.extra(x) if x.shape[0] % 2 else 0)
        return torch.sigmoid(self.fc2(torch.relu(hidden)))


def layers_that_come_and_go(size):
    """Weights are those of one process that takes the halves of each batch by themselves."""
    results = []
    for factor in (0.01, 0):
        seed()
        model = Sometimes().double()
        loss_func = nn.BCELoss()
        if factor:  # without it some gradients do not exist
            loss_func = minikeras.Regularized(loss_func, model, l2=factor)
        model = compiled(model, loss_func, accumulate=2 // size)
        X, y = doubles(20)
        parts = [
            (X[start : start + rows], y[start : start + rows])
            for start, rows in ((0, 4), (4, 5), (9, 5), (14, 4))
        ]
        dfhistory = model.fit(2, parts, verbose=0)
        results.append(found(model, dfhistory))
    return results


class Complex(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, dtype=torch.complex128) * (1 + 2j))

    def forward(self, x):
        return torch.sigmoid((x.to(self.weight.dtype) @ self.weight).abs())


def complex_weights(size):
    seed()
    model = Complex()
    model.compile(nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


def big_steps(size):
    seed()
    model = compiled(accumulate=2, clip_grad_norm=0.1)
    return found(model, model.fit(2, doubles(61), batch_size=12 // size, verbose=0))


class LooksAtGradients(Net):
    """Look at gradients, and clip them, between backward and step; add a loss of its own."""

    def compute_loss(self, outputs, labels, sample_weight=None):
        if self.training:
            (0.5 * self.fc1.weight.square().sum()).backward()
        return super().compute_loss(outputs, labels, sample_weight)

    def compute_metrics(self, outputs, labels):
        metrics = super().compute_metrics(outputs, labels)
        norm = torch.zeros(())
        if self.training:
            norm = nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        return metrics | {"norm": norm}


def gradients_between_backward_and_step(size):
    """All see the mean over the rows of all processes, once backward is over."""
    seed()
    model = LooksAtGradients().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    norms = []
    weight = model.fc2.weight
    optimizer.register_step_pre_hook(lambda *call: norms.append(weight.grad.norm().item()))
    weight.register_hook(lambda gradient: gradient + 0.1 * weight.detach())
    model = compiled(model, optimizer=optimizer)
    dfhistory = model.fit(3, doubles(48), batch_size=12 // size, verbose=0)
    return found(model, dfhistory, norms=norms)


class ClipsInMetrics(Net):
    """Clip the gradients in the metrics, which see them whole."""

    def compute_metrics(self, outputs, labels):
        metrics = super().compute_metrics(outputs, labels)
        norm = torch.zeros(())
        if self.training:
            norm = nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        return metrics | {"norm": norm}


def mean_of_some(y_pred, y_true):
    """Return the error over rows that count, of which there are other numbers in each batch."""
    counted = y_true + 0.25
    return minikeras.Average(((y_pred - y_true) ** 2 * counted).sum(), counted.sum())


def gradients_of_a_short_batch(size):
    """Metrics see the mean over all rows, however many there are, and of an Average."""
    histories = []
    for loss_func in (nn.MSELoss(), mean_of_some):
        seed()
        model = ClipsInMetrics().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model = compiled(model, loss_func, optimizer)
        histories.append(model.fit(3, doubles(49), batch_size=12 // size, verbose=0))
    return found(model, histories[1], first=histories[0].to_dict("list"))


def frozen_in_a_window(size):
    """A layer is frozen between two batches of one step, which still takes its gradient."""
    seed()
    model = compiled(accumulate=3)

    def freeze(batch, logs):
        model.fc1.requires_grad_(requires_grad=batch not in (2, 4))

    callback = minikeras.LambdaCallback(on_batch_end=freeze)
    dfhistory = model.fit(2, doubles(60), batch_size=12 // size, verbose=0, callbacks=[callback])
    return found(model, dfhistory)


def late_hook(size):
    """A hook of the user's that is registered after those of the buckets."""
    seed()
    model = compiled(optimizer=None)
    seen = []

    def halve(parameter):
        seen.append(parameter.grad is not None)
        parameter.grad.mul_(0.5)

    def register(epoch):
        if epoch == 2:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(halve)

    model.compile(nn.BCELoss(), torch.optim.SGD(model.parameters(), 0.5), device="cpu")
    callback = minikeras.LambdaCallback(on_epoch_begin=register)
    dfhistory = model.fit(3, doubles(48), batch_size=12 // size, verbose=0, callbacks=[callback])
    return found(model, dfhistory, seen=seen)


class Conjugates(minikeras.Model):
    """Complex parameters behind an odd number of others, whose gradients are conjugates."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(2, 1, dtype=torch.complex128) * (1 + 2j))

    def forward(self, x):
        return torch.sigmoid((x.to(self.weight.dtype) @ self.weight.conj()).abs() * self.scale[0])


def conjugates(size):
    seed()
    model = Conjugates()
    model.compile(nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


def channels_last(size):
    """A fused optimizer goes through the memory of weights and gradients side by side."""
    seed()
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 1)]
    model = minikeras.Model(nn.Sequential(*layers).to(memory_format=torch.channels_last)).double()
    images = torch.randn(20, 3, 6, 6, dtype=torch.float64)
    images = images.to(memory_format=torch.channels_last)
    scores = images.mean((1, 2, 3))[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    model = compiled(model, nn.MSELoss(), optimizer, {})
    return found(model, model.fit(2, (images, scores), batch_size=8 // size, verbose=0))
