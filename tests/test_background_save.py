"""fit(checkpoint=) writes in a thread: what is in the file, when, and what happens if it fails."""

import io
import os
import signal
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.compare import copy_weights
from helpers.models import compiled, points
from torch.utils.data import DataLoader, TensorDataset

from minikeras import Callback, CheckpointError, LambdaCallback
from minikeras.checkpoint import background, snapshot
from minikeras.checkpoint.file import previous, read
from minikeras.checkpoint.state import Checkpoint
from minikeras.support import atomic

LIMIT = 60  # seconds after which a test that hangs fails


def is_saving_thread():
    return threading.current_thread().name.startswith(background.THREAD + "_")


class Disk:
    """A disk that can be slow or full, for the thread that writes alone."""

    def __init__(self, monkeypatch):
        self.is_blocked = False
        self.is_full = False
        self.free = threading.Event()
        self.reached = threading.Event()  # by a write that is blocked
        self.saw_free = []  # of each blocked write: it was let go before the limit
        self.seconds = 0.0
        self.fsync = os.fsync
        monkeypatch.setattr(atomic.os, "fsync", self._fsync)

    def _fsync(self, descriptor):
        if is_saving_thread():
            time.sleep(self.seconds)
            if self.is_full:
                raise OSError(28, "No space left on device")
            if self.is_blocked:
                self.reached.set()
                self.saw_free.append(self.free.wait(LIMIT))
        self.fsync(descriptor)

    def let_go(self):
        assert self.reached.wait(LIMIT)
        self.is_blocked = False
        self.free.set()


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


class Counts(Callback):
    """Call functions at the end of a batch, by its epoch and number."""

    def __init__(self, acts):
        self.acts = acts
        self.epoch = 0

    def on_epoch_begin(self, epoch):
        self.epoch = epoch

    def on_batch_end(self, batch, logs):
        act = self.acts.get((self.epoch, batch))
        if act is not None:
            act()


def fit(path, epochs=2, callbacks=(), data=None, model=None, **kwargs):
    model = compiled(metrics_dict={}) if model is None else model
    data = points(96) if data is None else data  # three batches
    model.fit(epochs, data, verbose=0, checkpoint=path, callbacks=list(callbacks), **kwargs)
    return model


def position(path):
    at = read(path)["position"]
    return at["epoch"], at["step"]


def no_thread_is_left():
    deadline = time.monotonic() + 5
    while is_saving() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_saving()


def is_saving():
    return any(thread.name.startswith(background.THREAD) for thread in threading.enumerate())


# --- the fit goes on ------------------------------------------------------------------------------


def test_training_goes_on_while_the_file_is_written(disk, tmp_path):
    disk.is_blocked = True
    fit(tmp_path / "run.pt", callbacks=[Counts({(2, 2): disk.let_go})])
    assert disk.saw_free[0]
    assert position(tmp_path / "run.pt") == (3, 0)
    assert position(previous(tmp_path / "run.pt")) == (2, 0)
    assert no_thread_is_left()


def test_workers_are_forked_while_the_file_is_written(disk, tmp_path):
    disk.is_blocked = True
    loader = DataLoader(TensorDataset(*points(96)), 32, num_workers=1)
    fit(tmp_path / "run.pt", data=loader, callbacks=[Counts({(2, 2): disk.let_go})])
    assert disk.saw_free[0]


def status_of(child):
    """Wait for a forked process; return its exit status, or None if it hangs."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return None


def test_forked_process_does_not_wait_for_the_thread_of_its_parent(disk, tmp_path):
    disk.is_blocked = True
    statuses = []

    def fork():
        child = os.fork()
        if not child:
            background.wait_for_writes()  # as a fit or a load would
            os._exit(7)
        statuses.append(status_of(child))
        disk.let_go()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of such a fork
        fit(tmp_path / "run.pt", callbacks=[Counts({(2, 1): fork})])
    assert statuses == [7]


def test_forked_process_that_leaves_the_fit_does_not_wait_either(disk, tmp_path):
    disk.is_blocked = True
    own = os.getpid()
    statuses = []

    def fork():
        child = os.fork()
        if not child:
            raise SystemExit
        statuses.append(status_of(child))
        disk.let_go()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of such a fork
            fit(tmp_path / "run.pt", callbacks=[Counts({(2, 1): fork})])
    finally:
        if os.getpid() != own:
            os._exit(7)
    assert statuses == [7]


def test_file_is_a_snapshot_that_later_batches_do_not_change(disk, tmp_path):
    """All that training changes in place is changed before the file is written."""
    path = tmp_path / "run.pt"
    model = compiled()
    model.compile(torch.nn.BCELoss(), torch.optim.Adam(model.parameters()), device="cpu")
    model.register_buffer("counter", torch.zeros(1000))
    callback = Counts({})
    kept = {}
    seen = {}

    def keep():
        """The next save is of this state."""
        kept["model"] = copy_weights(model)
        kept["momenta"] = [state["exp_avg"].clone() for state in model.optimizer.state.values()]
        kept["random"] = torch.get_rng_state()
        callback.values = {"tensor": torch.ones(3), "list": [1, {"two": 2}]}
        callback.array = np.ones(3)
        disk.is_blocked = True

    def spoil():
        assert disk.reached.wait(LIMIT)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(7.0)
        for state in model.optimizer.state.values():
            state["exp_avg"].fill_(7.0)
        model.optimizer.param_groups[0]["lr"] = 7.0
        torch.rand(3)
        callback.values["tensor"].fill_(7.0)
        callback.values["list"][1]["two"] = 7
        callback.array.fill(7.0)
        disk.let_go()
        background.wait_for_writes()
        seen.update(read(path))

    callback.state_dict = lambda: {"values": callback.values, "array": callback.array}
    callback.load_state_dict = lambda state: None
    callback.values = {}
    callback.array = np.zeros(3)
    callback.acts = {(1, 1): keep, (1, 2): spoil}
    fit(path, epochs=1, model=model, callbacks=[callback], checkpoint_every=1)
    assert (seen["position"]["epoch"], seen["position"]["step"]) == (1, 1)
    assert all(torch.equal(seen["model"][name], value) for name, value in kept["model"].items())
    momenta = [state["exp_avg"] for state in seen["optimizers"][""]["state"]["state"].values()]
    assert all(map(torch.equal, momenta, kept["momenta"]))
    assert seen["optimizers"][""]["state"]["param_groups"][0]["lr"] == 0.001
    assert torch.equal(seen["random"]["torch"], kept["random"])
    saved = seen["callbacks"]["Counts"]
    assert saved["values"]["tensor"].tolist() == [1, 1, 1]
    assert saved["values"]["list"] == [1, {"two": 2}]
    assert next(iter(saved["array"].values())).tolist() == [1, 1, 1]


def test_saves_are_written_one_after_another_in_their_order(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    events = []
    put = atomic.put

    def watched_put(source, target):
        if target == path:
            events.append(position(source))
        put(source, target)

    write = background.write

    def watched_write(*args, **kwargs):
        events.append("begin")
        write(*args, **kwargs)
        events.append("end")

    monkeypatch.setattr(atomic, "put", watched_put)
    monkeypatch.setattr(background, "write", watched_write)
    fit(path, checkpoint_every=1)
    # batches 1 to 3, the end of epoch 1, batches 1 to 3; the last state is not the thread's
    positions = [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    expected = []
    for at in positions:
        expected += ["begin", at, "end"]
    assert events == [*expected, (3, 0)]


def test_callback_finds_the_file_of_the_epoch_before_when_an_epoch_ends(disk, tmp_path):
    path = tmp_path / "run.pt"
    disk.seconds = 0.1  # longer than an epoch
    seen = []

    def look(epoch, logs):
        if epoch > 1:
            seen.append(len(read(path)["history"]))

    fit(path, epochs=4, callbacks=[LambdaCallback(on_epoch_end=look)])
    assert seen == [1, 2, 3]


def test_load_in_a_callback_waits_for_the_last_save(disk, tmp_path):
    path = tmp_path / "run.pt"
    disk.seconds = 0.1
    model = compiled()
    other = compiled()
    weights = []
    saved = LambdaCallback(on_epoch_begin=lambda epoch: weights.append(copy_weights(model)))
    fit(path, model=model, callbacks=[saved, Counts({(2, 1): lambda: other.load(path)})])
    assert all(torch.equal(other.state_dict()[name], weights[1][name]) for name in weights[1])


def test_fit_within_a_fit_writes_its_own_file(disk, tmp_path):
    disk.seconds = 0.05
    inner = LambdaCallback(on_epoch_end=lambda epoch, logs: fit(tmp_path / f"inner {epoch}.pt"))
    fit(tmp_path / "run.pt", callbacks=[inner])
    for name in ("run.pt", "inner 1.pt", "inner 2.pt"):
        assert position(tmp_path / name) == (3, 0)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".prev"] * 3 + [".pt"] * 3


def test_without_memory_for_a_copy_the_file_is_written_at_once(tmp_path, monkeypatch):
    class Small(io.BytesIO):
        def write(self, data):
            raise MemoryError

    positions = []
    monkeypatch.setattr(snapshot, "io", SimpleNamespace(BytesIO=Small))
    look = Counts({(2, 1): lambda: positions.append(position(tmp_path / "run.pt"))})
    fit(tmp_path / "run.pt", callbacks=[look])
    assert positions == [(2, 0)]


# --- the fit ends ---------------------------------------------------------------------------------


def test_error_in_a_fit_waits_for_the_file_and_says_what_is_in_it(disk, tmp_path):
    path = tmp_path / "run.pt"
    disk.seconds = 0.2

    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as raised:
        fit(path, callbacks=[Counts({(2, 1): fail})])
    assert f"The last checkpoint is in {path}: epoch 2, step 0." in raised.value.__notes__[-1]
    assert position(path) == (2, 0)
    assert no_thread_is_left()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_break_in_a_fit_waits_for_the_file(error, disk, tmp_path):
    disk.seconds = 0.2

    def stop():
        raise error

    with pytest.raises(error):
        fit(tmp_path / "run.pt", callbacks=[Counts({(2, 1): stop})])
    assert position(tmp_path / "run.pt") == (2, 0)
    assert no_thread_is_left()


def test_signal_waits_for_the_save_before_its_own(disk, tmp_path):
    disk.seconds = 0.1
    send = Counts({(2, 1): lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(SystemExit):
        fit(tmp_path / "run.pt", callbacks=[send])
    assert position(tmp_path / "run.pt") == (2, 1)
    assert position(previous(tmp_path / "run.pt")) == (2, 0)


def test_second_signal_during_the_wait_leaves_a_complete_file_and_no_thread(monkeypatch, tmp_path):
    """The thread sends two signals while the fit waits at the end of the epoch's training."""
    path = tmp_path / "run.pt"
    fsync = os.fsync
    writes = []
    waits = threading.Event()
    on_train_end = Checkpoint.on_train_end

    def waiting(self, fit):
        if fit.at.epoch == 2:
            waits.set()
        on_train_end(self, fit)

    def interrupting(descriptor):
        if is_saving_thread() and not writes:
            writes.append(True)
            assert waits.wait(LIMIT)
            for _ in range(2):
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        fsync(descriptor)

    monkeypatch.setattr(Checkpoint, "on_train_end", waiting)
    monkeypatch.setattr(atomic.os, "fsync", interrupting)
    with pytest.raises(SystemExit) as raised:
        fit(path)
    assert raised.value.code == 143
    assert position(path) == (2, 0)
    assert no_thread_is_left()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


# --- the file cannot be written -------------------------------------------------------------------


def test_failed_write_is_a_warning_at_the_next_save_and_the_fit_continues(disk, tmp_path):
    path = tmp_path / "run.pt"
    disk.is_full = True

    def emptied(epoch, logs):
        if epoch == 2:
            disk.is_full = False

    with pytest.warns(UserWarning, match="could not be written") as caught:
        fit(path, epochs=3, callbacks=[LambdaCallback(on_epoch_end=emptied)])
    assert [str(warning.message) for warning in caught] == [
        f"{path} could not be written: [Errno 28] No space left on device. No earlier checkpoint "
        "was written. The fit continues, and the next checkpoint is tried again."
    ]
    assert position(path) == (4, 0)
    assert position(previous(path)) == (3, 0)


def test_failed_write_within_an_epoch_is_tried_again_before_the_next_one_is_due(disk, tmp_path):
    path = tmp_path / "run.pt"
    disk.is_full = True
    positions = []

    def freed():
        background.wait_for_writes()
        disk.is_full = False

    def look():
        background.wait_for_writes()
        positions.append(position(path))

    steps = Counts({(1, 2): freed, (1, 3): look})
    with pytest.warns(UserWarning, match="the next checkpoint is tried again"):
        fit(path, epochs=1, callbacks=[steps], data=points(160), checkpoint_every=1)
    assert positions == [(1, 2)]
    disk.is_full = True
    path = tmp_path / "2"
    steps = Counts({(1, 4): freed, (1, 5): look})  # due after batches 3 and 6
    with pytest.warns(UserWarning, match="the next checkpoint is tried again"):
        fit(path, epochs=1, callbacks=[steps], data=points(224), checkpoint_every=3)
    assert positions == [(1, 2), (1, 4)]


def test_failed_write_is_told_when_an_error_ends_the_fit(disk, tmp_path):
    path = tmp_path / "run.pt"
    disk.is_full = True

    def fail():
        raise ValueError("mine")

    with (
        pytest.raises(ValueError, match="mine") as raised,
        pytest.warns(UserWarning, match="could not be written") as caught,
    ):
        fit(path, callbacks=[Counts({(2, 1): fail})])
    assert [str(warning.message) for warning in caught] == [
        f"{path} could not be written: [Errno 28] No space left on device. No earlier checkpoint "
        "was written. Free disk space or pass another path."
    ]
    assert not any("The last checkpoint" in note for note in raised.value.__notes__)
    assert list(tmp_path.iterdir()) == []


def test_last_state_that_cannot_be_written_is_an_error_after_an_earlier_warning(
    monkeypatch, tmp_path
):
    path = tmp_path / "run.pt"
    fsync = os.fsync
    count = [0]

    def filling(descriptor):
        count[0] += 1
        if count[0] > 2:  # of the first file, and of its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", filling)
    with (
        pytest.raises(CheckpointError, match="These last weights are not saved") as raised,
        pytest.warns(UserWarning, match="The checkpoint of epoch 2, step 0 is still there"),
    ):
        fit(path, epochs=3)
    assert "The checkpoint of epoch 2, step 0 is still there." in str(raised.value)
    assert position(path) == (2, 0)


def test_error_other_than_of_the_disk_is_raised_at_the_next_save(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("a fault of the writer")

    monkeypatch.setattr(background, "write", broken)
    with pytest.raises(RuntimeError, match="a fault of the writer"):
        fit(tmp_path / "run.pt")
    assert no_thread_is_left()


def test_state_that_cannot_be_serialized_raises_its_error_and_is_not_said_to_be_saved(
    monkeypatch, tmp_path
):
    def broken(*args):
        raise RuntimeError("a fault of torch.save")

    monkeypatch.setattr(torch, "save", broken)
    monkeypatch.setattr(snapshot.StatePickler, "dump", broken)
    with pytest.raises(RuntimeError, match=r"a fault of torch\.save") as raised:
        fit(tmp_path / "run.pt")
    assert not any("The last checkpoint" in note for note in raised.value.__notes__)
    assert no_thread_is_left()
    assert list(tmp_path.iterdir()) == []
