"""A table with numbers and categories: forward takes a dict of inputs by name.

Each category has an embedding. The table is scikit-learn's diabetes: how far the disease of 442
people has progressed after a year, from ten measurements.
"""

import argparse

import pandas as pd
import torch
from sklearn.datasets import load_diabetes
from torch import nn

import minikeras


class TableModel(minikeras.Model):
    def __init__(self, numbers, sizes):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(size, 4, padding_idx=0) for name, size in sizes.items()}
        )
        inputs = numbers + 4 * len(sizes)
        self.net = nn.Sequential(
            nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)
        )

    def forward(self, numbers, **categories):
        # numbers: (rows, columns); each category: (rows,) of whole numbers
        embedded = [embedding(categories[name]) for name, embedding in self.embeddings.items()]
        return self.net(torch.cat([numbers, *embedded], dim=1))


class Inputs:
    """Turn rows into inputs. Categories, mean and std are those of the training rows, for all."""

    def __init__(self, train, names):
        self.categories = {name: sorted(train[name].dropna().unique()) for name in names}
        numbers = train.drop(columns=names)
        self.mean, self.std = numbers.mean(), numbers.std()

    def __call__(self, table):
        numbers = (table[self.mean.index] - self.mean) / self.std
        codes = {}
        for name, categories in self.categories.items():
            # 0 is a category that the training rows do not have: padding_idx keeps it at zeros
            codes[name] = pd.Index(categories).get_indexer(table[name]) + 1
        return {"numbers": numbers, **codes}


def main(epochs):
    torch.manual_seed(0)
    table = load_diabetes(as_frame=True, scaled=False).frame.sample(frac=1, random_state=0)
    # the limits of the World Health Organization
    table["bmi"] = pd.cut(
        table["bmi"], [0, 18.5, 25, 30, 100], labels=["under", "normal", "over", "obese"]
    )
    table["sex"] = table["sex"].map({1: "a", 2: "b"})  # scikit-learn does not say which is which
    X = table.drop(columns="target")
    # (rows, 1), divided by 100 so that they are near 1, as the network's first outputs are
    y = (table[["target"]] / 100).astype("float32")
    make_inputs = Inputs(X[:342], ["sex", "bmi"])
    train = make_inputs(X[:342]), y[:342]
    val = make_inputs(X[342:]), y[342:]

    sizes = {name: len(known) + 1 for name, known in make_inputs.categories.items()}
    model = TableModel(len(make_inputs.mean), sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    model.compile(nn.MSELoss(), optimizer, {"mae": nn.L1Loss()})
    model.fit(epochs, train)
    error = model.evaluate(val)["val_mae"]
    error_of_mean = (y[342:] - y[:342].mean()).abs().mean().item()
    print(f"mean absolute error {error:.3f}; of the mean as the answer {error_of_mean:.3f}")

    new = X[:2].assign(sex=["b", "unknown"])  # no training row has the second one
    print("two new rows:", (model.predict(make_inputs(new)) * 100).squeeze(1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
