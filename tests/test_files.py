"""Files that are odd, shared, damaged or crafted: refused or whole, and nothing else is touched."""

import copy
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compare import assert_equal_tensors
from helpers.files import run_file
from helpers.models import Net, compiled, points
from torch import nn

import minikeras
from minikeras import CheckpointError
from minikeras.checkpoint.file import dump, previous, read, write
from minikeras.support import atomic

DELETE = object()


# --- where a path leads ---------------------------------------------------------------------------


@pytest.mark.usefixtures("each_fit_in_a_process_of_its_own")
@pytest.mark.parametrize("there", [True, False])
def test_file_behind_a_symbolic_link_is_written_and_the_link_stays(there, tmp_path):
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "real.pt"
    middle = tmp_path / "middle.pt"
    link = tmp_path / "run.pt"
    middle.symlink_to("disk/real.pt")
    link.symlink_to("middle.pt")
    if there:
        run_file(real, epochs=1)
    run_file(link, epochs=2)
    assert link.is_symlink()
    assert middle.is_symlink()
    assert len(read(real)["history"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "middle.pt", "run.pt"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == [
        "real.pt",
        "real.pt.prev",
    ]
    Net().load(link)
    real.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"real\.pt\.prev\. The previous version is used instead"):
        Net().load(link)


def test_file_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "w.pt").symlink_to("w.pt")
    for call in (Net().save, Net().load):
        with pytest.raises(OSError, match="circle"):
            call(tmp_path / "w.pt")


def test_file_path_expands_the_home_folder_and_ignores_chdir_in_a_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    callbacks = [
        minikeras.LambdaCallback(on_epoch_end=lambda epoch, logs: os.chdir(tmp_path / "elsewhere")),
        minikeras.ModelCheckpoint("weights/{epoch}.pt"),
        minikeras.CSVLogger("log.csv"),
    ]
    compiled().fit(3, points(40), verbose=0, checkpoint="run.pt", callbacks=callbacks)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "elsewhere",
        "log.csv",
        "run.pt",
        "run.pt.prev",
        "weights",
    ]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4
    assert len(read(tmp_path / "run.pt")["history"]) == 3
    model = compiled()
    callbacks = [minikeras.ModelCheckpoint("~/best.pt"), minikeras.CSVLogger("~/log.csv")]
    model.fit(1, points(40), verbose=0, checkpoint="~/run.pt", callbacks=callbacks)
    model.save("~/w.pt")
    model.load("~/w.pt")
    model.export("~/m.pt2", points(2)[0])
    there = sorted(path.name for path in (tmp_path / "home").iterdir())
    assert there == ["best.pt", "log.csv", "m.pt2", "run.pt", "w.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_file_path_of_a_fifo_or_a_device_is_refused_at_once(tmp_path):
    fifo = tmp_path / "w.pt"
    os.mkfifo(fifo)
    safe = tmp_path / "w.safetensors"
    os.mkfifo(safe)
    for path in (fifo, safe, Path("/dev/zero")):
        kind = "a device" if path.name == "zero" else "a FIFO"
        with pytest.raises(CheckpointError, match=f"is {kind}, not a regular file"):
            Net().load(path)
        with pytest.raises(OSError, match=f"is {kind}, not a regular file"):
            Net().save(path)
        for callback in (minikeras.ModelCheckpoint(path), minikeras.CSVLogger(path, append=True)):
            with pytest.raises(OSError, match=f"is {kind}, not a regular file"):
                compiled().fit(1, points(8), verbose=0, callbacks=[callback])
    with pytest.raises(CheckpointError, match="is a FIFO, not a regular file"):
        run_file(fifo)


@pytest.mark.parametrize("path", ["", ".", "folder/", "a\0b", 3, b"w.pt", True])
def test_file_path_of_a_wrong_type_is_refused_by_every_writer(path):
    expected = ValueError if isinstance(path, str) else TypeError
    calls = [Net().save, Net().load, minikeras.ModelCheckpoint, minikeras.CSVLogger, run_file]
    for call in calls:
        with pytest.raises(expected, match=r'path of a file.* Pass one, such as "run\.pt"\.$'):
            call(path)


def test_file_path_of_a_folder_is_not_the_run_in_it(tmp_path):
    run_file(tmp_path / "exp" / "run.pt", epochs=1)
    for call in (Net().load, Net().save, run_file):
        with pytest.raises(
            (CheckpointError, IsADirectoryError),
            match=r"Pass the path of the file in it, .*exp/run.pt",
        ):
            call(tmp_path / "exp")
    assert [path.name for path in (tmp_path / "exp").iterdir()] == ["run.pt"]
    Net().load(tmp_path / "exp" / "run.pt")


def test_file_path_of_two_writers_is_refused_before_the_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.pt").symlink_to("run.pt")
    kinds = minikeras.ModelCheckpoint, minikeras.CSVLogger
    calls = [
        ("run.pt", [kinds[0]("./run.pt")]),
        ("run.pt", [kinds[0](tmp_path / "link.pt")]),
        ("run.pt", [kinds[1]("run.pt")]),
        ("run.pt", [kinds[0]("run.pt.prev")]),
        ("run-3.pt", [kinds[0]("run-{epoch}.pt")]),
        (None, [kinds[0]("w.pt"), kinds[0]("w.pt")]),
        (None, [kinds[0]("{epoch}.pt"), kinds[0]("{epoch}.pt")]),
        (None, [kinds[1]("w.csv"), kinds[1]("w.csv")]),
    ]
    for path, callbacks in calls:
        with pytest.raises(ValueError, match=r"would write one file\. Give each a path of its own"):
            compiled().fit(1, points(8), verbose=0, checkpoint=path, callbacks=callbacks)
    assert [path.name for path in tmp_path.iterdir()] == ["link.pt"]
    callbacks = [
        kinds[0]("{epoch}.pt"),
        kinds[0]("best.pt"),
        kinds[1]("log.csv"),
        kinds[1]("more.csv"),
    ]
    compiled().fit(1, points(8), verbose=0, checkpoint="run.pt", callbacks=callbacks)


def test_model_checkpoint_keeps_no_file_before_the_newest_and_save_does(tmp_path):
    model = compiled()
    model.fit(3, points(8), verbose=0, callbacks=[minikeras.ModelCheckpoint(tmp_path / "best.pt")])
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    model.save(tmp_path / "best.pt")
    assert previous(tmp_path / "best.pt").exists()


def test_checkpoint_of_an_older_script_says_how_to_start_again_and_that_works(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path, epochs=2)
    other = minikeras.Model(nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()))
    with pytest.raises(CheckpointError) as raised:
        run_file(path, model=other)
    assert str(raised.value).endswith(
        f"To start from scratch, delete {path} and {path}.prev, or pass another path."
    )
    path.unlink()
    previous(path).unlink()
    run_file(path, model=other)


# --- writers --------------------------------------------------------------------------------------

WRITER = """
import sys, torch
from pathlib import Path
from minikeras.checkpoint.file import dump, write
for number in range(60):
    value = {"number": number, "values": torch.full((20_000,), float(number))}
    write(Path(sys.argv[1]), dump(value))
"""


def test_file_written_by_two_processes_is_never_damaged(tmp_path):
    path = tmp_path / "w.pt"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(2)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        for place in (path, previous(path)):
            try:
                value = read(place)
            except FileNotFoundError:
                continue
            seen += 1
            assert (value["values"] == value["number"]).all()
        time.sleep(0.005)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pt", "w.pt.prev"]


def test_temporary_file_of_a_killed_writer_is_removed_and_that_of_a_living_one_is_not(
    tmp_path, monkeypatch
):
    path = tmp_path / "w.pt"
    left = atomic.temporary(path)
    alive = atomic.temporary(path)
    users = tmp_path / "w.pt.tmp"
    for file in (left, users):
        file.write_bytes(b"half")
    with atomic.claim(alive):
        Net().save(path)
        assert left.exists()  # it may be only just begun
        monkeypatch.setattr(atomic, "SETTLED", -1.0)
        Net().save(path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["w.pt", "w.pt.prev", alive.name, users.name]
        )


def test_temporary_file_that_is_a_link_is_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "0" * 16)
    (tmp_path / "w.pt.0000000000000000.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError):
        Net().save(tmp_path / "w.pt")
    assert precious.read_text() == "mine"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_save_interrupted_by_ctrl_c_keeps_the_file_before_it(tmp_path):
    script = textwrap.dedent("""
    import signal, sys, time, torch, minikeras
    from torch import nn
    model = minikeras.Model(nn.Sequential(*[nn.Linear(32, 32) for _ in range(80)]))
    path = sys.argv[1]
    begin = time.monotonic()
    model.save(path)
    seconds = time.monotonic() - begin
    def ctrl_c(number, frame): raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, ctrl_c)
    came = 0
    for number in range(40):
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds * (number % 20 + 1) / 25)
            model.save(path)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            came += 1
        minikeras.Model(model.net).load(path)
    print(came)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w.pt")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# --- names of weights -----------------------------------------------------------------------------


def test_load_takes_names_of_compiled_networks_into_plain_ones_and_back(tmp_path):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(torch.compile(inner, backend="eager").state_dict(), tmp_path / "whole.pt")
    nested = torch.compile(
        nn.Sequential(torch.compile(inner[0], backend="eager"), inner[1]), backend="eager"
    )
    torch.save(nested.state_dict(), tmp_path / "nested.pt")
    torch.save(
        {f"net.{name}": value for name, value in nested.state_dict().items()}, tmp_path / "part.pt"
    )
    for name in ("whole.pt", "nested.pt", "part.pt"):
        model = minikeras.Model(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        model.load(tmp_path / name)
        assert torch.equal(model.net[0].weight, inner[0].weight)
        model.save(tmp_path / "plain.pt")
        back = minikeras.Model(
            torch.compile(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), backend="eager")
        )
        back.load(tmp_path / "plain.pt")
        assert torch.equal(back.state_dict()["net.0.weight"], inner[0].weight)


def test_load_takes_a_file_with_one_name_of_tied_weights(tmp_path):
    from safetensors.torch import save_model

    def tied():
        model = minikeras.Model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        model.net[1].weight = model.net[0].weight
        return model

    first = tied()
    second = tied()
    save_model(first, str(tmp_path / "tied.safetensors"))
    second.load(tmp_path / "tied.safetensors")
    assert torch.equal(second.net[1].weight, first.net[0].weight)
    assert second.net[1].weight is second.net[0].weight
    with pytest.raises(CheckpointError, match=r"missing: net\.1\.weight"):
        minikeras.Model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).load(
            tmp_path / "tied.safetensors"
        )


# --- values that do not fit -----------------------------------------------------------------------

MISFITS = {
    "a number": 3.0,
    "None": None,
    "a list": [1.0],
    "sparse": torch.ones(1).to_sparse(),
    "meta": torch.ones(1, device="meta"),
    "complex": torch.ones(1, dtype=torch.complex64),
    "int8": torch.ones(1, dtype=torch.int8),
    "bool": torch.ones(1, dtype=torch.bool),
    "too large": torch.full((1,), 1e300, dtype=torch.float64),
    "another shape": torch.ones(2),
}


@pytest.mark.parametrize("name", MISFITS)
def test_load_of_a_value_that_does_not_fit_changes_no_weight(name, tmp_path):
    model = Net()
    path = tmp_path / "w.pt"
    before = copy.deepcopy(model.state_dict())
    torch.save(
        {key: torch.ones_like(value) for key, value in before.items()}
        | {"fc2.bias": MISFITS[name]},
        path,
    )
    with pytest.raises(CheckpointError):
        model.load(path)
    assert_equal_tensors(model.state_dict(), before)


def test_load_with_a_hook_that_fails_leaves_the_model_as_it_was(tmp_path):
    class Failing(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            raise ValueError("no")

    model = minikeras.Model(nn.Sequential(nn.Linear(2, 2), Failing(2, 1)))
    before = copy.deepcopy(model.state_dict())
    torch.save({key: value + 1 for key, value in before.items()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no The model is unchanged"):
        model.load(tmp_path / "w.pt")
    assert_equal_tensors(model.state_dict(), before)


@pytest.mark.parametrize("value", [torch.full((1,), torch.nan), torch.ones(1, dtype=torch.float64)])
def test_load_takes_nan_and_other_floats(value, tmp_path):
    model = Net()
    torch.save(model.state_dict() | {"fc2.bias": value}, tmp_path / "w.pt")
    model.load(tmp_path / "w.pt")
    assert torch.allclose(model.fc2.bias, value.float(), equal_nan=True)


# --- crafted files --------------------------------------------------------------------------------


class Call:
    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args


def nest(levels):
    value = ["x"]
    for _ in range(levels):
        value = [value] * 10
    return value


def tuples(levels, width):
    value = ("x",)
    for _ in range(levels):
        value = (value,) * width
    return value


class Key:
    """Pickled as what it holds, but never hashed here."""

    def __init__(self, value):
        self.value = value


class Pickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        super().save(obj.value if isinstance(obj, Key) else obj, save_persistent_id)


def pickled(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def selfish():
    value = []
    value.append(value)
    return value


BOMBS = {
    "bytearray": lambda: Call(bytearray, 2**30),
    "a tensor by its class": lambda: Call(torch.Tensor, 2**28),
    "a storage by its class": lambda: Call(torch.UntypedStorage, 2**30),
    "lists of lists": lambda: nest(9),
    "a key that is hashed for ever": lambda: {Key(tuples(9, 10)): 1},
    "a key of many levels": lambda: {Key(tuples(5000, 1)): 1},
    "itself": selfish,
    "a long number": lambda: 10**1000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_load_of_a_small_file_takes_little_memory_and_time(name, tmp_path):
    torch.save(Net().state_dict(), tmp_path / "good.pt")
    path = tmp_path / "w.pt"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        program = pickled({"a": BOMBS[name]()})
    finally:
        sys.setrecursionlimit(limit)
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w") as new:
        for entry in good.infolist():
            new.writestr(
                entry.filename, program if entry.filename.endswith("data.pkl") else good.read(entry)
            )
    with pytest.raises(CheckpointError):
        Net().load(path)


def test_load_refuses_tensors_that_claim_more_than_the_file_has(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        contents = {entry.filename: good.read(entry) for entry in good.infolist()}
    name = next(name for name in contents if name.endswith("data.pkl"))
    assert contents[name].count(b"K\x04") == 2  # of the storage, and of the tensor
    first, second, third = contents[name].split(b"K\x04")
    large = b"J" + (10**9).to_bytes(4, "little")
    programs = [
        first + large + second + b"K\x04" + third,
        first + b"K\x04" + second + large + third,
    ]
    for program in programs:
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
            for entry, content in contents.items():
                new.writestr(entry, program if entry == name else content)
        with pytest.raises(CheckpointError, match=r"is damaged: (it claims|a tensor)"):
            read(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry, content in contents.items():
            new.writestr(entry, content)
    with pytest.raises(CheckpointError, match=r"it is compressed, which torch\.save does not do"):
        read(tmp_path / "w.pt")


class Cut(minikeras.Callback):
    def on_batch_end(self, batch, logs):
        if batch == 2 and len(self.model._run.epochs) == 1:
            raise SystemExit


def fit_of(path, *callbacks):
    torch.manual_seed(0)
    model = minikeras.Model(
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Sigmoid())
    )
    model.compile(nn.BCELoss(), torch.optim.Adam(model.parameters(), 0.01), device="cpu")
    before = copy.deepcopy(model.state_dict())
    listed = [minikeras.EMA(0.9), minikeras.EarlyStopping("loss", patience=9), *callbacks]

    def call():
        model.fit(
            3,
            points(60),
            batch_size=20,
            verbose=0,
            checkpoint=path,
            checkpoint_every=1,
            callbacks=listed,
        )

    return model, before, call


def places_in(value, where=()):
    """The path to each place of a nest; long lists at their ends alone."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))[:2] + list(enumerate(value))[-1:]
    else:
        return
    for key, part in items:
        yield (*where, key)
        yield from places_in(part, (*where, key))


def changed(value, path, new):
    """A copy of a nest with another value at that place."""
    if not path:
        return new
    if isinstance(value, tuple):
        parts = list(value)
        parts[path[0]] = changed(parts[path[0]], path[1:], new)
        return tuple(parts)
    value = copy.copy(value)
    if len(path) == 1 and new is DELETE:
        del value[path[0]]
    else:
        value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


WRONG = [
    "text",
    -5,
    2**40,
    3.5,
    None,
    [],
    {},
    torch.ones(3),
    torch.zeros(0),
    float("nan"),
    (1, "x"),
    DELETE,
]


KNOWN = [  # that once went through, and failed after the first weight had moved
    (("totals", "sums", "loss"), 3.5),
    (("totals", "sums", "loss"), torch.ones(1)),
    (("totals", "counts", "loss"), 0),
    (("train", "epochs"), 3.5),
    (("train", "loader"), float("nan")),
    (("train", "draws"), {"x": {}}),
    (("train", "draws"), {"0": {"the global numpy": ("MT19937", [1], 2**40, 0, 0.0)}}),
    (("optimizers", "", "names"), float("nan")),
    (("optimizers", "", "names"), [["net.0.weight"]]),
    (("position", "logs"), {}),
    (("groups", ""), "text"),
    (("begun", "groups", ""), 3.5),
    (("begun", "compile", "accumulate"), []),
    (("in_eval",), 3.5),
    (("stays_in_eval",), 3.5),
    (("loss buffers",), {"x": 1}),
    (("loss frozen",), ["weight"]),
    (("attributes",), {"model.net.0": {"forward": "text"}}),
    (("attributes",), {"model.net.0": {"a b": 1}}),
    (("attributes",), {"model.net.0": {"scale": {"x": 1}}}),
    (("random", "attributes"), 3.5),
    (("random", "python", 2), {}),
    (("random", "numpy", "has_gauss"), 2**40),
]


def is_refused(good, place, new, folder):
    """Whether a fit refuses that change of its file; nothing has changed then."""
    path = folder / "run.pt"
    write(path, dump(changed(good, place, new)), keep=False)
    previous(path).unlink(missing_ok=True)
    model, before, call = fit_of(path)
    drawn = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    content = path.read_bytes()
    try:
        call()
    except CheckpointError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
            place,
            new,
        )
        assert not model.optimizer.state, (place, new)
        assert len(model.history) == 0
        now = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(now[0], drawn[0]), (place, new)
        assert now[1:] == drawn[1:], (place, new)
        assert path.read_bytes() == content
        assert [path.name for path in folder.iterdir()] == ["run.pt"]
        return True
    except UserWarning:  # taken, and told
        return False
    except Exception as error:
        raise AssertionError(f"{place} as {new!r}: {type(error).__name__}: {error}") from error
    return False


def test_checkpoint_with_any_changed_value_is_never_loaded_halfway(tmp_path):
    """Refused with all as it was, or harmless."""
    with pytest.raises(SystemExit):
        fit_of(tmp_path / "run.pt", Cut())[2]()
    good = read(tmp_path / "run.pt")
    cases = [(place, new) for place in places_in(good) for new in WRONG]
    chosen = random.Random(0).sample(cases, 80)
    refused = [is_refused(good, place, new, tmp_path) for place, new in chosen]
    assert sum(refused) > 40


def test_checkpoint_values_that_no_run_has_written_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        fit_of(tmp_path / "run.pt", Cut())[2]()
    good = read(tmp_path / "run.pt")
    for place, new in KNOWN:
        assert is_refused(good, place, new, tmp_path), (place, new)


def test_checkpoint_of_another_network_is_not_called_damaged(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(SystemExit):
        fit_of(path, Cut())[2]()
    other = compiled(minikeras.Model(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1), nn.Sigmoid())))
    with pytest.raises(
        CheckpointError,
        match=r"holds the weights of another architecture than Model: .*net\.0\.weight",
    ):
        other.fit(3, points(60), batch_size=20, verbose=0, checkpoint=path)


def test_checkpoint_position_that_would_crash_numpy_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path, epochs=1)
    state = read(path)
    for position in (2**30, -5, 625):
        state["random"]["numpy"]["state"]["pos"] = position
        write(path, dump(state))
        with pytest.raises(
            CheckpointError, match=r"random numpy pos is .* and not a position of 0 to 624"
        ):
            run_file(path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_checkpoint_with_damaged_weights_is_refused_or_harmless(name, tmp_path):
    """Bytes set, removed, doubled and swapped: what is loaded is what was saved."""
    path = tmp_path / name
    draw = random.Random(0)
    model = Net()
    model.save(path)
    whole = path.read_bytes()
    true = copy.deepcopy(model.state_dict())
    refused = 0
    for number in range(200):
        damaged = bytearray(whole)
        at = draw.randrange(len(whole))
        if number % 4 == 0:
            damaged[at] = draw.randrange(256)
        elif number % 4 == 1:
            del damaged[at : at + draw.randrange(1, 60)]
        elif number % 4 == 2:
            damaged[at:at] = damaged[at : at + 40]
        else:
            damaged[at : at + 8] = draw.randbytes(8)
        path.write_bytes(damaged)
        other = Net()
        before = copy.deepcopy(other.state_dict())
        try:
            other.load(path)
        except CheckpointError:
            refused += 1
            assert_equal_tensors(other.state_dict(), before)
        else:
            assert_equal_tensors(other.state_dict(), true)
    assert refused > 100
