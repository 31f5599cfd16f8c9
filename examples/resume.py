"""A run that can be stopped at any moment: press Ctrl-C, or kill it, then start it again.

Training resumes where it was stopped.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import minikeras


class Digits(Dataset):
    """scikit-learn's 8 x 8 digits, shifted by up to a pixel each time they are read."""

    def __init__(self, images, labels):
        self.images = torch.tensor(images, dtype=torch.float32) / 16
        self.labels = torch.tensor(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        across, down = torch.randint(-1, 2, (2,)).tolist()
        return self.images[row].roll((down, across), (0, 1)), self.labels[row]


def main(epochs, file, pause):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    dl_train = DataLoader(Digits(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
    dl_valid = DataLoader(Digits(images[1400:], labels[1400:]), batch_size=64)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
    )
    model = minikeras.Model(net)
    optimizer = torch.optim.Adam(model.parameters())
    model.compile(nn.CrossEntropyLoss(), optimizer, {"accuracy": minikeras.accuracy})
    # gives you time to press Ctrl-C
    slow = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: time.sleep(pause))
    dfhistory = model.fit(
        epochs, dl_train, dl_valid, checkpoint=file, checkpoint_every=5, callbacks=[slow]
    )
    print(f"{file} holds the whole run; the same numbers come out however often it was stopped:")
    print(dfhistory.tail(1).round(6).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--file", default="resume.pt")
    parser.add_argument(
        "--pause", type=float, default=0.05, help="seconds after each batch, default %(default)s"
    )
    main(**vars(parser.parse_args()))
