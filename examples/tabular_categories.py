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
            {name: nn.Embedding(size, 4) for name, size in sizes.items()}
        )
        inputs = numbers + 4 * len(sizes)
        self.net = nn.Sequential(
            nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)
        )

    def forward(self, numbers, **categories):
        # numbers: (rows, columns); each category: (rows,) of whole numbers
        embedded = [embedding(categories[name]) for name, embedding in self.embeddings.items()]
        return self.net(torch.cat([numbers, *embedded], dim=1))


def make_inputs(table, categories):
    numbers = table.drop(columns=[*categories, "target"])
    standard = (numbers - numbers.mean()) / numbers.std()
    codes = {name: table[name].cat.codes.to_numpy(dtype="int64") for name in categories}
    return {"numbers": standard.to_numpy(dtype="float32"), **codes}


def main(epochs):
    torch.manual_seed(0)
    table = load_diabetes(as_frame=True, scaled=False).frame.sample(frac=1, random_state=0)
    table["sex"] = table["sex"].astype("category")
    table["age"] = pd.cut(table["age"], [0, 30, 40, 50, 60, 120])
    # the limits of the World Health Organization
    table["bmi"] = pd.cut(table["bmi"], [0, 18.5, 25, 30, 35, 100])
    categories = ["sex", "age", "bmi"]
    sizes = {name: len(table[name].cat.categories) for name in categories}
    X = make_inputs(table, categories)
    # (rows, 1), divided by 100 so that they are near 1, as the network's first outputs are
    y = (table[["target"]] / 100).to_numpy(dtype="float32")
    train = {name: part[:342] for name, part in X.items()}, y[:342]
    val = {name: part[342:] for name, part in X.items()}, y[342:]

    model = TableModel(X["numbers"].shape[1], sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    model.compile(nn.MSELoss(), optimizer, {"mae": nn.L1Loss()})
    model.fit(epochs, train)
    error = model.evaluate(val)["val_mae"]
    error_of_mean = abs(y[342:] - y[:342].mean()).mean()
    print(f"mean absolute error {error:.3f}; of the mean as the answer {error_of_mean:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
