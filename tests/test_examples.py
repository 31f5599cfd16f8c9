"""Each example runs shortly, and shows what it is for."""

import ast
import re
import runpy
import sys

import pytest
import torch
from helpers.launch import run_python
from helpers.pages import without_times
from helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.chdir(tmp_path)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # these networks are small, and other work may share the machine
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def column(printed, name):
    """The values of a column of the printed history."""
    table = without_times(printed[printed.index("epoch ") :])
    header, *rows = [line.replace("*", " ").split() for line in table.splitlines()]
    return [
        float(row[header.index(name)])
        for row in rows
        if len(row) == len(header) and row[0].isdigit()
    ]


def test_example_image_classification_learns_the_digits_in_two_epochs(example):
    printed = example("image_classification.py", "--epochs", 2)
    assert column(printed, "val_accuracy")[-1] > 0.9
    assert int(re.search(r"(\d+) of 450 validation rows wrong", printed)[1]) < 45


def test_example_tabular_categories_is_better_than_the_mean(example):
    printed = example("tabular_categories.py", "--epochs", 10)
    ours, mean = map(
        float, re.search(r"error (\S+); of the mean as the answer (\S+)", printed).groups()
    )
    assert ours < 0.8 * mean


def test_example_sequence_lstm_learns_lines_of_different_lengths(example):
    right, lines = map(
        int,
        re.search(r"(\d+) of (\d+) lines", example("sequence_lstm.py", "--epochs", 25)).groups(),
    )
    assert lines == 20
    assert right >= 18


def test_example_several_outputs_trains_both_heads_from_one_loss(example):
    printed = example("several_outputs.py", "--epochs", 15)
    assert column(printed, "val_grape_accuracy")[-1] > 0.9
    assert column(printed, "val_alcohol_mae")[-1] < 0.9 * column(printed, "val_alcohol_mae")[0]
    assert "{'grape': torch.Size([3, 3]), 'alcohol': torch.Size([3, 1])}" in printed


def test_example_imbalanced_compares_losses_for_rare_positives(example):
    printed = example("imbalanced.py", "--epochs", 8, "--seeds", 2)
    found = re.findall(
        r"average precision (\S+) \+/- \S+ precision \S+ \+/- \S+ recall \S+ \+/- \S+\n", printed
    )
    assert len(found) == 4
    assert all(float(number) > 0.3 for number in found)  # guessing has 0.05


def test_example_transfer_helps_if_few_digits_are_labelled(example):
    head, block, whole, anew = map(float, re.findall(r"0\.\d{3}\n", example("transfer.py")))
    assert head < block <= whole
    assert anew < whole


def test_example_adversarial_has_a_column_for_each_side(example):
    printed = example("adversarial.py", "--epochs", 3)
    assert column(printed, "loss_g")[0] > 0
    assert 0.5 < column(printed, "told_apart")[-1] <= 1
    *_, last = printed.split("-" * 16 + "\n")
    assert [len(line) for line in last.splitlines()] == [16] * 8


def test_example_autoencoder_gives_the_digits_back(example):
    printed = example("autoencoder.py", "--epochs", 5)
    assert float(re.search(r"64 numbers as 8: mean squared error (\S+),", printed)[1]) < 0.045


def test_example_transformers_text_tells_praise_from_complaint(example, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    praise, complaint = map(
        float,
        re.search(r"praise: tensor\(\[(\S+), (\S+)\]\)", example("transformers_text.py")).groups(),
    )
    assert praise > 0.8
    assert complaint < 0.2


def test_example_optuna_search_prunes_and_finds_a_good_model(example):
    printed = example("optuna_search.py", "--trials", 12)
    complete, pruned = map(
        int, re.search(r"(\d+) trials ran to their end, (\d+) were pruned", printed).groups()
    )
    assert complete >= 3
    assert pruned >= 3
    assert complete + pruned == 12
    assert float(re.search(r"best val_loss (\S+)", printed)[1]) < 0.15


def test_example_ring_focal_finds_the_rare_positives(tmp_path):
    printed = run_python([str(EXAMPLES / "ring_focal.py")], cwd=tmp_path)
    *_, result, written = printed.splitlines()
    assert written.startswith("Wrote ring_focal.png: ")
    result = ast.literal_eval(result)
    assert result["val_accuracy"] >= 0.975
    assert result["val_recall"] >= 0.5
    assert (tmp_path / "ring_focal.png").stat().st_size > 10_000
    assert "[-1, 1]" in printed
    assert "Total params: 61" in printed


def test_example_linear_regression_recovers_w_and_b(tmp_path):
    printed = run_python([str(EXAMPLES / "linear_regression.py")], cwd=tmp_path)
    found = re.search(r"found w = \[ *(\S+), *(\S+)\]  b = *(\S+)", printed)
    assert [float(number) for number in found.groups()] == pytest.approx([2, -3, 10], abs=0.15)


def test_example_resume_continues_from_where_it_was_stopped(tmp_path):
    example = str(EXAMPLES / "resume.py")
    whole = run_python(
        [example, "--epochs", "2", "--pause", "0", "--file", "whole.pt"], cwd=tmp_path
    )
    first = run_python([example, "--epochs", "1", "--pause", "0"], cwd=tmp_path)
    second = run_python([example, "--epochs", "2", "--pause", "0"], cwd=tmp_path)
    assert "resume.pt: resumed after epoch 1" in second
    head_and_first_row = without_times(whole).splitlines()[:3]
    assert without_times(first).splitlines()[:3] == head_and_first_row
    assert second.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_files_say_what_they_are_for(path):
    assert path.read_text().startswith('"""')
