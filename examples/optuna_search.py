"""A search for width, dropout and rate with optuna on scikit-learn's breast cancer; a callback ends the bad trials."""

import argparse

import optuna
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

import minikeras


class Pruning(minikeras.Callback):
    """Tells optuna each epoch's validation loss, and ends the trial where that is worse than the median so far."""

    def __init__(self, trial):
        self.trial = trial

    def on_epoch_end(self, epoch, logs):
        self.trial.report(logs["val_loss"], epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def data():
    X, y = load_breast_cancer(return_X_y=True)
    X_train, X_val, y_train, y_val = train_test_split(X, y[:, None], stratify=y, random_state=0)
    scaler = StandardScaler().fit(X_train)
    return (scaler.transform(X_train), y_train.astype(float)), (
        scaler.transform(X_val),
        y_val.astype(float),
    )


def main(trials, epochs):
    train, val = data()

    def objective(trial):
        torch.manual_seed(trial.number)
        width, dropout = (
            trial.suggest_int("width", 4, 64, log=True),
            trial.suggest_float("dropout", 0.0, 0.5),
        )
        net = nn.Sequential(
            nn.Linear(30, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )
        model = minikeras.Model(net)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=trial.suggest_float("lr", 1e-4, 0.1, log=True)
        )
        model.compile(nn.BCEWithLogitsLoss(), optimizer)
        return model.fit(epochs, train, val, callbacks=[Pruning(trial)], verbose=0)[
            "val_loss"
        ].min()

    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    states = [trial.state.name for trial in study.trials]
    print(
        f"{states.count('COMPLETE')} trials ran to their end, {states.count('PRUNED')} were pruned"
    )
    print(f"best val_loss {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
