"""Kill fits with SIGKILL again and again, resume them, and compare.

`python tests/helpers/kills.py --kills 100` prints the count.

for each round:
    run a random call of fit in its own process, never stopped: history, weights, what is drawn next
    run the same call with checkpoint= in processes that are killed, until one reaches the end:
        at a random time, or by themselves at an epoch's end or in the middle of writing the file;
        sometimes two processes at once
    compare the two results bit for bit, and look for files next to the checkpoint

One process imports everything once and forks the others: a kill costs milliseconds, no import.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

import minikeras

sys.path.append(str(Path(__file__).parents[1]))  # when this file is run as a script
from helpers.runs import EPOCHS, LOADERS, Y, call_of, differences, noisy, result_of
from helpers.seeds import seed

LEFT_OUT = ("stateful",)  # it warns; test_resume.py has it
MODELS = ["net", "net", "centered", "pair", "growing"]
WAYS = [
    "time",
    "time",
    "time",
    "epoch's edge",
    "before it is flushed",
    "between two renamings",
    "after it is written",
]
PLACES = ["a file", "a file", "a link", "a relative path"]
FILES = re.compile(
    r"elsewhere|whole|carried on"
    r"|(whole\.csv|carried on\.csv|(run|target)\.pt(\.prev)?)(\.[0-9a-f]{16}\.tmp)?"
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    kills = 0
    rounds = 0
    different = 0
    while kills < args.kills:
        choice = draw.randrange(10**9)
        with tempfile.TemporaryDirectory() as folder:
            killed, found = one_round(Path(folder), choice, draw)
        kills += killed
        rounds += 1
        different += bool(found)
        print(
            f"round {rounds}, choice {choice}: {killed} kills, "
            f"{', '.join(map(str, found)) or 'same'}",
            flush=True,
        )
    print(f"{kills} kills over {rounds} runs, {different} differences")
    sys.exit(bool(different))


def one_round(folder, choice, draw):
    """Run one round; return the number of kills, and what differed."""
    begin = time.monotonic()
    assert wait(fork(folder, choice, "whole", checkpoint=False)) == 0, (
        "the run that is never stopped has failed"
    )
    seconds = time.monotonic() - begin
    kills = 0
    ended = False
    for number in range(12):
        way = draw.choice(WAYS) if number < 11 else "none"
        children = [
            fork(folder, choice, "carried on", checkpoint=True, way=way, at=draw.randrange(1, 5))
        ]
        if draw.random() < 0.1:
            # another start of the script
            children.append(fork(folder, choice, "carried on too", checkpoint=True))
        if way == "time":
            time.sleep(draw.random() * seconds)
            for child in children:
                os.kill(child, signal.SIGKILL)
        for child in children:
            status = wait(child)
            kills += status == -signal.SIGKILL
            if status > 0:
                return kills, ["an error, see above"]
        ended = (folder / "carried on").exists()
        if ended:
            break
    whole = torch.load(folder / "whole", weights_only=False)
    found = []
    for name in ("carried on", "carried on too"):
        if (folder / name).exists():
            found += differences(whole, torch.load(folder / name, weights_only=False))
    return kills, found + strange_files(folder)


def strange_files(folder):
    """List files that a run with a checkpoint should not have written."""
    found = [
        f"a file {path.name}"
        for path in folder.iterdir()
        if not FILES.fullmatch(path.name.replace(" too", ""))
    ]
    link = folder / "run.pt"
    if (folder / "target.pt").exists() and not link.is_symlink():
        found.append("a link that is none any longer")
    if (folder / "elsewhere").exists() and any((folder / "elsewhere").iterdir()):
        found.append("files in another folder")
    return found


def fork(folder, choice, name, **kwargs):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("error")  # each kind here is exact, and nothing is told of it
        warnings.filterwarnings("ignore", r"EMA\(decay=")  # the fits are short
        run(folder, choice, name, **kwargs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child):
    """Wait for a process; return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder, choice, name, checkpoint, way="none", at=1):
    draw = random.Random(choice)
    seed(1)
    kind = draw.choice(MODELS)
    model, arguments = call_of(
        draw.choice([loader for loader in LOADERS if loader not in LEFT_OUT]),
        model=kind,
        compile={"accumulate": draw.choice([1, 1, 3])},
        steps_per_epoch=draw.choice([None, None, 3, 7]),
        validation_freq=draw.choice([1, 1, 2]),
        dl_val=lambda: draw.choice([None, (Y.expand(-1, 2), Y), noisy(shuffle=True)]),
        epochs=EPOCHS + 1,
        callbacks=list,
    )
    every = draw.choice([None, 1, 2, 3])
    place = draw.choice(PLACES)
    arguments["callbacks"] = callbacks_of(draw, kind, model, arguments, folder / f"{name}.csv")
    if place == "a relative path":
        os.chdir(folder)
        arguments["callbacks"].append(goes_elsewhere(folder / "elsewhere"))
    if checkpoint:
        arguments |= {"checkpoint": path_of(place, folder), "checkpoint_every": every}
        arguments["callbacks"] += deadly(way, at)
    dfhistory = model.fit(**arguments)
    unfinished = folder / f"{name}.unfinished"
    torch.save(result_of(model, dfhistory), unfinished)
    os.replace(unfinished, folder / name)


def callbacks_of(draw, kind, model, arguments, table):
    """Choose some callbacks that suit the model."""
    monitor = "loss" if arguments["dl_val"] is None else "val_loss"
    callbacks = [
        minikeras.EMA(0.9, evaluate=draw.random() < 0.5),
        minikeras.EarlyStopping(monitor, patience=1, restore_best_weights=True),
        minikeras.CSVLogger(table),
    ]
    if kind not in ("pair", "growing"):  # torch's schedulers take no group that comes later
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(model.optimizer, 9)
        callbacks.append(minikeras.LRScheduler(scheduler, step="batch"))
    chosen = draw.sample(callbacks, draw.randrange(len(callbacks) + 1))
    if kind == "growing":
        chosen.append(Thaws())
    return chosen


class Thaws(minikeras.Callback):
    """Unfreeze the first layer in the second epoch, and give it to the optimizer."""

    def on_epoch_begin(self, epoch):
        if epoch == 2:
            layer = self.model.layers[0].requires_grad_(True)
            self.model.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.02})


def goes_elsewhere(folder):
    """Return a callback that changes the working directory as the first epoch begins."""

    def change(epoch):
        folder.mkdir(exist_ok=True)
        os.chdir(folder)

    return minikeras.LambdaCallback(on_epoch_begin=change)


def path_of(place, folder):
    if place == "a relative path":
        return "run.pt"
    path = folder / "run.pt"
    if place == "a link" and not path.is_symlink():
        path.symlink_to(folder / "target.pt")
    return path


def deadly(way, at):
    """Make this process kill itself at its `at`-th moment of a kind."""

    def die():
        nonlocal at
        at -= 1
        if at == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if way == "epoch's edge":
        return [minikeras.LambdaCallback(on_epoch_end=lambda epoch, logs: die())]
    fsync = os.fsync
    replace = os.replace

    def dying_fsync(descriptor):
        die()
        fsync(descriptor)

    def dying_replace(source, target):
        if way == "after it is written":
            replace(source, target)
            die()
        else:
            die()
            replace(source, target)

    if way == "before it is flushed":
        os.fsync = dying_fsync
    elif way in ("between two renamings", "after it is written"):
        os.replace = dying_replace
    return []


if __name__ == "__main__":
    main()
