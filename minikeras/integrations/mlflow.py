"""MLflow: a fit as a run in its tracking store."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from minikeras.integrations.tracking import Tracker, as_dict, import_optional

REFUSED = re.compile(r"[^\w/.: -]")  # characters that MLflow refuses in the name of a metric

PACKAGE = ("mlflow", "MLflow", "mlflow-skinny alembic sqlalchemy")  # as for import_optional


class MLflow(Tracker):
    """Log each epoch's row of the history, and the learning rates, to a run of MLflow.

    The metrics' names are the history's columns ("loss", "val_loss", "lr"), and their steps are the
    epochs. A character that MLflow refuses, such as the @ of "acc@1", becomes _; if the name is
    taken, _2, _3, ... is added. List this callback after those that add to the logs, such as
    LRScheduler.

    The run ends as FINISHED, after an error as FAILED, and after Ctrl-C or SIGTERM as KILLED. A
    resumed fit continues its run. Several processes log one run, from rank 0.

    Args:
        experiment: its name; it is created if needed. Default that of `mlflow.set_experiment`, or
            of MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or else MLflow's own.
        run_name: by default MLflow makes one up.
        tracking_uri: a server, or a file: "sqlite:///mlflow.db". Default MLflow's own, or
            MLFLOW_TRACKING_URI.
        params: name -> value, the settings of the run.
        summary: what `model.summary(...)` returned, for the artifact "summary.txt"; default the
            model as torch prints it.

    Raises:
        ModuleNotFoundError: the package is missing: pip install mlflow-skinny alembic sqlalchemy.
        TypeError: `params` is not a dict. Errors of MLflow itself are raised at the first epoch.

    The extra installs what is needed to write; to look at the runs with `mlflow ui`, also
    `pip install mlflow`::

        from minikeras.integrations.mlflow import MLflow

        runs = MLflow("ring", params={"lr": 0.01}, tracking_uri="sqlite:///mlflow.db")
        model.fit(30, dl_train, dl_valid, callbacks=[runs])
    """

    opened = ("client",)

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
        self.start_new_run()
        import_optional(*PACKAGE)
        self.experiment = experiment
        self.run_name = run_name
        self.tracking_uri = tracking_uri
        self.params = {} if params is None else as_dict("params", params)
        self.summary = summary

    @property
    def package(self) -> Any:
        """The package; not an attribute, since no copy can hold it."""
        return import_optional(*PACKAGE)

    def start_new_run(self) -> None:
        super().start_new_run()
        self.names: dict[str, str] = {}  # column -> name of the metric

    def open(self, epoch: int) -> None:
        self.client = self.package.MlflowClient(tracking_uri=self.tracking_uri)
        if self.run_id is None:
            self._create_run()
        else:
            self.client.update_run(self.run_id, status="RUNNING")
            self.logged_before = self._last_step()

    def _create_run(self) -> None:
        run = self.client.create_run(self._experiment_id(), run_name=self.run_name)
        self.run_id = run.info.run_id
        self.is_open = True  # set here already, since what follows may fail
        params = []
        for name, value in self.params.items():
            params.append(self.package.entities.Param(name, str(value)))
        self.client.log_batch(self.run_id, params=params)
        summary = self.model if self.summary is None else self.summary
        self.client.log_text(self.run_id, str(summary), "summary.txt")

    def _experiment_id(self) -> str:
        known = os.environ.get("MLFLOW_EXPERIMENT_ID")  # also set by mlflow.set_experiment
        if known and not self.experiment:
            # the id belongs to the store that MLflow is set to; in another store it would be
            # another experiment
            if self.tracking_uri in (None, self.package.get_tracking_uri()):
                return known
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            return str(self.client.create_experiment(name))
        return str(experiment.experiment_id)

    def _last_step(self) -> int:
        """Return the last epoch in the run; the checkpoint may have been saved before it."""
        last = 0
        for name in self.client.get_run(self.run_id).data.metrics:
            for point in self.client.get_metric_history(self.run_id, name):
                last = max(last, int(point.step))
        return last

    def write(self, epoch: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)  # in ms
        # names that MLflow takes come first, so that they stay as they are
        for name in sorted(values, key=lambda name: REFUSED.search(name) is not None):
            if name not in self.names:
                self.names[name] = self._free_name(REFUSED.sub("_", name))
        metrics = []
        for name, value in values.items():
            metrics.append(self.package.entities.Metric(self.names[name], value, now, epoch))
        self.client.log_batch(self.run_id, metrics=metrics)

    def _free_name(self, name: str) -> str:
        free = name
        number = 1
        while free in self.names.values():
            number += 1
            free = f"{name}_{number}"
        return free

    def close(self, error: BaseException | None) -> None:
        if error is None:
            status = "FINISHED"
        elif isinstance(error, Exception):
            status = "FAILED"
        else:
            status = "KILLED"
        self.client.set_terminated(self.run_id, status)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"names": dict(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.names = dict(state["names"])
