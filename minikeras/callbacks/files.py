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
from minikeras.callbacks.monitor import Monitor, Watching, skipped, unknown
from minikeras.columns import column_order
from minikeras.support.atomic import check_writable, previous, write
from minikeras.support.paths import fix, follow_links, refuse_special, same_place, user_path

NUMBER = r"[-+0-9., %_einfa]*"  # what a number may look like in a name


class ModelCheckpoint(Watching):
    """Saves the model's weights at the end of each epoch, or of those alone that are the best so far.

    Args:
        path: where to, as `Model.save` takes it; {epoch} and logged names in braces are filled in, with a format where
            wanted: "weights/{epoch:02d}-{val_loss:.3f}.pt". A value of validation is nan in an epoch without one.
            Folders are made.
        monitor: with save_best_only, the name that tells the best epoch, default "val_loss"; one with val_ is looked at
            in the epochs with a validation. It is not looked at otherwise.
        save_best_only: save an epoch only when its value is better than any before; default False.
        mode: "min" or "max" for what is better; "auto", the default, goes by the name.

    Each fit starts afresh. Epochs are numbered from 1, over several fits. NaN is never better.

    Raises:
        ValueError: a bad argument; at the fit's beginning, a name with val_ without dl_val; at an epoch's end, one that
            is not logged.
        OSError: at the fit's beginning or an epoch's end, a file cannot be written.

    >>> import minikeras, tempfile, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save = minikeras.ModelCheckpoint(folder + "/weights/{epoch:02d}.pt")
    ...     dfhistory = model.fit(2, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[save], verbose=0)
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
    ) -> None:
        user_path(path)
        self.path: str = str(path)
        self.folder: Path = Path()  # a fit's current one as it begins: a callback may chdir
        self.names: list[str] = _names_in(self.path)
        self.monitor: Monitor | None = (
            Monitor("ModelCheckpoint", monitor, mode) if save_best_only else None
        )
        self.best: float = 0.0

    def on_fit_begin(self) -> None:
        self.best = 0.0 if self.monitor is None else self.monitor.worst
        self.folder = Path.cwd()
        if self.model.is_main_process:
            known = self.path.partition("{")[0] + "_" if self.names else self.path
            check_writable(user_path(known), "ModelCheckpoint")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.monitor is not None:
            value = self.monitor.read(logs, self.validates)
            if value is None or not self.monitor.better(value, self.best):
                return
            self.best = value
        known = {**logs, "epoch": epoch}
        for name in self.names:
            if self.validates and skipped(name, logs):
                known[name] = math.nan
            elif name not in known:
                raise unknown(
                    f"the path {self.path!r} of ModelCheckpoint has {name!r}", name, known
                )
        self._save(self.folder / user_path(self.path.format_map(known)))

    def _save(self, path: Path) -> None:
        if getattr(self.model.save, "__module__", "") != "minikeras.model":  # the user's own
            self.model.save(path)
            return
        self.model._save(path, keep=False)

    def watched(self) -> list[tuple[str, str, str]]:
        in_path = [(name, "names its files by", "a path without it") for name in self.names]
        return in_path + ([] if self.monitor is None else self.monitor.watched())

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "monitor": None if self.monitor is None else self.monitor.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        monitor = None if self.monitor is None else self.monitor.state()
        if state.get("monitor", monitor) == monitor:  # the best of another value says nothing
            self.best = state["best"]


def _names_in(path: str) -> list[str]:
    """The names in a path's braces; a path that cannot be filled in is refused."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(path) if name is not None]
        _filled_in(path)
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"path {path!r} cannot be filled in: {error}. Write names in braces, {{epoch:02d}} or {{val_loss:.3f}}, "
            f"and a brace that stands for itself twice."
        ) from None
    return names


def _filled_in(path: str) -> str:
    """An example of a path's names: formats are for an int and for floats."""
    return path.format_map(defaultdict(lambda: 0.5, epoch=1))


class CSVLogger(Callback):
    """Writes each epoch's row of the history to a CSV file, and flushes it.

    List this callback after those that add to the logs, such as LRScheduler. A value that an epoch has not got, as
    where validation was skipped, is an empty field. Columns that turn up later widen the file.

    Args:
        path: the file; its folders are made.
        append: go on in a file that is there, under its header; else it is written over at the fit's first row. A fit
            that is carried on goes on in its file either way, without the rows after the last save. Default False.

    Raises:
        OSError: at the fit's beginning or an epoch's end, the file cannot be written.

    >>> import minikeras, tempfile, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), metrics_dict={"two": lambda y_pred, y_true: 2.0})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = minikeras.CSVLogger(folder + "/log.csv")
    ...     dfhistory = model.fit(3, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[log], verbose=0)
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
        self.columns: list[str] = []  # of the file, from this fit's first row on
        self.rows: int = len(self._read()[1]) if self.append else 0  # of the file, that are to stay
        if self.model.is_main_process:
            check_writable(self.path, "CSVLogger")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if not self.model.is_main_process:
            return
        if not self.columns or not logs.keys() <= set(self.columns):
            self._make_room(list(logs))
        with self.place.open("a", newline="", encoding="utf-8") as file:
            self._writer(file).writerow({**logs, "epoch": epoch})
        self.rows += 1

    def _make_room(self, names: list[str]) -> None:
        """The file anew, with the rows that are to stay and a column for each name."""
        header, rows = self._read() if self.rows or self.append else ([], [])
        self.columns = header if self.rows or self.append else []
        if not {"epoch", *names} <= set(self.columns):
            names = list(dict.fromkeys([*self.columns, *names]))
            self.columns = ["epoch", *column_order(name for name in names if name != "epoch")]

        def dump(new: Path) -> None:
            with new.open("w", newline="", encoding="utf-8") as file:
                self._writer(file).writeheader()
                self._writer(file).writerows(rows[: self.rows])

        write(self.place, dump, keep=False)  # at once: a crash leaves the one or the other

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
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
    """Refuse two things of one fit that would write one file.

    Raises:
        ValueError: there are such; the message names both.
    """
    taken: list[tuple[Path, str]] = []
    if checkpoint is not None:
        place = follow_links(checkpoint)
        taken += [
            (place, f'checkpoint="{checkpoint}"'),
            (previous(place), f'checkpoint="{checkpoint}" and its .prev'),
        ]
    for writer in callbacks:
        if not isinstance(writer, (ModelCheckpoint, CSVLogger)):
            continue
        name = f'{type(writer).__name__}("{writer.path}")'
        for path, other in taken:
            if _may_write(writer, path):
                raise ValueError(
                    f"{other} and {name} would write one file. Give each a path of its own."
                )
        taken.append((_example_of(writer), name))


def _example_of(writer: ModelCheckpoint | CSVLogger) -> Path:
    """A path that a callback writes to."""
    if isinstance(writer, CSVLogger) or not writer.names:
        return user_path(writer.path)
    return user_path(_filled_in(writer.path))


def _may_write(writer: ModelCheckpoint | CSVLogger, path: Path) -> bool:
    """Whether a callback writes to that path, or may in some epoch where its path has names in braces."""
    if same_place(_example_of(writer), path):
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
