"""Imbalanced classes: measure FocalLoss against binary cross entropy; 1 row in 20 is positive.

Malignant tumours are made rare in scikit-learn's breast cancer data. Precision and recall are those
at a probability of 0.5; average precision needs no threshold. Over 10 seeds, each with its own
rows, split and initial weights, average precision is 0.85 to 0.87 for all four losses, with spreads
of 0.06 to 0.07: on this data the focal loss moves the threshold and does no more.
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


def load_rare_positives(seed):
    X, benign = load_breast_cancer(return_X_y=True)
    few = np.random.default_rng(seed).choice(np.flatnonzero(benign == 0), 19, replace=False)
    rows = np.concatenate([np.flatnonzero(benign), few])  # 357 negatives and 19 positives
    X, y = X[rows], (benign[rows] == 0).astype("float32")
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=seed)
    mean, std = X.mean(0), X.std(0)
    return (X - mean) / std, y, (X_test - mean) / std, y_test


def measure(loss_func, epochs, seed):
    X, y, X_test, y_test = load_rare_positives(seed)
    torch.manual_seed(seed)
    model = minikeras.Model(
        nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    )
    model.compile(loss_func, torch.optim.Adam(model.parameters(), lr=0.01))
    model.fit(epochs, (X, y), verbose=0)
    score = model.predict(X_test).numpy()
    return {
        "average precision": average_precision_score(y_test, score),
        "precision": precision_score(y_test, score > 0, zero_division=0),
        "recall": recall_score(y_test, score > 0),
    }


def main(epochs, seeds):
    for name, loss_func in LOSSES.items():
        table = pd.DataFrame([measure(loss_func, epochs, seed) for seed in range(seeds)])
        cells = []
        for column, values in table.items():
            cells.append(f"{column} {values.mean():.2f} +/- {values.std():.2f}")
        print(f"{name:<27}", *cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=10)
    main(**vars(parser.parse_args()))
