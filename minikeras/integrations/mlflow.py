"""MLflow: a fit as a run in its tracking store."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from minikeras.integrations.tracking import Tracker, as_dict, imported

REFUSED = re.compile(r"[^\w/.: -]")  # in the name of a metric


class MLflow(Tracker):
    """Logs each epoch's row of the history, and the learning rates, to a run of MLflow.

    The metrics' names are the history's columns ("loss", "val_loss", "lr"), with _ for a character that MLflow refuses,
    such as the @ of "acc@1", and _2, _3 at the end where another has that name; their steps are the epochs. List this
    callback after those that add to the logs, such as LRScheduler. The run ends as FINISHED, as FAILED after an error,
    or as KILLED after Ctrl-C or SIGTERM; a fit that is carried on goes on in it. Several processes are one run, of
    rank 0.

    Args:
        experiment: its name; it is made where there is none. Default that of `mlflow.set_experiment`, or of
            MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or else MLflow's own.
        run_name: default one that MLflow makes up.
        tracking_uri: a server, or a file: "sqlite:///mlflow.db". Default MLflow's own, or MLFLOW_TRACKING_URI.
        params: name -> what the run was made with.
        summary: what `model.summary(...)` returned, for the artifact "summary.txt"; default the model as torch prints
            it.

    Raises:
        ModuleNotFoundError: the package is missing: pip install mlflow-skinny alembic sqlalchemy.
        TypeError: `params` is no dict. What MLflow itself raises comes at the first epoch.

    The extra is what writes; `pip install mlflow` adds `mlflow ui`, to look at it::

        from minikeras.integrations.mlflow import MLflow

        runs = MLflow("ring", params={"lr": 0.01}, tracking_uri="sqlite:///mlflow.db")
        model.fit(30, dl_train, dl_valid, callbacks=[runs])
    """

    def __init__(
        self,
        experiment: str | None = None,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        summary: Any = None,
    ) -> None:
        super().__init__()
        self.anew()
        self.package = imported("mlflow", "MLflow", "mlflow-skinny alembic sqlalchemy")
        self.experiment = experiment
        self.run_name = run_name
        self.tracking_uri = tracking_uri
        self.params = {} if params is None else as_dict("params", params)
        self.summary = summary

    def anew(self) -> None:
        super().anew()
        self.names: dict[str, str] = {}  # of the columns, for MLflow

    def open(self, epoch: int) -> None:
        self.client = self.package.MlflowClient(tracking_uri=self.tracking_uri)
        if self.run_id is None:
            self._create()
        else:
            self.client.update_run(self.run_id, status="RUNNING")
            self.logged = self._last_step()

    def _create(self) -> None:
        run = self.client.create_run(self._experiment_id(), run_name=self.run_name)
        self.run_id = run.info.run_id
        self.opened = True  # now already: what follows may fail
        self._log(
            params=[
                self.package.entities.Param(name, str(value)) for name, value in self.params.items()
            ]
        )
        self.client.log_text(
            self.run_id, str(self.model if self.summary is None else self.summary), "summary.txt"
        )

    def _experiment_id(self) -> str:
        known = os.environ.get("MLFLOW_EXPERIMENT_ID")  # mlflow.set_experiment puts it there, too
        if (
            known
            and not self.experiment
            and self.tracking_uri in (None, self.package.get_tracking_uri())
        ):
            return known  # of the store that MLflow is set to; in another one it would be another experiment
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = self.client.get_experiment_by_name(name)
        return str(self.client.create_experiment(name) if found is None else found.experiment_id)

    def _last_step(self) -> int:
        """The last epoch in the run: one may have been logged, and not saved in the checkpoint any more."""
        names = self.client.get_run(self.run_id).data.metrics
        points = [
            point for name in names for point in self.client.get_metric_history(self.run_id, name)
        ]
        return max((int(point.step) for point in points), default=0)

    def _log(self, **items: Any) -> None:
        self.client.log_batch(self.run_id, **items)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)  # in ms
        for name in sorted(
            values, key=lambda name: REFUSED.search(name) is not None
        ):  # what may stay does
            if name not in self.names:
                self.names[name] = self._free(REFUSED.sub("_", name))
        named = {self.names[name]: value for name, value in values.items()}
        self._log(
            metrics=[
                self.package.entities.Metric(name, value, now, epoch)
                for name, value in named.items()
            ]
        )

    def _free(self, name: str) -> str:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        return next(
            free for free in itertools.chain([name], numbered) if free not in self.names.values()
        )

    def close(self, error: BaseException | None) -> None:
        failed = "FAILED" if isinstance(error, Exception) else "KILLED"
        self.client.set_terminated(self.run_id, "FINISHED" if error is None else failed)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"names": dict(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.names = dict(state["names"])
