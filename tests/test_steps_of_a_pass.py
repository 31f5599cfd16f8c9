"""steps and validation_steps, and data that never ends."""

import itertools

import pytest
import torch
from helpers.models import compiled, points
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import minikeras

X, y = points(80)
BATCHES = list(zip(X.split(10), y.split(10), strict=True))


class Endless:
    """Begins with the same batches at each iteration, and never ends."""

    def __init__(self):
        self.begun = self.given = 0

    def __iter__(self):
        self.begun += 1
        for batch in itertools.cycle(BATCHES):
            self.given += 1
            yield batch


class EndlessRows(IterableDataset):
    def __iter__(self):
        yield from itertools.cycle(zip(X, y, strict=True))


ENDLESS = {
    "an iterable": Endless,
    "a cycle": lambda: itertools.cycle(BATCHES),
    "a generator": lambda: iter(Endless()),
    "a loader": lambda: DataLoader(EndlessRows(), batch_size=10),
}
KINDS = {**ENDLESS, "a list": lambda: BATCHES, "arrays": lambda: (X, y)}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_take_the_first_batches_of_any_data(kind):
    model = compiled()
    size = {"batch_size": 10} if kind == "arrays" else {}
    expected = model.evaluate(BATCHES[:3])
    assert model.evaluate(KINDS[kind](), steps=3, **size) == expected
    for predicting in (model, minikeras.Model(nn.Linear(2, 1))):
        # in batches of the same size: others may differ in the last bit
        rows = predicting.predict(X[:30], batch_size=10)
        assert torch.equal(predicting.predict(KINDS[kind](), steps=3, **size), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_steps_take_as_many_batches_each_time(kind):
    model = compiled(lr=0.0)
    size = {"batch_size": 10} if kind == "arrays" else {}
    data = KINDS[kind]()
    dfhistory = model.fit(2, (X, y), data, validation_steps=3, verbose=0, **size)
    first = model.evaluate(BATCHES[:3])["val_loss"]
    goes_on = kind in ("a cycle", "a generator")  # an iterator stands where the last pass stopped
    second = model.evaluate(BATCHES[3:6])["val_loss"] if goes_on else first
    assert list(dfhistory["val_loss"]) == [first, second]
    if kind == "an iterable":
        assert (data.begun, data.given) == (2, 6)


def test_steps_beyond_the_last_batch_take_all_batches():
    model = compiled()
    assert model.evaluate(BATCHES, steps=100) == model.evaluate(BATCHES)
    assert len(model.predict((X, y), steps=100)) == len(X)


VERBS = {
    "fit, dl_train": (
        lambda model, data, **k: model.fit(1, data, verbose=0, **k),
        "steps_per_epoch",
    ),
    "fit, dl_val": (
        lambda model, data, **k: model.fit(1, (X, y), data, verbose=0, **k),
        "validation_steps",
    ),
    "evaluate": (lambda model, data, **k: model.evaluate(data, **k), "steps"),
    "predict": (lambda model, data, **k: model.predict(data, **k), "steps"),
}


@pytest.mark.parametrize(("call", "argument"), VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("make", [itertools.cycle, lambda batches: itertools.repeat(batches[0])])
def test_endless_data_is_refused_and_the_remedy_works(call, argument, make):
    model = compiled()
    with pytest.raises(ValueError, match=f"never ends.*Pass {argument}=") as raised:
        call(model, make(BATCHES))
    assert f"for instance {argument}=100" in str(raised.value)
    call(model, make(BATCHES), **{argument: 2})


def test_repeat_with_an_end_is_not_refused_as_endless():
    model = compiled()
    assert model.evaluate(itertools.repeat(BATCHES[0], 3)) == model.evaluate(BATCHES[:1])


@pytest.mark.parametrize("kind", ["a cycle", "a generator"])
def test_iterator_for_several_passes_is_refused_and_validation_steps_are_the_remedy(kind):
    model = compiled()
    with pytest.raises(ValueError, match="validation_steps"):
        model.fit(2, (X, y), ENDLESS[kind](), verbose=0)
    model.fit(2, (X, y), ENDLESS[kind](), validation_steps=2, verbose=0)


@pytest.mark.parametrize(
    ("call", "limit", "argument"),
    [
        (
            lambda m, data: m.fit(1, BATCHES, data, steps_per_epoch=5, verbose=0),
            100,
            "validation_steps",
        ),
        (lambda m, data: m.fit(1, BATCHES, data, verbose=0), 1000, "validation_steps"),
        (lambda m, data: m.evaluate(data), 10_000, "steps"),
    ],
)
def test_long_pass_of_unknown_length_is_warned_of_with_a_remedy(call, limit, argument):
    class Ended(Exception):
        pass

    class Long:
        def __iter__(self):
            for _ in range(limit):
                yield BATCHES[0]
            raise Ended

    with (
        pytest.warns(UserWarning, match=f"given {limit} batches .* pass {argument}="),
        pytest.raises(Ended),
    ):
        call(compiled(), Long())


def test_long_pass_of_known_length_is_not_warned_of():
    compiled().fit(1, BATCHES, BATCHES[:1] * 150, steps_per_epoch=5, verbose=0)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_steps_that_are_no_number_are_refused(steps):
    model = compiled()
    for call, argument in VERBS.values():
        with pytest.raises(ValueError, match=f"{argument} must be a whole number of 1 or more"):
            call(model, BATCHES, **{argument: steps})


def test_validation_steps_without_dl_val_are_refused():
    with pytest.raises(
        ValueError, match=r"validation_steps=3 needs data to validate on\. Pass dl_val"
    ):
        compiled().fit(1, (X, y), validation_steps=3, verbose=0)
