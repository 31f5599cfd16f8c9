"""Weights & Biases: a fit as a run, online or only in files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minikeras.integrations.tracking import Tracker, as_dict, import_optional

INTERRUPTED = 255  # the exit code that W&B gives a run that Ctrl-C ended
CLOSED = "minikeras_epoch.txt"  # a file next to W&B's own, which contains the last epoch

PACKAGE = ("wandb", "WandB", "wandb")  # as for import_optional


class WandB(Tracker):
    """Log each epoch's row of the history, and the learning rates, to a run of Weights & Biases.

    The names are the history's columns ("loss", "val_loss", "lr"), the steps are the epochs. List
    this callback after those that add to the logs, such as LRScheduler. An error ends the run as
    failed. Several processes log one run, from rank 0.

    A resumed fit continues the run of the same id; offline, in a new folder next to the previous
    one, and `wandb sync` joins them. A run that you have started with `wandb.init` and not finished
    is left as it is: the fit's run is another one next to it.

    Offline, W&B keeps the last rows in memory: if a process is killed at once (SIGKILL), its file
    lacks them. After an error, Ctrl-C or SIGTERM the file is complete.

    Args:
        project: its name.
        name: of the run; by default W&B makes one up.
        config: name -> value, the settings of the run.
        **kwargs: for `wandb.init`: mode="offline" (or WANDB_MODE in the environment), dir, entity,
            tags, ...

    Raises:
        ModuleNotFoundError: the package is missing: pip install wandb.
        TypeError: `config` is not a dict. Errors of W&B itself are raised at the first epoch.

    ::

        from minikeras.integrations.wandb import WandB

        run = WandB("ring", config={"lr": 0.01}, mode="offline")
        model.fit(30, dl_train, dl_valid, callbacks=[run])
    """

    opened = ("run",)

    def __init__(
        self,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        import_optional(*PACKAGE)
        self.project = project
        self.name = name
        self.config = None if config is None else as_dict("config", config)
        self.kwargs = kwargs
        self.start_time = 0.0  # when the last part of the run was started, in seconds

    @property
    def package(self) -> Any:
        """The package; not an attribute, since no copy can hold it."""
        return import_optional(*PACKAGE)

    def open(self, epoch: int) -> None:
        arguments = {
            "project": self.project,
            "name": self.name,
            "config": self.config,
            # otherwise init would return the user's run
            "reinit": None if self.package.run is None else "create_new",
        }
        arguments |= self.kwargs
        continues = self.run_id is not None
        if continues:
            arguments |= {"id": self.run_id, "resume": "allow"}
            # W&B names the folder of a part by the second, and would overwrite one of the same
            time.sleep(min(max(self.start_time + 1 - time.time(), 0), 1))
        self.start_time = time.time()
        self.run = self.package.init(**arguments)
        self.run_id = self.run.id
        self.logged_before = self._last_epoch() if continues else 0

    def _folder(self) -> Path:
        return Path(self.run.dir).parent  # of the current part of the run

    def _last_epoch(self) -> int:
        """Return the last epoch in the parts that were closed.

        The checkpoint may have been saved before it.
        """
        files = self._folder().parent.glob(f"*-{self.run_id}/{CLOSED}")
        return max((int(file.read_text()) for file in files), default=0)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        # without commit the row would wait for the next one
        self.run.log(values, step=epoch, commit=True)

    def close(self, error: BaseException | None) -> None:
        if error is None:
            exit_code = 0
        elif isinstance(error, Exception):
            exit_code = 1
        else:
            exit_code = INTERRUPTED
        self.run.finish(exit_code=exit_code)
        if self._folder().is_dir():  # not with mode="disabled"
            (self._folder() / CLOSED).write_text(str(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"begun": self.start_time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.start_time = state["begun"]
