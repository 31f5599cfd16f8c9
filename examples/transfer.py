"""Transfer learning in three stages: layers trained on the digits 0 to 4 are used for 5 to 9.

Few of the new digits have labels. First the new head is trained, then the last block with it, then
all layers, the earlier ones with a lower learning rate.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import minikeras


def block(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


def create_model():
    body = nn.Sequential(block(1, 32), block(32, 64), nn.MaxPool2d(2), nn.Flatten())
    return minikeras.Model(nn.Sequential(body, nn.Linear(256, 5)))


def compile_with(model, groups):
    model.compile(
        nn.CrossEntropyLoss(), torch.optim.Adam(groups, lr=1e-3), {"accuracy": minikeras.accuracy}
    )


def report(stage, model, test):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = model.evaluate(test)
    print(f"{stage:34s} {trained:6d} parameters   val_accuracy {result['val_accuracy']:.3f}")


def main(epochs, rows):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    old, new = labels < 5, labels >= 5
    few = images[new][:rows], labels[new][:rows] - 5
    test = images[new][rows:], labels[new][rows:] - 5

    model = create_model()
    compile_with(model, model.parameters())
    model.fit(epochs, (images[old], labels[old]), verbose=0)

    body = model.net[0]
    head = nn.Linear(256, 5)
    model.net[1] = head
    # One optimizer for all stages: it does not move what is frozen.
    groups = [
        {"params": body[0].parameters(), "lr": 1e-4},
        {"params": body[1].parameters(), "lr": 3e-4},
        {"params": head.parameters(), "lr": 1e-3},
    ]
    compile_with(model, groups)

    minikeras.freeze(body)  # its BatchNorms keep the means of the old digits
    model.fit(epochs, few, verbose=0)
    report(f"1. the head, {rows} rows", model, test)

    minikeras.unfreeze(body[1])
    model.fit(epochs, few, verbose=0)
    report("2. the last block and the head", model, test)

    minikeras.unfreeze(body)
    model.fit(epochs, few, verbose=0)
    report("3. all layers", model, test)

    untrained = create_model()
    compile_with(untrained, untrained.parameters())
    untrained.fit(3 * epochs, few, verbose=0)
    report("without transfer, the same epochs", untrained, test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of each stage")
    parser.add_argument("--rows", type=int, default=25, help="labelled rows of the digits 5 to 9")
    main(**vars(parser.parse_args()))
