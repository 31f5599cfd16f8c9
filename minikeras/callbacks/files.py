"""Callbacks that write files: the weights, and the history as a table."""

from __future__ import annotations

import csv
import math
import os
import re
import string
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minikeras.callback import Callback
from minikeras.callbacks.monitor import Monitor, MonitoringCallback, is_skipped, unknown_name
from minikeras.columns import sort_columns
from minikeras.errors import check_number_in_range
from minikeras.support.atomic import check_writable, previous, write
from minikeras.support.paths import fix, follow_links, refuse_special, same_place, user_path

NUMBER = r"[-+0-9., %_einfa]*"  # what a formatted number may look like in a file name


class ModelCheckpoint(MonitoringCallback):
    """Save the model's weights at the end of every epoch, or only of the best epochs.

    Args:
        path: the file, as for `Model.save`. {epoch} and logged names in braces are replaced by
            their values, with an optional format: "weights/{epoch:02d}-{val_loss:.3f}.pt". In an
            epoch without validation a val_ value is nan. Folders are created.
        monitor: with save_best_only, the name whose value decides, default "val_loss". A val_ name
            is read only in epochs with validation. Without save_best_only it is not used.
        save_best_only: save an epoch only if its value is better than all before; default False.
        mode: "min" or "max"; "auto", the default, infers the direction from the name.
        initial_value: with save_best_only, the best value so far, such as the `best` of the
            ModelCheckpoint of an earlier fit: only better values are saved. Default none.

    Each fit starts without a best value, or with `initial_value`. Epochs are numbered from 1, over
    several fits. NaN is never better. `best` is the best value of the current or last fit.

    Raises:
        ValueError: a bad argument; when the fit begins, a name with val_ without dl_val; at the end
            of an epoch, a name that is not logged.
        OSError: a file cannot be written; raised when the fit begins or at the end of an epoch.

    >>> import minikeras, tempfile, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss())
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save = minikeras.ModelCheckpoint(folder + "/weights/{epoch:02d}.pt")
    ...     dfhistory = model.fit(2, data, callbacks=[save], verbose=0)
    ...     print(sorted(file.name for file in Path(folder, "weights").iterdir()))
    ['01.pt', '02.pt']
    """

    def __init__(
        self,
        path: str | Path,
        monitor: str = "val_loss",
        *,
        save_best_only: bool = False,
        mode: str = "auto",
        initial_value: float | None = None,
    ) -> None:
        user_path(path)
        self.path: str = str(path)
        self.folder: Path = Path()  # the current one when a fit begins: a callback may chdir
        self.names: list[str] = _names_in(self.path)
        self.monitor = monitor
        self.save_best_only = save_best_only
        self.mode = mode
        self.initial_value = initial_value
        self.best: float = _check_initial(initial_value, self._watch)

    @property
    def _watch(self) -> Monitor | None:
        """What reads and compares the monitored value; None if every epoch is saved."""
        if not self.save_best_only:
            return None
        return Monitor("ModelCheckpoint", self.monitor, self.mode)

    def on_fit_begin(self) -> None:
        self.best = _check_initial(self.initial_value, self._watch)
        self.folder = Path.cwd()
        if self.model.is_main_process:
            known = self.path.partition("{")[0] + "_" if self.names else self.path
            check_writable(user_path(known), "ModelCheckpoint")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        watch = self._watch
        if watch is not None:
            value = self._read_monitored(watch, logs)
            if value is None or not watch.better(value, self.best):
                return
            self.best = value
        known = {**logs, "epoch": epoch}
        for name in self.names:
            if self.validates and is_skipped(name, logs):
                known[name] = math.nan
            elif name not in known:
                raise unknown_name(
                    f"the path {self.path!r} of ModelCheckpoint has {name!r}", name, known
                )
        self._save(self.folder / user_path(self.path.format_map(known)))

    def _save(self, path: Path) -> None:
        if getattr(self.model.save, "__module__", "") != "minikeras.model":  # a custom save
            self.model.save(path)
            return
        self.model._save(path, keep=False)

    def watched_names(self) -> list[tuple[str, str, str]]:
        watched = [(name, "names its files by", "a path without it") for name in self.names]
        watch = self._watch
        if watch is not None:
            watched += watch.watched_names()
        return watched

    def _monitor_state(self) -> list[Any] | None:
        watch = self._watch
        return None if watch is None else watch.state()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "monitor": self._monitor_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # the best of another value cannot be compared
        if state.get("monitor", self._monitor_state()) == self._monitor_state():
            self.best = state["best"]


def _check_initial(value: Any, monitor: Monitor | None) -> float:
    """Return the best value that a fit begins with.

    Raises:
        ValueError: it is no number, no value could be better, or nothing is monitored.
    """
    if monitor is None:
        if value is not None:
            raise ValueError(
                f"initial_value={value!r} needs save_best_only=True: without it every epoch is "
                f"saved. Pass both or none."
            )
        return 0.0
    if value is None:
        return monitor.worst
    return check_number_in_range(
        "initial_value",
        value,
        f"that another value of {monitor.name!r} can be better than, such as the `best` of an "
        f"earlier ModelCheckpoint, or None",
        lambda number: number != -monitor.worst,
    )


def _names_in(path: str) -> list[str]:
    """Return the names in the braces of a path; refuse a path that cannot be filled in."""
    names = []
    try:
        for _, name, _, _ in string.Formatter().parse(path):
            if name is not None:
                names.append(name)
        _fill_with_examples(path)
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"path {path!r} cannot be filled in: {error}. Write names in braces, {{epoch:02d}} or "
            f"{{val_loss:.3f}}, and a brace that stands for itself twice."
        ) from None
    return names


def _fill_with_examples(path: str) -> str:
    """Replace the names in a path by example values: an int for epoch, floats for the others."""
    return path.format_map(defaultdict(lambda: 0.5, epoch=1))


class CSVLogger(Callback):
    """Write each epoch's row of the history to a CSV file at the end of the epoch.

    List this callback after those that add to the logs, such as LRScheduler. A value that an epoch
    does not have, such as a skipped validation, is an empty field. New columns widen the file.

    Args:
        path: the file. Its folders are created.
        append: if the file exists, keep its rows and columns and add to them; otherwise the fit's
            first row replaces the file. A fit resumed from a checkpoint continues its own file in
            both cases, without the rows after the last save. Default False.

    Raises:
        OSError: the file cannot be written; raised when the fit begins or at the end of an epoch.

    >>> import minikeras, tempfile, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), metrics_dict={"two": lambda y_pred, y_true: 2.0})
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = minikeras.CSVLogger(folder + "/log.csv")
    ...     dfhistory = model.fit(3, data, callbacks=[log], verbose=0)
    ...     print(Path(folder, "log.csv").read_text().splitlines()[0])
    epoch,loss,two
    """

    def __init__(self, path: str | Path, append: bool = False) -> None:
        self.path: Path = user_path(path)
        self.place: Path = self.path  # absolute during a fit: a callback may chdir
        self.append = append

    def on_fit_begin(self) -> None:
        self.place = fix(self.path)
        refuse_special(follow_links(self.place))
        self.columns: list[str] = []  # of the file, once this fit has written a row
        self.rows: int = len(self._read()[1]) if self.append else 0  # of the file, to be kept
        if self.model.is_main_process:
            check_writable(self.path, "CSVLogger")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if not self.model.is_main_process:
            return
        if not self.columns or not logs.keys() <= set(self.columns):
            self._rewrite(list(logs))
        with self.place.open("a", newline="", encoding="utf-8") as file:
            self._writer(file).writerow({**logs, "epoch": epoch})
        self.rows += 1

    def _rewrite(self, names: list[str]) -> None:
        """Write the file again, with the rows to be kept and a column for each name."""
        header: list[str] = []
        rows: list[dict[str, str]] = []
        if self.rows or self.append:
            header, rows = self._read()
        self.columns = header
        if not {"epoch", *names} <= set(self.columns):
            names = list(dict.fromkeys([*self.columns, *names]))
            self.columns = ["epoch", *sort_columns(name for name in names if name != "epoch")]

        def dump(new: Path) -> None:
            with new.open("w", newline="", encoding="utf-8") as file:
                self._writer(file).writeheader()
                self._writer(file).writerows(rows[: self.rows])

        write(self.place, dump, keep=False)  # atomic: a crash leaves the old file or the new one

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Return the columns and the rows of the file."""
        if not self.place.exists():
            return [], []
        with self.place.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            return list(reader.fieldnames or ()), list(reader)

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(
            file, self.columns, restval="", extrasaction="ignore", lineterminator="\n"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]
        self.columns = []


def check_places(callbacks: Iterable[Callback], checkpoint: Path | None) -> None:
    """Refuse a fit in which two callbacks, or one and the checkpoint, would write the same file.

    Raises:
        ValueError: two would; the message names both.
    """
    taken: list[tuple[Path, str]] = []
    if checkpoint is not None:
        place = follow_links(checkpoint)
        taken.append((place, f'checkpoint="{checkpoint}"'))
        taken.append((previous(place), f'checkpoint="{checkpoint}" and its .prev'))
    for writer in callbacks:
        if not isinstance(writer, (ModelCheckpoint, CSVLogger)):
            continue
        name = f'{type(writer).__name__}("{writer.path}")'
        for path, other in taken:
            if _may_write(writer, path):
                raise ValueError(
                    f"{other} and {name} would write one file. Give each a path of its own."
                )
        taken.append((_example_path(writer), name))


def _example_path(writer: ModelCheckpoint | CSVLogger) -> Path:
    """Return a path that a callback writes to."""
    if isinstance(writer, CSVLogger) or not writer.names:
        return user_path(writer.path)
    return user_path(_fill_with_examples(writer.path))


def _may_write(writer: ModelCheckpoint | CSVLogger, path: Path) -> bool:
    """Tell whether a callback writes to that path, or may do so in some epoch.

    A callback's own path may have names in braces, whose values differ from epoch to epoch.
    """
    if same_place(_example_path(writer), path):
        return True
    if isinstance(writer, CSVLogger) or not writer.names:
        return False
    own = str(user_path(writer.path))
    pattern = ""
    if not os.path.isabs(own):
        pattern = re.escape(os.path.realpath(Path.cwd()) + os.sep)
    for text, name, _, _ in string.Formatter().parse(own):
        pattern += re.escape(text)
        if name is not None:
            pattern += NUMBER
    return re.fullmatch(pattern, os.path.realpath(path)) is not None
