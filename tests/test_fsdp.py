"""Parameters in parts, on the CPU under torchrun: the numbers of one process, and of whole parameters."""

import re

import pytest
import shards
import torch
from conftest import compiled
from launch import ROOT, assert_same, torchrun

SAME = [
    "arrays",
    "penalties",
    "big_steps",
    "fewer_rows_than_processes",
    "uneven",
    "two_optimizers",
    "callbacks",
    "compiled_again",
    "nan_on_one",
]


def results_of(folder, cases, processes=2, **env):
    """Of each case, what each rank found."""
    done = torchrun([ROOT / "tests" / "shards.py", folder, *cases], processes, {"FOLDER": str(folder)} | env)
    assert done.returncode == 0, done.stderr
    return {case: [torch.load(folder / f"{case}.{rank}.pt") for rank in range(processes)] for case in cases}


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("parts"), [*SAME, "refused", "carried_on"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("whole"), SAME, KIND="ddp")


@pytest.mark.parametrize("case", SAME)
def test_two_processes_with_parts_find_what_one_finds_with_twice_the_batch(case, in_parts, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    expected = shards.CASES[case](1)
    for found in in_parts[case]:
        assert_same(found, expected)


@pytest.mark.parametrize("case", SAME)
def test_and_what_two_find_with_whole_parameters(case, in_parts, whole):
    assert_same(in_parts[case], whole[case])


def test_three_processes_some_of_which_have_no_part_of_a_bias_do_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    expected = {case: shards.CASES[case](1) for case in ("arrays", "penalties")}
    for case, found in results_of(tmp_path, list(expected), 3).items():
        for one in found:
            assert_same(one, expected[case])


def test_a_fit_goes_on_bit_by_bit_the_same(in_parts, tmp_path):
    results_of(tmp_path, ["carried_on"], PART="2")
    found = results_of(tmp_path, ["carried_on"], PART="9")
    torch.testing.assert_close(found["carried_on"], in_parts["carried_on"], rtol=0, atol=0)


def test_a_fit_goes_from_two_processes_to_one_and_back(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    expected = shards.carried_on(1)
    results_of(tmp_path, ["carried_on"], PART="2")
    monkeypatch.setenv("PART", "3")
    assert shards.carried_on(1) == {}
    for one in results_of(tmp_path, ["carried_on"], PART="9")["carried_on"]:
        assert_same(one, expected)


def test_what_cannot_be_had_with_parts_is_refused_with_a_remedy(in_parts):
    assert in_parts["refused"][0]["said"] == in_parts["refused"][1]["said"] == [
        'distributed="fsdp" and jit=True do not go together. Leave one of them out.',
        'distributed="fsdp" and precision="fp16" do not go together. Pass precision="bf16".',
        "fsdp_blocks: no part of Net is a Conv1d. It has Linear.",
        "fsdp_blocks must be a class of modules or several, got 'Linear'. Pass (nn.Linear,).",
        "A step of your own called a layer whose weights are in parts, outside the forward of the block that puts them "
        'together. Name its class among the blocks: compile(distributed="fsdp", fsdp_blocks=(nn.Linear,)).',
    ]  # fmt: skip


def test_fsdp_without_a_launcher_is_an_error_that_gives_the_command(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = (
        'distributed="fsdp" needs several processes, and this one was started alone. Start the script with '
        "torchrun --nproc-per-node=2 script.py, or leave distributed out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        compiled(distributed="fsdp")
    said = "fsdp_blocks needs distributed=\"fsdp\", got distributed='auto'. Pass both or none."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        compiled(fsdp_blocks=torch.nn.Linear)


def test_one_process_under_torchrun_trains_alone_with_whole_parameters(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = compiled(distributed="fsdp")
    assert model._run.world is None
    assert not hasattr(model.fc1.weight, "full_tensor")
