"""Image classification: a convolutional network with BatchNorm reads 8 x 8 digits."""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import minikeras


def block(inputs, outputs):
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def main(epochs):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    # (rows, channels, height, width), from 0 to 1
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    X, X_val, y, y_val = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )

    model = minikeras.Model(
        nn.Sequential(*block(1, 32), *block(32, 64), nn.Flatten(), nn.Linear(256, 10))
    )
    model.summary(input_shape=(1, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.compile(nn.CrossEntropyLoss(), optimizer, {"accuracy": minikeras.accuracy})
    schedule = minikeras.LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs))
    best = minikeras.EarlyStopping("val_accuracy", patience=5, restore_best_weights=True)
    model.fit(epochs, (X, y), dl_val=(X_val, y_val), batch_size=64, callbacks=[schedule, best])

    predicted = model.predict(X_val).argmax(1)  # of raw scores: (rows, 10)
    wrong = (predicted != torch.tensor(y_val)).nonzero().flatten().tolist()
    mistakes = ", ".join(f"{y_val[row]} for {predicted[row]}" for row in wrong)
    print(f"{len(wrong)} of {len(y_val)} validation rows wrong: {mistakes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    main(**vars(parser.parse_args()))
