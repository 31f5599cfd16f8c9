"""What is in the files of TensorBoard, MLflow and W&B."""

import struct
import time

from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from minikeras.integrations.mlflow import MLflow
from minikeras.integrations.tensorboard import TensorBoard
from minikeras.integrations.wandb import WandB

STATES = {
    0: "FINISHED",
    1: "FAILED",
    255: "KILLED",
    "STATUS_SUCCESS": "FINISHED",
    "STATUS_FAILURE": "FAILED",
}


class Board:
    def __init__(self, folder):
        self.folder = folder / "board"

    def callback(self):
        return TensorBoard(self.folder, every=2, hparams={"lr": 0.1, "kind": "ring"})

    def table(self):
        return scalars(self.folder)

    def state(self):
        return STATES[status(self.folder)]

    def runs(self):
        return 1  # there is one for each folder


def events(folder):
    return EventAccumulator(str(folder), size_guidance={HISTOGRAMS: 0}).Reload()


def scalars(folder):
    """Return the values of each name in order, and check that each step is there once."""
    held = events(folder)
    points = {name: held.Scalars(name) for name in held.Tags()["scalars"]}
    for name, found in points.items():
        steps = [point.step for point in found]
        assert steps == sorted(set(steps)), name
    table = {}
    for name, found in points.items():
        table[name] = {point.step: point.value for point in found}
    return table


def status(folder):
    held = events(folder)
    content = held.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    return session_status(HParamsPluginData.FromString(content).session_end_info.status)


def session_status(number):
    from tensorboard.plugins.hparams.api_pb2 import Status

    return Status.Name(number)


class Store:
    """MLflow in a copy of an SQLite file, which takes seconds to create."""

    made = None

    def __init__(self, folder):
        self.uri = f"sqlite:///{folder}/mlflow.db"
        if Store.made is None:
            self.client().search_experiments()
            Store.made = (folder / "mlflow.db").read_bytes()
        (folder / "mlflow.db").write_bytes(Store.made)

    def callback(self):
        return MLflow("rings", "first", self.uri, {"lr": 0.1, "kind": "ring"})

    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def found(self):
        experiment = self.client().get_experiment_by_name("rings")
        return self.client().search_runs([experiment.experiment_id])

    def run(self):
        (run,) = self.found()
        return run

    def table(self):
        run = self.run()
        table = {}
        for name in run.data.metrics:
            found = self.client().get_metric_history(run.info.run_id, name)
            table[name] = {point.step: point.value for point in found}
            assert len(table[name]) == len(found), name
        return table

    def state(self):
        return self.run().info.status

    def runs(self):
        return len(self.found())


class Files:
    """W&B offline: a folder for each part of a run, all with its id."""

    def __init__(self, folder):
        self.folder = folder

    def callback(self):
        return WandB(
            "rings", "first", {"lr": 0.1, "kind": "ring"}, mode="offline", dir=str(self.folder)
        )

    def records(self, kind):
        files = sorted(self.folder.glob("wandb/offline-run-*/*.wandb"))
        found = []
        for file in files:
            for record in ended(file):
                if record.HasField(kind):
                    found.append(getattr(record, kind))
        return found

    def table(self):
        table = {}
        for row in self.records("history"):
            items = {item.key or item.nested_key[0]: float(item.value_json) for item in row.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    assert items["_step"] not in table.setdefault(name, {}), name
                    table[name][int(items["_step"])] = value
        return table

    def state(self):
        return STATES[self.records("exit")[-1].exit_code]

    def runs(self):
        return len({run.run_id for run in self.records("run")})


def ended(path):
    """Return the records up to the last; W&B's own process may still be writing them."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = list(records(path))
        if found and found[-1].HasField("exit"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def records(path):
    """Read a .wandb file: LevelDB's log of protobuf messages, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    whole = b""
    at = 7
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + size > len(data):
            return
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(whole)
            whole = b""
