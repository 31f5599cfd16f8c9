"""Values that processes send to each other arrive as they were."""

import os
from collections import OrderedDict
from pickle import PickleError, dumps

import numpy as np
import pytest
import torch

from minikeras.distributed.packing import pack, unpack

VALUES = {
    "plain": {"a": [1, 2.5, None, "b"], "c": (True, b"d")},
    "an array": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2],
    "a tensor": torch.arange(6.0),
    "no rows": torch.empty(0, 3),
    "one number": torch.tensor(2.5, dtype=torch.float64),
    "part of a tensor": torch.arange(12.0).reshape(3, 4)[1:, ::2],
    "bfloat16": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative": torch.tensor([1 + 2j]).conj().imag,
    "sparse": torch.tensor([0.0, 1]).to_sparse(),
    "text": np.array(["a", "bc"]),
    "dtype": torch.bfloat16,
    "shape": torch.Size([2, 3]),
    "set": {1, 2},
    "ordered": OrderedDict(a=1),
    "nested": [{"x": torch.ones(2, dtype=torch.uint8)}],
}


@pytest.mark.parametrize("name", VALUES)
def test_value_is_the_same_after_it_was_packed(name):
    value = VALUES[name]
    found = unpack(pack(value))
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype
        assert found.layout == value.layout
        assert torch.equal(as_dense(found), as_dense(value))
    else:
        assert str(found) == str(value)


def as_dense(tensor):
    return tensor.to_dense()


def test_part_of_a_tensor_is_packed_without_the_rest():
    whole = torch.zeros(100_000)
    assert len(pack(whole[:2])) < 1_000


def test_tensor_that_was_packed_can_be_written_to():
    found = unpack(pack(torch.zeros(3)))
    found += 1
    assert found.tolist() == [1, 1, 1]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("packer", [pack, dumps])
def test_value_that_would_run_code_is_refused_before_it_does(packer, tmp_path):
    packed = packer([1, Evil(tmp_path / "ran")])
    with pytest.raises(PickleError, match="system is not a plain value"):
        unpack(packed)
    assert list(tmp_path.iterdir()) == []
