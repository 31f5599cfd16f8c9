"""Several outputs: a dict of two outputs, with a loss, a weight and a metric for each."""

import argparse

import torch
from sklearn.datasets import load_wine
from torch import nn

import minikeras


class WineModel(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        self.grape = nn.Linear(32, 3)
        self.alcohol = nn.Linear(32, 1)

    def forward(self, x):
        hidden = self.body(x)
        return {"grape": self.grape(hidden), "alcohol": self.alcohol(hidden)}


def accuracy(y_pred, y_true):
    return (y_pred.argmax(1) == y_true).float().mean()


def main(epochs):
    torch.manual_seed(0)
    wine = load_wine()
    order = torch.randperm(len(wine.target))
    table = torch.tensor(wine.data, dtype=torch.float32)[order]
    table = (table - table[:128].mean(0)) / table[:128].std(0)
    X = table[:, 1:]
    grape = torch.tensor(wine.target)[order]
    alcohol = table[:, :1]
    train = X[:128], {"grape": grape[:128], "alcohol": alcohol[:128]}
    val = X[128:], {"grape": grape[128:], "alcohol": alcohol[128:]}

    model = WineModel()
    losses = {
        "grape": nn.CrossEntropyLoss(),
        "alcohol": (nn.MSELoss(), 0.5),  # a loss and its weight; in standard deviations, squared
    }
    metrics = {"grape": {"accuracy": accuracy}, "alcohol": {"mae": nn.L1Loss()}}
    model.compile(losses, torch.optim.Adam(model.parameters(), lr=0.01), metrics)
    model.fit(epochs, train, dl_val=val)
    outputs = model.predict(X[-3:])  # in the structure that forward returns
    print({name: part.shape for name, part in outputs.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
