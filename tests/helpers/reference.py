"""A bare training loop to compare with, and its metric."""

import pandas as pd
import torch


def reference_fit(net, X, y, epochs, batch_size, drop_last, lr):
    """Train by a bare loop in float64; each mean is a sum over rows, divided at the end."""
    history = []
    for _ in range(epochs):
        rows = 0
        losses = 0.0
        right = 0.0
        for start in range(0, len(X), batch_size):
            features = X[start : start + batch_size]
            labels = y[start : start + batch_size]
            if drop_last and len(features) < batch_size:
                break
            outputs = net(features)
            loss = ((outputs - labels) ** 2).mean()
            grads = torch.autograd.grad(loss, list(net.parameters()))
            rows += len(features)
            losses += ((outputs - labels) ** 2).mean(1).sum().item()
            right += ((outputs > 0.5) == (labels > 0.5)).double().sum().item()
            with torch.no_grad():
                for parameter, grad in zip(net.parameters(), grads, strict=True):
                    parameter -= lr * grad
        outputs = net(X)
        history.append(
            {
                "loss": losses / rows,
                "accuracy": right / rows,
                "val_loss": ((outputs - y) ** 2).mean().item(),
                "val_accuracy": ((outputs > 0.5) == (y > 0.5)).double().mean().item(),
            }
        )
    return pd.DataFrame(history, index=pd.RangeIndex(epochs))


def accuracy64(y_pred, y_true):
    return ((y_pred > 0.5) == (y_true > 0.5)).double().mean()
