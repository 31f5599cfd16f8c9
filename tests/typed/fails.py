"""What a user's type checker must refuse. Read by ./check, and not run.

Each wrong line is marked with the error that mypy and pyright must give there. A mark without its
error is an error.
"""

import torch
from torch import nn

import minikeras

model = minikeras.Model("net")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model.compile()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model.compile(nn.MSELoss(), "adam")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model.compile(nn.MSELoss(), metrics_dict=[len])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model.compile(nn.MSELoss(), metrics={"one": len})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model.compile(nn.MSELoss(), None, None, None, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

X = torch.zeros(8, 2)
y = torch.zeros(8, 1)
model.fit("3", (X, y))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model.fit(3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model.fit(3, (X, y), None, None, 32)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model.fit(3, (X, y), callbacks=[minikeras.EMA])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
model.fit(3, (X, y), callbacks=[print])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
logs: dict[str, float] = model.fit(3, (X, y))  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
model.evaluate((X, y))["val_loss"].item()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
model.save(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

minikeras.FocalLoss(2.0, 0.75, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
minikeras.FocalLoss(gamma="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
minikeras.EarlyStopping(patience=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
minikeras.EarlyStopping(patiense=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
minikeras.LRScheduler(0.1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
print(minikeras.no_such)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class Wrong(minikeras.Callback):
    def on_epoch_end(self, epoch: str) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        print(epoch)
