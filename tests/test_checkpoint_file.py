"""Files of weights and of runs: loaded whole or refused, and never able to run code."""

import ast
import io
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.files import run_file
from helpers.models import Net, compiled, points
from helpers.paths import PACKAGE, TESTS
from torch import nn

import minikeras
from minikeras import CheckpointError
from minikeras.checkpoint.file import dump, previous, read, write

DATA = TESTS / "data"
REMEDY = (
    "There is no previous version: pass another path, or delete this file to start from scratch."
)
OF_LOAD = "If it is the wrong file, pass another path."


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pt", "folder/that/is/made/w.pt", "w.safetensors"])
def test_save_and_load_give_the_same_weights(name, tmp_path):
    model = Net()
    other = Net()
    model.save(tmp_path / name)
    other.load(str(tmp_path / name))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_save_writes_what_torch_loads_and_load_reads_what_torch_saved(tmp_path):
    model = Net()
    other = Net()
    model.save(tmp_path / "ours.pt")
    other.load_state_dict(torch.load(tmp_path / "ours.pt"))
    torch.save(other.state_dict(), tmp_path / "theirs.pt")
    third = Net()
    third.load(tmp_path / "theirs.pt")
    assert torch.equal(third.fc1.weight, model.fc1.weight)


def test_safetensors_of_others_are_loaded_and_tied_weights_are_saved(tmp_path):
    from safetensors.torch import save_file

    model = Net()
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    other = Net()
    other.load(tmp_path / "theirs.safetensors")
    assert torch.equal(other.fc1.weight, model.fc1.weight)
    tied = minikeras.Model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    tied.net[1].weight = tied.net[0].weight
    tied.save(tmp_path / "tied.safetensors")
    tied.load(tmp_path / "tied.safetensors")


def test_load_takes_the_weights_from_the_checkpoint_of_a_run(tmp_path):
    model = run_file(tmp_path / "run.pt")
    other = Net()
    other.load(tmp_path / "run.pt")
    assert torch.equal(other.fc1.weight, model.fc1.weight)


def test_load_refuses_weights_of_another_architecture_and_leaves_the_model_as_it_was(tmp_path):
    model = Net()
    path = tmp_path / "w.pt"
    state = model.state_dict()
    state["fc1.weight"] = torch.zeros(8, 3)
    state["extra"] = torch.zeros(1)
    del state["fc2.bias"]
    torch.save(state, path)
    before = model.fc2.weight.clone()
    with pytest.raises(CheckpointError) as raised:
        model.load(path)
    assert str(raised.value) == (
        f"{path} holds the weights of another architecture than Net: missing: fc2.bias; "
        "unexpected: extra; of another shape: fc1.weight (8, 3) instead of (8, 2). Build the "
        f"model as it was when the file was written. {OF_LOAD}"
    )
    assert torch.equal(model.fc2.weight, before)


def test_save_never_overwrites_a_folder_of_the_user(tmp_path):
    pairs = [("results", "results"), ("weights.pt", "weights.pt.prev")]
    for _, name in pairs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text("mine")
    for name, folder in pairs:
        for _ in range(2):
            with pytest.raises(IsADirectoryError) as raised:
                Net().save(tmp_path / name)
            assert (
                str(raised.value) == f"{tmp_path / folder} is a folder, but not one with a "
                "checkpoint. Pass the path of a file."
            )
        assert (tmp_path / folder / "data.txt").read_text() == "mine"


def test_load_refuses_weights_under_other_names_and_says_what_to_call(tmp_path):
    net = nn.Linear(2, 1)
    model = minikeras.Model(net)
    state = net.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save(
        {f"module.net.{name}": value for name, value in state.items()}, tmp_path / "wrapped.pt"
    )
    torch.save({"epoch": 3, "all": model.state_dict()}, tmp_path / "inner.pt")
    remedies = {
        "bare.pt": (
            "The keys are those of model.net: load them with model.net.load_state_dict(...)."
        ),
        "wrapped.pt": (
            'Each key has the prefix "module.", which the keys of the model do not have: save '
            "them without it."
        ),
        "inner.pt": (
            'The weights are under the key "all": call '
            'model.load_state_dict(torch.load(...)["all"]).'
        ),
    }
    for name, remedy in remedies.items():
        with pytest.raises(CheckpointError) as raised:
            model.load(tmp_path / name)
        assert str(raised.value).endswith(f". {remedy} {OF_LOAD}")


@pytest.mark.parametrize("path", [".", ""])
def test_checkpoint_without_a_file_name_is_refused(path):
    with pytest.raises(
        ValueError,
        match=r'checkpoint=".?" is not the path of a file. Pass one, such as "run\.pt"\.$',
    ):
        compiled().fit(1, points(20), checkpoint=path, verbose=0)


def test_load_refuses_a_missing_file_and_one_that_holds_no_weights(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"there is no file .*w\.pt\. Pass the path of a file that model\.save",
    ):
        Net().load(tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError) as raised:
        Net().load(tmp_path / "list.pt")
    assert (
        str(raised.value)
        == f"{tmp_path / 'list.pt'} contains a list, not the weights of a model. {OF_LOAD}"
    )


def test_safetensors_with_a_flipped_bit_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    Net().save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as raised:
        Net().load(path)
    assert (
        str(raised.value) == f"{path} is damaged: its tensors do not match its checksum. {REMEDY}"
    )


def test_safetensors_without_the_package_raise_an_error_that_says_what_to_install(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"need a package: pip install safetensors$"):
        Net().save(tmp_path / "w.safetensors")


# --- damage ---------------------------------------------------------------------------------------


def test_checkpoint_damage_is_named_for_what_it_is(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path, epochs=1)
    whole = path.read_bytes()
    middle = whole.index(b"\x3f", 2000)
    cases = {
        b"": "is empty",
        b"epoch,loss\n1,0.5\n": "is not a file that torch.save wrote",
        whole[: len(whole) // 2]: "is damaged or cut short: File is not a zip file",
        whole[:middle] + b"\x3e" + whole[middle + 1 :]: r"is damaged in archive/\S+",
    }
    for content, told in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            run_file(path)
        assert re.fullmatch(
            rf"{re.escape(str(path))} {told}\. {re.escape(REMEDY)}", str(raised.value)
        ), raised.value
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder, but not one with a checkpoint"):
        run_file(path)


@pytest.mark.usefixtures("each_fit_in_a_process_of_its_own")
def test_checkpoint_that_is_damaged_is_replaced_by_the_one_before_with_a_warning(tmp_path):
    path = tmp_path / "run.pt"
    model = run_file(path, epochs=3)
    kept = previous(path).read_bytes()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is used instead") as warned:
        again = run_file(path, epochs=3)
    assert str(warned[0].message) == (
        f"{path} is damaged or cut short: File is not a zip file. The previous version is "
        f"{path}.prev. The previous version is used instead."
    )
    assert torch.equal(again.fc1.weight, model.fc1.weight)
    assert previous(path).read_bytes() == kept  # a damaged file does not take its place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(path)


def test_checkpoint_removed_by_the_user_starts_again_whatever_was_before_it(tmp_path):
    path = tmp_path / "run.pt"
    first = run_file(path, epochs=3)
    assert previous(path).exists()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Net().load(path)
    model = Net()
    with torch.no_grad():
        model.fc1.weight.zero_()
    assert not torch.equal(run_file(path, epochs=1, model=model).fc1.weight, first.fc1.weight)
    assert path.exists()


@pytest.mark.parametrize("links", [True, False])
def test_checkpoint_is_a_whole_file_at_each_moment_of_a_write(links, tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            seen.append(len(read(path)))
            result = function(*args, **kwargs)
            seen.append(len(read(path)))
            return result

        return call

    def no_links(*args):
        raise OSError("not here")

    write(path, dump([1]))
    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(os, "link", watched(os.link) if links else no_links)
    write(path, dump([1, 2]))
    assert sorted(seen) == seen
    assert set(seen) == {1, 2}
    assert (read(path), read(previous(path))) == ([1, 2], [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pt", "w.pt.prev"]


def test_checkpoint_is_not_used_if_both_files_are_damaged(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path)
    for damaged in (path, previous(path)):
        damaged.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"run\.pt\.prev is empty"):
        run_file(path)


def flat(value, where=""):
    """Everything in a nest of plain values, as pairs that can be compared."""
    if isinstance(value, torch.Tensor):
        return [
            (
                where,
                value.dtype,
                value.shape,
                value.reshape(-1).view(torch.uint8).tolist() if value.numel() else [],
            )
        ]
    if isinstance(value, dict):
        pairs = []
        for key, part in value.items():
            pairs += flat(part, f"{where}/{key}")
        return pairs
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), where)
    return [(where, repr(value))]


def test_checkpoint_entry_that_claims_to_be_a_folder_is_refused(tmp_path):
    """A flip of this one bit makes torch.load return whatever the memory held."""
    path = tmp_path / "run.pt"
    run_file(path, epochs=1)
    with zipfile.ZipFile(path) as archive:
        begin = archive.start_dir
    damaged = bytearray(path.read_bytes())
    damaged[damaged.rindex(b"archive/data/0", begin) - 46 + 38] ^= 0x10
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged in archive/data/0"):
        read(path)


@pytest.mark.parametrize("part", range(4))
def test_checkpoint_with_any_flipped_bit_or_cut_is_never_loaded_wrong(part, tmp_path):
    """700 of them: each one found, or harmless since the same values are read."""
    path = tmp_path / "run.pt"
    run_file(path, epochs=1)
    whole = path.read_bytes()
    true = flat(read(path))
    draw = random.Random(part)
    found = 0
    for number in range(175):
        damaged = bytearray(whole)
        if number % 5 == 4:
            del damaged[draw.randrange(len(whole)) :]
        else:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            value = read(path)
        except CheckpointError:
            found += 1
        else:
            assert flat(value) == true, f"damage number {number} was loaded"
    assert found > 100


# --- safety ---------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


def test_checkpoint_that_would_run_code_is_refused_before_it_does(tmp_path):
    Evil.mark = tmp_path / "ran"
    path = tmp_path / "run.pt"
    torch.save({"minikeras": 1, "model": Evil()}, path)
    with pytest.raises(CheckpointError) as raised:
        run_file(path)
    told = (
        "contains objects other than tensors and plain values, which could run code, so it was "
        "not loaded"
    )
    assert str(raised.value) == f"{path} {told}. {REMEDY}"
    with pytest.raises(CheckpointError):
        Net().load(path)
    assert not Evil.mark.exists()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_checkpoint_code_unpickles_nothing(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":  # what only writes
            allowed = {"Pickler", "dumps"}
            if path.name == "packing.py":  # by a list of harmless functions: test_messages.py
                allowed |= {"Unpickler", "UnpicklingError"}
            assert {alias.name for alias in node.names} <= allowed
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
                "marshal",
            } & set(names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load"):
            assert {k.arg: k.value.value for k in node.keywords if k.arg == "weights_only"} == {
                "weights_only": True
            }
        if isinstance(node, ast.Call):
            assert "add_safe_globals" not in ast.unparse(node.func)
            assert not ast.unparse(node.func).startswith(("np.load", "numpy.load"))


class Odd(minikeras.Callback):
    def state_dict(self):
        return {"when": [{1, 2}, Path("here")]}


def test_checkpoint_of_a_state_that_is_not_plain_is_refused_before_anything_trains(tmp_path):
    model = compiled()
    before = model.fc1.weight.clone()
    with pytest.raises(TypeError) as raised:
        model.fit(1, points(8), verbose=0, checkpoint=tmp_path / "run.pt", callbacks=[Odd()])
    assert str(raised.value) == (
        "callbacks['Odd']['when'][1] is a PosixPath, which a checkpoint cannot hold: expected "
        "tensors, numbers, strings, lists and dicts. Turn it into these in state_dict, and back in "
        "load_state_dict."
    )
    assert torch.equal(model.fc1.weight, before)


def test_checkpoint_of_a_metric_that_cannot_be_saved_is_refused_before_anything_moves(tmp_path):
    class Window:
        def __init__(self):
            self.last = io.StringIO()

        def reset(self):
            pass

        def update(self, outputs, labels):
            pass

        def compute(self):
            return 0.0

    model = compiled(metrics_dict={"window": Window()})
    before = model.fc1.weight.clone()
    with pytest.raises(TypeError) as raised:
        model.fit(1, points(8), verbose=0, checkpoint=tmp_path / "run.pt")
    assert str(raised.value) == (
        "metric 'window' holds a StringIO in .last, which a checkpoint cannot hold. Give the "
        "metric state_dict() and load_state_dict(state) of tensors, numbers, lists and dicts."
    )
    assert torch.equal(model.fc1.weight, before)


# --- another run's file ---------------------------------------------------------------------------


def test_checkpoint_that_holds_weights_alone_is_refused(tmp_path):
    Net().save(tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as raised:
        run_file(tmp_path / "w.pt")
    assert str(raised.value) == (
        f"{tmp_path / 'w.pt'} is not a checkpoint of a minikeras fit. To start from scratch, "
        f"delete {tmp_path / 'w.pt'}, or pass another path."
    )


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path, epochs=1)
    model = Net()
    model.compile(nn.BCELoss(), torch.optim.Adam(model.parameters()), device="cpu")
    with pytest.raises(CheckpointError) as raised:
        model.fit(2, points(40), verbose=0, checkpoint=path)
    assert str(raised.value) == (
        f"{path} was written with another optimizer: SGD [4] instead of Adam [4] (parameters in "
        "each group). Call compile with the same arguments as then. To start from scratch, delete "
        f"{path}, or pass another path."
    )


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path)
    with pytest.raises(
        CheckpointError,
        match=r"another architecture than Model: missing: net\.weight, net\.bias; unex",
    ):
        run_file(path, model=minikeras.Model(nn.Linear(2, 1)))


def test_checkpoint_of_another_loss_is_refused_before_its_weights_are_loaded(tmp_path):
    path, (X, y) = tmp_path / "run.pt", points(40)

    def run(loss):
        torch.manual_seed(0)
        model = minikeras.Model(nn.Linear(2, 3))
        model.compile(loss, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
        before = model.net.weight.clone()
        try:
            model.fit(2, (X, y.squeeze(1).long()), checkpoint=path, verbose=0)
        finally:
            moved = not torch.equal(model.net.weight, before)
            assert moved == (loss.weight is None)

    run(nn.CrossEntropyLoss())
    with pytest.raises(
        CheckpointError, match=r"another architecture than CrossEntropyLoss: missing: weight\."
    ):
        run(nn.CrossEntropyLoss(weight=torch.ones(3)))


def test_checkpoint_gives_lazy_layers_their_sizes(tmp_path):
    def made():
        torch.manual_seed(0)
        return minikeras.Model(nn.Sequential(nn.LazyLinear(1), nn.Sigmoid()))

    model = run_file(tmp_path / "run.pt", model=made())
    model.save(tmp_path / "w.pt")
    for name in ("w.pt", "run.pt"):
        other = made()
        other.load(tmp_path / name)
        assert torch.equal(other.net[0].weight, model.net[0].weight)
    assert torch.equal(
        run_file(tmp_path / "run.pt", model=made()).net[0].weight, model.net[0].weight
    )


@pytest.mark.usefixtures("each_fit_in_a_process_of_its_own")
def test_checkpoint_of_a_fit_of_other_epochs_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path, epochs=4)
    model = compiled()
    model.fit(2, points(40), verbose=0)
    with pytest.raises(CheckpointError) as raised:
        model.fit(1, points(40), verbose=0, checkpoint=path)
    assert str(raised.value) == (
        f"{path} is of a fit of epochs 1 to 4, and this one is of epochs 3 to 3. Pass a different "
        f"path to each fit. To start from scratch, delete {path} and {path}.prev, or pass another "
        "path."
    )
    model.fit(1, points(40), verbose=0, checkpoint=tmp_path / "another.pt")
    path.unlink()
    previous(path).unlink()
    assert len(model.fit(1, points(40), verbose=0, checkpoint=path)) == 4


def test_checkpoint_of_a_newer_layout_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_file(path, epochs=1)
    write(path, dump(read(path) | {"minikeras": 99}))
    with pytest.raises(
        CheckpointError,
        match=r"has file layout 99, and this version of minikeras reads layouts up to 1\. Upgrade",
    ):
        run_file(path)


def test_checkpoint_of_each_older_layout_keeps_loading(tmp_path):
    for old in sorted(DATA.glob("run_v?.pt")):
        path = tmp_path / old.name
        shutil.copy(old, path)
        model = compiled()
        assert list(model.fit(2, points(40), batch_size=20, verbose=0, checkpoint=path).index) == [
            0,
            1,
        ]
        assert torch.equal(model.fc1.weight.sum(), torch.load(DATA / "run_v1_sum.pt"))


def fit_with_parts(epochs, precision, callbacks=(), **options):
    """Fit with all that lies between a loss and a step, and callbacks that count steps."""
    torch.manual_seed(0)
    model = minikeras.Model(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"accumulate": 2, "clip_grad_norm": 0.5, "precision": precision}
    model.compile(nn.BCEWithLogitsLoss(), optimizer, device="cpu", **parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    counting = [minikeras.EMA(0.8), minikeras.LRScheduler(schedule, step="batch")]
    data = points(70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: a scaler skipped the first step
        model.fit(
            epochs, data, batch_size=10, verbose=0, callbacks=[*counting, *callbacks], **options
        )
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_checkpoint_written_before_the_stepper_had_parts_resumes_in_its_window(precision, tmp_path):
    path = tmp_path / "run.pt"
    shutil.copy(DATA / f"run_in_window_{precision}.pt", path)  # after batch 3 of epoch 2
    resumed = fit_with_parts(3, precision, checkpoint=path)
    whole = fit_with_parts(3, precision)
    torch.testing.assert_close(resumed.net.weight, whole.net.weight, rtol=1e-4, atol=1e-5)
    assert resumed.history["lr"].iloc[-1] == pytest.approx(whole.history["lr"].iloc[-1])


# --- writing that fails ---------------------------------------------------------------------------


def limited(code, *, status=0):
    """Run a script whose files are limited from `full()` to `emptied()`; return what it printed."""
    head = f"""
    import resource, signal, sys, warnings
    sys.path.insert(0, {str(TESTS)!r})
    from helpers.models import *
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.manual_seed(0)
    infinity = resource.RLIM_INFINITY
    def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (3000, infinity))
    def emptied(): resource.setrlimit(resource.RLIMIT_FSIZE, (infinity, infinity))
    """
    script = textwrap.dedent(head) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def test_checkpoint_on_a_full_disk_warns_keeps_the_old_file_and_is_tried_again(tmp_path):
    out, err = limited(f"""
    path = {str(tmp_path / "run.pt")!r}
    from minikeras.checkpoint.file import read
    class Disk(minikeras.Callback):
        def on_epoch_end(self, epoch, logs):
            if epoch == 2: full()
            if epoch == 3:
                emptied()
                print("kept:", len(read(path)["history"]))
    compiled().fit(4, points(40), verbose=0, checkpoint=path, callbacks=[Disk()])
    print("in the end:", len(read(path)["history"]))
    import os
    print(sorted(os.listdir({str(tmp_path)!r})))
    """)
    assert out == "kept: 1\nin the end: 4\n['run.pt', 'run.pt.prev']\n"
    assert (
        "run.pt could not be written: [Errno 27] File too large. The checkpoint of epoch 2, step "
        "0 is still there. The fit continues, and the next checkpoint is tried again." in err
    )


def test_checkpoint_whose_last_state_cannot_be_written_is_an_error(tmp_path):
    _, err = limited(
        f"""
        full()
        compiled().fit(1, points(40), verbose=0, checkpoint={str(tmp_path / "run.pt")!r})
        """,
        status=1,
    )
    assert (
        f"CheckpointError: {tmp_path / 'run.pt'} could not be written: [Errno 27] File too large. "
        "No earlier checkpoint was written. These last weights are not saved. Free disk space or "
        "pass another path." in err
    )
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_in_a_folder_without_write_permission_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    model = compiled()
    with pytest.raises(
        OSError, match=r"checkpoint=\.\.\.\) cannot write .*: .*(File exists|Not a directory)"
    ):
        model.fit(1, points(8), verbose=0, checkpoint=tmp_path / "file" / "run.pt")
    assert model.history.empty


def test_checkpoint_every_needs_checkpoint():
    with pytest.raises(
        ValueError, match=r'checkpoint_every=5 needs a file\. Pass checkpoint="run\.pt" as well\.$'
    ):
        compiled().fit(1, points(8), checkpoint_every=5)
