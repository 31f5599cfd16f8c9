"""The outputs of many batches as those of all rows.

tensors         a fixed number of rows for each row of the batch, one or more: concatenated
lists           an item for each row: one long list; else part by part, as tuples and dicts are
None            None in every batch
anything else   has no rows: an error that says so

Whether a tensor has the rows first is asked of all batches and not of one, whose sizes may be equal
by accident. If all batches have the same number of rows and the outputs may be a vector, a table or
a mean for the whole batch, `probe` runs the model once more, on two rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from minikeras.data.nests import parts
from minikeras.errors import described, is_number

Probe = Callable[[], tuple[Any, int] | None]  # outputs for another number of rows, and that number
WAY_OUT = (
    "Leave it out of what forward returns in eval mode (`if self.training`), give it a row for "
    "each row of the batch with .expand, or predict batch by batch"
)


def join(
    pieces: list[Any], rows: list[int], probe: Probe = lambda: None, final: bool = True
) -> Any:
    """The outputs of all batches, of so many rows each, joined along the rows.

    Unless `final` more batches follow, which will settle what is doubtful.

    Raises:
        ValueError: a part that has no rows, or that is another in another batch.

    >>> join([(torch.zeros(2, 1), {"a": torch.ones(2)}), (torch.zeros(1, 1), {"a": torch.ones(1)})], [2, 1])[1]
    {'a': tensor([1., 1., 1.])}
    """
    return _Joining(rows, probe, final).join(pieces, [])


class _Joining:
    def __init__(self, rows: list[int], probe: Probe, final: bool) -> None:
        self.final = final
        self.rows = rows
        self.probe = probe
        self.probed: Any = None
        self.same_rows = len(set(rows)) == 1

    def join(self, pieces: list[Any], path: list[Any]) -> Any:
        if all(piece is None for piece in pieces):
            return None
        if any(piece is None for piece in pieces):
            other = next(piece for piece in pieces if piece is not None)
            raise ValueError(
                f"a part of the outputs{place(path)} is None in one batch and {described(other)} "
                "in another, and cannot be joined. Return the same parts for each batch, or "
                "predict batch by batch."
            )
        if all(isinstance(piece, (Tensor, np.ndarray)) for piece in pieces):
            return self.tensors(pieces, path)
        if all(isinstance(piece, PackedSequence) for piece in pieces):
            return self.packed(pieces, path)
        if any(parts(piece) is None for piece in pieces):
            return self.others(pieces, path)
        if all(is_plain_list(piece) for piece in pieces) and self.is_by_row(pieces, path):
            return type(pieces[0])([item for piece in pieces for item in piece])
        return self.containers(pieces, path)

    # --- containers ---

    def is_by_row(self, pieces: list[Any], path: list[Any]) -> bool:
        """Whether these lists have an item for each row, and not always the same parts."""
        if [len(piece) for piece in pieces] != self.rows:
            return False
        if not self.same_rows:
            return True
        found = self.another(path) if self.final else None
        if (
            found is not None
            and is_plain_list(found[0])
            and len(found[0]) in (found[1], len(pieces[0]))
        ):
            return len(found[0]) == found[1]
        if all(parts(item) is not None for piece in pieces for item in piece):
            return True  # such as a dict for each image
        try:
            self.containers(pieces, path)
        except ValueError:
            return True
        return False

    def containers(self, pieces: list[Any], path: list[Any]) -> Any:
        first = pieces[0]
        named = [_named(piece) for piece in pieces]
        for piece, its in zip(pieces, named, strict=True):
            if its.keys() != named[0].keys():
                self.refuse_different(first, piece)
        found = parts(first)
        assert found is not None
        return found[1](
            [self.join([its[name] for its in named], [*path, name]) for name in named[0]]
        )

    def refuse_different(self, first: Any, other: Any) -> NoReturn:
        raise ValueError(
            f"the outputs of the batches are made in different ways, {described(first)} and "
            f"{described(other)}, and cannot be joined. Return the same from each, or predict "
            "batch by batch."
        )

    def others(self, pieces: list[Any], path: list[Any]) -> Any:
        """What is neither a tensor nor always a container."""
        first = pieces[0]
        for piece in pieces:
            if type(piece) is not type(first):
                self.refuse_different(first, piece)
        if isinstance(first, str) and all(piece == first for piece in pieces):
            return first
        if is_number(first) or isinstance(first, str):
            raise ValueError(
                f"the model returned {described(first)}{place(path)} for a batch of {self.rows[0]} "
                "rows; predict joins tensors that have the rows first, and this has none. "
                f"{WAY_OUT}."
            )
        raise ValueError(
            f"the model returned {described(first)}{place(path)}, which predict cannot join: it "
            "joins tensors that have the rows first, in tuples, lists, dicts and dataclasses. "
            "Return such tensors, or predict batch by batch."
        )

    # --- tensors ---

    def tensors(self, pieces: list[Any], path: list[Any]) -> Any:
        self.check_dimensions(pieces, path)
        first = pieces[0]
        multiple = self.multiple(pieces)
        if multiple is None:
            self.refuse_rows(pieces, path)
        shapes = sorted({tuple(piece.shape[1:]) for piece in pieces})
        if len(shapes) > 1:
            raise ValueError(
                f"the outputs of the batches have rows of different shapes, {shapes[0]} and "
                f"{shapes[-1]}, and cannot be joined. Pad them to one shape in forward, or predict "
                "batch by batch."
            )
        if self.is_doubtful(pieces, multiple):
            found = self.another(path)
            if found is not None:
                self.compare(first, found, multiple, path)
            elif multiple != 1 and self.rows[0] == 1 and len(pieces) > 1:
                self.refuse_size(pieces, path)  # a row without a dimension for the rows
        if len(pieces) == 1:
            return first
        return torch.cat(pieces) if isinstance(first, Tensor) else np.concatenate(pieces)

    def check_dimensions(self, pieces: list[Any], path: list[Any]) -> None:
        """Tensors without dimensions, and a last row that was squeezed."""
        most = max(piece.ndim for piece in pieces)
        for piece, rows in zip(pieces, self.rows, strict=True):
            if rows == 1 and (
                piece.ndim < most or (piece.ndim == 0 and not self.is_number_per_batch(path))
            ):
                self.refuse_squeezed(tuple(piece.shape), path)
            if piece.ndim == 0:
                raise ValueError(
                    f"the model returned one number{place(path)}, a 0-d tensor, for {rows} rows; "
                    f"predict joins tensors that have the rows first, and this has none. {WAY_OUT}."
                )

    def is_number_per_batch(self, path: list[Any]) -> bool:
        """Whether another number of rows gives one number as well."""
        found = self.another(path)
        return (
            found is not None and isinstance(found[0], (Tensor, np.ndarray)) and found[0].ndim == 0
        )

    def refuse_squeezed(self, shape: tuple[int, ...], path: list[Any]) -> NoReturn:
        raise ValueError(
            f"the model returned shape {shape}{place(path)} for a batch of one row, which has lost "
            "the dimension of its rows, as squeeze() does. Name the dimension in forward: "
            "squeeze(-1)."
        )

    def multiple(self, pieces: list[Any]) -> int | None:
        """How many rows each row of a batch gives; None if that is no fixed whole number."""
        found = set()
        for piece, rows in zip(pieces, self.rows, strict=True):
            size = piece.shape[0]
            if not rows:
                if size:
                    return None
            elif not size or size % rows:
                return None
            else:
                found.add(size // rows)
        if len(found) > 1:
            return None
        return found.pop() if found else 1

    def refuse_rows(self, pieces: list[Any], path: list[Any]) -> NoReturn:
        for piece, rows in zip(pieces, self.rows, strict=True):
            shape = tuple(piece.shape)
            if (
                rows in shape[1:]
                and shape[0] != rows
                and self.is_row_dimension(shape.index(rows, 1), path)
            ):
                dim = shape.index(rows, 1)
                raise ValueError(
                    f"the model returned a tensor of shape {shape}{place(path)} for {rows} rows; "
                    "predict joins batches along the first dimension, and the rows are in "
                    f"dimension {dim}. Return it with .transpose(0, {dim})."
                )
        self.refuse_size(pieces, path)

    def is_row_dimension(self, dim: int, path: list[Any]) -> bool:
        """Whether this dimension grows with the rows, as far as that can be asked."""
        found = self.another(path)
        if found is None:
            return True
        shape = getattr(found[0], "shape", ())
        return len(shape) > dim and shape[dim] == found[1]

    def refuse_size(self, pieces: list[Any], path: list[Any]) -> NoReturn:
        seen: dict[tuple[Any, int], None] = {}
        for piece, rows in zip(pieces, self.rows, strict=True):
            seen[(tuple(piece.shape), rows)] = None
        shown = " and ".join(
            f"shape {shape} for {rows} rows" for shape, rows in list(seen)[:1] + list(seen)[1:][-1:]
        )
        raise ValueError(
            f"the model returned {shown}{place(path)}; predict joins tensors that have the rows "
            f"first, one for each row of the batch or a fixed number. {WAY_OUT}. If the features "
            "do not have the rows first, give labels that have, or a batch of your own with an "
            "int `batch_size`."
        )

    def is_doubtful(self, pieces: list[Any], multiple: int) -> bool:
        """Whether the sizes may be what they are by accident."""
        if not self.same_rows or not self.rows[0] or not self.final:
            return False
        first = pieces[0]
        if multiple != 1 or (self.rows[0] > 1 and self.rows[0] in first.shape[1:]):
            return True
        if len(pieces) == 1:
            return False  # one batch alone is returned as it is
        # a vector or a table for the whole batch, or a mean over the one row that it has
        return first.ndim == 1 or self.rows[0] == 1 or is_same(first, pieces[1])

    def compare(self, first: Any, found: tuple[Any, int], multiple: int, path: list[Any]) -> None:
        """Refuse a tensor that does not grow with the rows."""
        other, rows = found
        if not isinstance(other, (Tensor, np.ndarray)):
            return
        here, there = tuple(first.shape), tuple(other.shape)
        if len(here) != len(there) and self.rows[0] == 1:
            self.refuse_squeezed(here, path)
        if there[:1] != (multiple * rows,) or there[1:] != here[1:]:
            raise ValueError(
                f"the model returned shape {here} for {self.rows[0]} rows and shape {there} for "
                f"{rows} rows{place(path)}; predict joins tensors that have the rows first, one "
                f"for each row of the batch or a fixed number. {WAY_OUT}."
            )

    def another(self, path: list[Any]) -> tuple[Any, int] | None:
        """This part of the outputs for another number of rows; None if that cannot be had."""
        if self.probed is None:
            self.probed = (self.probe(),)
        found = self.probed[0]
        if found is None:
            return None
        outputs, rows = found
        for name in path:
            its = _named(outputs)
            if name not in its:
                return None
            outputs = its[name]
        return outputs, rows

    def packed(self, pieces: list[Any], path: list[Any]) -> PackedSequence:
        """Packed sequences of all rows, in order."""
        for piece, rows in zip(pieces, self.rows, strict=True):
            found = int(piece.batch_sizes[0])
            if found != rows:
                raise ValueError(
                    f"the model returned a PackedSequence of {found} rows{place(path)} for {rows} "
                    "rows of the batch. Return one sequence for each row, or predict batch by "
                    "batch."
                )
        if len(pieces) == 1:
            only: PackedSequence = pieces[0]
            return only
        sequences = [sequence for piece in pieces for sequence in unpack_sequence(piece)]
        return pack_sequence(sequences, enforce_sorted=False)


def is_same(first: Any, second: Any) -> bool:
    """Whether two batches gave the very same numbers, as a table does that is no output of the rows."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return bool(np.array_equal(first, second))


def is_plain_list(nest: Any) -> bool:
    """Whether it is a list or tuple without names for its parts."""
    return (
        isinstance(nest, (list, tuple))
        and not hasattr(nest, "_fields")
        and not isinstance(nest, PackedSequence)
    )


def place(path: list[Any]) -> str:
    """Where a part is in the outputs, as code shows it."""
    return " in its outputs" + "".join(f"[{name!r}]" for name in path) if path else ""


def _named(nest: Any) -> dict[Any, Any]:
    """A container's parts under their keys or places."""
    inner = (parts(nest) or ([],))[0]
    return dict(zip(nest if isinstance(nest, Mapping) else range(len(inner)), inner, strict=True))
