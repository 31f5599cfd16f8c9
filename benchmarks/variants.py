"""Run one variant of one work: `python benchmarks/variants.py WORK VARIANT` prints a line of JSON.

    seconds          on the clock: `work.epochs` epochs, after `work.warm` epochs of warming up
    cpu_seconds      of them, this process's on a core; its DataLoader's workers are not included
    steps            optimizer steps in these seconds (batches, for predict)
    steps_taken      optimizer steps of the whole run as the optimizer itself counted them
    final_loss       over all rows after training (for predict: the mean output)
    tolerance        of final_loss against the tuned loop's, relative
    peak_mb          of this process
    gpu_mb           the most that torch had allocated on the device by the end of these seconds
    gpu_mb_before    for predict: the same after 20 batches, before the clock started
    compile_seconds  what warming up took beyond what as many epochs take later

Each function below is one variant: build, `with warm:` train a little, `with timed:` train, and
return the trained network and the number of optimizer steps. Logs, checkpoints and progress bars
are off where there is a switch. Each run has its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from works import RingLoss, RingLossAsPrinted, Work, make_work


class Stopwatch:
    """Measure the seconds inside `with`: wall-clock time and CPU time of this process.

    The device has nothing left to do as the clock starts and as it stops.
    """

    seconds = 0.0
    cpu_seconds = 0.0
    gpu_mb: float | None = None  # see `gpu_mb` below

    def __init__(self, device: str) -> None:
        self.device = device
        self.synchronize = torch.get_device_module(device).synchronize

    def __enter__(self) -> None:
        self.synchronize()
        self.started = time.perf_counter()
        self.cpu_started = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.cpu_seconds = time.process_time() - self.cpu_started
        self.gpu_mb = gpu_mb(self.device)


def gpu_mb(device: str) -> float | None:
    """Return the most that torch has had allocated on a device, None if it does not count."""
    most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if most is None else most() / 2**20


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Read the step count of Adam itself: a hook that counts would change what is measured."""
    state = next(iter(optimizer.state.values()))
    return int(state["step"])


# --- loops without a library ---


def naive(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train by the loop of most tutorials: DataLoader, `.item()` at each step."""
    net = work.make_net()
    loader = work.loader()
    loss_func = work.make_loss(net)
    optimizer = Adam(net.parameters(), lr=work.lr)
    autocast = work.autocast()
    history = []

    def train(epochs):
        for _ in range(epochs):
            net.train()
            total = correct = 0.0
            for features, labels in loader:
                features, labels = features.to(work.device), labels.to(work.device)
                optimizer.zero_grad()
                with autocast:
                    outputs = net(features)
                    loss = loss_func(outputs, labels)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(features)
                correct += work.metric(outputs, labels).item() * len(features)
            history.append((total / len(work.X), correct / len(work.X)))

    with warm:
        train(work.warm)
    with timed:
        train(work.epochs)
    return net, steps_of(optimizer)


def tuned(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train by the best eager loop by hand.

    Rows are permuted once an epoch, batches are slices, totals stay tensors. Rows that only
    workers can read come from the loader.
    """
    if work.by_row:
        return tuned_loader(work, warm, timed)
    net = work.make_net()
    rows = len(work.X)
    all_X = work.X.to(work.device)
    all_y = work.y.to(work.device)
    loss_func = work.make_loss(net)
    optimizer = Adam(net.parameters(), lr=work.lr)
    autocast = work.autocast()
    history = []

    def train(epochs):
        for _ in range(epochs):
            net.train()
            order = torch.randperm(rows, device=work.device)
            X, y = all_X[order], all_y[order]
            total, correct = torch.zeros(2, device=work.device)
            for start in range(0, rows, work.batch_size):
                features = X[start : start + work.batch_size]
                labels = y[start : start + work.batch_size]
                with autocast:
                    outputs = net(features)
                    loss = loss_func(outputs, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    total.add_(loss, alpha=len(features))
                    correct.add_(work.metric(outputs, labels), alpha=len(features))
            history.append((total.item() / rows, correct.item() / rows))

    with warm:
        train(work.warm)
    with timed:
        train(work.epochs)
    return net, steps_of(optimizer)


def tuned_loader(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train by the best eager loop over a DataLoader with workers.

    Batches are copied without waiting from pinned memory, totals stay tensors.
    """
    net = work.make_net()
    loader = work.loader()
    loss_func = work.make_loss(net)
    optimizer = Adam(net.parameters(), lr=work.lr)
    autocast = work.autocast()
    history = []

    def train(epochs):
        for _ in range(epochs):
            net.train()
            total, correct = torch.zeros(2, device=work.device)
            for features, labels in loader:
                features = features.to(work.device, non_blocking=True)
                labels = labels.to(work.device, non_blocking=True)
                with autocast:
                    outputs = net(features)
                    loss = loss_func(outputs, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    total.add_(loss, alpha=len(features))
                    correct.add_(work.metric(outputs, labels), alpha=len(features))
            history.append((total.item() / len(work.X), correct.item() / len(work.X)))

    with warm:
        train(work.warm)
    with timed:
        train(work.epochs)
    return net, steps_of(optimizer)


def compiled(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train by the tuned loop, with torch.compile of forward, loss and metric, and of the step."""
    if work.by_row:
        raise NotImplementedError("its batches are slices")
    net = work.make_net()
    rows = len(work.X)
    all_X = work.X.to(work.device)
    all_y = work.y.to(work.device)
    loss_func = work.make_loss(net)
    optimizer = Adam(net.parameters(), lr=work.lr)
    autocast = work.autocast()
    history = []

    @torch.compile
    def forward(features, labels):
        with autocast:
            outputs = net(features)
            loss = loss_func(outputs, labels)
        return loss, work.metric(outputs.detach(), labels)

    @torch.compile(fullgraph=False)
    def step():
        optimizer.step()

    def train(epochs):
        for _ in range(epochs):
            net.train()
            order = torch.randperm(rows, device=work.device)
            X, y = all_X[order], all_y[order]
            total, correct = torch.zeros(2, device=work.device)
            for start in range(0, rows, work.batch_size):
                features = X[start : start + work.batch_size]
                labels = y[start : start + work.batch_size]
                loss, accuracy = forward(features, labels)
                loss.backward()
                step()
                optimizer.zero_grad()
                total.add_(loss.detach(), alpha=len(features))
                correct.add_(accuracy, alpha=len(features))
            history.append((total.item() / rows, correct.item() / rows))

    with warm:
        train(work.warm)
    with timed:
        train(work.epochs)
    return net, steps_of(optimizer)


# --- minikeras ---


def minikeras(
    work: Work,
    warm: Stopwatch,
    timed: Stopwatch,
    loss: str = "own",
    verbose: int = 1,
    on_device: bool = False,
    **switches: Any,
) -> tuple[nn.Module, int]:
    """Train by a user's script: subclass, compile, fit with a DataLoader; bar and metric on.

    loss: "own" is minikeras.Regularized(minikeras.FocalLoss()) on ring, "same" what all others
    have, "printed" the one that walks over the parameters at each step.
    on_device: the user has moved the data there, as the tuned loop has.
    """
    import minikeras

    model = work.make_net(minikeras.Model)
    loss_func = work.make_loss(model)
    if isinstance(loss_func, RingLoss) and loss == "own":
        loss_func = minikeras.Regularized(minikeras.FocalLoss(), model, l1=0.001, l2=0.001)
    elif loss == "printed":
        loss_func = RingLossAsPrinted(model)
    optimizer = Adam(model.parameters(), lr=work.lr)
    try:
        model.compile(
            loss_func,
            optimizer,
            {"accuracy": work.metric},
            device=work.device,
            precision="bf16" if work.bf16 else "fp32",
            **switches,
        )
    except TypeError as error:
        raise NotImplementedError(str(error)) from error
    loader = work.loader_on_device() if on_device else work.loader()
    with warm:
        model.fit(work.warm, dl_train=loader, verbose=verbose)
    with timed:
        model.fit(work.epochs, dl_train=loader, verbose=verbose)
    return model, steps_of(optimizer)


# --- rivals ---


def torchkeras2(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    # Two versions of one package are needed: see requirements.txt.
    sys.path.insert(0, str(Path(__file__).parent / "torchkeras2"))
    import torchkeras

    if not torchkeras.__version__.startswith("2."):
        raise ModuleNotFoundError("torchkeras 2")
    model = work.make_net(torchkeras.Model)
    optimizer = Adam(model.parameters(), lr=work.lr)
    model.compile(work.make_loss(model), optimizer, {"accuracy": work.metric})
    loader = work.loader()
    with warm:
        model.fit(work.warm, dl_train=loader, log_step_freq=1000)
    with timed:
        model.fit(work.epochs, dl_train=loader, log_step_freq=1000)
    return model, steps_of(optimizer)


def torchkeras4(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train with torchkeras 4, timed by a callback: a second fit would start with an idle epoch.

    Its bar, its checkpoints and its gradient clipping have no switch.
    """
    import torchkeras

    if not torchkeras.__version__.startswith("4."):
        raise ModuleNotFoundError("torchkeras 4")

    class Accuracy(nn.Module):
        def __init__(self):
            super().__init__()
            self.reset()

        def reset(self):
            self.correct = torch.tensor(0.0)
            self.count = 0

        def forward(self, preds, targets):
            accuracy = work.metric(preds, targets)
            self.correct = self.correct + accuracy * len(preds)
            self.count = self.count + len(preds)
            return accuracy

        def compute(self):
            return self.correct / self.count

    class Clock:
        epochs = 0

        def on_train_epoch_end(self, model):
            self.epochs += 1
            if self.epochs == work.warm:
                timed.__enter__()
            elif self.epochs == work.warm + work.epochs:
                timed.__exit__()

    net = work.make_net()
    optimizer = Adam(net.parameters(), lr=work.lr)
    model = torchkeras.KerasModel(net, work.make_loss(net), {"accuracy": Accuracy()}, optimizer)
    epochs = work.warm + work.epochs
    with tempfile.TemporaryDirectory() as folder:
        model.fit(
            work.loader(),
            epochs=epochs,
            ckpt_path=f"{folder}/checkpoint",
            patience=epochs,
            monitor="train_loss",
            callbacks=[Clock()],
            plot=False,
            cpu=True,
        )
    return net, steps_of(optimizer)


def keras(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train with Keras on its torch backend, with Keras's own layers and losses.

    The first weights are copied from the network that all others have.
    """
    os.environ["KERAS_BACKEND"] = "torch"
    from keras import Sequential, layers, losses, optimizers, regularizers

    net = work.make_net()
    if isinstance(work.make_loss(net), RingLoss):
        penalty = regularizers.L1L2(l1=0.001, l2=0.0005)
        shapes = [(4, "relu"), (8, "relu"), (1, "sigmoid")]
        model = Sequential(
            [layers.Dense(units, act, kernel_regularizer=penalty) for units, act in shapes]
        )
        loss = losses.BinaryFocalCrossentropy(apply_class_balancing=True, alpha=0.75, gamma=2.0)
    else:
        model = Sequential(keras_layers(layers, work.X.ndim))
        loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model.build((None, *work.X.shape[1:]))
    model.set_weights([swap(p.detach()).numpy() for p in net.parameters()])
    # The epsilon is torch's default; Keras's is 1e-7.
    optimizer = optimizers.Adam(learning_rate=work.lr, epsilon=1e-8)
    model.compile(optimizer, loss, metrics=["accuracy"])
    loader = work.loader()
    with warm:
        model.fit(loader, epochs=work.warm, verbose=0)
    with timed:
        model.fit(loader, epochs=work.epochs, verbose=0)
    with torch.no_grad():
        for parameter, array in zip(net.parameters(), model.get_weights(), strict=True):
            parameter.copy_(swap(torch.from_numpy(array), back=True))
    return net, int(optimizer.iterations)


def keras_layers(layers: Any, ndim: int) -> list[Any]:
    if ndim == 2:
        return [layers.Dense(256, "relu"), layers.Dense(128, "relu"), layers.Dense(10)]
    convolution = {"padding": "same", "activation": "relu", "data_format": "channels_first"}
    return [
        layers.Conv2D(8, 3, **convolution),
        layers.MaxPooling2D(2, data_format="channels_first"),
        layers.Conv2D(16, 3, **convolution),
        layers.MaxPooling2D(2, data_format="channels_first"),
        layers.Flatten(data_format="channels_last"),
        layers.Dense(10),
    ]


def swap(weight: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Permute torch's (out, in, height, width) to Keras's (height, width, in, out), or back."""
    if weight.ndim == 4:
        return weight.permute(3, 2, 0, 1) if back else weight.permute(2, 3, 1, 0)
    return weight.T if weight.ndim == 2 else weight


def lightning(
    work: Work, warm: Stopwatch, timed: Stopwatch, bar: bool = False
) -> tuple[nn.Module, int]:
    """Train with Lightning, timed by a callback, which leaves out the long start of a fit."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar

    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = work.make_net()
            self.loss_func = work.make_loss(self.net)

        def training_step(self, batch, batch_idx):
            features, labels = batch
            outputs = self.net(features)
            loss = self.loss_func(outputs, labels)
            accuracy = work.metric(outputs, labels)
            self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=bar)
            self.log("accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=bar)
            return loss

        def configure_optimizers(self):
            return Adam(self.parameters(), lr=work.lr)

    class Clock(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == work.warm:
                timed.__enter__()

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == work.warm + work.epochs - 1:
                timed.__exit__()

    callbacks = [Clock()]
    if bar:
        callbacks.append(TQDMProgressBar())
    module = Lit()
    trainer = Trainer(
        max_epochs=work.warm + work.epochs,
        accelerator=work.device,
        precision="bf16-mixed" if work.bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
        callbacks=callbacks,
    )
    trainer.fit(module, work.loader())
    return module.net, steps_of(trainer.optimizers[0])


def ignite(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Average

    net = work.make_net()
    optimizer = Adam(net.parameters(), lr=work.lr)
    trainer = create_supervised_trainer(
        net,
        optimizer,
        work.make_loss(net),
        output_transform=lambda x, y, y_pred, loss: (
            loss.detach(),
            work.metric(y_pred.detach(), y),
        ),
    )
    Average(lambda output: output[0]).attach(trainer, "loss")
    Average(lambda output: output[1]).attach(trainer, "accuracy")
    loader = work.loader()
    with warm:
        trainer.run(loader, max_epochs=work.warm)
    with timed:
        trainer.run(loader, max_epochs=work.warm + work.epochs)
    return net, steps_of(optimizer)


def skorch(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    from skorch import NeuralNet
    from skorch.callbacks import EpochScoring

    def accuracy(net, X, y):
        return work.metric(torch.from_numpy(net.predict_proba(X)), torch.as_tensor(y)).item()

    module = work.make_net()
    net = NeuralNet(
        module,
        work.make_loss(module),
        optimizer=Adam,
        lr=work.lr,
        batch_size=work.batch_size,
        train_split=None,
        verbose=0,
        iterator_train__shuffle=True,
        iterator_train__num_workers=work.workers,
        callbacks=[EpochScoring(accuracy, on_train=True, name="accuracy", lower_is_better=False)],
    )
    with warm:
        net.set_params(max_epochs=work.warm).partial_fit(work.X, work.y)
    with timed:
        net.set_params(max_epochs=work.epochs).partial_fit(work.X, work.y)
    return net.module_, steps_of(net.optimizer_)


def poutyne(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    from poutyne import Model

    net = work.make_net()
    optimizer = Adam(net.parameters(), lr=work.lr)
    model = Model(net, optimizer, work.make_loss(net), batch_metrics=[work.metric], device="cpu")
    loader = work.loader()
    with warm:
        model.fit_generator(loader, epochs=work.warm, verbose=False)
    with timed:
        model.fit_generator(loader, epochs=work.epochs, verbose=False)
    return net, steps_of(optimizer)


def accelerate(work: Work, warm: Stopwatch, timed: Stopwatch) -> tuple[nn.Module, int]:
    """Train by the loop of Accelerate's documentation; totals stay tensors."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=work.device == "cpu", mixed_precision="bf16" if work.bf16 else "no"
    )
    net = work.make_net()
    loss_func = work.make_loss(net)
    model, optimizer, loader = accelerator.prepare(
        net, Adam(net.parameters(), lr=work.lr), work.loader()
    )
    history = []

    def train(epochs):
        for _ in range(epochs):
            model.train()
            total, correct = torch.zeros(2, device=work.device)
            for features, labels in loader:
                optimizer.zero_grad()
                outputs = model(features)
                loss = loss_func(outputs, labels)
                accelerator.backward(loss)
                optimizer.step()
                total += loss.detach() * len(features)
                correct += work.metric(outputs.detach(), labels) * len(features)
            history.append((total.item() / len(work.X), correct.item() / len(work.X)))

    with warm:
        train(work.warm)
    with timed:
        train(work.epochs)
    return net, steps_of(optimizer)


# --- predict: a million rows to a million outputs ---


def predict_tuned(work: Work) -> Any:
    """Predict by slices: a GPU holds one batch and its outputs."""
    net = work.make_net().eval()

    def predict(X):
        batches = X.split(work.batch_size)
        with torch.no_grad():
            return torch.cat([net(features.to(work.device)).cpu() for features in batches])

    return predict


def predict_on_device(work: Work) -> Any:
    """Predict with all rows and all outputs on the device: its memory grows with the rows."""
    net = work.make_net().eval()

    def predict(X):
        batches = X.to(work.device).split(work.batch_size)
        with torch.no_grad():
            return torch.cat([net(features) for features in batches]).cpu()

    return predict


def predict_naive(work: Work) -> Any:
    net = work.make_net().eval()

    def predict(X):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(X), batch_size=work.batch_size
        )
        with torch.no_grad():
            return torch.cat([net(features.to(work.device)).cpu() for (features,) in loader])

    return predict


def predict_minikeras(work: Work) -> Any:
    import minikeras

    model = work.make_net(minikeras.Model)  # not compiled: predict stays on the model's device
    return lambda X: model.predict(X, batch_size=work.batch_size)


def predict_minikeras_loader(work: Work) -> Any:
    import minikeras

    model = work.make_net(minikeras.Model)
    dataset = torch.utils.data.TensorDataset
    return lambda X: model.predict(
        torch.utils.data.DataLoader(dataset(X), batch_size=work.batch_size)
    )


def predict_keras(work: Work) -> Any:
    os.environ["KERAS_BACKEND"] = "torch"
    from keras import Sequential, layers

    model = Sequential([layers.Dense(64, "relu"), layers.Dense(1)])
    model.build((None, 20))
    model.set_weights([swap(p.detach()).numpy() for p in work.make_net().parameters()])
    return lambda X: torch.from_numpy(model.predict(X, batch_size=work.batch_size, verbose=0))


def predict_skorch(work: Work) -> Any:
    from skorch import NeuralNetRegressor

    net = NeuralNetRegressor(work.make_net(), batch_size=work.batch_size).initialize()
    return lambda X: torch.from_numpy(net.predict(X))


def predict_poutyne(work: Work) -> Any:
    from poutyne import Model

    model = Model(work.make_net(), None, None, device="cpu")
    return lambda X: torch.from_numpy(model.predict(X, batch_size=work.batch_size, verbose=False))


# --- the list, and one run ---

VARIANTS: dict[str, Any] = {
    "tuned": (tuned, {}),
    "naive": (naive, {}),
    "compiled": (compiled, {}),
    "minikeras": (minikeras, {}),
    "minikeras-quiet": (minikeras, {"verbose": 0}),
    "minikeras-on-device": (minikeras, {"on_device": True}),
    "minikeras-same-loss": (minikeras, {"loss": "same"}),
    "minikeras-printed-loss": (minikeras, {"loss": "printed"}),
    "minikeras-jit": (minikeras, {"jit": True}),
    "minikeras-jit-4": (minikeras, {"jit": True, "steps_per_execution": 4}),
    "torchkeras2": (torchkeras2, {}),
    "torchkeras4": (torchkeras4, {}),
    "keras": (keras, {}),
    "lightning": (lightning, {}),
    "lightning-bar": (lightning, {"bar": True}),
    "ignite": (ignite, {}),
    "skorch": (skorch, {}),
    "poutyne": (poutyne, {}),
    "accelerate": (accelerate, {}),
}
PREDICT: dict[str, Any] = {
    "tuned": predict_tuned,
    "naive": predict_naive,
    "on-device": predict_on_device,
    "minikeras": predict_minikeras,
    "minikeras-loader": predict_minikeras_loader,
    "keras": predict_keras,
    "skorch": predict_skorch,
    "poutyne": predict_poutyne,
}
ON_A_GPU = (
    "tuned",
    "naive",
    "on-device",
    "compiled",
    "minikeras",
    "minikeras-quiet",
    "minikeras-on-device",
    "minikeras-same-loss",
    "minikeras-printed-loss",
    "minikeras-jit",
    "minikeras-jit-4",
    "minikeras-loader",
    "lightning",
    "lightning-bar",
    "accelerate",
)
ONLY_ON_A_GPU = ("on-device", "minikeras-on-device")  # on the CPU the data is there anyway
RING_ONLY = ("minikeras-same-loss", "minikeras-printed-loss")


def names(work: str, device: str) -> list[str]:
    """List the variants of a work, in the order of its table."""
    known = []
    for name in PREDICT if work == "predict" else VARIANTS:
        if name in RING_ONLY and not work.startswith("ring"):
            continue
        if name in ONLY_ON_A_GPU and (device == "cpu" or work == "loader"):
            continue
        # the other libraries have no bf16, or take no Dataset, or only with other code
        if name in ON_A_GPU or (device == "cpu" and work not in ("loader", "transformer")):
            known.append(name)
    return known


@torch.no_grad()
def loss_over_all_rows(work: Work, net: nn.Module) -> float:
    net.eval()
    net.to(work.device)  # some libraries move it back to the CPU
    loss_func = work.make_loss(net)
    total = 0.0
    for X, y in zip(work.X.split(1000), work.y.split(1000), strict=True):
        loss = loss_func(net(X.to(work.device)), y.to(work.device))
        total += float(loss) * len(X)
    return total / len(work.X)


def measure_training(work: Work, variant: str) -> dict[str, Any]:
    function, switches = VARIANTS[variant]
    warm = Stopwatch(work.device)
    timed = Stopwatch(work.device)
    net, steps_taken = function(work, warm, timed, **switches)
    return {
        "seconds": timed.seconds,
        "cpu_seconds": timed.cpu_seconds,
        "tolerance": work.tolerance,
        "steps": work.epochs * work.steps,
        "steps_taken": steps_taken,
        "steps_expected": (work.warm + work.epochs) * work.steps,
        "peak_mb": peak_mb(),
        "gpu_mb": timed.gpu_mb,
        "compile_seconds": max(0.0, warm.seconds - timed.seconds * work.warm / work.epochs),
        "final_loss": loss_over_all_rows(work, net),
    }


def measure_predict(work: Work, variant: str) -> dict[str, Any]:
    predict = PREDICT[variant](work)
    timed = Stopwatch(work.device)
    predict(work.X[: 20 * work.batch_size])
    gpu_mb_before = gpu_mb(work.device)
    with timed:
        for _ in range(work.epochs):
            outputs = predict(work.X)
    assert outputs.shape == (len(work.X), 1), outputs.shape
    steps = work.epochs * work.steps
    return {
        "seconds": timed.seconds,
        "cpu_seconds": timed.cpu_seconds,
        "tolerance": work.tolerance,
        "steps": steps,
        "steps_taken": steps,
        "steps_expected": steps,
        "peak_mb": peak_mb(),
        "gpu_mb": timed.gpu_mb,
        "gpu_mb_before": gpu_mb_before,
        "compile_seconds": 0.0,
        "final_loss": float(outputs.double().mean()),
    }


def peak_mb() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("variant")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = make_work(args.work, args.quick, args.device)
    torch.manual_seed(args.seed)
    measure = measure_predict if args.work == "predict" else measure_training
    try:
        result = measure(work, args.variant)
    except ModuleNotFoundError as error:
        result = {"missing": f"not installed: {error.name or error}"}
    except NotImplementedError as error:
        result = {"missing": f"not available: {error}"}
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
