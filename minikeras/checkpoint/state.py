"""The whole state of a run <-> one file, so that a fit can be killed at any instant and carried on bit by bit the same.

opened      is there a file, is it whole, is it of this call of fit, does it fit this model? nothing is changed yet
restored    weights, optimizers, totals, history, callbacks, random state; then the fit goes on where the file stands
written     at each epoch's end, every so many steps, and when the process is asked to end
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minikeras.atomic import discard, previous, refuse_folders, temporary, write
from minikeras.callbacks import Callback, check_writable
from minikeras.checkpoint.file import dump, read_newest, remedy
from minikeras.checkpoint.folder import apart, dump_rest, reader, save_parts
from minikeras.checkpoint.matching import (
    VERSION,
    check_run,
    settings,
    warn_of_other_callbacks,
    warn_of_other_settings,
)
from minikeras.checkpoint.plain import plain, restored
from minikeras.checkpoint.validate import untouched
from minikeras.checkpoint.weights import RUN, buffers_of, freeze, frozen, set_buffers, weights_of
from minikeras.data import Positioned, seeded, warn_of_hidden_draws
from minikeras.distributed import World, load_optimizer, load_whole
from minikeras.errors import CheckpointError, positive_int
from minikeras.faults import Interruptions
from minikeras.paths import fix, follow_links, user_path
from minikeras.randomness import Randomness

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


@dataclass
class Position:
    """Where a fit stands: in an epoch, after so many of its steps; `logs` are the training's once that is done."""

    epoch: int
    step: int = 0
    logs: dict[str, float] | None = None


class Checkpoint:
    """One fit's file. Without a path nothing is read or written.

    Args:
        path: the file; its folder is made.
        every: steps between two writings within an epoch, None for none.
    """

    def __init__(self, path: str | Path | None, every: int | None = None) -> None:
        if path is None and every is not None:
            raise ValueError(f'checkpoint_every={every} needs a file. Pass checkpoint="run.pt" as well.')
        self.path = None if path is None else path_of_run(path)
        self.place = None if self.path is None else fix(self.path)  # a callback may chdir
        self.every = None if every is None else positive_int("checkpoint_every", every)
        self.state: Any = None  # what is to be carried on from
        self.whole = True  # the newest file is; else it is not worth keeping as the one before
        self.written = ""  # the last writing, for people
        self.random: Any = None  # as it was before the validation under way
        self.saved_step = 0  # of the epoch under way
        self.interruptions = Interruptions(active=path is not None)

    # --- before a fit -------------------------------------------------------------------------------------------------

    def watched(self, train: Iterable[Any], val: Iterable[Any] | None, device: torch.device) -> Iterable[Any]:
        """The same training batches, knowing where they stand."""
        if self.path is None:
            return train
        pairs = [(getattr(one, "loader", one), name) for one, name in ((train, "dl_train"), (val, "dl_val"))]
        for loader, name in pairs:
            warn_of_hidden_draws(loader, name)
        self.loaders: list[Any] = [loader for loader, _ in pairs]
        self.randomness = Randomness(device, self.loaders)
        self.train = Positioned(train, "dl_train", self.randomness)
        return self.train

    def open(self, model: Model, run: Run, epochs: int) -> int:
        """The number of the last epoch of this call of fit, the file looked at.

        Raises:
            CheckpointError: the file is damaged, or of another run, model or optimizer.
            OSError: none can be written there.
        """
        self.model, self.run = model, run
        run.carried_on.clear()
        self.interruptions.alone = run.world is None
        before, run.under_way = run.under_way, None
        self.first, self.last = len(run.epochs) + 1, len(run.epochs) + epochs
        if self.path is None:
            return self.last
        plain(self.run.train.state_dict(), "metrics")  # what cannot be held is said before anything moves
        run.begun = run.begun or {"optimizers": settings(run.optimizers), "frozen": frozen(model)}
        place = follow_links(self.path)
        refuse_folders(previous(place))
        found = read_newest(self.path, reader(model))
        if found is not None:
            state, path = found
            if before is not None and before[0] == self.path:  # broken off, and called once more
                self.first, self.last = before[1], before[1] - 1 + epochs
            self.whole = path == place
            check_run(state, model, run, path)
            self.state = self._mine(state, path)
            self._compare_beginnings(state.get("begun"))
        if self.state is None and model.is_main_process and not self.path.is_dir():  # a folder was read
            check_writable(self.path, "fit(checkpoint=...)")
        run.under_way = self.path, self.first
        return self.last

    def check_length(self, batches: int | None) -> None:
        """Refuse a position beyond an epoch's end, where the number of its batches is known.

        Raises:
            CheckpointError: it is.
        """
        step = 0 if self.state is None else self.state["position"]["step"]
        if batches is not None and step > batches:
            raise CheckpointError(
                f"the checkpoint stands after batch {step} and dl_train ended after {batches}. Give the same data as "
                f"before."
            )

    def _compare_beginnings(self, begun: Any) -> None:
        """The script's with those of the run: what it has changed since is told, or is not to be taken back."""
        if begun is None:  # an older file has none
            return
        now, self.run.begun = self.run.begun, begun
        if self.state is None:
            return
        if self.model.is_main_process:
            warn_of_other_settings(begun["optimizers"], now["optimizers"], self.path)
        if begun["frozen"] != now["frozen"]:
            self.state["frozen"] = None

    def _mine(self, state: Any, path: Path) -> Any:
        """The state where this call of fit goes on with it, else None."""
        done, rows = len(self.run.epochs), len(state["history"])
        if state["first"] == self.first:  # the same call
            return state
        if done == rows:  # a call before this one, whose file this one takes over
            return None
        if state["first"] > self.last:  # a call after this one: this one was done long ago
            return state
        raise CheckpointError(
            f"{path} is of a fit of epochs {state['first']} to {state['last']}, and this one is of epochs "
            f"{self.first} to {self.last}. Give each fit a file of its own. {remedy(path)}"
        )

    # --- as it begins -------------------------------------------------------------------------------------------------

    @untouched
    def restore(self, callbacks: list[Callback], say: Callable[[str], None]) -> Position:
        """Take over the file's state, where there is one of this call; where the fit begins, said in a line."""
        self.callbacks, self.say = callbacks, say
        if self.path is not None:  # what cannot be held is said before anything moves
            plain({name: callback.state_dict() for name, callback in named(callbacks)}, "callbacks")
            others = {key: value for key, value in self.model.state_dict().items() if not isinstance(value, Tensor)}
            plain(others, "the state_dict")
        if self.state is None:
            return Position(self.first)
        state, self.state = self.state, None
        self._load_weights(state)
        at = Position(self.last + 1)
        if state["first"] > self.last:
            self.run.epochs = self.run.epochs[: self.last]
        else:
            self._load_course(state)
            at = at if stopped(state) else Position(**state["position"])
            self.model.stop_training = state["stopped"]
        if at.epoch > self.last:
            self.run.under_way = None
            say(f"{self.path}: finished after epoch {len(self.run.epochs)}, nothing is left to train")
        else:
            if self.model.is_main_process:
                warn_of_other_callbacks(state["callbacks"], dict(named(callbacks)))
            say(f"{self.path}: carried on in epoch {at.epoch} after step {at.step}")
        return at

    def _load_weights(self, state: Any) -> None:
        run = self.run
        load_whole(self.model, state["model"])
        set_buffers(self.model, state["buffers"], run.device)
        freeze(self.model, state.get("frozen"))
        if isinstance(run.loss_func, nn.Module):
            run.loss_func.load_state_dict(state["loss"])
        for name, optimizer in run.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name]["state"])
        run.epochs = [(dict(logs), dict(rates)) for logs, rates in state["history"]]

    def _load_course(self, state: Any) -> None:
        world, ranks = self.run.world, state.get("ranks", [])
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        same = size > 1 and len(ranks) == size
        state = state | (ranks[rank] if same else {})
        set_buffers(self.model, state["own buffers"] if same else {}, self.run.device)
        self.run.train.reset()
        if state["position"]["step"]:
            self.run.train.load_state_dict(restored(state["totals"]), counted=same or rank == 0)  # by it for all
        validated = any(name.startswith("val_") for logs, _ in self.run.epochs[self.first - 1 :] for name in logs)
        self.run.carried_on.update(["train_step"] + ["evaluate_step"] * validated)
        if self.run.precision is not None and state.get("precision"):  # older files have none
            self.run.precision.load_state_dict(restored(state["precision"]))
        for name, callback in named(self.callbacks):
            if name in state["callbacks"]:
                callback.load_state_dict(restored(state["callbacks"][name]))
        for loader in self.loaders:
            if getattr(loader, "persistent_workers", False) and len(self.run.epochs) >= self.first:
                # in the run before, the seed of its workers was drawn in an epoch that is over
                seeded(loader, self.run.world)
        if same or rank == 0:
            self.randomness.restore(state["random"])
        self.train.carry_on(state["train"])
        self.resumed = self.randomness.states()

    def enter(self, at: Position) -> None:
        """Before an epoch's first batch: where the epoch had begun already, its callbacks may have drawn again."""
        self.saved_step = at.step
        if at.step:
            self.randomness.restore(self.resumed)

    # --- as it goes on ------------------------------------------------------------------------------------------------

    def after_batch(self, at: Position, number: int) -> bool:
        """Write where that is due or the process is asked to end; whether the pass over the data is to end."""
        self.agree()
        if at.logs is None:
            at.step = number
            if self.model.stop_training:
                return True
            if self.every is not None and number - self.saved_step >= self.every:
                self.save(at)
        self.interruptions.act(lambda: self.left(at))
        return False

    def agree(self) -> None:
        """What one of several processes is asked to do, all do after the same batch."""
        if self.run.world is not None:
            received = self.interruptions.received or 0
            stops, signal = self.run.world.agree(self.model.stop_training, received)
            self.model.stop_training = bool(stops)
            self.interruptions.agreed = int(signal) or None

    def before_validation(self) -> None:
        """Validation is not carried on in its middle, but begun anew."""
        if self.path is not None:
            self.random = self.randomness.states()

    def epoch_ended(self, at: Position) -> None:
        """Write; `at` is where the next epoch begins. The fit's last state must be written, or it is an error."""
        self.random = None
        self.agree()
        self.save(at, last=at.epoch > self.last or self.model.stop_training)
        self.interruptions.act(lambda: self.left(at, saved=True))

    def left(self, at: Position, saved: bool = False) -> None:
        """A signal has come: write, and say how to go on."""
        if not saved:
            self.save(at)
        self.say(f"{self.path}: stopped in epoch {at.epoch} after step {at.step}; the same call goes on from there")

    def save(self, at: Position, last: bool = False) -> None:
        if self.path is None:
            return
        assert self.place is not None
        error = self._write(self.place, plain(self._state(at), "the state of the run"))
        if error is not None and last:
            why = "Make room or give another file: these last weights are not saved."
            raise CheckpointError(f"{self._unwritten(error)} {why}") from error
        if error is not None:
            why = "The fit goes on, and it is tried again at the next time."
            warnings.warn(f"{self._unwritten(error)} {why}", stacklevel=2)
        failed = error is not None
        if self.run.world is not None:  # all must know, since all try again
            failed = bool(self.run.world.agree(failed)[0])
        if not failed:
            self.run.under_way = None if last else self.run.under_way
            self.whole, self.written, self.saved_step = True, f"epoch {at.epoch}, step {at.step}", at.step

    def _write(self, path: Path, state: Any) -> OSError | None:
        """By rank 0, where there are several processes, and what is in parts by all; the error, if it failed."""
        state, parts = apart(state)
        folder = None
        try:
            if parts and self.run.world is not None:
                folder = Path(self.run.world.broadcast(str(temporary(follow_links(path)))))
                state["parts"] = save_parts(folder, parts, self.run.world)
            if self.model.is_main_process:
                write(path, dump_rest(state) if parts else dump(state), keep=self.whole, new=folder)
        except OSError as error:
            if folder is not None and self.model.is_main_process:
                with contextlib.suppress(OSError):
                    discard(folder)
            return error
        return None

    def _unwritten(self, error: OSError) -> str:
        before = f"The state of {self.written} is still there" if self.written else "Nothing was written before"
        return f"{self.path} could not be written: {str(error).rstrip('.')}. {before}."

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Adds to any error where the last state is."""
        try:
            yield
        except Exception as error:
            if self.written:
                error.add_note(f"The last state is in {self.path}: {self.written}. Call fit again to go on from there.")
            raise

    def _state(self, at: Position) -> dict[str, Any]:
        model, run, loss = self.model, self.run, self.run.loss_func
        weights, mine = weights_of(model), self._of_process()
        state = {
            RUN: VERSION,
            "first": self.first,
            "last": self.last,
            "stopped": model.stop_training,
            "position": asdict(at),
            "history": run.epochs,
            "begun": run.begun,
            "frozen": frozen(model),
            "model": weights,
            "buffers": {name: buffer for name, buffer in buffers_of(model).items() if name not in weights},
            "loss": weights_of(loss) if isinstance(loss, nn.Module) else {},
            "optimizers": {
                name: {"class": type(optimizer).__name__, "state": optimizer.state_dict()}
                for name, optimizer in run.optimizers.items()
            },
            "callbacks": {name: callback.state_dict() for name, callback in named(self.callbacks)},
            **mine,
        }
        return state if run.world is None else state | self._of_ranks(run.world, mine)

    def _of_process(self) -> dict[str, Any]:
        """What each process has of its own."""
        precision, totals = self.run.precision, self.run.train
        return {
            "precision": None if precision is None else precision.state_dict(),
            "totals": totals.state_dict(),
            "random": self.random or self.randomness.states(),
            "train": self.train.position(),
        }

    def _of_ranks(self, world: World, mine: dict[str, Any]) -> dict[str, Any]:
        """What each of several processes has of its own; and the totals of all of them together."""
        together, totals = dict(mine["totals"]), self.run.train
        if totals.sums:
            sums, counts = totals.summed()
            together |= {"sums": dict(zip(totals.sums, sums, strict=True)), "counts": counts}
        mine = mine | {"own buffers": buffers_of(self.model)}
        rest, _ = apart(plain(mine, "the state of a process"))  # parts are in the whole state under the same names
        return {"totals": together, "ranks": world.gather(rest)}


def path_of_run(path: Any) -> Path:
    """The user's path of a file for the state of a run.

    Raises:
        TypeError, ValueError: it is none.
    """
    checked = user_path(path, "checkpoint")
    if checked.suffix == ".safetensors":
        raise ValueError(
            f'checkpoint="{path}": a .safetensors file holds tensors alone, and not the state of a run. '
            f'Pass "{checked.with_suffix(".pt")}".'
        )
    return checked


def stopped(state: Any) -> bool:
    """Whether the fit was stopped before its last epoch, and that epoch is over."""
    return bool(state["stopped"] and not state["position"]["step"])


def named(callbacks: Iterable[Callback]) -> list[tuple[str, Callback]]:
    """Each callback under its class's name, numbered from the second of a class on."""
    seen: dict[str, int] = {}
    pairs = []
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] = seen.get(name, 0) + 1
        pairs.append((name if seen[name] == 1 else f"{name} {seen[name]}", callback))
    return pairs
