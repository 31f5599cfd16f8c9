"""Columns of the history from what a metric object answers at the end of a pass.

a number, or an Average    one column, `name`
a dict                     `name_key` for each key
a 1-d tensor or a list     `name_0`, `name_1`, ...
a 2-d tensor               `name_0_0`, `name_0_1`, ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from minikeras.errors import described, is_number
from minikeras.results import Average, check_average

MOST = 1000  # columns of one object: a table of more is of no use to anyone


def columns_of(name: str, value: Any, source: str = "compute()") -> dict[str, float]:
    """Give each number in the answer of the metric `name` a column; `source` is what answered.

    Raises:
        ValueError: the answer holds something else, nothing, or too many numbers.

    >>> columns_of("f1", {"cat": 0.5, "dog": 0.75}), columns_of("f1", [0.5, 0.75])
    ({'f1_cat': 0.5, 'f1_dog': 0.75}, {'f1_0': 0.5, 'f1_1': 0.75})
    """
    pairs: list[tuple[str, float]] = []
    for column, number in _numbers(name, value):
        if number is None or len(pairs) == MOST:
            break
        pairs.append((column, number))
    else:
        columns = dict(pairs)
        if pairs and len(columns) == len(pairs):
            return columns
    raise ValueError(f"metric {name!r}: {source} gave {described(value)}; {_remedy(value)}")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float | None]]:
    """Each number with its column; None stands for what is no number."""
    if isinstance(value, Average):
        check_average(f"metric {name!r}", value, wait=True)
        yield name, float(value.total) / float(value.count) if value.count else math.nan
    elif is_number(value):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(f"{name}_{key}", part)
    elif _is_table(value):
        for index, part in enumerate(value.tolist() if hasattr(value, "tolist") else value):
            yield from _numbers(f"{name}_{index}", part)
    else:
        yield name, None


def _is_table(value: Any) -> bool:
    """Whether a value is a list, or a tensor or array of real numbers with at least one dimension."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.numel() <= MOST and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.size <= MOST and value.dtype.kind in "biuf"
    return type(value) is list


def _remedy(value: Any) -> str:
    expected = f"expected a number, or a dict, list or tensor of numbers, which becomes a column for each (at most {MOST}). "
    if isinstance(value, tuple):
        return expected + (
            'For a few numbers return a dict of name -> number, such as {"precision": p, '
            '"recall": r}; a curve is no column: compute it from model.predict(X) after the fit.'
        )
    return expected + "Return these, or compute it from model.predict(X) after the fit."


def check_name(who: str, name: Any, taken: tuple[str, ...]) -> None:
    """A column's name must be a string that history does not use itself."""
    if not isinstance(name, str):
        raise TypeError(f"{who} the name {name!r}; expected a string.")
    if name in taken or name.startswith("val_"):
        raise ValueError(
            f"{who} the name {name!r}, which history uses itself ({', '.join(taken)} and val_...). "
            f"Give it another name."
        )


def check_columns(columns: Mapping[str, Iterable[str]], others: Iterable[str]) -> None:
    """Refuse columns of objects that have a name of another column, or one that the history uses.

    Args:
        columns: name of a metric object -> its columns.
        others: the columns of the loss, of functions and of what a step returns.

    Raises:
        ValueError: a name is taken.
    """
    owners = dict.fromkeys(others, "")
    for name, names in columns.items():
        for column in names:
            check_name(f"metric {name!r} gives a column", column, ("loss", "lr", "epoch"))
            if column in owners:
                other = f"metric {owners[column]!r} gives" if owners[column] else "there is"
                raise ValueError(
                    f"metric {name!r} gives a column {column!r}, and {other} a column of this name. "
                    f"Give the metric another name in metrics_dict."
                )
            owners[column] = name


def column_order(names: Iterable[str]) -> list[str]:
    """Names in the history's order: training's, then validation's, then learning rates.

    >>> column_order(["loss", "lr", "val_loss", "accuracy"])
    ['loss', 'accuracy', 'val_loss', 'lr']
    """
    return sorted(
        names, key=lambda name: (is_rate(name), name.startswith("val_"))
    )  # the order within each part stays


def is_rate(name: str) -> bool:
    """Whether a column is that of a learning rate: lr, or lr_<name> where there are several optimizers."""
    return name == "lr" or name.startswith("lr_")


def rate_name(optimizer: str) -> str:
    """The column of an optimizer's learning rate: lr, or lr_<name> if there are several optimizers."""
    return f"lr_{optimizer}" if optimizer else "lr"


# words in a name that say what is better; a name with none of them, or with both kinds, says nothing
MORE = """
    acc accuracy auc auroc ap map precision recall sensitivity specificity f1 fbeta r2 iou miou jaccard dice kappa mcc
    correlation pearson spearman similarity psnr ssim bleu rouge ndcg mrr hits
"""
LESS = """
    loss error err mae mse rmse msle rmsle mape smape bce nll entropy crossentropy perplexity ppl wer cer divergence kld
    hinge distance brier
"""


def mode_of(name: str) -> str | None:
    """What is better by the words in a name, "min" or "max"; None where they do not say.

    >>> mode_of("val_MSELoss"), mode_of("val_top5_acc"), mode_of("temperature")
    ('min', 'max', None)
    """
    # val_top5_acc -> val, top5, top, acc; MSELoss -> mseloss, mse, loss
    words = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name) + re.split(r"\W|_", name)
    known = {form for word in words for form in (word.lower(), word.lower().rstrip("0123456789"))}
    more, less = not known.isdisjoint(MORE.split()), not known.isdisjoint(LESS.split())
    if more == less:
        return None
    return "max" if more else "min"
