"""Transfer learning: layers trained on the digits 0 to 4 are used for 5 to 9; few have labels.

The layers are first frozen, then fine-tuned.
"""

import argparse

import torch
from image_classification import accuracy
from sklearn.datasets import load_digits
from torch import nn

import minikeras


def create_model():  # without BatchNorm, whose running means would keep changing in frozen layers
    body = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return minikeras.Model(nn.Sequential(body, nn.Linear(256, 5)))


def train(model, epochs, data, groups):
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam(groups), {"accuracy": accuracy})
    model.fit(epochs, data, verbose=0)


def main(epochs, rows):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    old, new = labels < 5, labels >= 5
    few = images[new][:rows], labels[new][:rows] - 5
    test = images[new][rows:], labels[new][rows:] - 5

    model = create_model()
    train(model, epochs, (images[old], labels[old]), model.parameters())
    body, head = model.net[0], nn.Linear(256, 5)
    model.net[1] = head

    body.requires_grad_(False)
    train(model, epochs, few, head.parameters())
    print(f"the head alone, {rows} rows: {model.evaluate(test)['val_accuracy']:.3f}")

    body.requires_grad_(True)
    groups = [
        {"params": body.parameters(), "lr": 1e-4},
        {"params": head.parameters(), "lr": 1e-3},
    ]
    train(model, epochs, few, groups)
    result = model.evaluate(test)
    print(f"then all layers, the body at a tenth of the rate: {result['val_accuracy']:.3f}")

    untrained = create_model()
    train(untrained, 2 * epochs, few, untrained.parameters())
    result = untrained.evaluate(test)
    print(f"from nothing, the same rows and epochs: {result['val_accuracy']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=50, help="labelled rows of the digits 5 to 9")
    main(**vars(parser.parse_args()))
