"""What differs between processes is named at the beginning of a call, with the value of each."""

import pytest
from helpers.launch import results_of
from helpers.ranks.planted import DURING, PLANTED


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What each of two processes is told about each difference."""
    folder = tmp_path_factory.mktemp("planted")
    return results_of("helpers.ranks", folder, ["planted"])["planted"]


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
