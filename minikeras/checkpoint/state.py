"""The whole state of a run <-> one file, so that a fit can be killed at any instant and carried on bit by bit the same.

opened      is there a file, is it whole, is it of this call of fit, does it fit this model? nothing is changed yet
restored    weights, optimizers, totals, history, callbacks, random state; then the fit goes on where the file stands
written     at each epoch's end, every so many steps, and when the process is asked to end
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.callback import Callback
from minikeras.checkpoint.file import dump, read_newest, remedy_of_fit
from minikeras.checkpoint.fits import data_of, use
from minikeras.checkpoint.folder import apart, dump_rest, reader, save_parts
from minikeras.checkpoint.matching import (
    VERSION,
    beginning,
    check_run,
    group_names,
    other_schedules,
    parameters_by_name,
    warn_of_another_script,
    warn_of_other_callbacks,
    warn_of_other_data,
    warn_of_other_generators,
    warn_of_other_monitors,
    warn_of_other_schedules,
    warn_of_other_settings,
)
from minikeras.checkpoint.plain import plain, restored
from minikeras.checkpoint.position import Positioned, warn_of_hidden_draws
from minikeras.checkpoint.signals import Interruptions
from minikeras.checkpoint.validate import untouched
from minikeras.checkpoint.weights import (
    RUN,
    buffers_of,
    fill_late_buffers,
    freeze,
    frozen,
    late_buffers,
    set_buffers,
    weights_of,
)
from minikeras.errors import CheckpointError, positive_int
from minikeras.hooks import Fit, Hook, Position
from minikeras.processes import OneProcess
from minikeras.stepper import Stepper
from minikeras.support.atomic import (
    check_writable,
    discard,
    previous,
    refuse_folders,
    temporary,
    write,
)
from minikeras.support.paths import fix, follow_links, user_path
from minikeras.support.randomness import Randomness
from minikeras.support.reachable import PlainAttributes
from minikeras.support.sharded_tensors import load_optimizer, load_whole

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


class Checkpoint(Hook):
    """One fit's file.

    Args:
        path: the file; its folder is made.
        every: steps between two writings within an epoch, None for none.
    """

    def __init__(self, path: str | Path, every: int | None = None) -> None:
        self.path = path_of_run(path)
        self.place = fix(self.path)  # a callback may chdir
        self.every = None if every is None else positive_int("checkpoint_every", every)
        self.state: Any = None  # what is to be carried on from
        self.whole = True  # the newest file is; else it is not worth keeping as the one before
        self.written = ""  # the last writing, for people
        self.random: Any = None  # as it was before the validation under way
        self.saved_step = 0  # of the epoch under way
        self.again: Any = None  # the state of an epoch that is resumed in its middle, until its on_epoch_begin is over
        self.interruptions = Interruptions()

    # --- before a fit -------------------------------------------------------------------------------------------------

    def watched(
        self,
        train: Iterable[Any],
        val: Iterable[Any] | None,
        model: Model,
        run: Run,
        callbacks: list[Callback],
    ) -> Iterable[Any]:
        """The same training batches, knowing where they stand."""
        pairs = [
            (getattr(batches, "loader", batches), name)
            for batches, name in ((train, "dl_train"), (val, "dl_val"))
        ]
        for loader, name in pairs:
            if model.is_main_process:
                warn_of_hidden_draws(loader, name)
        self.loaders: list[Any] = [loader for loader, _ in pairs]
        self.given = callbacks
        data = {name: loader for loader, name in pairs if loader is not None}
        others = {"model": model, "loss_func": run.loss_func, **dict(named(callbacks))}
        self.randomness = Randomness(
            run.device, self.loaders, data | others, data, (run,), (model, *callbacks)
        )
        self.attributes = PlainAttributes(holders_in(model, run.loss_func))
        self.data = data_of(self.loaders[0])
        self.train = Positioned(train, "dl_train", self.randomness)
        return self.train

    def open(self, model: Model, run: Run, epochs: int) -> int:
        """The number of the last epoch of this call of fit, the file looked at.

        Raises:
            CheckpointError: the file is damaged, or of another run, model or optimizer; or another fit of this process
                has used it.
            OSError: none can be written there.
        """
        self.model, self.run = model, run
        self.interruptions.alone = run.world.size == 1
        # of a fit that did not come to its end: its checkpoint's path, and its first epoch
        before, run.kept["unfinished"] = run.kept.get("unfinished"), None
        self.first, self.last = len(run.epochs) + 1, len(run.epochs) + epochs
        # what cannot be held is said before anything moves
        plain(self.run.train.totals.state_dict(), "metrics")
        place = follow_links(self.path)
        refuse_folders(previous(place))
        found = read_newest(self.path, reader(model))
        is_again = before is not None and before[0] == self.path
        if (
            found is not None and before is not None and is_again
        ):  # broken off, and called once more
            self.first, self.last = before[1], before[1] - 1 + epochs
        # optimizers' settings and what is frozen, as the first fit with a checkpoint began
        run.kept["begun"] = run.kept.get("begun") or beginning(model, run)
        if found is not None:
            check_run(found[0], model, run, found[1])
        self.use = use(
            self.path, model, run, self.loaders, self.given, self.last, found is not None
        )
        if found is not None:
            state, path = found
            self.whole = path == place
            self.state = self._mine(state, path)
            self._compare_beginnings(state.get("begun"))
        run.world.by_main(self._check_writable)
        run.kept["unfinished"] = self.path, self.first
        return self.last

    def _check_writable(self) -> None:
        if self.state is None and not self.path.is_dir():  # a folder was read
            check_writable(self.path, "fit(checkpoint=...)")

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
        """What the script froze when the run began, and has thawed since, is not to be frozen by the file."""
        self.now = self.run.kept["begun"]
        if begun is None:  # an older file has none
            return
        self.run.kept["begun"] = begun
        if self.state is None:
            return
        for key in ("frozen", "loss frozen", "in_eval"):
            if begun.get(key, self.now[key]) != self.now[key]:
                self.state[key] = None

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
            f"{self.first} to {self.last}. Give each fit a file of its own. {remedy_of_fit(path)}"
        )

    # --- as it begins -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Hold signals back during a fit, until the state is written."""
        with self.interruptions:
            yield

    def resume(self, fit: Fit) -> None:
        """Take over the file's state, and set where the fit begins."""
        fit.at = self.restore(fit.callbacks, fit.say)

    @untouched
    def restore(self, callbacks: list[Callback], say: Callable[[str], None]) -> Position:
        """Take over the file's state if it is of this call; return where the fit begins, said in a line.

        All that can be refused is refused before the first weight is changed.

        Raises:
            CheckpointError: data, callbacks or metrics cannot take over what the file has of them.
        """
        self.callbacks, self.say = callbacks, say
        self._note_groups()
        # what cannot be held is said before anything moves
        plain({name: callback.state_dict() for name, callback in named(callbacks)}, "callbacks")
        others = {}
        for key, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):
                others[key] = value
        plain(others, "the state_dict")
        if self.state is None:
            return Position(self.first)
        state, self.state = self.state, None
        later = state["first"] > self.last
        at = Position(self.last + 1)
        if not later:
            self._check_course(state)
            at = at if stopped(state) else Position(**state["position"])
        finished = at.epoch > self.last
        if self.model.is_main_process:
            self._warn(state, finished, later)
        self._load_weights(with_copy(state, "optimizers"), whole=not at.step)
        if later:
            self.run.epochs = self.run.epochs[: self.last]
        else:
            self._begin_course(state)
            self._load_course(with_copy(state, "callbacks"))
            self.model.stop_training = state["stopped"]
        if finished:
            self.run.kept["unfinished"] = None
            self.use.came_to = "its end"
            say(
                f"{self.path}: finished after epoch {len(self.run.epochs)}, nothing is left to train"
            )
        else:
            say(f"{self.path}: carried on in epoch {at.epoch} after step {at.step}")
            if at.step:
                self.again = state
        return at

    def _check_course(self, state: Any) -> None:
        """Refuse what cannot be taken over; callbacks and metrics try it, and are put back if one cannot."""
        self.randomness.check(state["random"])
        if state["train"] is not None and state["position"]["epoch"] <= self.last:
            self.train.check(restored(state["train"]))
        tried: list[tuple[Callback, Any]] = []
        try:
            for name, callback in named(self.callbacks):
                if name in state["callbacks"]:
                    tried.append((callback, copy.deepcopy(callback.state_dict())))
                    self._try(
                        f"callback {name}", callback.load_state_dict, state["callbacks"][name]
                    )
            if state["position"]["step"] and self.run.train.totals.objects:
                self._try("metrics", self.run.train.totals.load_state_dict, state["totals"])
        except CheckpointError:
            for callback, before in reversed(tried):
                with contextlib.suppress(Exception):
                    callback.load_state_dict(before)
            raise
        finally:
            self.run.train.totals.reset()

    def _try(self, what: str, take: Callable[[Any], Any], state: Any) -> None:
        try:
            take(restored(copy.deepcopy(state)))
        except Exception as error:
            raise CheckpointError(
                f"{self.path} has a state that the {what} cannot take: {type(error).__name__}: {error}. The model is "
                f"as it was. Give what was given when the file was written. "
                f"{remedy_of_fit(self.path)}"
            ) from error

    def _warn(self, state: Any, finished: bool, later: bool) -> None:
        """Say what the script has changed since the run began, and which is taken."""
        callbacks, states = dict(named(self.callbacks)), state["callbacks"]
        if later:  # the file's callbacks and data are those of another call
            callbacks, states = {}, {}
        schedules = other_schedules(states, callbacks)
        if state.get("begun") is not None:
            begun, now = state["begun"], self.now
            warn_of_other_settings(
                begun["optimizers"], now["optimizers"], self.path, bool(schedules)
            )
            warn_of_another_script(begun, now, self.path)
        if later:
            return
        warn_of_other_schedules(schedules, self.path)
        warn_of_other_monitors(states, callbacks, self.path)
        if not finished:
            warn_of_other_callbacks(states, callbacks)
        warn_of_other_generators(self.randomness.others(state["random"]), self.path)
        warn_of_other_data(state, self.data, finished, self.path)

    def _load_weights(self, state: Any, whole: bool = True) -> None:
        """Weights, optimizers and history; unless `whole`, optimizers have the groups that the epoch began with."""
        run, loss = self.run, self.run.loss_func
        fill_late_buffers(self.model, late_buffers(self.model, state["model"]), run.device)
        load_whole(self.model, state["model"])
        set_buffers(self.model, state["buffers"], run.device)
        freeze(self.model, state.get("frozen"))
        if state.get("in_eval") is not None:
            run.modes.restore(state["in_eval"])
        if isinstance(loss, nn.Module):
            fill_late_buffers(loss, late_buffers(loss, state["loss"]), run.device)
            loss.load_state_dict(state["loss"])
            set_buffers(loss, state.get("loss buffers", {}), run.device)
            freeze(loss, state.get("loss frozen"))
        parameters = parameters_by_name(self.model, loss)
        for name, optimizer in run.optimizers.items():
            written = state["optimizers"][name]
            groups = len(written["state"]["param_groups"])
            if not whole:
                groups = min(groups, state.get("groups", {}).get(name, groups))
            regroup(optimizer, written, groups, parameters)
            load_optimizer(optimizer, of_groups(written["state"], groups))
        run.epochs = [(dict(logs), dict(rates)) for logs, rates in state["history"]]

    def _begin_course(self, state: Any) -> None:
        """What is taken over once: where the data stand, and which steps have been seen."""
        validated = any(
            name.startswith("val_")
            for logs, _ in self.run.epochs[self.first - 1 :]
            for name in logs
        )
        self.run.engine.expect_steps(
            ["train_step", "evaluate_step"] if validated else ["train_step"]
        )
        position = restored(self._of_rank(state)["train"])
        past_first_epoch = len(self.run.epochs) >= self.first
        begun = 2 if position is None else position.get("iterations", 2)  # older files do not tell
        self.train.iterations = begun if past_first_epoch or position is not None else 0
        for number, loader in enumerate(self.loaders):
            in_first = (
                number == 0 and begun < 2
            )  # steps_per_epoch: the first iteration may be under way still
            if getattr(loader, "persistent_workers", False) and past_first_epoch and not in_first:
                # in the run before, the seed of its workers was drawn in an iteration that is over
                self.run.world.draw_first_seed(loader)
        self.train.resume_at(position)

    def _of_rank(self, state: Any) -> Any:
        """The state with what this process had of its own, where there are as many processes as then."""
        world, ranks = self.run.world, state.get("ranks", [])
        if world.size > 1 and len(ranks) == world.size:
            return state | ranks[world.rank]
        return state

    def _load_course(self, state: Any) -> None:
        world, ranks = self.run.world, state.get("ranks", [])
        rank = world.rank
        same = world.size > 1 and len(ranks) == world.size
        state = self._of_rank(state)
        set_buffers(self.model, state["own buffers"] if same else {}, self.run.device)
        if isinstance(self.run.loss_func, nn.Module):
            set_buffers(
                self.run.loss_func,
                state.get("own loss buffers", {}) if same else {},
                self.run.device,
            )
        self.run.train.totals.reset()
        if state["position"]["step"]:
            self.run.train.totals.load_state_dict(
                restored(state["totals"]), counted=same or rank == 0
            )  # by it for all
        stepper = self.run.stepper
        if stepper.compiled_parts and state.get("precision"):  # older files have none
            stepper.load_state_dict(restored(state["precision"]))
        stepper.load_steps(steps_in(state))
        for name, callback in named(self.callbacks):
            if name in state["callbacks"]:
                callback.load_state_dict(restored(state["callbacks"][name]))
        self.attributes.restore(restored(state.get("attributes", {})))
        if same or rank == 0:
            self.randomness.restore(restored(state["random"]))

    def before_epoch(self, fit: Fit) -> None:
        """Note the optimizers' groups: on_epoch_begin may add some."""
        self._note_groups()

    def _note_groups(self) -> None:
        self.groups = {
            name: len(optimizer.param_groups) for name, optimizer in self.run.optimizers.items()
        }

    def on_epoch_begin(self, fit: Fit) -> None:
        """After on_epoch_begin of an epoch: one that is resumed in its middle has had it already.

        What it did to the model, the optimizers, the random states and callbacks with a state_dict is undone: the state
        of the file is put back. What it set up in callbacks without one stays.
        """
        self.saved_step = fit.at.step
        state, self.again = self.again, None
        if state is not None:
            epochs = self.run.epochs
            self._load_weights(state)
            self.run.epochs = epochs
            self._load_course(state)
            self.groups = state.get("groups", self.groups)

    # --- as it goes on ------------------------------------------------------------------------------------------------

    def on_batch_end(self, fit: Fit, number: int) -> None:
        """Write if it is due, or if the process is asked to end."""
        at = fit.at
        if at.logs is None and not self.model.stop_training and self.every is not None:
            if number - self.saved_step >= self.every:
                self.save(at)
        if not (at.logs is None and self.model.stop_training):
            self.interruptions.act(lambda: self.left(at))

    def on_validation_begin(self, fit: Fit) -> None:
        """Note the random state: validation is not resumed in its middle, but begun again."""
        self.random = self.randomness.states()

    def on_epoch_end(self, fit: Fit) -> None:
        """Write the state. The fit's last state must be written, or it is an error."""
        at = fit.at
        self.random = None
        self.save(at, last=at.epoch > self.last or self.model.stop_training)
        self.interruptions.act(lambda: self.left(at, saved=True))

    def left(self, at: Position, saved: bool = False) -> None:
        """A signal has come: write, and say how to go on."""
        if not saved:
            self.save(at)
        self.say(
            f"{self.path}: stopped in epoch {at.epoch} after step {at.step}; the same call goes on from there"
        )

    def save(self, at: Position, last: bool = False) -> None:
        if not self.run.allows_writing(self.path, with_state=True):
            return
        error = self._write(self.place, plain(self._state(at), "the state of the run"))
        failed = error is not None
        failed = bool(self.run.world.agree(failed)[0])  # all must know, since all try again
        if failed and last:
            problem: Any = (
                "another process has failed, and its message says more" if error is None else error
            )
            why = "Make room or give another file: these last weights are not saved."
            raise CheckpointError(f"{self._unwritten(problem)} {why}") from error
        if error is not None:
            why = "The fit goes on, and it is tried again at the next time."
            warnings.warn(f"{self._unwritten(error)} {why}", stacklevel=2)
        if last:
            self.use.came_to = "its end"
        if not failed:
            if last:
                self.run.kept["unfinished"] = None
            self.whole = True
            self.written = f"epoch {at.epoch}, step {at.step}"
            self.saved_step = at.step

    def _write(self, path: Path, state: Any) -> OSError | None:
        """By rank 0, where there are several processes, and what is in parts by all; the error, if it failed."""
        state, parts = apart(state)
        folder = None
        try:
            if parts:
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

    def _unwritten(self, error: Any) -> str:
        before = (
            f"The state of {self.written} is still there"
            if self.written
            else "Nothing was written before"
        )
        return f"{self.path} could not be written: {str(error).rstrip('.')}. {before}."

    @contextlib.contextmanager
    def around_epoch(self, fit: Fit) -> Iterator[None]:
        """Add to any error where the last state is."""
        try:
            yield
        except Exception as error:
            self.use.came_to = "an error"
            if self.written:
                error.add_note(
                    f"The last state is in {self.path}: {self.written}. Call fit again to go on from there."
                )
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
            "begun": run.kept["begun"],
            "data": self.data,
            "groups": self.groups,
            "attributes": self.attributes.states(),
            "frozen": frozen(model),
            "in_eval": run.modes.look(),
            "model": weights,
            "buffers": {
                name: buffer for name, buffer in buffers_of(model).items() if name not in weights
            },
            "loss": {},
            "optimizers": {
                name: {
                    "class": type(optimizer).__name__,
                    "state": optimizer.state_dict(),
                    "names": group_names(optimizer, model, loss),
                }
                for name, optimizer in run.optimizers.items()
            },
            "callbacks": {name: callback.state_dict() for name, callback in named(self.callbacks)},
            **mine,
        }
        if isinstance(loss, nn.Module):
            of_loss = weights_of(loss)
            hidden = {
                name: buffer for name, buffer in buffers_of(loss).items() if name not in of_loss
            }
            state |= {"loss": of_loss, "loss buffers": hidden, "loss frozen": frozen(loss)}
        if run.world.size > 1:
            state |= self._of_ranks(run.world, mine)
        return state

    def _of_process(self) -> dict[str, Any]:
        """What each process has of its own."""
        stepper = self.run.stepper
        return {
            "precision": layout_of(stepper),
            "optimizer_steps": stepper.named_steps(),
            "totals": self.run.train.totals.state_dict(),
            "random": self.random or self.randomness.states(),
            "train": self.train.position(),
        }

    def _of_ranks(self, world: OneProcess, mine: dict[str, Any]) -> dict[str, Any]:
        """What each of several processes has of its own; and the totals of all of them together."""
        together, totals = dict(mine["totals"]), self.run.train.totals
        if totals.sums:
            sums, counts = totals.summed()
            together |= {"sums": dict(zip(totals.sums, sums, strict=True)), "counts": counts}
        mine["own buffers"] = buffers_of(self.model)
        if isinstance(self.run.loss_func, nn.Module):
            mine["own loss buffers"] = buffers_of(self.run.loss_func)
        rest, _ = apart(
            plain(mine, "the state of a process")
        )  # parts are in the whole state under the same names
        return {"totals": together, "ranks": world.gather(rest)}


def layout_of(stepper: Stepper) -> dict[str, Any] | None:
    """What the parts of the stepper hold, as it lies in a file: each optimizer has a window."""
    state = stepper.state_dict()
    if state is None:
        return None
    windows = {}
    for name, steps in stepper.named_steps().items():
        window = state.get("windows", {}).get(name, {})
        windows[name] = {"weight": 0, "current": None, "batches": 0, **window, "steps": steps}
    return {"accumulate": 1, "scaler": None} | state | {"windows": windows}


def steps_in(state: Any) -> dict[str, int]:
    """The steps that each optimizer had taken; older files tell them of windows alone."""
    if "optimizer_steps" in state:
        return dict(state["optimizer_steps"])
    windows = (state.get("precision") or {}).get("windows", {})
    return {name: window["steps"] for name, window in windows.items()}


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


def holders_in(model: nn.Module, loss_func: Any) -> dict[str, Any]:
    """The objects whose plain attributes are held: layers of the model and the loss."""
    holders: dict[str, Any] = {}
    for root, value in (("model", model), ("loss_func", loss_func)):
        if isinstance(value, nn.Module):
            for name, module in value.named_modules():
                holders[f"{root}.{name}".rstrip(".")] = module
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(
            value, types.FunctionType
        ):
            holders[root] = value
    return holders


def with_copy(state: Any, key: str) -> Any:
    """A state whose part of that name may be changed: it is needed once more if an epoch is resumed in its middle."""
    if not state["position"]["step"]:
        return state
    return state | {key: copy.deepcopy(state[key])}


def regroup(optimizer: Optimizer, written: Any, count: int, parameters: Mapping[str, Any]) -> None:
    """Give an optimizer the groups of the file: those that a callback had added, and not those that it added here."""
    own = optimizer.param_groups
    for group in own[count:]:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
    del own[count:]
    for number in range(len(own), count):
        group = dict(written["state"]["param_groups"][number])
        group["params"] = [parameters[name] for name in written["names"][number]]
        optimizer.add_param_group(group)


def of_groups(state: Any, count: int) -> Any:
    """An optimizer's state_dict with its first groups alone."""
    groups = state["param_groups"][:count]
    numbers = {number for group in groups for number in group["params"]}
    kept = {number: values for number, values in state["state"].items() if number in numbers}
    return {**state, "param_groups": groups, "state": kept}


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
