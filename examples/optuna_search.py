"""A search for width, dropout and learning rate with optuna; a callback ends the bad trials.

The data is scikit-learn's breast cancer.
"""

import argparse

import optuna
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

import minikeras


class Pruning(minikeras.Callback):
    """Report each epoch's validation loss to optuna; end a trial worse than the median so far."""

    def __init__(self, trial):
        self.trial = trial

    def on_epoch_end(self, epoch, logs):
        self.trial.report(logs["val_loss"], epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def load_data():
    X, y = load_breast_cancer(return_X_y=True)
    y = y[:, None].astype(float)
    X_train, X_val, y_train, y_val = train_test_split(X, y, stratify=y, random_state=0)
    scaler = StandardScaler().fit(X_train)
    return (scaler.transform(X_train), y_train), (scaler.transform(X_val), y_val)


def main(trials, epochs):
    train, val = load_data()

    def objective(trial):
        torch.manual_seed(trial.number)
        width = trial.suggest_int("width", 4, 64, log=True)
        dropout = trial.suggest_float("dropout", 0.0, 0.5)
        lr = trial.suggest_float("lr", 1e-4, 0.1, log=True)
        model = minikeras.Model(
            nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))
        )
        model.compile(nn.BCEWithLogitsLoss(), torch.optim.Adam(model.parameters(), lr=lr))
        dfhistory = model.fit(epochs, train, val, callbacks=[Pruning(trial)], verbose=0)
        return dfhistory["val_loss"].min()

    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    states = [trial.state.name for trial in study.trials]
    complete = states.count("COMPLETE")
    pruned = states.count("PRUNED")
    print(f"{complete} trials ran to their end, {pruned} were pruned")
    print(f"best val_loss {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
