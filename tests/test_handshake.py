"""What differs between processes is named at the beginning of a call, with the value of each."""

from types import SimpleNamespace

import pytest
import torch
from helpers.compare import assert_equal_tensors
from helpers.launch import launch_cases
from helpers.ranks import agreement
from helpers.ranks.planted import DURING, PLANTED

import minikeras
from minikeras.distributed.channel import VERBS, Channel, Verb
from minikeras.distributed.handshake import buffer_sums, factors_of_blocks, sum_of_bits

CASES = [
    "late",  # the first call of all
    "planted",
    "agreements",
    "stopped_by_a_layer",
    "stopped_before_a_step",
    "stopped_at_an_epoch_end",
    "signalled",
    "followed",
    "local_files",
    "group_created_again",
    "stepped_differently",
    "caught_and_called",
    "buffers_inside_a_fit",
    "buffers_inside_a_step",
    "buffers_after_a_failed_fit",
    "buffers_of_fillers",
    "slow",
    "freed",
]


def run(folder, cases):
    """Return what each of two processes found; after an error torch may abort them as they end."""
    done = launch_cases("helpers.ranks", folder, cases)
    found = {}
    for case in cases:
        files = [folder / f"{case}.{rank}.pt" for rank in range(2)]
        assert all(file.exists() for file in files), done.stderr
        found[case] = [torch.load(file) for file in files]
    return found


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """What each of two processes found; the last case is one that they cannot go on after."""
    return run(tmp_path_factory.mktemp("agreed"), [*CASES, "stuck"])


@pytest.fixture
def planted(agreed):
    """What each of two processes is told about each difference."""
    return agreed["planted"]


@pytest.mark.parametrize("name", PLANTED)
def test_handshake_names_a_difference_and_both_values_before_a_weight_moves(planted, name):
    _, first, last = PLANTED[name]
    for said in planted:
        message, same = said[name]
        assert first in message, message
        assert last in message, message
        assert same


@pytest.mark.parametrize("name", DURING)
def test_handshake_names_what_has_come_to_differ_during_a_fit(planted, name):
    _, first, last = DURING[name]
    for said in planted:
        message, _ = said[name]
        assert first in message, message
        assert last in message, message


# --- agreement during a fit -----------------------------------------------------------------------


def test_agreement_after_each_batch_is_for_callbacks_of_batches_in_any_process(agreed):
    for counts in agreed["agreements"]:
        assert counts["each"] == counts["each on one"]
        assert counts["each"] - counts["none"] == 2 * agreement.STEPS
        assert counts["slow validation"] - counts["validation"] > agreement.STEPS


def test_agreement_makes_all_stop_after_the_batch_of_a_layer_in_one_process(agreed):
    first, last = agreed["stopped_by_a_layer"]
    assert first[:3] == last[:3]
    batches, epochs, has_stopped, _ = first
    assert has_stopped
    assert (batches, epochs) == (3, 1)
    assert_equal_tensors(first[3], last[3])


def test_agreement_makes_all_stop_while_gradients_wait_for_a_step(agreed):
    first, last = agreed["stopped_before_a_step"]
    assert first[:3] == last[:3] == [4, 1, True]
    assert_equal_tensors(first[3], last[3])


def test_agreement_on_its_way_is_not_waited_for_and_loses_no_stop(agreed):
    first, last = agreed["stopped_at_an_epoch_end"]
    epochs, on_their_way, weights = first
    assert epochs == last[0] == 2
    assert on_their_way == last[1] == 2 * (agreement.STEPS - 1)
    assert_equal_tensors(weights, last[2])


def test_fit_sends_few_small_messages(agreed):
    for counts in agreed["agreements"]:
        assert counts["none"] <= 8, counts


def test_group_that_is_destroyed_is_said_and_one_that_is_created_again_is_used(agreed):
    for message, alike in agreed["group_created_again"]:
        assert "there is no process group any more" in message
        assert alike


def test_agreement_on_a_signal_of_one_process_saves_at_one_place_to_resume_from(agreed):
    for result in agreed["signalled"]:
        assert result["whole ended"] == []
        assert set(result["resumed ended"]) == {143}
        assert result["resumed"][1] == result["whole"][1]
        assert_equal_tensors(result["resumed"][0], result["whole"][0])


def test_agreement_on_what_callbacks_monitor_is_by_the_value_of_rank_0(agreed):
    for best_epoch, best, rate, epochs, weights in agreed["followed"]:
        assert (best_epoch, best, epochs) == (1, 1.0, 4)
        assert rate == pytest.approx(1e-3 * 0.1**3)
        assert_equal_tensors(weights, agreed["followed"][0][4])


def test_agreement_on_a_checkpoint_sends_the_file_that_rank_0_alone_has(agreed):
    for result in agreed["local_files"]:
        assert result["again"][0] == result["whole"][0]
        assert_equal_tensors(result["again"][1], result["whole"][1])


def test_agreement_on_a_checkpoint_refuses_files_that_differ(agreed):
    for rank, result in enumerate(agreed["local_files"]):
        only, older = result["said"]
        finds = ("no file", "a file")[rank]
        assert f"only.pt: process {rank} finds {finds}, and other processes do not" in only
        assert (
            "older.pt differs between the processes: process 0 is in epoch 3 after step 0, process "
            "1 is in epoch 2 after step 0. Pass a path on a disk that all machines share, or "
            "delete the files of all but process 0, which sends its own to the others."
        ) in older


# --- buffers, in which each process counts its own rows -------------------------------------------


def test_buffers_in_a_callback_are_those_of_rank_0_for_that_call_alone(agreed):
    first, last = (found["calls"] for found in agreed["buffers_inside_a_fit"])
    assert len(first["called"]) == 8
    for number, own in enumerate(first["own"]):
        torch.testing.assert_close(first["called"][number], own)
        torch.testing.assert_close(last["called"][number], own)
        assert not torch.equal(last["own"][number][0], own[0])  # the case is what it says
    for found in agreed["buffers_inside_a_fit"]:
        for name in ("buffers", "weights", "after"):
            assert_bits(found["calls"][name], found["none"][name])


def test_buffers_in_a_custom_step_are_those_of_rank_0_also_before_its_backward(agreed):
    first, last = agreed["buffers_inside_a_step"]
    assert len(first["called"]) == 4
    torch.testing.assert_close(first["called"], first["own"])
    torch.testing.assert_close(last["called"], first["own"])


def test_buffers_of_model_and_loss_are_those_of_rank_0_after_a_fit(agreed):
    first, last = agreed["buffers_inside_a_fit"]
    assert_bits(first["none"]["after"], first["none"]["buffers"][-1])
    assert_bits(last["none"]["after"], first["none"]["after"])


def test_buffers_after_a_fit_that_raised_are_those_of_rank_0(agreed):
    first, last = agreed["buffers_after_a_failed_fit"]
    assert not torch.equal(first["before"][0], last["before"][0])
    for found in (first, last):
        torch.testing.assert_close(found["called"], first["own"])
        assert_bits(found["after"], first["before"])


def test_buffers_do_not_count_the_batch_that_a_process_repeats(agreed):
    for first, last in zip(*agreed["buffers_of_fillers"], strict=True):
        torch.testing.assert_close(first["found"], first["expected"])
        torch.testing.assert_close(last["found"], last["expected"])
        assert_bits(first["after"], first["found"])
        assert_bits(last["after"], first["found"])


def test_buffers_that_count_as_many_rows_of_other_kinds_have_other_checksums():
    sums = []
    for counts in ([3, 5, 0], [5, 3, 0], [3, 5, 0]):
        model = minikeras.Model(torch.nn.Linear(2, 1))
        model.register_buffer("counts", torch.tensor(counts))
        model.compile(torch.nn.MSELoss(), device="cpu")
        sums.append(buffer_sums(model, model._run))
    assert sums[0] == sums[2] != sums[1]


def assert_bits(one, other):
    """Check that nested lists of tensors are bit-for-bit identical."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- a process that does not answer ---------------------------------------------------------------


def test_step_of_one_process_alone_is_told_as_such(agreed):
    remedy = (
        "optimizer_step adds up the gradients of all processes, so it must be called equally often "
        "in every process. The loss and the rows of a batch differ between processes: skip or "
        "repeat optimizer_step by a number that all have, such as the batch's number."
    )
    begin = "train_step calls optimizer_step more often in one process than in another"
    expected = [
        f"{begin}: fit (optimizer_step) in process 0, fit (end of a batch) in process 1. {remedy}",
        f"{begin}: fit (end of a batch) in process 0, fit (optimizer_step) in process 1. {remedy}",
    ]
    for said in agreed["stepped_differently"]:
        assert said == 2 * expected


def test_error_that_one_process_catches_is_quoted_if_it_calls_the_next_verb(agreed):
    errors = ["ValueError: epoch of mine", "KeyboardInterrupt", "OSError: disk of mine"]
    places = ["end of an epoch", "end of a batch", "1 numbers"]
    expected = []
    for error, place in zip(errors, places, strict=True):
        expected.append(
            f"process 1 has left fit with {error}. So the processes are in different calls now: "
            f"fit ({place}) in process 0, evaluate (beginning) in process 1. Mend that error, and "
            "start all processes again."
        )
    for said in agreed["caught_and_called"]:
        assert said == expected


def test_error_that_one_process_catches_is_told_to_those_that_wait_for_it(tmp_path):
    waiting, failed = run(tmp_path, ["caught"])["caught"]
    assert failed[0] == "loss of mine"
    assert waiting[0] == (
        "process 0 of 2 waits for the others, and process 1 has left fit with ValueError: loss of "
        "mine. Mend that error, and start all processes again."
    )
    assert "is no longer in step with the others since an earlier error" in waiting[1]
    assert "process 0 has given up, since process 1 has left fit with ValueError" in failed[1]


OTHER_WORK = (
    "Other work there may take long. But an operation of torch.distributed that not all processes "
    "call, such as a barrier in a callback, does not end: call it in every process, or in none."
)


def test_process_that_is_waited_for_long_is_named_in_a_warning(agreed):
    waiting, working = agreed["slow"]
    said = f"process 0 of 2 has waited 2 s for process 1 in fit (end of an epoch). {OTHER_WORK}"
    assert waiting == [said, said]
    assert working == []


def test_process_that_waits_long_in_the_first_call_of_all_warns(agreed):
    waiting, working = agreed["late"]
    said = "process 0 of 2 has waited 2 s for the others at the beginning of fit."
    assert waiting == [f"{said} {OTHER_WORK}"]
    assert working == []


def test_threads_of_torch_free_no_message_while_a_dataloader_may_fork(agreed):
    for found in agreed["freed"]:
        assert max(found.values()) < 5  # of 500; 38 and more if they are not kept


def test_processes_that_do_not_come_to_the_first_call_are_an_error_that_says_so():
    def new_group(**kwargs):
        raise torch.distributed.DistStoreError("wait timeout after 120000ms")

    channel = object.__new__(Channel)
    channel.dist = SimpleNamespace(new_group=new_group)
    channel.notes = SimpleNamespace(timeout=None)
    channel.rank, channel.size = 1, 2
    said = (
        r"process 1 of 2 has waited 0 s for the others at the beginning of evaluate, in vain\. All "
        r"processes must make the same calls .* Torch says: wait timeout after 120000ms"
    )
    VERBS.append(Verb("evaluate"))
    try:
        with pytest.raises(RuntimeError, match=said):
            channel._create_group()
    finally:
        VERBS.pop()


def test_verb_of_one_process_is_told_while_the_other_waits_for_gradients(agreed):
    first, last = agreed["stuck"]
    of_0 = "in evaluate in fit (beginning)"
    of_1 = "in fit (gradients or other sums)"
    said = (
        f"process 0 is {of_0}, process 1 {of_1}, and each waits for the other. All processes must",
        f"process 1 is {of_1}, process 0 {of_0}, and each waits for the other. All processes must",
    )
    assert any(sentence in first for sentence in said)
    assert any(sentence in last for sentence in said)


def test_processes_that_failed_at_different_places_of_backward_can_save_but_not_train(tmp_path):
    for first, second in run(tmp_path, ["failed_apart"])["failed_apart"]:
        assert first == ""
        assert "different places of backward" in second
        assert "expected equally many sums of gradients, got " in second
    assert (tmp_path / "rescued.pt").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 5, 3000])
def test_checksum_of_weights_sees_order_and_signs(rows, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 7, generator=generator).to(dtype)
    factors = factors_of_blocks()
    signs = weight.clone()
    signs[0, :2] *= -1
    signs[-1, :2] *= -1
    changed = [weight.flip(0), weight.flip(1), weight.roll(1, 0), signs]
    sums = [int(sum_of_bits(tensor, factors)) for tensor in [weight, *changed]]
    assert len(set(sums)) == len(sums)
    assert int(sum_of_bits(weight.clone(), factors)) == sums[0]
