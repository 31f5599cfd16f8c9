"""Draw the figures of the pages and of the README into docs/img: python docs/figures.py."""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import minikeras

ROOT = Path(__file__).parent.parent
IMG = ROOT / "docs" / "img"
sys.path.insert(0, str(ROOT / "examples"))


def save(name, dpi=70):
    plt.gcf().savefig(IMG / name, dpi=dpi, bbox_inches="tight")
    plt.close("all")


def first():
    """Drawn by the code of the first page."""
    page = (ROOT / "docs" / "index.md").read_text()
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join(re.findall(r"```python\n(.*?)```\n", page, re.DOTALL)), {})
    save("first.png")


def ring():
    """Drawn by the example."""
    import ring_focal

    with contextlib.redirect_stdout(io.StringIO()):
        ring_focal.main(epochs=30, batch_size=100)
    plt.gcf().set_size_inches(12, 3.6)
    save("ring.png", dpi=60)


def focal():
    """Loss against the probability of the right answer."""
    p_t = torch.linspace(0.01, 1, 200)
    plt.figure(figsize=(6, 3.5))
    plt.plot(p_t, -p_t.log(), label="cross entropy", color="black")
    for gamma in (0.5, 1.0, 2.0, 5.0):
        loss = 2 * minikeras.FocalLoss(gamma, alpha=0.5, reduction="none")(p_t, torch.ones(200))
        plt.plot(p_t, loss, label=f"gamma = {gamma}")
    plt.gca().set(
        xlabel="p_t: probability given to the right answer",
        ylabel="loss, scaled to alpha = 1",
        ylim=(0, 4),
    )
    plt.legend()
    save("focal.png")


def penalties():
    """Twenty inputs, three of which matter: the weights under no penalty, L2 and L1."""
    _, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    for axis, title, strengths in zip(
        axes, ["no penalty", "L2, 1.0", "L1, 0.5"], [{}, {"l2": 1.0}, {"l1": 0.5}], strict=True
    ):
        axis.bar(range(20), weights(**strengths))
        axis.set(title=title, xlabel="input", xticks=[0, 5, 10, 15])
    axes[0].set(ylabel="weight")
    save("penalties.png")


def weights(**strengths):
    torch.manual_seed(0)
    X = torch.randn(60, 20)
    true = torch.zeros(20, 1)
    true[:3] = torch.tensor([[2.0], [-1.5], [1.0]])
    model = minikeras.Model(nn.Linear(20, 1))
    loss_func = minikeras.Regularized(nn.MSELoss(), model, **strengths)
    model.compile(loss_func, torch.optim.Adam(model.parameters(), lr=0.01), device="cpu")
    model.fit(600, [(X, X @ true + 1.5 * torch.randn(60, 1))], verbose=0)
    return model.net.weight.detach().squeeze().tolist()


def diagnosis():
    """Drawn by the code of the page on diagnose and lr_find."""
    page = (ROOT / "docs" / "diagnose.md").read_text()
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join(re.findall(r"```python\n(.*?)```\n", page, re.DOTALL)), names)
    names["figure"].set_size_inches(10, 7)
    names["figure"].savefig(IMG / "diagnosis.png", dpi=60)
    names["axis"].figure.savefig(IMG / "lr_find.png", dpi=70)
    plt.close("all")


if __name__ == "__main__":
    IMG.mkdir(exist_ok=True)
    os.chdir(tempfile.mkdtemp())
    for figure in (first, ring, focal, penalties, diagnosis):
        figure()
