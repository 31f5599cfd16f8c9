"""An adversarial pair: two optimizers in one train_step; a generator draws digits (Goodfellow et al., 2014)."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import minikeras

NOISE = 16


class Gan(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1)
        )

    def forward(self, noise):  # what predict gives: digits
        return self.generator(noise)

    def train_step(self, features, labels, sample_weight=None):
        digits = self.generator(torch.randn(len(features), NOISE, device=features.device))
        real, drawn = self.discriminator(features), self.discriminator(digits.detach())
        loss_d = self.compute_loss(real, torch.ones_like(real)) + self.compute_loss(
            drawn, torch.zeros_like(drawn)
        )
        self.backward(loss_d, "d")
        self.optimizer_step("d")
        judged = self.discriminator(digits)
        loss_g = self.compute_loss(judged, torch.ones_like(judged))
        self.backward(loss_g, "g")  # fills the generator's gradients alone
        self.optimizer_step("g")
        taken = (real > 0).float().mean() / 2 + (drawn < 0).float().mean() / 2
        return {"loss": loss_d, "loss_g": loss_g, "told_apart": taken}


def shown(digit):  # 64 values, 0 to 1
    return "\n".join(
        "".join(" .:-=+*#"[int(7 * value)] * 2 for value in row)
        for row in digit.reshape(8, 8).tolist()
    )


def main(epochs):
    torch.manual_seed(0)
    X = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = Gan()
    rates = {"g": (model.generator, 1e-3), "d": (model.discriminator, 5e-4)}
    adams = {
        name: torch.optim.Adam(part.parameters(), lr, betas=(0.5, 0.999))
        for name, (part, lr) in rates.items()
    }
    model.compile(F.binary_cross_entropy_with_logits, adams)
    model.fit(epochs, X, batch_size=64)
    print(*map(shown, model.predict(torch.randn(3, NOISE))), sep="\n" + "-" * 16 + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    main(**vars(parser.parse_args()))
