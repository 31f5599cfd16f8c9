"""The model and the data of each example, without its training."""

import runpy
import sys

import pytest

import minikeras
from helpers.paths import ROOT

# the model of ray_train is built in the processes of ray
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "ray_train.py"})


class Stopped(Exception):
    """Raised in place of the first fit of a script."""


def first_fit(path, monkeypatch, folder):
    """Run an example up to its first fit; return the model and what fit was given."""
    given = []

    def fit(model, epochs, dl_train, dl_val=None, **kwargs):
        options = {name: kwargs[name] for name in ("batch_size",) if name in kwargs}
        given.append((model, dl_train, dl_val, options))
        raise Stopped

    monkeypatch.setattr(sys, "argv", [path.name])
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patched:
        patched.setattr(minikeras.Model, "fit", fit)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Stopped:
            pass
        except ModuleNotFoundError as error:
            pytest.skip(f"needs {error.name}")
    return given[0]
