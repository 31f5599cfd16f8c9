"""Several processes: the order of rows after a resume, and samplers that differ."""

import pytest
import torch
from helpers.launch import results_of
from helpers.ranks.orders import DIFFERENT
from torch.utils.data import DataLoader

from minikeras.checkpoint.position import Positioned
from minikeras.support.randomness import Randomness

ALL = ["resumed_orders", "different_orders", "messages_of_orders", "draws_around_other_models"]
REMEDY = (
    "Draw the order from a generator with a seed, the same in all processes, such as "
    "np.random.default_rng(0). If the sampler gives each process its own rows, set its attribute "
    "num_replicas to 2: they are not divided again then."
)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return results_of("helpers.ranks", tmp_path_factory.mktemp("ranks"), ALL)


def test_resume_on_another_number_of_processes_reads_the_rows_of_an_uninterrupted_fit(by_two):
    assert by_two["resumed_orders"] == [[], []]


@pytest.mark.slow
def test_resume_on_three_processes_reads_the_rows_of_an_uninterrupted_fit(tmp_path):
    found = results_of("helpers.ranks", tmp_path, ["all_resumed_orders"], 3)
    assert found["all_resumed_orders"] == [[], [], []]


def test_resume_from_a_file_that_does_not_say_who_drew_the_order_is_as_it_was():
    def positioned():
        loader = DataLoader(
            range(9), 2, shuffle=True, generator=torch.Generator().manual_seed(1), collate_fn=list
        )
        return Positioned(loader, "dl_train", Randomness(torch.device("cpu"), [loader]))

    whole = positioned()
    expected = [list(whole), list(whole)]
    first = positioned()
    batches = iter(first)
    seen = [next(batches), next(batches)]
    position, now = first.position(), first.randomness.states()
    del position["ahead"]  # as older versions wrote it
    second = positioned()
    second.randomness.restore(now)
    second.resume_at(position)
    assert [[*seen, *second], list(second)] == expected


@pytest.mark.parametrize("name", DIFFERENT)
def test_sampler_with_another_order_in_each_process_is_an_error_before_a_weight_moves(name, by_two):
    (message, same, rows), other = (found[name] for found in by_two["different_orders"])
    assert other == [message, same, rows]
    if name in ("declared", "batches declared", "alike"):
        assert message == "nothing"
        assert rows == sorted([*range(24)] * 3)
        return
    assert message != "nothing"
    assert same == (name != "late")
    assert len(rows) == (48 if name == "late" else 0)  # noticed as the next pass begins


def test_error_of_a_sampler_that_differs_shows_both_orders_and_the_remedy(by_two):
    found = by_two["different_orders"][0]
    assert found["by rank"][0] == (
        "the sampler of dl_train, ByRank, gives other rows in process 1 than in process 0; "
        "expected all rows, in the same order in all processes, since each uses its share of them. "
        "They begin with 0, 2, 4, 6, 8, 10 ... in process 0, and with 1, 3, 5, 7, 9, 11 ... in "
        f"process 1. {REMEDY}"
    )
    assert found["batches by rank"][0].startswith("the sampler of dl_train, BatchesByRank, gives")
    assert found["seed"][0] == (
        "the sampler of dl_train is DistributedSampler(shuffle=True, seed=0, drop_last=False) at "
        "epoch 0 in process 0, and DistributedSampler(shuffle=True, seed=1, drop_last=False) at "
        "epoch 0 in process 1; expected the same settings in all processes, since each uses its "
        "share of one order. Pass the same shuffle, seed and drop_last, and the same number to "
        "set_epoch."
    )


def test_comparing_a_custom_order_costs_one_small_message_for_each_fit(by_two):
    for of_torch, custom in by_two["messages_of_orders"]:
        assert custom == of_torch + 1


def test_calls_of_another_model_in_a_fit_leave_each_process_its_random_numbers(by_two):
    for found in by_two["draws_around_other_models"]:
        for verb in ("predict", "evaluate", "fit"):
            *within, after = found[verb]
            assert not any(within)
            assert after
            assert not found[f"{verb}, repeated"]
