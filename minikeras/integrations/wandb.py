"""Weights & Biases: a fit as a run, online or in files alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minikeras.integrations.tracking import Tracker, as_dict, imported

INTERRUPTED = 255  # the exit code that W&B gives a run that Ctrl-C ended
CLOSED = "minikeras_epoch.txt"  # a file beside W&B's own, with the last epoch in it


class WandB(Tracker):
    """Logs each epoch's row of the history, and the learning rates, to a run of Weights & Biases.

    The names are the history's columns ("loss", "val_loss", "lr"), the steps are the epochs. List this callback after
    those that add to the logs, such as LRScheduler. An error ends the run as failed. Several processes are one run, of
    rank 0. A fit that is carried on goes on in the run of the same id: offline, in a folder beside the one before it;
    `wandb sync` puts them together. A run that you have begun yourself with `wandb.init`, and not finished, is left as
    it is: the fit's is another beside it.

    Offline, W&B holds the last rows in memory: a process that is killed outright (SIGKILL) leaves a file without them.
    After an error, Ctrl-C and SIGTERM they are in it.

    Args:
        project: its name.
        name: of the run; default one that W&B makes up.
        config: name -> what the run was made with.
        **kwargs: for `wandb.init`: mode="offline" (or WANDB_MODE in the environment), dir, entity, tags, ...

    Raises:
        ModuleNotFoundError: the package is missing: pip install wandb.
        TypeError: `config` is no dict. What W&B itself raises comes at the first epoch.

    ::

        from minikeras.integrations.wandb import WandB

        model.fit(30, dl_train, dl_valid, callbacks=[WandB("ring", config={"lr": 0.01}, mode="offline")])
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.package = imported("wandb", "WandB", "wandb")
        self.project = project
        self.name = name
        self.config = None if config is None else as_dict("config", config)
        self.kwargs = kwargs
        self.begun = 0.0  # the time when the last part of the run was, in seconds

    def open(self, epoch: int) -> None:
        known = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
        beside = (
            None if self.package.run is None else "create_new"
        )  # else init returns the user's run
        arguments = {
            "project": self.project,
            "name": self.name,
            "config": self.config,
            "reinit": beside,
        }
        arguments |= self.kwargs | known
        if known:  # W&B names a part's folder by the second, and would write over one of the same
            time.sleep(min(max(self.begun + 1 - time.time(), 0), 1))
        self.begun = time.time()
        self.run = self.package.init(**arguments)
        self.run_id = self.run.id
        self.logged = self._last_epoch() if known else 0

    def _folder(self) -> Path:
        return Path(self.run.dir).parent  # of the part of the run that is logged now

    def _last_epoch(self) -> int:
        """The last one in the parts that were closed: it may be one that is not in the checkpoint any more."""
        files = self._folder().parent.glob(f"*-{self.run_id}/{CLOSED}")
        return max((int(file.read_text()) for file in files), default=0)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log(
            values, step=epoch, commit=True
        )  # without commit the row waits for the next one

    def close(self, error: BaseException | None) -> None:
        failed = 1 if isinstance(error, Exception) else INTERRUPTED
        self.run.finish(exit_code=0 if error is None else failed)
        if self._folder().is_dir():  # not with mode="disabled"
            (self._folder() / CLOSED).write_text(str(self.epoch))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.begun = state["begun"]
