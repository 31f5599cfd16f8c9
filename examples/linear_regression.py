"""Linear regression: fit finds the w and b that the data was made with."""

import argparse

import torch
from torch import nn

import minikeras


def main(epochs):
    torch.manual_seed(0)
    w, b = torch.tensor([[2.0], [-3.0]]), 10.0
    X = 10 * torch.rand(400, 2) - 5
    Y = X @ w + b + 0.5 * torch.randn(400, 1)

    model = minikeras.Model(nn.Linear(2, 1))
    model.summary(input_shape=(2,))
    model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.1), {"mae": nn.L1Loss()})
    model.fit(epochs, (X[:300], Y[:300]), dl_val=(X[300:], Y[300:]), batch_size=20)

    (w1, w2), found_b = model.net.weight[0].tolist(), model.net.bias.item()
    print("true  w = [ 2.00, -3.00]  b = 10.00")
    print(f"found w = [{w1:5.2f}, {w2:5.2f}]  b = {found_b:5.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    main(parser.parse_args().epochs)
