"""Runs a plain script on copies of the package from which rooms are deleted, and prints what came.

Called as a script with the folder of the package and a folder for the copies; prints JSON: for each
deletion the columns, numbers and outputs, and for each capability asked for the module that is
missing.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import numpy
import pandas  # noqa: F401 - loaded once for all copies
import torch
import torch._dynamo  # by the first optimizer, else in each child
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# what is deleted -> the line that asks for it; "" for what nobody asks for by name
ROOMS = {
    "by_name.py": "minikeras.Model().compile({'a': nn.MSELoss()})",
    "callbacks": "minikeras.EMA()",
    "checkpoint": "fit(checkpoint=PATH)",
    "checks": "",
    "data": "fit(validation_steps=1)",
    "diagnosis": "compiled().diagnose(X)",
    "distributed": "compiled(distributed='ddp')",
    "export.py": "compiled().export(PATH, X)",
    "faults": "",
    "freezing.py": "minikeras.freeze(compiled())",
    "integrations": "from minikeras.integrations.wandb import WandB",
    "jit": "compiled(jit=True)",
    "losses.py": "minikeras.FocalLoss()",
    "metrics.py": "minikeras.accuracy",
    "on_all_rows.py": "minikeras.OnAllRows(max)",
    "parts/accumulate.py": "compiled(accumulate=2)",
    "parts/bare_calls.py": "bare()",
    "parts/clip.py": "compiled(clip_grad_norm=1.0)",
    "parts/mixed_precision.py": "compiled(precision='bf16')",
    "report": "compiled().summary(input_data=X)",
    "transformed.py": "minikeras.Transformed(max)",
}
SHARED = "support"  # of several rooms: it goes when they all go
ALL = "all rooms"


def main():
    package, folder = map(Path, sys.argv[1:])
    found = {"": in_a_fork(package.parent, "")}
    for room, asked in ROOMS.items():
        found[room] = in_a_fork(copy_without(package, folder, [room]), asked)
    found[ALL] = in_a_fork(copy_without(package, folder, [*ROOMS, "parts", SHARED]), "")
    print(json.dumps(found))


def copy_without(package, folder, rooms):
    """Copy the package into a folder of its own, and delete rooms from the disk."""
    place = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(package, place / "minikeras")  # with what is compiled, which saves time
    for room in rooms:
        path = place / "minikeras" / room
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    return place


def in_a_fork(place, asked):
    """Run the script in a child, which has torch loaded and the package not."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(write, "w") as pipe:
            try:
                json.dump(run(place, asked), pipe)
            except BaseException:
                json.dump({"error": traceback.format_exc()}, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    return answer


def run(place, asked):
    # an editable install has a finder of its own, which would find what is deleted here
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if "editable" not in repr(finder).lower()
    ]
    sys.path.insert(0, str(place))
    import minikeras

    assert Path(minikeras.__file__).parent == place / "minikeras"
    answer = {"plain": plain(minikeras)}
    if asked:
        answer["missing"] = missing(minikeras, asked)
    return answer


def plain(minikeras):
    """Compile, fit twice, evaluate and predict; return columns and a digest of all numbers."""
    model = compiled_by(minikeras)()
    X, y = rows()
    numbers = [model.fit(2, (X, y), (X[:10], y[:10]), batch_size=8, verbose=0)]
    loader = DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)
    numbers.append(model.fit(2, loader, loader, verbose=0))
    numbers += [model.evaluate((X, y)), model.evaluate(loader)]
    outputs = [model.predict(X), model.predict(loader)]
    columns = [list(number) for number in numbers]
    digest = hashlib.sha256()
    for number in numbers[:2]:
        digest.update(number.to_numpy().tobytes())
    for number in numbers[2:]:
        digest.update(numpy.array(list(number.values())).tobytes())
    for output in outputs:
        digest.update(output.numpy().tobytes())
    return [columns, digest.hexdigest()]


def rows():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(50, 4, generator=generator)
    return X, (X.sum(1, keepdim=True) > 0).float()


def compiled_by(minikeras):
    def compiled(kind=minikeras.Model, **options):
        torch.manual_seed(0)
        model = kind(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metrics_dict = {"mae": nn.L1Loss()}
        model.compile(nn.BCEWithLogitsLoss(), optimizer, metrics_dict, device="cpu", **options)
        return model

    return compiled


def missing(minikeras, asked):
    """The module that is not there when a capability is asked for."""
    X, y = rows()
    compiled = compiled_by(minikeras)

    def fit(**options):
        compiled().fit(1, (X, y), (X, y), verbose=0, **options)

    def bare():
        class Bare(minikeras.Model):
            def train_step(self, features, labels, sample_weight=None):
                return super().train_step(features, labels)

        compiled(Bare, clip_grad_norm=1.0).fit(1, (X, y), verbose=0)

    names = {
        "minikeras": minikeras,
        "nn": nn,
        "compiled": compiled,
        "fit": fit,
        "bare": bare,
        "X": X,
        "PATH": tempfile.mkdtemp() + "/file.pt",
    }
    with contextlib.redirect_stdout(None):
        try:
            exec(asked, names)
        except ModuleNotFoundError as error:
            return error.name
    return "nothing"


if __name__ == "__main__":
    main()
