"""An autoencoder: the labels are the features; each digit becomes 8 numbers instead of 64.

The same is done with as many numbers by PCA, for comparison.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn

import minikeras


class Autoencoder(minikeras.Model):
    def __init__(self, size):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, size))
        self.decoder = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def main(epochs, size):
    torch.manual_seed(0)
    X = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)] / 16
    X, X_val = X[:1400], X[1400:]
    model = Autoencoder(size)
    model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.002))
    model.fit(epochs, (X, X), dl_val=(X_val, X_val), batch_size=64)

    # any part of a model can predict by itself
    codes = minikeras.Model(model.encoder).predict(X_val)  # (rows, size)
    pca = PCA(size).fit(X)
    by_pca = torch.tensor(pca.inverse_transform(pca.transform(X_val)))
    error_of_pca = nn.MSELoss()(by_pca, X_val)
    error = model.evaluate((X_val, X_val))["val_loss"]
    print(
        f"{X_val.shape[1]} numbers as {codes.shape[1]}: mean squared error {error:.4f}, "
        f"by PCA {error_of_pca:.4f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--size", type=int, default=8, help="numbers that a digit becomes")
    main(**vars(parser.parse_args()))
