"""A copy of a run's state in memory, and the file that a thread writes from it."""

import io
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers.models import compiled, points

from minikeras import CheckpointError, LambdaCallback
from minikeras.checkpoint import snapshot
from minikeras.checkpoint.background import BackgroundWrites
from minikeras.checkpoint.file import read
from minikeras.checkpoint.snapshot import Memory

ROW = ({"loss": 0.5}, {"lr": 0.1})


def write(path, copy):
    with open(path, "wb") as file:
        copy.write(file)


def in_background(path, state):
    writes = BackgroundWrites()
    writes.start(path, {"history": [], **state}, keep=False).wait()
    writes.close()
    return read(path)


@pytest.mark.parametrize("dtype", snapshot.STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)], ids=str)
def test_tensor_is_read_as_it_was(dtype, shape, tmp_path):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    write(tmp_path / "run.pt", Memory().copy({"other": torch.ones(5), "tensor": tensor}, []))
    found = read(tmp_path / "run.pt")["tensor"]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert found.stride() == tensor.stride()
    assert torch.equal(found, tensor)


def test_file_is_one_of_torch(tmp_path):
    weights = OrderedDict(a=torch.rand(3, requires_grad=True), b=torch.tensor(2))
    state = {"model": weights, "numbers": [1, 2.5, True, None, ("x", 10**20)], 3: {}}
    write(tmp_path / "run.pt", Memory().copy(state, [ROW]))
    for mmap in (False, True):
        found = torch.load(tmp_path / "run.pt", weights_only=True, mmap=mmap)
        assert torch.equal(found["model"]["a"], weights["a"])
        assert not found["model"]["a"].requires_grad
        assert type(found["model"]) is OrderedDict
        assert found["history"] == [ROW]
        assert {**found, "model": 0} == {**state, "model": 0, "history": [ROW]}


def test_bytes_of_tied_tensors_are_in_the_file_once(tmp_path):
    tensor = torch.rand(100)
    write(tmp_path / "run.pt", Memory().copy({"a": tensor, "b": tensor.detach()}, []))
    with zipfile.ZipFile(tmp_path / "run.pt") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1
    found = read(tmp_path / "run.pt")
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["b"], tensor)


def test_copy_does_not_change_with_the_state(tmp_path):
    state = {"tensor": torch.ones(3), "numbers": [1]}
    epochs = [ROW]
    copy = Memory().copy(state, epochs)
    state["tensor"].zero_()
    state["numbers"].append(2)
    epochs.append(ROW)
    write(tmp_path / "run.pt", copy)
    found = read(tmp_path / "run.pt")
    assert found["tensor"].tolist() == [1, 1, 1]
    assert (found["numbers"], found["history"]) == ([1], [ROW])


def test_memory_is_kept_for_the_next_copy():
    memory = Memory()
    memory.copy({"a": torch.ones(10), "b": torch.ones(20)}, [])
    kept = memory.flat[torch.float32].data_ptr()
    memory.copy({"a": torch.zeros(5), "b": torch.zeros(20)}, [])
    assert memory.flat[torch.float32].data_ptr() == kept


def test_row_of_the_history_is_pickled_once(monkeypatch, tmp_path):
    pickled = []
    program_of = snapshot.program_of

    def watched(value):
        pickled.append(value)
        return program_of(value)

    monkeypatch.setattr(snapshot, "program_of", watched)
    compiled().fit(6, points(), verbose=0, checkpoint=tmp_path / "run.pt")
    rows = [value for value in pickled if value != "history"]
    assert len(rows) == 5  # the last state of a fit is written at once


def test_rows_of_another_history_are_pickled_again(tmp_path):
    memory = Memory()
    memory.copy({}, [ROW, ROW])
    for epochs in ([ROW], [ROW, ROW, ({"loss": np.float64(1.0)}, {})]):
        write(tmp_path / "run.pt", memory.copy({}, epochs))
        assert read(tmp_path / "run.pt")["history"] == epochs


CHANNELS_LAST = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
UNUSUAL = {
    "strides": CHANNELS_LAST,
    "sparse": torch.eye(3).to_sparse(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "complex": torch.ones(2, dtype=torch.complex64),
    "set": {1, 2},
    "number of NumPy": np.float64(0.5),
    "text": "c__builtin__\nset",
    "bytes": b"\0\xff",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_value_is_in_the_file(name, tmp_path):
    value = UNUSUAL[name]
    found = in_background(tmp_path / "run.pt", {"value": value, "other": torch.ones(2)})
    assert found["other"].tolist() == [1, 1]
    if not isinstance(value, torch.Tensor):
        assert found["value"] == value
    elif name == "sparse":
        assert torch.equal(found["value"].to_dense(), value.to_dense())
    else:
        assert torch.equal(found["value"], value)
        assert found["value"].stride() == value.stride()


@pytest.mark.parametrize("value", [frozenset({1}), bytearray(b"a"), ..., io.BytesIO(), int, len])
def test_value_that_no_file_can_hold_is_an_error(value, tmp_path):
    with pytest.raises(TypeError, match=r"the state of the run\['value'\] is a"):
        in_background(tmp_path / "run.pt", {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mmap", [False, True])
def test_large_file_is_read_with_its_numbers_of_64_bits(mmap, monkeypatch, tmp_path):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # instead of 2 GB
    value = {"first": torch.arange(1000), "second": torch.arange(5.0)}
    write(tmp_path / "run.pt", Memory().copy(value, [ROW]))
    found = torch.load(tmp_path / "run.pt", weights_only=True, mmap=mmap)
    assert torch.equal(found["first"], value["first"])
    assert torch.equal(found["second"], value["second"])


def test_no_byte_can_change_unnoticed(tmp_path):
    path = tmp_path / "run.pt"
    write(path, Memory().copy({"tensor": torch.arange(3.0), "number": 7}, [ROW]))
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except CheckpointError:
            continue
        assert (found["number"], found["history"]) == (7, [ROW])
        assert found["tensor"].tolist() == [0, 1, 2]


def test_fit_that_reads_its_file_of_a_thread_goes_on_from_it(tmp_path):
    def stop(epoch, logs):
        if epoch == 3:
            raise SystemExit

    path = tmp_path / "run.pt"
    torch.manual_seed(0)
    expected = compiled().fit(4, points(), verbose=0)
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        compiled().fit(
            4, points(), verbose=0, checkpoint=path, callbacks=[LambdaCallback(on_epoch_end=stop)]
        )
    assert len(read(path)["history"]) == 2
    torch.manual_seed(0)
    assert compiled().fit(4, points(), verbose=0, checkpoint=path).equals(expected)
