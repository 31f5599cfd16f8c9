"""A generative adversarial network: two optimizers in one train_step; it draws digits.

The method is that of Goodfellow et al., 2014, "Generative Adversarial Nets".
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import minikeras

NOISE = 16  # numbers that the generator makes a digit from


class Gan(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1)
        )

    def forward(self, noise):  # what predict returns: digits
        return self.generator(noise)

    def train_step(self, features, labels, sample_weight=None):
        digits = self.generator(torch.randn(len(features), NOISE, device=features.device))

        real = self.discriminator(features)
        drawn = self.discriminator(digits.detach())
        loss_real = self.compute_loss(real, torch.ones_like(real))
        loss_drawn = self.compute_loss(drawn, torch.zeros_like(drawn))
        loss_d = loss_real + loss_drawn
        self.backward(loss_d, "d")
        self.optimizer_step("d")

        judged = self.discriminator(digits)
        loss_g = self.compute_loss(judged, torch.ones_like(judged))
        self.backward(loss_g, "g")  # fills only the generator's gradients
        self.optimizer_step("g")

        told_apart = (real > 0).float().mean() / 2 + (drawn < 0).float().mean() / 2
        return {"loss": loss_d, "loss_g": loss_g, "told_apart": told_apart}


def draw(digit):
    """Draw a digit of 64 values from 0 to 1 as text."""
    lines = []
    for row in digit.reshape(8, 8).tolist():
        lines.append("".join(" .:-=+*#"[int(7 * value)] * 2 for value in row))
    return "\n".join(lines)


def main(epochs):
    torch.manual_seed(0)
    X = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = Gan()
    optimizers = {
        "g": torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        "d": torch.optim.Adam(model.discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999)),
    }
    model.compile(F.binary_cross_entropy_with_logits, optimizers)
    model.fit(epochs, X, batch_size=64)
    print(*map(draw, model.predict(torch.randn(3, NOISE))), sep="\n" + "-" * 16 + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    main(**vars(parser.parse_args()))
