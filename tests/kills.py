"""Kill fits with SIGKILL again and again, carry them on, compare: `python tests/kills.py --kills 100` prints the count.

for each round:
    a call of fit of a random kind, in a process of its own, never stopped: history, weights and what is drawn next
    the same call with checkpoint=, in processes that are killed: at a random time, or by themselves at an epoch's edge,
        or in the middle of writing the file, until the last one comes to its end
    the two results bit by bit

One process imports everything once and forks the others, so that a kill costs milliseconds and not an import.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from runs import LOADERS, Y, call_of, differences, noisy, result_of, seed

import minikeras

LEFT_OUT = ("stateful", "iterable, own generator")  # they warn; test_resume.py has them
WAYS = ["time", "time", "time", "epoch's edge", "before it is flushed", "between two renamings", "after it is written"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, kills, rounds, different = random.Random(args.seed), 0, 0, 0
    while kills < args.kills:
        choice = draw.randrange(10**9)
        with tempfile.TemporaryDirectory() as folder:
            killed, found = one_round(Path(folder), choice, draw)
        kills, rounds, different = kills + killed, rounds + 1, different + bool(found)
        print(f"round {rounds}, choice {choice}: {killed} kills, {', '.join(map(str, found)) or 'same'}", flush=True)
    print(f"{kills} kills over {rounds} runs, {different} differences")
    sys.exit(bool(different))


def one_round(folder, choice, draw):
    """The number of kills, and what differed."""
    begin = time.monotonic()
    assert wait(fork(folder, choice, "whole", checkpoint=False)) == 0, "the run that is never stopped has failed"
    seconds, kills, quiet = time.monotonic() - begin, 0, 0
    for number in range(12):
        way = draw.choice(WAYS) if number < 11 else "none"
        child = fork(folder, choice, "carried on", checkpoint=True, way=way, at=draw.randrange(1, 5))
        if way == "time":
            time.sleep(draw.random() * seconds)
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        kills += status == -signal.SIGKILL
        quiet += status == 0
        if status > 0:
            return kills, ["an error, see above"]
        if quiet:
            break
    return kills, differences(*(torch.load(folder / name, weights_only=False) for name in ("whole", "carried on")))


def fork(folder, choice, name, **kwargs):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run(folder, choice, name, **kwargs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child):
    """Its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder, choice, name, checkpoint, way="none", at=1):
    draw = random.Random(choice)
    seed(1)
    model, arguments = call_of(
        draw.choice([kind for kind in LOADERS if kind not in LEFT_OUT]),
        steps_per_epoch=draw.choice([None, None, 3, 7]),
        validation_freq=draw.choice([1, 1, 2]),
        dl_val=lambda: draw.choice([None, (Y.expand(-1, 2), Y), noisy(shuffle=True)]),
        epochs=4,
        callbacks=list,
    )
    every = draw.choice([None, 1, 2, 3])
    monitor = "loss" if arguments["dl_val"] is None else "val_loss"
    arguments["callbacks"] = draw.sample(
        [
            minikeras.EMA(0.9, evaluate=draw.random() < 0.5),
            minikeras.EarlyStopping(monitor, patience=1, restore_best_weights=True),
            minikeras.LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR(model.optimizer, 9), step="batch"),
            minikeras.CSVLogger(folder / f"{name}.csv"),
        ],
        draw.randrange(5),
    )
    if checkpoint:
        arguments |= {"checkpoint": folder / "run.pt", "checkpoint_every": every}
        arguments["callbacks"] += deadly(way, at)
    dfhistory = model.fit(**arguments)
    torch.save(result_of(model, dfhistory), folder / name)


def deadly(way, at):
    """What makes this process kill itself at its `at`-th moment of a kind."""

    def die():
        nonlocal at
        at -= 1
        if at == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if way == "epoch's edge":
        return [minikeras.LambdaCallback(on_epoch_end=lambda epoch, logs: die())]
    fsync, replace = os.fsync, os.replace

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
