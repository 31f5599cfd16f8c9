"""distributed="fsdp" under torchrun, on the CPU: the numbers of one process and of "ddp"."""

import re
import shutil

import pytest
import torch
from helpers import launch, shards
from helpers.compare import assert_same, copy_weights
from helpers.launch import launch_cases, torchrun
from helpers.models import compiled

from minikeras.errors import CheckpointError

SAME = [
    "arrays",
    "penalties",
    "whole_parameters_beside",
    "big_steps",
    "fewer_rows_than_processes",
    "uneven",
    "two_optimizers",
    "callbacks",
    "shared_layers",
    "compiled_again",
    "nan_on_one",
    "by_the_user",
]


def results_of(folder, cases, processes=2, **env):
    return launch.results_of("helpers.shards", folder, cases, processes, **env)


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("parts"), [*SAME, "half", "refused", "carried_on"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("whole"), [*SAME, "half"], KIND="ddp")


@pytest.mark.parametrize("case", SAME)
def test_fsdp_on_two_processes_finds_what_one_finds_with_twice_the_batch(
    case, in_parts, tmp_path, monkeypatch
):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    expected = shards.CASES[case](1)
    for found in in_parts[case]:
        assert_same(found, expected)


@pytest.mark.parametrize("case", [*SAME, "half"])
def test_fsdp_finds_what_two_processes_find_with_whole_parameters(case, in_parts, whole):
    assert_same(in_parts[case], whole[case])


def test_fsdp_on_three_processes_without_a_part_of_each_bias_finds_what_one_finds(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    expected = {case: shards.CASES[case](1) for case in ("arrays", "penalties")}
    for case, found in results_of(tmp_path, list(expected), 3).items():
        for result in found:
            assert_same(result, expected[case])


@pytest.mark.parametrize("number", ["15", "9"], ids=["SIGTERM", "SIGKILL"])
def test_fsdp_run_resumes_bit_for_bit_from_its_folder(number, in_parts, tmp_path):
    done = launch_cases(
        "helpers.shards", tmp_path, ["carried_on"], PART="9", KILL=f"1 {number} 2 3"
    )
    assert done.returncode != 0
    assert sorted(path.name for path in (tmp_path / "run.pt").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "run.pt",
    ]
    found = results_of(tmp_path, ["carried_on"], PART="9")
    torch.testing.assert_close(found["carried_on"], in_parts["carried_on"], rtol=0, atol=0)


ON_A_GPU = """
import sys
import torch
from torch import nn
import minikeras

torch.manual_seed(0)
X = torch.randn(200, 2)
model = minikeras.Model(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
model.compile(nn.MSELoss(), device=sys.argv[2], distributed=sys.argv[1])
dfhistory = model.fit(3, (X, X[:, :1]), (X, X[:, :1]), verbose=0)
print(next(model.parameters()).device, *dfhistory.to_numpy().flatten())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fsdp_and_ddp_of_one_process_train_on_its_gpu_and_on_the_cpu(kind, tmp_path):
    (tmp_path / "script.py").write_text(ON_A_GPU)
    found = {}
    for device in ("cpu", torch.accelerator.current_accelerator().type):
        done = torchrun([tmp_path / "script.py", kind, device], 1)
        assert done.returncode == 0, done.stderr
        where, *numbers = done.stdout.split()
        assert where.startswith(device)
        found[device] = [float(number) for number in numbers]
    cpu, gpu = found.values()
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A folder that has one before it, of two processes."""
    folder = tmp_path_factory.mktemp("broken off")
    results_of(folder, ["carried_on"], PART="2")
    return folder


def test_fsdp_run_resumes_from_two_processes_to_one_and_back(broken_off, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    expected = shards.carried_on(1)
    shutil.copytree(broken_off / "run.pt", tmp_path / "run.pt")
    monkeypatch.setenv("PART", "3")
    assert shards.carried_on(1) == {}
    assert (tmp_path / "run.pt").is_file()
    for result in results_of(tmp_path, ["carried_on"], PART="9")["carried_on"]:
        assert_same(result, expected)
    assert (tmp_path / "run.pt").is_dir()


@pytest.mark.parametrize("name", ["__1_0.distcp", "run.pt"])
def test_fsdp_folder_that_is_damaged_is_replaced_by_the_one_before_or_refused(
    name, broken_off, tmp_path
):
    folder = tmp_path / "run.pt"
    model = shards.Deep().double()
    for one in ("run.pt", "run.pt.prev"):
        shutil.copytree(broken_off / one, tmp_path / one)
    model.load(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.warns(
        UserWarning,
        match=rf"is damaged in .* The previous version is {folder}\.prev\.",
    ):
        model.load(folder)
    shutil.move(folder, tmp_path / "aside")  # as between two renamings
    model.load(folder)
    shutil.move(tmp_path / "aside", folder)
    shutil.rmtree(tmp_path / "run.pt.prev")
    before = copy_weights(model)
    with pytest.raises(CheckpointError, match=r"is damaged in .* There is no previous version"):
        model.load(folder)
    assert_same(dict(model.state_dict()), before)


def test_fsdp_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "run.pt").mkdir()
    said = rf"^{tmp_path}/run.pt is a folder, but not one with a checkpoint\."
    with pytest.raises(CheckpointError, match=said):
        compiled().fit(
            1, (torch.zeros(8, 2), torch.zeros(8, 1)), checkpoint=tmp_path / "run.pt", verbose=0
        )


SHARED = (
    'are one parameter in 2 blocks; distributed="fsdp" expects each parameter in one block, since '
    "each block is gathered by itself. Choose fsdp_blocks so that one block has all of these "
    'names, or no block has any; or pass distributed="ddp".'
)
NOT_FOR_SHARDS = (
    'cannot step the shards of distributed="fsdp": torch lacks one of its operations for them. Use '
    'another optimizer, such as torch.optim.AdamW, or pass distributed="ddp".'
)


def test_fsdp_refuses_what_it_cannot_do_with_a_remedy(in_parts):
    shared = [
        "blocks.0.parts.0.weight and blocks.1.0.weight",
        "blocks.1.0.weight and blocks.2.0.weight",
        "blocks.1.0.weight and first.weight",
    ]
    said = [
        'distributed="fsdp" and jit=True do not go together. Leave one of them out.',
        'distributed="fsdp" and precision="fp16" do not go together. Pass precision="bf16".',
        "fsdp_blocks: Net has no module of class Conv1d. Its classes: Linear.",
        "fsdp_blocks must be a module class or a tuple of them, got 'Linear'. Pass (nn.Linear,).",
        "A custom train_step called a layer with sharded weights outside the forward of the "
        "block that gathers them. "
        'Add the class of the layer to the blocks: compile(distributed="fsdp", '
        "fsdp_blocks=(nn.Linear,)).",
        "loss.backward() bypasses training on 2 processes. Call self.backward(loss) in train_step.",
        *(f"{names} {SHARED}" for names in shared),
        *(f"{name} {NOT_FOR_SHARDS}" for name in ("Adafactor", "Muon", "Rprop")),
    ]
    assert [found["said"] for found in in_parts["refused"]] == [said, said]


def test_fsdp_without_a_launcher_is_an_error_that_gives_the_command(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = 'distributed="fsdp" needs several processes, and only this one was started'
    with pytest.raises(ValueError, match=f"^{said}"):
        compiled(distributed="fsdp")
    said = "fsdp_blocks needs distributed=\"fsdp\", got distributed='auto'. Pass both or none."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        compiled(fsdp_blocks=torch.nn.Linear)


def test_fsdp_of_one_process_under_torchrun_trains_with_whole_parameters(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = compiled(distributed="fsdp")
    assert model._run.world.size == 1
    assert not hasattr(model.fc1.weight, "full_tensor")
