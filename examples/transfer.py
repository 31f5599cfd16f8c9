"""Transfer: layers that learnt the digits 0 to 4 serve 5 to 9, of which few are labelled; frozen, then tuned."""

import argparse

import torch
from image_classification import accuracy
from sklearn.datasets import load_digits
from torch import nn

import minikeras


def network():  # without BatchNorm, whose running means would go on moving in frozen layers
    body = [
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    return minikeras.Model(nn.Sequential(nn.Sequential(*body), nn.Linear(256, 5)))


def fitted(model, epochs, data, groups):
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam(groups), {"accuracy": accuracy})
    model.fit(epochs, data, verbose=0)
    return model


def main(epochs, rows):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = (
        torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
        torch.tensor(labels),
    )
    old, new = labels < 5, labels >= 5
    few = images[new][:rows], labels[new][:rows] - 5
    test = images[new][rows:], labels[new][rows:] - 5

    model = network()
    fitted(model, epochs, (images[old], labels[old]), model.parameters())
    body, head = model.net[0], nn.Linear(256, 5)
    model.net[1] = head

    body.requires_grad_(False)
    fitted(model, epochs, few, head.parameters())
    print(f"the head alone, {rows} rows: {model.evaluate(test)['val_accuracy']:.3f}")

    body.requires_grad_(True)
    fitted(
        model,
        epochs,
        few,
        [{"params": body.parameters(), "lr": 1e-4}, {"params": head.parameters(), "lr": 1e-3}],
    )
    print(
        f"... then all layers, the body at a tenth of the rate: {model.evaluate(test)['val_accuracy']:.3f}"
    )

    anew = network()
    fitted(anew, 2 * epochs, few, anew.parameters())
    print(f"from nothing, the same rows and epochs: {anew.evaluate(test)['val_accuracy']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=50, help="labelled rows of the digits 5 to 9")
    main(**vars(parser.parse_args()))
