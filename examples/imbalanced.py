"""Imbalanced classes, measured: FocalLoss against binary cross entropy where one row in twenty is positive.

Malignant tumours are made rare in scikit-learn's breast cancer data. Precision and recall are those at a probability
of 0.5; average precision needs no threshold. With 10 seeds, each with rows, split and first weights of its own, it is
0.85 to 0.87 for all four losses, with spreads of 0.06 to 0.07: here focal loss moves the threshold, no more.
"""

import argparse

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import average_precision_score, precision_score, recall_score
from sklearn.model_selection import train_test_split
from torch import nn

import minikeras

LOSSES = {
    "binary cross entropy": nn.BCEWithLogitsLoss(),
    "focal, gamma 2, alpha 0.5": minikeras.FocalLoss(alpha=0.5, from_logits=True),
    "focal, gamma 2, alpha 0.75": minikeras.FocalLoss(from_logits=True),
    "alpha 0.75 without fading": minikeras.FocalLoss(gamma=0, from_logits=True),
}


def rare_positives(seed):
    X, benign = load_breast_cancer(return_X_y=True)
    few = np.random.default_rng(seed).choice(np.flatnonzero(benign == 0), 19, replace=False)
    rows = np.concatenate([np.flatnonzero(benign), few])  # 357 negatives and 19 positives
    X, y = X[rows], (benign[rows] == 0).astype("float32")
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=seed)
    mean, std = X.mean(0), X.std(0)
    return (X - mean) / std, y, (X_test - mean) / std, y_test


def measured(loss_func, epochs, seed):
    X, y, X_test, y_test = rare_positives(seed)
    torch.manual_seed(seed)
    model = minikeras.Model(
        nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    )
    model.compile(loss_func, torch.optim.Adam(model.parameters(), lr=0.01))
    model.fit(epochs, (X, y), verbose=0)
    score = model.predict(X_test).numpy()
    precision, recall = (
        precision_score(y_test, score > 0, zero_division=0),
        recall_score(y_test, score > 0),
    )
    return {
        "average precision": average_precision_score(y_test, score),
        "precision": precision,
        "recall": recall,
    }


def main(epochs, seeds):
    for name, loss_func in LOSSES.items():
        table = pd.DataFrame([measured(loss_func, epochs, seed) for seed in range(seeds)])
        print(
            f"{name:<27}",
            *(f"{column} {each.mean():.2f} +/- {each.std():.2f}" for column, each in table.items()),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=10)
    main(**vars(parser.parse_args()))
