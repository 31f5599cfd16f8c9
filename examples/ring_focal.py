"""Rare positives: focal loss with L1 and L2 penalties finds a ring of 200 points in one of 6000."""

import argparse

import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader, TensorDataset, random_split

import minikeras

# from the palette of Okabe and Ito, which colour-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"


class DNNModel(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(2, 4)
        self.fc2 = torch.nn.Linear(4, 8)
        self.fc3 = torch.nn.Linear(8, 1)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return torch.sigmoid(self.fc3(x))


def ring(rows, radius):
    r, angle = radius + torch.randn(rows, 1), 2 * torch.pi * torch.rand(rows, 1)
    return torch.cat([r * torch.cos(angle), r * torch.sin(angle)], dim=1)


def accuracy(y_pred, y_true):
    return ((y_pred > 0.5) == (y_true > 0.5)).float().mean()


def recall(y_pred, y_true):
    """Return the share of positives that are found, a mean over the positives alone."""
    found = (y_pred > 0.5) & (y_true > 0.5)
    return minikeras.Average(found.sum(), (y_true > 0.5).sum())


def main(epochs, batch_size):
    torch.manual_seed(0)
    X = torch.cat([ring(200, 5.0), ring(6000, 8.0)])
    Y = torch.cat([torch.ones(200, 1), torch.zeros(6000, 1)])
    ds_train, ds_valid = random_split(TensorDataset(X, Y), [0.7, 0.3])
    dl_train = DataLoader(ds_train, batch_size, shuffle=True, num_workers=2)
    dl_valid = DataLoader(ds_valid, batch_size, num_workers=2)
    model = DNNModel()
    model.summary(input_shape=(2,))
    loss_func = minikeras.Regularized(minikeras.FocalLoss(), model, l1=0.001, l2=0.001)
    metrics = {"accuracy": accuracy, "recall": recall}
    model.compile(loss_func, torch.optim.Adam(model.parameters(), lr=0.01), metrics)
    dfhistory = model.fit(epochs, dl_train=dl_train, dl_val=dl_valid, log_step_freq=30)
    result = model.evaluate(dl_valid)
    y_pred = model.predict(X)
    if model.is_main_process:  # with several processes, only one prints and plots
        print(result)  # a network that answers "negative" to all has accuracy 0.968 and recall 0
        plot(X, Y, y_pred, dfhistory)
        plt.savefig("ring_focal.png")
        print("Wrote ring_focal.png: the points, what the network predicts, and the loss by epoch.")
    return dfhistory


def plot(X, Y, y_pred, dfhistory):
    _, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    scatter(axes[0], X, Y, "truth")
    scatter(axes[1], X, y_pred, "prediction")
    epochs = dfhistory.index + 1  # the index counts from 0, epochs from 1
    axes[2].plot(epochs, dfhistory["loss"], color=BLUE, label="training")
    axes[2].plot(epochs, dfhistory["val_loss"], "--", color=ORANGE, label="validation")
    axes[2].set(title="focal loss with penalties", xlabel="epoch")
    axes[2].legend()


def scatter(axis, X, y, title):
    positive = y[:, 0] > 0.5
    for name, color, rows in [("negative", BLUE, ~positive), ("positive", ORANGE, positive)]:
        axis.scatter(*X[rows].T, s=3, color=color, label=f"{name}: {int(rows.sum())}")
    axis.set(title=title, aspect="equal")
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False, markerscale=4
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--batch-size", type=int, default=100, help="of each process, under torchrun"
    )
    main(**vars(parser.parse_args()))
