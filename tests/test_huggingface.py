"""A model saved to a folder and built from it again by huggingface_hub, without the network."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from helpers.launch import torchrun
from helpers.models import compiled
from safetensors.torch import load_file
from torch import nn

import minikeras
from minikeras.integrations.huggingface import HubModel


class Net(HubModel):
    """Dropout and BatchNorm, a size and a list from the constructor."""

    def __init__(self, hidden, widths=(1, 2), *, act=None):
        super().__init__()
        self.hidden = hidden
        self.widths = widths
        self.fc1 = nn.Linear(2, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.act = act or nn.ReLU()
        self.drop = nn.Dropout()
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, x):
        return torch.sigmoid(self.fc2(self.drop(self.act(self.norm(self.fc1(x))))))


def trained():
    model = compiled(Net(16, widths=[3, 4]))
    model.fit(2, (torch.randn(40, 2), torch.rand(40, 1).round()), verbose=0)
    return model


def test_hub_model_comes_back_from_its_folder_with_arguments_and_weights(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "net")
    twin = Net.from_pretrained(tmp_path / "net")
    assert (twin.hidden, twin.widths) == (16, [3, 4])
    assert not twin.training
    assert Net.from_pretrained(tmp_path / "net", map_location="meta").fc1.weight.is_meta
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
    x = torch.randn(9, 2)
    assert torch.equal(twin.predict(x), model.predict(x))


def test_hub_model_keeps_its_arguments_as_given_though_the_constructor_changes_them(tmp_path):
    class Stack(HubModel):
        def __init__(self, sizes):
            super().__init__()
            sizes.append(1)
            self.layers = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))

    sizes = [2, 4]
    model = Stack(sizes)
    assert sizes == [2, 4, 1]  # it is the user's own list that the constructor was given
    model.save_pretrained(tmp_path)
    assert len(Stack.from_pretrained(tmp_path).layers) == 2


def test_hub_model_folder_holds_what_the_hub_shows(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "hidden": 16,
        "widths": [3, 4],
        "act": None,
    }
    assert "library_name: minikeras" in (tmp_path / "README.md").read_text()
    weights = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }


class Around(HubModel):
    """A layer that is to be given, and one that may be."""

    def __init__(self, layer, act=nn.Identity, **more):
        super().__init__()
        self.layer = layer
        self.act = act()
        self.more = more

    def forward(self, x):
        return self.act(self.layer(x))


def test_hub_model_arguments_that_json_cannot_hold_are_passed_again(tmp_path):
    model = Around(nn.Linear(2, 1), nn.Identity, width=3)
    model.save_pretrained(tmp_path / "plain")
    twin = Around.from_pretrained(tmp_path / "plain", layer=nn.Linear(2, 1))
    assert torch.equal(twin.predict(torch.eye(2)), model.predict(torch.eye(2)))
    assert twin.more == {"width": 3}
    with pytest.raises(TypeError, match="layer"):
        Around.from_pretrained(tmp_path / "plain")
    Net(4, act=nn.Tanh()).save_pretrained(tmp_path / "net", config={"hidden": 4})
    assert isinstance(Net.from_pretrained(tmp_path / "net", act=nn.Tanh()).act, nn.Tanh)


class Stacked(HubModel):
    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))


@pytest.mark.parametrize(
    ("make", "name", "what"),
    [
        (lambda: Net(4, act=nn.Tanh()), "act", "Tanh"),
        (lambda: Net(4, np.arange(1, 3)), "widths", "ndarray (2,) int64"),
        (lambda: Net(4, {1: 2}), "widths", "{1: int}"),
        (lambda: Around(nn.Linear(2, 1), nn.Tanh), "act", "type"),
        (lambda: Around(nn.Linear(2, 1), scale=np.int64(2)), "scale", "int64 () int64"),
        (lambda: Stacked(2, 16, 1), "*sizes", "(int, int, int)"),
        (lambda: HubModel(nn.Linear(2, 1)), "net", "Linear"),
        (lambda: copy.deepcopy(Net(4, act=nn.Tanh())), "act", "Tanh"),
    ],
    ids=["module", "array", "dict", "class", "number", "several", "net", "copy"],
)
def test_hub_model_that_would_come_back_as_another_one_is_not_saved(make, name, what, tmp_path):
    model = make()
    message = (
        f"{name} was {what}, which config.json cannot hold: from_pretrained would build "
        f"{type(model).__name__} without it. Let the constructor take numbers, strings, lists or "
        "dicts, under names, and make of them what it needs; or pass config=..., a dict for "
        "config.json, and to from_pretrained what is not in it."
    )
    for write in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(TypeError) as error:
            write(tmp_path / "net")
        assert str(error.value) == message
    assert not (tmp_path / "net").exists()


def test_hub_model_subclass_may_say_how_its_arguments_become_json(tmp_path):
    def layer(name):
        return getattr(nn, name)()

    class Coded(HubModel, coders={nn.Module: (lambda module: type(module).__name__, layer)}):
        def __init__(self, act: nn.Module = nn.ReLU()):  # noqa: B008
            super().__init__()
            self.act = act

    Coded(nn.Tanh()).save_pretrained(tmp_path)
    assert isinstance(Coded.from_pretrained(tmp_path).act, nn.Tanh)


def test_hub_model_is_compiled_and_trained_before_and_after(tmp_path):
    model = trained()
    before = set(model.state_dict())
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) == before
    assert len(model.fit(1, (torch.randn(40, 2), torch.rand(40, 1).round()), verbose=0)) == 3
    twin = compiled(Net.from_pretrained(tmp_path))
    assert len(twin.fit(1, (torch.randn(40, 2), torch.rand(40, 1).round()), verbose=0)) == 1


def test_hub_model_weights_shared_by_two_layers_come_back_shared(tmp_path):
    class Tied(HubModel):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    model.save_pretrained(tmp_path)
    twin = Tied.from_pretrained(tmp_path)
    assert twin.a.weight is twin.b.weight
    assert torch.equal(twin.a.weight, model.a.weight)


def test_hub_model_of_another_architecture_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(minikeras.CheckpointError) as caught:
        Net.from_pretrained(tmp_path, hidden=8)
    assert (
        f"{tmp_path / 'model.safetensors'} holds the weights of another architecture than Net"
        in str(caught.value)
    )


def test_hub_model_folder_without_weights_is_an_error(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Net.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"there is no model.safetensors in {tmp_path}. Pass a folder that save_pretrained wrote."
    )


SCRIPT = """
import sys
import torch
from torch import nn
from minikeras.integrations.huggingface import HubModel

class Net(HubModel):
    def __init__(self, rows):
        super().__init__()
        self.fc = nn.Linear(rows, 1)
    def forward(self, x):
        return self.fc(x)

torch.manual_seed(0)
model = Net(3)
model.compile(nn.MSELoss(), device="cpu", distributed=sys.argv[2])
model.fit(1, (torch.ones(8, 3), torch.ones(8, 1)), verbose=0)
rank = torch.distributed.get_rank()
model.save_pretrained(sys.argv[1] if rank == 0 else sys.argv[1] + "-other")
torch.distributed.barrier()
outputs = model.predict(torch.eye(3))
assert torch.allclose(Net.from_pretrained(sys.argv[1]).predict(torch.eye(3)), outputs)
"""


@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_hub_model_on_two_processes_is_written_by_one_with_whole_weights(distributed, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun([tmp_path / "script.py", tmp_path / "net", distributed])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "script.py"]
    assert load_file(tmp_path / "net" / "model.safetensors")["fc.weight"].shape == (1, 3)
