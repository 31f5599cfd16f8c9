"""Save the whole state of a run to one file, and resume from it, bit-for-bit identical.

open      read the file, check that it is complete and belongs to this call of fit and this model;
          nothing is changed yet
restore   load weights, optimizers, totals, history, callbacks and random states; the fit resumes
          from the position in the file
save      at the end of each epoch, every so many steps, and when the process is asked to end: copy
          the state, and let a thread write it while the fit goes on
finish    wait for the last save, and tell whether it succeeded
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.callback import Callback
from minikeras.checkpoint.background import BackgroundWrite, BackgroundWrites, wait_for_writes
from minikeras.checkpoint.file import (
    dump,
    name_files,
    read_newest,
    remedy_of_fit,
)
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
from minikeras.checkpoint.plain import find_tensors, plain, restored
from minikeras.checkpoint.position import Positioned, build_end_error, warn_of_hidden_draws
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
from minikeras.errors import CheckpointError, check_positive_int
from minikeras.hooks import Fit, Hook, Position
from minikeras.modes import names_staying_in_eval, set_staying_in_eval
from minikeras.nests import is_sharded
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
from minikeras.support.randomness import Randomness, pack
from minikeras.support.reachable import PlainAttributes
from minikeras.support.sharded_tensors import load_optimizer, load_whole

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


class Checkpoint(Hook):
    """The file of one fit.

    Args:
        path: the file; its folder is created.
        every: steps between two writings within an epoch, None for none.
    """

    def __init__(self, path: str | Path, every: int | None = None) -> None:
        self.path = path_of_run(path)
        self.place = fix(self.path)  # a callback may chdir
        self.every = None if every is None else check_positive_int("checkpoint_every", every)
        self.state: Any = None  # what to resume from
        self.replaced = ""  # the epochs of an earlier fit whose file this fit replaces
        self.whole = True  # the newest file is complete; else it is not worth keeping as NAME.prev
        self.written = ""  # the last writing, for messages
        self.random: Any = None  # the random state before the current validation
        self.saved_step = 0  # of the current epoch
        self.writes = BackgroundWrites()
        self.saving: Saving | None = None  # the last save, until it is known whether it succeeded
        # the state of an epoch that is resumed in its middle, until its on_epoch_begin is over
        self.resumed_state: Any = None
        self.is_divided = False  # several processes train, or each tensor may be in several parts
        self.interruptions = Interruptions()

    # --- before a fit -----------------------------------------------------------------------------

    def watched(
        self,
        train: Iterable[Any],
        val: Iterable[Any] | None,
        model: Model,
        run: Run,
        callbacks: list[Callback],
    ) -> Iterable[Any]:
        """Return the training batches as a source that records its position."""
        # what the user passed
        train_loader = getattr(train, "loader", train)
        val_loader = getattr(val, "loader", val)
        self.loaders: list[Any] = [train_loader, val_loader]
        if model.is_main_process:
            warn_of_hidden_draws(train_loader, "dl_train")
            warn_of_hidden_draws(val_loader, "dl_val")
        data = {"dl_train": train_loader}
        if val_loader is not None:
            data["dl_val"] = val_loader
        roots = {**data, "model": model, "loss_func": run.loss_func, **dict(named(callbacks))}
        self.given = callbacks
        self.randomness = Randomness(
            run.device,
            self.loaders,
            roots,
            counted=data,
            without=(run,),
            uncounted=(model, *callbacks),
        )
        self.attributes = PlainAttributes(holders_in(model, run.loss_func))
        self.data = data_of(train_loader)
        self.train = Positioned(train, "dl_train", self.randomness, remedy_of_fit(self.path))
        return self.train

    def open(self, model: Model, run: Run, epochs: int) -> int:
        """Read and check the file; return the number of the last epoch of this call of fit.

        Raises:
            CheckpointError: the file is damaged, or of another run, fit, model or optimizer; or
                another fit of this process has used it.
            OSError: no file can be written there.
        """
        self.model = model
        self.run = run
        self.interruptions.alone = run.world.size == 1
        # of a fit that did not finish: its checkpoint's path, and its first epoch
        before = run.kept.get("unfinished")
        run.kept["unfinished"] = None
        self.first = len(run.epochs) + 1
        # what cannot be saved is an error before anything changes
        plain(self.run.train.totals.state_dict(), "metrics")
        place = follow_links(self.path)
        refuse_folders(previous(place))
        # of a fit that an error has ended in all processes, or in whose callback this one begins
        run.world.by_main(wait_for_writes)
        found = self._share_file(read_newest(self.path, reader(model)))
        if found is not None and before is not None and before[0] == self.path:
            self.first = before[1]  # the same call again, after an error or an interruption
        self.last = self.first - 1 + epochs
        # optimizers' settings and what is frozen, as the first fit with a checkpoint began
        run.kept["begun"] = run.kept.get("begun") or beginning(model, run)
        if found is not None:
            check_run(found[0], model, run, found[1])
        has_file = found is not None
        self.use = use(self.path, model, run, self.loaders, self.given, self.last, has_file)
        if found is not None:
            state, path = found
            self.whole = path == place
            self.state = self._state_of_this_call(state, path)
            self._compare_beginnings(state.get("begun"))
        self._compare_positions()
        run.world.by_main(self._check_writable)
        run.kept["unfinished"] = self.path, self.first
        return self.last

    def _share_file(self, found: tuple[Any, Path] | None) -> tuple[Any, Path] | None:
        """Return what was found, and rank 0's file in processes whose path has none.

        It may be on a disk of rank 0's machine: rank 0 alone writes.

        Raises:
            CheckpointError: rank 0 has no file and another process has, or it is in parts.
        """
        world = self.run.world
        some, none = world.agree(found is not None, found is None, about="the checkpoint's file")
        if not (some and none):
            return found
        can_send = found is not None and found[1].is_file()
        if not world.broadcast(can_send):
            here = "a file" if found is not None else "no file"
            raise CheckpointError(
                f"{self.path}: process {world.rank} finds {here}, and other processes do not find "
                "the same. Rank 0 sends a file that it alone has to the others; this one must be "
                "read by all. Pass a path on a disk that all machines share, or copy it to each."
            )
        state, path = world.broadcast(None if found is None else [found[0], str(found[1])])
        return (state, Path(path)) if found is None else found

    def _compare_positions(self) -> None:
        """Refuse files that are at different positions in different processes.

        Raises:
            CheckpointError: they are.
        """
        at = None if self.state is None else Position(**self.state["position"])
        place = [0, 0] if at is None else [at.epoch, at.step]
        world = self.run.world
        about = "the checkpoint's position"
        last_epoch, last_step, first_epoch, first_step = world.agree(
            *place, -place[0], -place[1], about=about
        )
        if [last_epoch, last_step] == [-first_epoch, -first_step]:
            return
        places = []
        for rank, (epoch, step) in enumerate(world.gather(place) or []):
            where = f"in epoch {epoch} after step {step}" if epoch else "without a state"
            places.append(f"process {rank} is {where}")
        raise CheckpointError(
            f"{self.path} differs between the processes: {', '.join(places)}. Pass a path on a "
            "disk that all machines share, or delete the files of all but process 0, which sends "
            "its own to the others."
        )

    def _check_writable(self) -> None:
        if self.state is None and not self.path.is_dir():  # a folder was read
            check_writable(self.path, "fit(checkpoint=...)")

    def check_length(self, batches: int | None) -> None:
        """Refuse a position beyond an epoch's end, if the number of its batches is known.

        Raises:
            CheckpointError: the position is beyond it.
        """
        step = 0 if self.state is None else self.state["position"]["step"]
        if batches is not None and step > batches:
            raise build_end_error(step, "dl_train", batches, remedy_of_fit(self.path))

    def _compare_beginnings(self, begun: Any) -> None:
        """Forget what the file would freeze if the script has changed what it freezes itself."""
        self.now = self.run.kept["begun"]
        if begun is None:  # an older file has none
            return
        self.run.kept["begun"] = begun
        if self.state is None:
            return
        for key in ("frozen", "loss frozen", "in_eval", "stays_in_eval"):
            if begun.get(key, self.now[key]) != self.now[key]:
                self.state[key] = None

    def _state_of_this_call(self, state: Any, path: Path) -> Any:
        """Return the file's state if this call of fit resumes from it, else None.

        Raises:
            CheckpointError: the file is of another fit.
        """
        epochs_in_history = len(self.run.epochs)
        epochs_in_file = len(state["history"])
        if state["first"] == self.first:  # the same call
            self._check_last_epoch(state, path)
            return state
        if epochs_in_history == epochs_in_file:  # an earlier call, whose file this one replaces
            self.replaced = f"{state['first']} to {epochs_in_file}"
            return None
        # a later call as well: its weights are not those that this call would end with
        raise CheckpointError(
            f"{path} is of a fit of epochs {state['first']} to {state['last']}, and this one is "
            f"of epochs {self.first} to {self.last}. Pass a different path to each fit. "
            f"{remedy_of_fit(path)}"
        )

    def _check_last_epoch(self, state: Any, path: Path) -> None:
        """Refuse a file from within an epoch after this fit's last one.

        The weights in it are those of no epoch in the history.

        Raises:
            CheckpointError: it is such a file.
        """
        at = Position(**state["position"])
        if at.step and at.epoch > self.last:
            raise CheckpointError(
                f"{path} was written in epoch {at.epoch} after step {at.step}, and this fit is of "
                f"epochs {self.first} to {self.last}. Ask for {at.epoch - self.first + 1} epochs "
                f"or more. {remedy_of_fit(path)}"
            )

    # --- at the beginning of a fit ----------------------------------------------------------------

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Hold signals back during a fit, until the state is written."""
        with self.interruptions:
            try:
                yield
            finally:
                self._finish_alone()
                self.writes.close()

    def resume(self, fit: Fit) -> None:
        """Load the file's state, and set where the fit starts."""
        fit.at = self.restore(fit.callbacks, fit.say)

    @untouched
    def restore(self, callbacks: list[Callback], say: Callable[[str], None]) -> Position:
        """Load the file's state if it belongs to this call; return where the fit starts.

        A line says where. Everything that can be refused is refused before the first weight
        changes.

        Raises:
            CheckpointError: data, callbacks or metrics cannot load their state in the file.
        """
        self.callbacks = callbacks
        self.say = say
        parameters = self.model.parameters()
        self.is_divided = self.run.world.size > 1 or any(map(is_sharded, parameters))
        self._note_groups()
        self._check_plain()
        if self.state is None:
            if self.replaced:
                say(
                    f"{self.path}: epochs {self.first} to {self.last} replace the fit of epochs "
                    f"{self.replaced} in this file"
                )
            return Position(self.first)
        state = self.state
        self.state = None
        self._check_course(state)
        at = Position(self.last + 1) if was_stopped(state) else Position(**state["position"])
        is_finished = at.epoch > self.last
        if self.model.is_main_process:
            self._warn(state, is_finished)
        self._load_weights(with_copy(state, "optimizers"), whole=not at.step)
        self._begin_course(state)
        self._load_course(with_copy(state, "callbacks"))
        self.model.stop_training = state["stopped"]
        if is_finished:
            self.run.kept["unfinished"] = None
            self.use.came_to = "its end"
            say(f"{self.path}: {self._describe_end()}")
        elif at.step:
            say(f"{self.path}: resumed in epoch {at.epoch} after step {at.step}")
            self.resumed_state = state
        else:
            say(f"{self.path}: resumed after epoch {at.epoch - 1}")
        return at

    def _describe_end(self) -> str:
        """Say that nothing is left to train, and how to train more."""
        epochs = len(self.run.epochs)
        is_stopped = self.model.stop_training
        line = f"{'stopped' if is_stopped else 'finished'} after epoch {epochs}"
        if epochs > self.last:
            line += f", and this fit asks for epochs {self.first} to {self.last}"
        more = "" if is_stopped else "ask for more epochs, or "
        files = name_files(self.path)
        return f"{line}: nothing is left to train ({more}delete {files} to start from scratch)"

    def _check_plain(self) -> None:
        """Raise an error, before anything changes, for what cannot be saved."""
        states = {name: callback.state_dict() for name, callback in named(self.callbacks)}
        plain(states, "callbacks")
        others = {}
        for key, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):
                others[key] = value
        plain(others, "the state_dict")

    def _check_course(self, state: Any) -> None:
        """Raise an error for state that cannot be loaded.

        Callbacks and metrics try it, and get their own state back if one of them cannot.
        """
        self._check_random(state["random"])
        if state["train"] is not None and state["position"]["epoch"] <= self.last:
            self.train.check(restored(state["train"]))
        tried: list[tuple[Callback, Any]] = []
        totals = self.run.train.totals
        try:
            for name, callback in named(self.callbacks):
                if name in state["callbacks"]:
                    tried.append((callback, copy.deepcopy(callback.state_dict())))
                    written = state["callbacks"][name]
                    self._try(f"callback {name}", callback.load_state_dict, written)
            if state["position"]["step"] and totals.objects:
                self._try("metrics", totals.load_state_dict, state["totals"])
        except CheckpointError:
            for callback, before in reversed(tried):
                with contextlib.suppress(Exception):
                    callback.load_state_dict(before)
            raise
        finally:
            totals.reset()

    def _check_random(self, states: Any) -> None:
        """Refuse random states of other loaders."""
        try:
            self.randomness.check(states)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {remedy_of_fit(self.path)}") from None

    def _try(self, what: str, load_state: Callable[[Any], Any], state: Any) -> None:
        try:
            load_state(restored(copy.deepcopy(state)))
        except Exception as error:
            raise CheckpointError(
                f"{self.path} has a state that the {what} cannot load: {type(error).__name__}: "
                f"{error}. The model is unchanged. Use the same {what} as when the file was "
                f"written. {remedy_of_fit(self.path)}"
            ) from error

    def _warn(self, state: Any, is_finished: bool) -> None:
        """Warn about what the script has changed since the run started, and say what is used."""
        callbacks = dict(named(self.callbacks))
        states = state["callbacks"]
        schedules = other_schedules(states, callbacks)
        begun = state.get("begun")
        if begun is not None:
            has_schedules = bool(schedules)
            warn_of_other_settings(
                begun["optimizers"], self.now["optimizers"], self.path, has_schedules
            )
            warn_of_another_script(begun, self.now, self.path)
        warn_of_other_schedules(schedules, self.path)
        warn_of_other_monitors(states, callbacks, self.path)
        if not is_finished:
            warn_of_other_callbacks(states, callbacks)
        warn_of_other_generators(self.randomness.others(state["random"]), self.path)
        warn_of_other_data(state, self.data, is_finished, self.path)

    def _load_weights(self, state: Any, whole: bool = True) -> None:
        """Load weights, optimizers and history.

        Args:
            whole: with all groups of the optimizers; else with those that the epoch began with.
        """
        run = self.run
        loss = run.loss_func
        fill_late_buffers(self.model, late_buffers(self.model, state["model"]), run.device)
        load_whole(self.model, state["model"])
        set_buffers(self.model, state["buffers"], run.device)
        freeze(self.model, state.get("frozen"))
        if state.get("stays_in_eval") is not None:
            set_staying_in_eval(self.model, state["stays_in_eval"])
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
        """Load once the position of the data, and which steps have been compiled."""
        steps = ["train_step"]
        if self._has_validated():
            steps.append("evaluate_step")
        self.run.engine.expect_steps(steps)
        self.run.engine.load_state_dict(self._of_rank(state).get("graphs", {}))  # older: none
        position = restored(self._of_rank(state)["train"])
        is_past_first_epoch = len(self.run.epochs) >= self.first
        # older files do not say how many iterations have begun
        iterations = 2 if position is None else position.get("iterations", 2)
        self.train.iterations = 0
        if is_past_first_epoch or position is not None:
            self.train.iterations = iterations
        for number, loader in enumerate(self.loaders):
            # with steps_per_epoch the first iteration may not be over yet
            is_in_first = number == 0 and iterations < 2
            has_workers = getattr(loader, "persistent_workers", False)
            if has_workers and is_past_first_epoch and not is_in_first:
                # in the run before, the seed of its workers was drawn in an iteration that is over
                self.run.world.draw_first_seed(loader)
        self.train.resume_at(position)

    def _has_validated(self) -> bool:
        """Tell whether an epoch of this call of fit has been validated."""
        for logs, _ in self.run.epochs[self.first - 1 :]:
            if any(name.startswith("val_") for name in logs):
                return True
        return False

    def _has_own_part(self, state: Any) -> bool:
        """Tell whether a state has a part of each process, for as many processes as here."""
        size = self.run.world.size
        return size > 1 and len(state.get("ranks", [])) == size

    def _of_rank(self, state: Any) -> Any:
        """Return the state with this process's own part in it, if there is one."""
        if self._has_own_part(state):
            return state | state["ranks"][self.run.world.rank]
        return state

    def _load_course(self, state: Any) -> None:
        """Load buffers of this process, totals, parts of the stepper, callbacks, random states."""
        run = self.run
        has_own_part = self._has_own_part(state)
        takes_shared = has_own_part or run.world.rank == 0  # else rank 0 loads it for all
        state = self._of_rank(state)
        buffers = state["own buffers"] if has_own_part else {}
        set_buffers(self.model, buffers, run.device)
        if isinstance(run.loss_func, nn.Module):
            buffers = state.get("own loss buffers", {}) if has_own_part else {}
            set_buffers(run.loss_func, buffers, run.device)
        run.train.totals.reset()
        if state["position"]["step"]:
            run.train.totals.load_state_dict(restored(state["totals"]), counted=takes_shared)
        stepper = run.stepper
        if stepper.compiled_parts and state.get("precision"):  # older files have none
            stepper.load_state_dict(restored(state["precision"]))
        stepper.load_steps(steps_in(state))
        for name, callback in named(self.callbacks):
            if name in state["callbacks"]:
                callback.load_state_dict(restored(state["callbacks"][name]))
        self.attributes.restore(restored(state.get("attributes", {})))
        random = restored(state["random"])
        if takes_shared:
            self.randomness.restore(random)
        else:  # a sampler may count epochs in all processes
            self.randomness.attributes.restore(random.get("attributes", {}))

    def before_epoch(self, fit: Fit) -> None:
        """Note the optimizers' groups: on_epoch_begin may add some."""
        self._note_groups()

    def _note_groups(self) -> None:
        self.groups = {}
        for name, optimizer in self.run.optimizers.items():
            self.groups[name] = len(optimizer.param_groups)

    def on_epoch_begin(self, fit: Fit) -> None:
        """Put the file's state back, if the epoch is resumed in its middle.

        on_epoch_begin of the callbacks has run before, in the interrupted run. What it has done
        now to the model, the optimizers, the random states and callbacks with a state_dict is
        undone. What it set up in callbacks without one stays.
        """
        self.saved_step = fit.at.step
        state = self.resumed_state
        self.resumed_state = None
        if state is not None:
            epochs = self.run.epochs
            self._load_weights(state)
            self.run.epochs = epochs
            self._load_course(state)
            self.groups = state.get("groups", self.groups)

    # --- during a fit -----------------------------------------------------------------------------

    def on_batch_end(self, fit: Fit, number: int) -> None:
        """Write the state if it is due, or if the process has received a signal to end."""
        at = fit.at
        if self.saving is not None and self.saving.is_done() and self.run.world.size == 1:
            self.finish()
        is_training = at.logs is None
        if is_training and not self.model.stop_training and self.every is not None:
            saved_step = self.saved_step if self.saving is None else self.saving.step
            if number - saved_step >= self.every:
                self.save(at)
        if not (is_training and self.model.stop_training):
            self.interruptions.act(lambda: self._leave(at))

    def on_train_end(self, fit: Fit) -> None:
        """Wait for the last save: callbacks may read its file when this epoch ends."""
        self.finish()

    def on_validation_begin(self, fit: Fit) -> None:
        """Note the random state: validation is not resumed in its middle, but runs again."""
        self.random = self.randomness.states()

    def on_epoch_end(self, fit: Fit) -> None:
        """Write the state; for the last one of a fit it is an error if that fails."""
        at = fit.at
        self.random = None
        self.save(at, last=at.epoch > self.last or self.model.stop_training)
        self.interruptions.act(lambda: self._leave(at, is_saved=True))

    def _leave(self, at: Position, is_saved: bool = False) -> None:
        """Write the state after a signal, and say how to resume."""
        if is_saved:
            self.finish()
        else:
            self.save(at, wait=True)
        self.say(
            f"{self.path}: stopped in epoch {at.epoch} after step {at.step}; the same call "
            "resumes from there"
        )

    def save(self, at: Position, last: bool = False, wait: bool = False) -> None:
        """Write the state of the run as it is now.

        A thread writes the file while the fit goes on, and `finish` tells whether that succeeded;
        the next save, the end of the epoch's training and the end of the fit call it.

        Args:
            last: it is the last state of the fit: wait until the file is complete.
            wait: wait until the file is complete.

        Raises:
            CheckpointError: the last state could not be written. For another one it is a warning.
        """
        self.finish()
        if not self.run.allows_writing(self.path, with_state=True):
            return
        state = self._state(at)
        saving = Saving(f"epoch {at.epoch}, step {at.step}", at.step)
        if not (wait or last or self.is_divided):
            # without memory for a copy, write the file now: that needs none
            with contextlib.suppress(MemoryError, RuntimeError):
                saving.thread = self.writes.start(self.place, state, keep=self.whole)
        if saving.thread is None:
            self._write(saving, plain(state, "the state of the run"), wait=wait or last)
        self.saving = saving
        if wait or last:
            self.finish(last)

    def finish(self, last: bool = False) -> None:
        """Wait for the save that has begun, and tell whether it succeeded. All processes call it.

        Args:
            last: it is that of the last state of the fit.

        Raises:
            CheckpointError: the last state could not be written. For another one it is a warning.
        """
        saving = self.saving
        self.saving = None
        if saving is None:
            return
        error = saving.wait()
        # all processes must know, since all try again
        has_failed = bool(self.run.world.agree(error is not None)[0])
        if has_failed and last:
            problem: Any = error
            if error is None:
                problem = "another process has failed: read its error message"
            why = "These last weights are not saved. Free disk space or pass another path."
            raise CheckpointError(f"{self._describe_failure(problem)} {why}") from error
        if error is not None:
            why = "The fit continues, and the next checkpoint is tried again."
            warnings.warn(f"{self._describe_failure(error)} {why}", stacklevel=2)
        if last:
            self.use.came_to = "its end"
        if not has_failed:
            if last:
                self.run.kept["unfinished"] = None
            self._note_success(saving)

    def _finish_alone(self) -> None:
        """Wait for the save that has begun as a fit ends early; the other processes may not."""
        saving = self.saving
        self.saving = None
        if saving is None:
            return
        error = saving.wait()
        if error is None:
            self._note_success(saving)
        else:
            why = "Free disk space or pass another path."
            warnings.warn(f"{self._describe_failure(error)} {why}", stacklevel=2)

    def _note_success(self, saving: Saving) -> None:
        self.whole = True
        self.written = saving.name
        self.saved_step = saving.step

    def _write(self, saving: Saving, state: Any, wait: bool) -> None:
        """Write a state, or begin to; `saving` has the thread, or the error if that failed.

        With several processes rank 0 writes, and all write their parts of sharded tensors; for
        that all of them wait.
        """
        path = self.place
        tensors = find_tensors(state)
        parts: dict[str, Tensor] = {}
        if any(is_sharded(tensor) for tensor in tensors):
            state, parts = apart(state)
        folder = None
        try:
            if parts:
                folder = Path(self.run.world.broadcast(str(temporary(follow_links(path)))))
                state["parts"] = save_parts(folder, parts, self.run.world)
            if not self.model.is_main_process:
                return
            if not parts and not wait and self.is_divided:
                with contextlib.suppress(MemoryError, RuntimeError):
                    saving.thread = self.writes.start(path, state, keep=self.whole)
                    return
            write_file = dump_rest(state) if parts else dump(state)
            write(path, write_file, keep=self.whole, new=folder)
        except OSError as error:
            if folder is not None and self.model.is_main_process:
                with contextlib.suppress(OSError):
                    discard(folder)
            saving.error = error

    def _describe_failure(self, error: Any) -> str:
        before = "No earlier checkpoint was written"
        if self.written:
            before = f"The checkpoint of {self.written} is still there"
        return f"{self.path} could not be written: {str(error).rstrip('.')}. {before}."

    @contextlib.contextmanager
    def around_epoch(self, fit: Fit) -> Iterator[None]:
        """Add to any error where the last state is."""
        try:
            yield
        except Exception as error:
            self.use.came_to = "an error"
            self._finish_alone()
            if self.written:
                error.add_note(
                    f"The last checkpoint is in {self.path}: {self.written}. Call fit again to "
                    "resume from there."
                )
            raise

    def _state(self, at: Position) -> dict[str, Any]:
        """Return the whole state of the run."""
        model = self.model
        run = self.run
        loss = run.loss_func
        weights = weights_of(model)
        optimizers = {}
        for name, optimizer in run.optimizers.items():
            optimizers[name] = {
                "class": type(optimizer).__name__,
                "state": optimizer.state_dict(),
                "names": group_names(optimizer, model, loss),
            }
        of_process = self._of_process()
        states_of_callbacks = {}
        for name, callback in named(self.callbacks):
            states_of_callbacks[name] = callback.state_dict()
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
            "stays_in_eval": names_staying_in_eval(model),
            "model": weights,
            "buffers": buffers_beside(model, weights),
            "loss": {},
            "optimizers": optimizers,
            "callbacks": plain(states_of_callbacks, "callbacks"),
            **of_process,
        }
        if isinstance(loss, nn.Module):
            loss_weights = weights_of(loss)
            state["loss"] = loss_weights
            state["loss buffers"] = buffers_beside(loss, loss_weights)
            state["loss frozen"] = frozen(loss)
        if run.world.size > 1:
            state |= self._of_ranks(run.world, of_process)
        return state

    def _of_process(self) -> dict[str, Any]:
        """Return the state that differs between processes."""
        stepper = self.run.stepper
        return {
            "precision": layout_of(stepper),  # of all parts: files of older versions have the name
            "optimizer_steps": stepper.named_steps(),
            "graphs": self.run.engine.state_dict(),
            "totals": self.run.train.totals.state_dict(),
            "random": plain(pack(self.random or self.randomness.states()), "random states"),
            "train": plain(self.train.position(), "the position of dl_train"),
        }

    def _of_ranks(self, world: OneProcess, of_process: dict[str, Any]) -> dict[str, Any]:
        """Return the state that differs between processes, for each, and the totals over all."""
        totals = self.run.train.totals
        totals_of_all = dict(of_process["totals"])
        if totals.sums:
            sums, counts = totals.summed()
            totals_of_all["sums"] = dict(zip(totals.sums, sums, strict=True))
            totals_of_all["counts"] = counts
        of_process["own buffers"] = buffers_of(self.model)
        if isinstance(self.run.loss_func, nn.Module):
            of_process["own loss buffers"] = buffers_of(self.run.loss_func)
        # sharded tensors are in the whole state under the same names
        rest, _ = apart(plain(of_process, "the state of a process"))
        return {"totals": totals_of_all, "ranks": world.gather(rest)}


@dataclass
class Saving:
    """A save that has begun."""

    name: str  # of the state, for messages
    step: int  # of the epoch
    thread: BackgroundWrite | None = None  # None if the file is complete, or rank 0 writes it
    error: OSError | None = None

    def is_done(self) -> bool:
        """Tell whether the file is complete, or could not be written."""
        return self.thread is None or self.thread.is_done()

    def wait(self) -> OSError | None:
        """Wait for the end, and return the error if the file could not be written."""
        return self.error if self.thread is None else self.thread.wait()


def buffers_beside(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the buffers that are not among the weights, as they are not persistent."""
    buffers = {}
    for name, buffer in buffers_of(module).items():
        if name not in weights:
            buffers[name] = buffer
    return buffers


def layout_of(stepper: Stepper) -> dict[str, Any] | None:
    """Return the state of the stepper's parts as a file has it: a window for each optimizer."""
    state = stepper.state_dict()
    if state is None:
        return None
    windows = {}
    for name, steps in stepper.named_steps().items():
        window = state.get("windows", {}).get(name, {})
        windows[name] = {"weight": 0, "current": None, "batches": 0, **window, "steps": steps}
    return {"accumulate": 1, "scaler": None} | state | {"windows": windows}


def steps_in(state: Any) -> dict[str, int]:
    """Return the number of steps that each optimizer had taken.

    Older files have it in the windows alone.
    """
    if "optimizer_steps" in state:
        return dict(state["optimizer_steps"])
    windows = (state.get("precision") or {}).get("windows", {})
    return {name: window["steps"] for name, window in windows.items()}


def path_of_run(path: Any) -> Path:
    """Return the path of a file for the state of a run.

    Raises:
        TypeError, ValueError: the user's path cannot be one.
    """
    checked = user_path(path, "checkpoint")
    if checked.suffix == ".safetensors":
        raise ValueError(
            f'checkpoint="{path}": a .safetensors file holds only tensors, not the state of a '
            f'run. Pass "{checked.with_suffix(".pt")}".'
        )
    return checked


def holders_in(model: nn.Module, loss_func: Any) -> dict[str, Any]:
    """Return the objects whose plain attributes are saved: layers of the model and the loss."""
    holders: dict[str, Any] = {}
    for root, value in (("model", model), ("loss_func", loss_func)):
        if isinstance(value, nn.Module):
            for name, module in value.named_modules():
                holders[f"{root}.{name}".rstrip(".")] = module
            continue
        has_attributes = isinstance(getattr(value, "__dict__", None), dict)
        if has_attributes and not isinstance(value, types.FunctionType):
            holders[root] = value
    return holders


def with_copy(state: Any, key: str) -> Any:
    """Return a state whose part `key` may be changed.

    If an epoch is resumed in its middle, the original is needed once more.
    """
    if not state["position"]["step"]:
        return state
    return state | {key: copy.deepcopy(state[key])}


def regroup(optimizer: Optimizer, written: Any, count: int, parameters: Mapping[str, Any]) -> None:
    """Give an optimizer the groups of the file.

    A callback may have added groups then, and others now.

    Args:
        count: how many groups.
        parameters: name -> parameter.
    """
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
    """Return an optimizer's state_dict with its first `count` groups alone."""
    groups = state["param_groups"][:count]
    numbers = set()
    for group in groups:
        numbers.update(group["params"])
    states = {}
    for number, values in state["state"].items():
        if number in numbers:
            states[number] = values
    return {**state, "param_groups": groups, "state": states}


def was_stopped(state: Any) -> bool:
    """Tell whether the fit was stopped before its last epoch, and that epoch is over."""
    return bool(state["stopped"] and not state["position"]["step"])


def named(callbacks: Iterable[Callback]) -> list[tuple[str, Callback]]:
    """Return each callback with its class's name, numbered from the second of a class on."""
    seen: dict[str, int] = {}
    pairs = []
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] = seen.get(name, 0) + 1
        pairs.append((name if seen[name] == 1 else f"{name} {seen[name]}", callback))
    return pairs
