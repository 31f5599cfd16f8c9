"""distributed="ddp" under torchrun, on the CPU: the numbers of one process with the whole batch."""

import ast
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import peers
from helpers.compare import assert_same
from helpers.launch import PYTHONPATH, launch_cases, results_of, torchrun
from helpers.models import compiled, points
from helpers.pages import without_times
from helpers.paths import ROOT
from helpers.ranks import CASES, common, resume, same_numbers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import minikeras
from minikeras.distributed.shards import sync_batchnorm
from minikeras.distributed.world import World

SAME = [
    "arrays",
    "loader_in_memory",
    "detection",
    "loader_by_rows",
    "loader_with_workers",
    "loader_with_a_generator",
    "fewer_rows_than_processes",
    "persistent",
    "persistent_carried_on",
    "batch_sampler",
    "shared_out_by_the_user",
    "odd_buffers",
    "list_of_batches",
    "steps_per_epoch",
    "two_optimizers",
    "shared_between_optimizers",
    "own_parameters",
    "losses_by_name",
    "layers_that_come_and_go",
    "complex_weights",
    "big_steps",
    "auroc",
    "collection",
    "transformed",
    "on_all_rows",
    "on_all_rows_carried_on",
    "per_class",
    "accuracies",
    "tracked",
    "uneven",
    "samplers_by_epoch",
    "some_steps",
    "in_eval_mode",
    "frozen",
    "nests",
    "split_batches",
    "learning_rates",
    "fetched_rows",
    "early_stopping",
    "gradients_between_backward_and_step",
    "gradients_of_a_short_batch",
    "frozen_in_a_window",
    "late_hook",
    "conjugates",
    "channels_last",
    "one_rank_stops",
    "jit",
    "distributed_sampler",
    "distributed_sampler_of_rows",
    "loaders_of_other_classes",
    "shown_in_a_bar",
    "part_of_an_iterable",
    "generator_of_a_loader_and_a_split",
    "drawn_by_a_dataset",
    "workers_that_stay",
]
OTHERS = [
    "same_rows",
    "other_rows",
    "rows_unknown_on_one",
    "spoiled_on_one",
    "one_file",
    "on_all_rows_fails",
    "no_means",
    "batch_values",
    "odd",
    "told",
    "timer",
    "nan_on_one",
    "dropout",
    "refused",
    "main_alone",
    "whole",
    "whole_with_a_worker",
]
STEPS = [
    "arrays",
    "loader_by_rows",
    "fewer_rows_than_processes",
    "own_parameters",
    "big_steps",
    "auroc",
    "uneven",
]
ON_THREE = [
    "on_all_rows",
    "on_all_rows_carried_on",
    "arrays",
    "fewer_rows_than_processes",
    "two_optimizers",
    "samplers_by_epoch",
    "some_steps",
    "nests",
    "split_batches",
    "learning_rates",
    "distributed_sampler",
    "loaders_of_other_classes",
]


def results_by(tmp_path_factory, cases, processes, **env):
    """Run cases of a module under torchrun; return the result of each rank for each case."""
    folder = tmp_path_factory.mktemp("ranks")
    env["ODD"] = json.dumps(drawn(processes))
    results = results_of("helpers.ranks", folder, cases, processes, **env)
    return results | {"folder": folder}


KINDS = ["arrays", "tensors", "rows"]


def edges(processes):
    """Yield the edge cases.

    Fewer rows than processes, one row or none for the last process in the last step, and nothing
    left by drop_last.
    """
    step = 2 * processes
    for kind, (rows, drop_last) in itertools.product(
        KINDS,
        [
            (processes - 1, False),
            (step + 1, False),
            (step + processes - 1, False),
            (step - 1, True),
        ],
    ):
        yield {
            "kind": kind,
            "rows": rows,
            "val": 1,
            "batch": 2,
            "shuffle": True,
            "drop_last": drop_last,
        }


@st.composite
def odd_ones(draw, processes):
    """Draw any kind of data, often with a last step that does not come out even."""
    batch = draw(st.integers(1, 7))  # of each process
    step = batch * processes
    last = draw(st.sampled_from([0, 1, processes - 1, processes, step - 1]) | st.integers(0, step))
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "rows": draw(st.sampled_from([1, 2, 3, 0])) * step + last,
        "val": draw(st.integers(1, 2 * step)),
        "batch": batch,
        "shuffle": draw(st.booleans()),
        "drop_last": draw(st.sampled_from([False, False, True])),
    }


@functools.cache
def drawn(processes):
    """The edges, and what hypothesis comes up with, the same each time: one launch serves all."""
    cases = list(edges(processes))

    @settings(max_examples=25, derandomize=True, database=None, phases=[Phase.generate])
    @given(odd_ones(processes))
    def collect(case):
        if case not in cases:
            cases.append(case)

    collect()
    return cases


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    return results_by(tmp_path_factory, ["odd"], 1)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return results_by(tmp_path_factory, SAME + OTHERS, 2, BUCKET="64")


@pytest.fixture(scope="module")
def by_two_at_the_end(tmp_path_factory):
    return results_by(tmp_path_factory, STEPS, 2, STEP="own")


@pytest.fixture(scope="module")
def by_three(tmp_path_factory):
    return results_by(tmp_path_factory, [*ON_THREE, "odd"], 3)


@pytest.mark.parametrize("case", SAME)
def test_ddp_on_two_processes_finds_what_one_finds_with_twice_the_batch(case, by_two, monkeypatch):
    monkeypatch.setenv("FOLDER", str(by_two["folder"]))
    expected = CASES[case](1)
    for found in by_two[case]:
        assert_same(found, expected)


@pytest.mark.parametrize("case", STEPS)
def test_ddp_with_a_custom_step_sends_its_gradients_at_the_end_and_finds_the_same(
    case, by_two_at_the_end
):
    expected = CASES[case](1)
    for found in by_two_at_the_end[case]:
        assert_same(found, expected)


@pytest.mark.parametrize("case", ON_THREE)
def test_ddp_on_three_processes_finds_what_one_finds(case, by_three, monkeypatch):
    monkeypatch.setenv("FOLDER", str(by_three["folder"]))
    expected = CASES[case](1)
    for found in by_three[case]:
        assert_same(found, expected)


@pytest.mark.parametrize(("processes", "fixture"), [(1, "by_one"), (2, "by_two"), (3, "by_three")])
def test_ddp_finds_what_one_process_finds_for_any_rows_batch_and_kind_of_data(
    processes, fixture, request
):
    results = request.getfixturevalue(fixture)["odd"]
    for number, case in enumerate(drawn(processes)):
        expected = same_numbers.odd_one(1, processes, **case)
        for found in (result[number] for result in results):
            if "error" in expected:
                assert found == results[0][number], case
                assert found.keys() == expected.keys(), case
            else:
                assert_same(found, expected, case)


def test_ddp_timer_ends_the_fit_by_the_clock_of_rank_0(by_two):
    assert by_two["timer"] == [{"epochs": True, "equal": False}] * 2


def test_ddp_loss_that_is_nan_on_one_process_ends_the_fit_on_all_before_a_weight_moves(by_two):
    found = by_two["nan_on_one"]
    assert [result["mine"] for result in found] == [False, True]
    assert all(result["same"] and result["epochs"] == 1 for result in found)


def test_ddp_buffer_that_is_infinite_on_one_process_ends_the_fit_on_all_and_reaches_no_file(by_two):
    for rank, found in enumerate(by_two["spoiled_on_one"]):
        for on_nan in ("raise", "stop"):
            expected = {"epochs": 0, "files": [False, False], "mine": rank == 1, "told": rank == 0}
            assert found[on_nan] == expected | {"finite": True}
        assert found["ignore"]["epochs"] == 1
        assert found["ignore"]["finite"]


def test_ddp_rows_that_one_process_cannot_count_are_an_error_on_all_and_an_average_needs_none(
    by_two,
):
    expected = CASES["rows_unknown_on_one"](1)
    said = expected.pop("said")
    assert (
        "cannot be told: first sizes differ in features {'x': Tensor (6, 2) float64, 'table': "
        "Tensor (5,)" in said
    )
    for found in by_two["rows_unknown_on_one"]:
        assert found.pop("said") == said
        assert_same(found, expected)


def test_ddp_processes_agree_whether_a_checkpoint_is_of_another_fit(by_two):
    expected = ["trained", "refused", "trained", "refused", "another fit", "refused"]
    assert [found["said"] for found in by_two["one_file"]] == [expected] * 2


def test_ddp_dropout_differs_between_processes_and_what_is_drawn_after_the_fit_does_not(by_two):
    assert by_two["dropout"] == [{"masks": True, "drawn": False}] * 2


def test_ddp_rank_0_alone_writes_files_and_gets_the_gathered_predictions(by_two, monkeypatch):
    folder = by_two["folder"]
    monkeypatch.setenv("FOLDER", str(folder))
    assert_same(by_two["main_alone"][0], CASES["main_alone"](1))
    assert by_two["main_alone"][1] == {}
    one, two = ((folder / size / "log.csv").read_text() for size in "12")
    assert one.splitlines()[0] == two.splitlines()[0]
    assert len(one.splitlines()) == len(two.splitlines()) == 3
    assert sorted(file.name for file in (folder / "2").iterdir()) == [
        "0.pt2",
        "1.pt",
        "2.pt",
        "log.csv",
        "weights.pt",
    ]


def test_ddp_refuses_what_several_processes_cannot_do_with_a_remedy(by_two):
    said = [
        'loss_func has reduction="sum", and training on 2 processes weights each batch by '
        'its rows, and a sum has already counted them. Build it with reduction="mean", or return '
        "minikeras.Average(total, count).",
        "metric 'mean' is a Mean, an object whose state cannot be combined over several "
        "processes. Pass a function that returns a mean or an Average(total, count), "
        "minikeras.OnAllRows(function), or a torchmetrics object.",
        "loss.backward() bypasses training on 2 processes. Call self.backward(loss) in train_step.",
        "backward computed the gradient of a parameter a second time, after the processes had "
        "added it up, as torch.utils.checkpoint does with use_reentrant=True. Pass "
        "use_reentrant=False.",
        "the processes have from 8 to 9 rows. Give all processes the same data: each uses its "
        "share of it.",
        "the processes have from 1 to 2 batches. Give all processes the same data: each uses its "
        "share of it.",
    ]
    assert [found["said"] for found in by_two["refused"]] == [said, said]


def test_ddp_rows_that_all_processes_read_are_told_by_rank_0_alone(by_two):
    said = (
        "{} gave all 2 processes the same rows; expected other rows in each. Every row counts 2 "
        "times: each process reads {} itself, since its rows are not known by number. Pass a "
        "Dataset with __getitem__, or a DataLoader over one, which are divided; or yield a part "
        "in __iter__: itertools.islice(rows, rank, None, 2), with rank = "
        "torch.distributed.get_rank()."
    )
    told = [
        [said.format("dl_val", "Wrapped")],
        [said.format("dl_train", "Wrapped")],
        [said.format("dl", "Unchanged")],
        [],
    ]
    assert by_two["same_rows"] == [told, [[], [], [], []]]


def test_ddp_row_numbers_that_differ_are_an_error_and_other_data_a_warning(by_two):
    said = (
        "dl_train has other rows in process 1 than in process 0; expected the same rows in the "
        "same order in all processes, since each uses its share of them. Otherwise some rows are "
        "used twice, and others by no process. A split or a shuffle without a seed differs from "
        "process to process. Give it one: random_split(..., "
        "generator=torch.Generator().manual_seed(0)), train_test_split(..., random_state=0), "
        "np.random.default_rng(0). If each process is to read rows of its own, pass an "
        "IterableDataset."
    )
    refused = dict.fromkeys(["split", "sampler"], said)
    warned = ["arrays", "frames", "tensors", "list", "array"]
    fine = {"rounded": "", "same": ""}
    first = refused | dict.fromkeys(warned, f"warned: {said}") | fine
    other = refused | dict.fromkeys(warned, "") | fine
    assert by_two["other_rows"] == [first, other]


def test_ddp_error_of_a_function_on_all_rows_reaches_all_processes(by_two):
    where = "metric 'm', computed at the end of a pass"
    assert [part["said"] for part in by_two["on_all_rows_fails"]] == [
        f"ZeroDivisionError: no rows of this kind {where}",
        "RuntimeError: process 0 of 2, which calls the function, failed: ZeroDivisionError: no "
        "rows of this kind " + where,
    ]


def test_ddp_warnings_of_metrics_come_from_the_first_process_alone(by_two):
    said = [
        "metric 'f1': the outputs are raw scores,",
        "metric 'rmse' gives another number if a ",
    ]
    assert [part["said"] for part in by_two["no_means"]] == [said, []]


def test_ddp_batch_values_are_of_this_processs_rows_and_nan_for_a_filler(by_two):
    first, second = by_two["batch_values"]
    assert [batch[1] for batch in first] == [batch[0] for batch in first]
    assert [batch[1] for batch in second[:-1]] == [batch[0] for batch in second[:-1]]
    assert [len(first), len(second)] == [6, 6]
    assert math.isnan(second[-1][1])
    assert second[-1][2] == second[-2][2]  # its running mean does not move
    assert [batch[0] for batch in first[:-1]] != [batch[0] for batch in second[:-1]]


def test_ddp_without_a_launcher_is_an_error_that_gives_the_command(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = (
        'distributed="ddp" needs several processes, and only this one was started. Start the '
        "script with "
        "torchrun --nproc-per-node=2 script.py, or omit distributed."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        compiled(distributed="ddp")
    with pytest.raises(ValueError, match=r"Did you mean 'ddp'\?"):
        compiled(distributed="dpp")


def test_ddp_warns_of_what_is_different_with_several_processes(by_two):
    steps = (
        "steps_per_execution=4 is 1 on 2 processes, which add up their gradients between backward "
        "and step. The numbers are the same. Leave it out there."
    )
    one_row = (
        "layer net.1 (BatchNorm1d) cannot train on one row, which has no variance: it got shape "
        "(1, 8), process {}'s share of the batch. Drop the short last batch with drop_last=True, "
        "or choose a bigger batch_size."
    )
    nothing = (
        "dl_train gave no batch: drop_last=True drops the only batch, 5 rows of batch_size=3 on "
        "each of 2 processes. Set drop_last=False."
    )
    norm = (
        "sync_batchnorm=True with 2 processes needs GPUs: torch has no SyncBatchNorm for the CPU. "
        "Omit it, and choose a batch_size that is large enough for the statistics of each process."
    )
    assert by_two["told"] == [
        [steps, norm, one_row.format(0), nothing],
        [norm, one_row.format(1), nothing],
    ]


def test_distributed_auto_on_one_process_has_no_world():
    run = compiled(sync_batchnorm=True)._run
    assert run.world.size == 1
    assert not run.stepper.parts


def test_sync_batchnorm_keeps_weights_names_and_what_is_frozen():
    model = minikeras.Model(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3), nn.BatchNorm1d(3)))
    minikeras.freeze(model.net[0])
    world = SimpleNamespace(size=2)
    before = dict(model.named_parameters())
    sync_batchnorm(model, world, torch.device("cuda"))
    assert isinstance(model.net[2], nn.SyncBatchNorm)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    model.train()
    assert [module.training for module in model.net] == [False, True, True]


# --- a group that is there already, without a launcher's variables --------------------------------


@pytest.fixture(scope="module")
def by_peers(tmp_path_factory):
    """Run two processes, the second of which stops; return their folder and outputs."""
    folder = tmp_path_factory.mktemp("peers")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-m", "helpers.peers", str(folder)]
    both = [
        subprocess.Popen([*command, rank], env=env, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        printed = [both[0].communicate(timeout=60)[0]]
    finally:
        for process in both:
            process.kill()
    return folder, [*printed, both[1].communicate()[0]]


def test_process_group_of_the_user_is_taken_and_its_first_process_prints(by_peers):
    folder, printed = by_peers
    assert "Total params: 33" in printed[0]
    assert printed[1] == ""
    torch.manual_seed(0)
    model = compiled()
    expected = common.found(model, model.fit(2, points(30), batch_size=10, verbose=0))
    for rank in range(2):
        assert_same(torch.load(folder / f"{rank}.pt")[0]["weights"], expected["weights"])


def test_process_group_without_local_rank_takes_the_gpu_of_its_rank_on_its_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    asked = {"get_rank": 5, "get_world_size": 8, "get_backend_config": "cpu:gloo,cuda:nccl"}
    for name, answer in asked.items():
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert World().device(torch.device("cuda")) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert World().device(torch.device("cuda")) == torch.device("cuda", 3)


def test_process_group_waits_for_a_save_and_all_processes_raise_if_it_fails(by_peers):
    folder, _ = by_peers
    failed = [torch.load(folder / f"{rank}.pt")[1] for rank in range(2)]
    assert failed[0].startswith(("NotADirectoryError", "FileExistsError"))
    assert (
        failed[1] == "RuntimeError: process 0 of 2, which writes the files, has failed. Look for "
        "its error message."
    )


def test_process_group_with_a_lost_process_raises_after_the_timeout_of_the_user(by_peers):
    said, seconds = torch.load(by_peers[0] / "left alone.pt")
    assert said.startswith(
        "process 0 of 2 got no answer from the others: one has ended, or has taken longer than "
        "the group's timeout. Look for its error message first. Processes must make the same "
        "calls of fit, evaluate, predict and save. For a longer timeout call "
        "torch.distributed.init_process_group(timeout=...) before compile. With "
        "TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment torch says which operations did not "
        "meet. Torch says: "
    )
    # and it has ended at all: a group's own timeout is half an hour
    assert seconds > peers.TIMEOUT - 1


# --- broken off and carried on --------------------------------------------------------------------


def carried_on(folder, processes=2, **env):
    """How the run ended, and what each rank found."""
    done = launch_cases("helpers.ranks", folder, ["carried_on"], processes, **env)
    if done.returncode:
        return done, []
    return done, [torch.load(folder / f"carried_on.{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize(
    ("number", "workers"), [("15", "0"), ("9", "1")], ids=["SIGTERM", "SIGKILL, a worker"]
)
def test_ddp_run_killed_on_one_rank_resumes_bit_for_bit(number, workers, by_two, tmp_path):
    done, _ = carried_on(tmp_path, WORKERS=workers, KILL=f"1 {number} 2 4")
    assert done.returncode != 0
    if number == "15":
        assert re.findall(r"exitcode *: *(-?\d+)", done.stderr).count("143") >= 1
    done, found = carried_on(tmp_path, WORKERS=workers)
    assert done.returncode == 0, done.stderr
    expected = by_two["whole_with_a_worker" if workers == "1" else "whole"]
    for rank in range(2):
        torch.testing.assert_close(found[rank], expected[rank], rtol=0, atol=0)


def test_ddp_run_resumes_from_two_processes_to_one_and_back(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN", "1")
    for size, kill in ((2, "0 15 1 3"), (1, "0 15 2 2"), (2, "-1 0 0 0")):
        done, found = carried_on(tmp_path, size, KILL=kill)
        assert bool(done.returncode) == (kill[0] != "-"), done.stderr
    expected = resume.carried_on(1, file=False)
    for result in found:
        assert_same(result, expected)


@pytest.mark.slow
def test_ddp_run_that_torchrun_restarts_resumes_bit_for_bit(by_two, tmp_path):
    # see docs/growing.md
    more = {
        "PET_MAX_RESTARTS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done, found = carried_on(tmp_path, KILL="1 9 2 4", **more)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    for rank in range(2):
        torch.testing.assert_close(found[rank], by_two["whole"][rank], rtol=0, atol=0)


def test_ddp_rank_that_raises_ends_all_with_its_error(tmp_path):
    done = launch_cases("helpers.ranks", tmp_path, ["raising"])
    assert done.returncode == 1
    assert "ValueError: this is the cause" in done.stderr


def test_ddp_ring_example_prints_the_table_of_one_process_with_twice_the_batch(
    tmp_path,
):
    example = [ROOT / "examples" / "ring_focal.py", "--epochs", "2"]
    two = torchrun(example, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, example), "--batch-size", "200"]
    one = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    tables = [without_times(done.stdout).splitlines()[:-2] for done in (one, two)]
    assert tables[0] == tables[1]
    last = [ast.literal_eval(done.stdout.splitlines()[-2]) for done in (one, two)]
    assert last[0] == pytest.approx(last[1], rel=1e-6)


@pytest.mark.slow
def test_ray_train_ring_example_gives_the_history_that_torchrun_gives(tmp_path):
    pytest.importorskip("ray", reason='needs pip install "ray[train]"')
    examples = ROOT / "examples"
    # Ray keeps files there
    env = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{examples}",
        "HOME": str(tmp_path),
    }
    script = tmp_path / "script.py"
    script.write_text(
        "import os, ring_focal\nring_focal.main(3, 100).to_csv(os.environ['RANK'] + '.csv')\n"
    )
    done = torchrun([script], env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import ray_train; ray_train.main(3, 100).to_csv('ray.csv')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected, found = (pd.read_csv(tmp_path / name, index_col=0) for name in ("0.csv", "ray.csv"))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6, atol=1e-6)
