"""What a user's type checker must take: mypy --strict and pyright. Read by ./check, and not run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras


class Net(minikeras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(x)
        return scores

    def train_step(
        self, features: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Mapping[str, Tensor | float | minikeras.Average]:
        outputs = self.compute_outputs(features)
        loss = self.compute_loss(outputs, labels, sample_weight)
        self.backward(loss)
        self.optimizer_step()
        return {"loss": loss, "two": 2.0, **self.compute_metrics(outputs, labels)}


class Rates(minikeras.Callback):
    def on_batch_begin(self, batch: int) -> None:
        self.batch = batch

    def on_batch_end(self, batch: int, logs: minikeras.BatchLogs) -> None:
        self.loss: float = logs.batch["loss"]
        self.mean: float = logs["loss"]


class OnlyMeans(minikeras.Callback):
    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self.mean = logs["loss"]


class Shout(minikeras.Callback):
    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        print(epoch, logs["loss"], self.model.history)
        self.model.stop_training = epoch == 3


def accuracy(y_pred: Tensor, y_true: Tensor) -> Tensor:
    return ((y_pred > 0) == (y_true > 0.5)).float().mean()


model = Net()
assert_type(minikeras.Model(nn.Linear(2, 1)), minikeras.Model)
optimizer = torch.optim.Adam(minikeras.weight_decay_groups(model, 1e-4))
loss_func = minikeras.Regularized(minikeras.FocalLoss(2.0, from_logits=True), model, l1=1e-4)
model.compile(
    loss_func,
    optimizer,
    {"accuracy": accuracy},
    "cpu",
    precision="bf16",
    clip_grad_norm=1.0,
    accumulate=2,
)
model.compile(
    lambda y_pred, y_true: (y_pred - y_true).abs().mean(),
    {"all": optimizer},
    jit={"mode": "default"},
)

X = torch.zeros(8, 2)
y = torch.zeros(8, 1)
callbacks = [
    Shout(),
    minikeras.LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs)),
    minikeras.LambdaCallback(on_batch_end=lambda batch, logs: print(logs.batch["loss"])),
    Rates(),
    OnlyMeans(),
    minikeras.EarlyStopping("val_loss", patience=3, baseline=0.5, restore_best_weights=True),
    minikeras.ModelCheckpoint(Path("best.pt"), save_best_only=True),
    minikeras.LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 2), step="batch"),
    minikeras.LRScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), monitor="loss"),
    minikeras.CSVLogger("log.csv", append=True),
    minikeras.EMA(0.99),
    minikeras.Timer(60),
    minikeras.Timer(log=True),
]
loader = DataLoader(TensorDataset(X, y), batch_size=4)
assert_type(
    model.fit(3, loader, dl_val=loader, log_step_freq=10, callbacks=callbacks), pd.DataFrame
)
model.fit(
    3,
    (np.zeros((8, 2)), pd.Series(np.zeros(8))),
    batch_size=4,
    checkpoint=Path("run.pt"),
    on_nan="stop",
)
assert_type(model.evaluate((X, y), batch_size=4), dict[str, float])
predicted: Tensor = model.predict(X, gather="main")
model.save("weights.pt")
model.load(Path("weights.pt"))

shown = minikeras.summary(model, (2,))
assert_type(shown.total_params, int)
assert_type(shown.to_dataframe(), pd.DataFrame)
assert_type(model.summary(input_data=X).rows[0].trainable_params, int)


def check_rows(evidence: minikeras.diagnosis.Evidence) -> list[minikeras.diagnosis.Finding]:
    found = f"{evidence.train.rows} rows"
    return [minikeras.diagnosis.Finding("note", "the data", found, "more", "Collect more.")]


diagnosis = model.diagnose((X, y), (X, y), steps=10, checks=[check_rows])
assert_type(diagnosis, minikeras.diagnosis.Diagnosis)
assert_type(diagnosis.findings[0].found, str)
assert_type(diagnosis.to_dataframe(), pd.DataFrame)
assert_type(model.lr_find(loader, steps=10).suggestion, float | None)
assert_type(minikeras.l1_penalty(model, 0.1) + minikeras.l2_penalty(model, 0.1), Tensor)
assert_type(minikeras.EarlyStopping().best, float)
assert_type(minikeras.FocalLoss().gamma, float)

try:
    model.load("weights.pt")
except (minikeras.CheckpointError, minikeras.NotCompiledError, minikeras.ForwardError) as error:
    assert_type(error.args[0], Any)
