"""Join the outputs of many batches along the rows. You may skip this file.

tensors         a fixed number of rows for each row of the batch, one or more: concatenated
lists           with an item for each row: one long list; else part by part, as tuples and dicts are
None            None in every batch
anything else   has no rows: an error that says so

The sizes of one batch may look like rows by accident, so the sizes of all batches are compared.
If all batches have the same number of rows and the outputs may be a vector, a table or a mean for
the whole batch, `probe` runs the model once more, on two rows.

join            joins the outputs of all batches
Stack           copies the outputs of each batch behind the others as they come, if they are plain
                tensors: nothing is left to concatenate
join_stack      makes the same checks as `join` on a stack
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from minikeras.errors import describe, is_number
from minikeras.nests import take_apart

Probe = Callable[[], tuple[Any, int] | None]  # outputs for another number of rows, and that number
BY_BATCH = "pass join=False for a list with the outputs of each batch"
WAY_OUT = (
    "Leave it out of what forward returns in eval mode (`if self.training`), give it a row for "
    f"each row of the batch with .expand, or {BY_BATCH}"
)


def join(
    pieces: list[Any], rows: list[int], probe: Probe = lambda: None, final: bool = True
) -> Any:
    """Join the outputs of all batches along the rows.

    Args:
        pieces: the outputs of each batch.
        rows: how many rows each batch has.
        probe: returns the outputs for another number of rows, and that number; None if it cannot.
        final: False if more batches follow, which will settle what is doubtful now.

    Raises:
        ValueError: a part has no rows, or differs from batch to batch.

    >>> first = (torch.zeros(2, 1), {"a": torch.ones(2)})
    >>> second = (torch.zeros(1, 1), {"a": torch.ones(1)})
    >>> join([first, second], [2, 1])[1]
    {'a': tensor([1., 1., 1.])}
    """
    return _Joining(rows, probe, final).join(pieces, [])


class Stack:
    """The outputs of many batches in one tensor on the CPU, each batch behind the one before it.

    Args:
        rows: the rows of all batches, if they are known.
        batch_size: the rows of each of these batches; the last may have fewer.

    >>> stack = Stack()
    >>> [stack.add(torch.zeros(2)), stack.add(torch.ones(1)), stack.add(torch.ones(1, 1))]
    [2, 1, 0]
    >>> stack.joined()
    tensor([0., 0., 1.])
    """

    def __init__(self, rows: int | None = None, batch_size: int = 1) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.is_open = True  # until a batch does not fit
        self.sizes: list[int] = []  # the first size of each batch's outputs
        self.full: list[Tensor] = []  # blocks of memory
        self.block: Tensor | None = None  # the block that is being filled
        self.array: Any = np.empty(0)  # the same memory: NumPy copies into it faster
        self.filled = 0  # rows of the block
        # of the last batch's outputs
        self.size = 0
        self.shape: torch.Size | None = None
        self.dtype: torch.dtype | None = None

    def add(self, outputs: Any) -> int:
        """Copy the outputs of a batch behind the others, and return their first size.

        0 if they do not fit; after the first that do not, none do. They are copied at once since
        the model may return a view of something larger, or the same memory for each batch.
        """
        if (
            type(outputs) is not Tensor
            or outputs.shape != self.shape
            or outputs.dtype is not self.dtype
            or outputs.layout is not torch.strided
            or self.filled + self.size > len(self.array)
        ):
            if not self.is_open or not self._fits(outputs):
                self.is_open = False
                self.shape = None
                return 0
            self._make_room(outputs)
        stop = self.filled + self.size
        self.array[self.filled : stop] = outputs.numpy(force=True)  # off the device, no graph
        self.filled = stop
        self.sizes.append(self.size)
        return self.size

    def _fits(self, outputs: Any) -> bool:
        """Tell whether outputs are a plain tensor, with rows like those of the last batch."""
        if type(outputs) is not Tensor or outputs.layout is not torch.strided:
            return False
        if outputs.is_quantized or outputs.is_nested or outputs.is_meta:
            return False
        # a batch of images may be in channels_last order, which torch.cat keeps
        if not 1 <= outputs.ndim <= 3 or outputs.shape[0] == 0:
            return False
        if self.block is not None:
            return outputs.dtype is self.block.dtype and outputs.shape[1:] == self.block.shape[1:]
        try:
            torch.empty(0, dtype=outputs.dtype, device="cpu").numpy()
        except TypeError:  # NumPy does not have this dtype, such as bfloat16
            return False
        return True

    def _make_room(self, outputs: Tensor) -> None:
        """Get ready for outputs of another first size, or begin a new block.

        The first block has room for all batches if their rows are known; else each block has twice
        the room of the one before. What nothing is written into takes no memory.
        """
        self.size = outputs.shape[0]
        self.shape = outputs.shape
        self.dtype = outputs.dtype
        if self.filled + self.size <= len(self.array):
            return
        capacity = 16 * self.size
        if self.block is not None:
            self.full.append(self.block[: self.filled])
            capacity = 2 * len(self.block)
        elif self.rows is not None:
            capacity = self.size * self.rows // min(self.batch_size, self.rows)
        shape = (max(capacity, self.size), *self.shape[1:])
        self.block = torch.empty(shape, dtype=self.dtype, device="cpu")
        self.array = self.block.numpy()
        self.filled = 0

    def _parts(self) -> list[Tensor]:
        """Return what is filled of each block."""
        assert self.block is not None
        return [*self.full, self.block[: self.filled]]

    def batch(self, number: int) -> Tensor:
        """Return the outputs of one batch, as a view; the first is number 0."""
        start = sum(self.sizes[:number])
        for part in self._parts():
            if start < len(part):
                return part[start : start + self.sizes[number]]
            start -= len(part)
        raise IndexError(number)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the outputs of each batch, as views."""
        sizes = iter(self.sizes)
        for part in self._parts() if self.sizes else ():
            start = 0
            while start < len(part):
                size = next(sizes)
                yield part[start : start + size]
                start += size

    def joined(self) -> Tensor:
        """Return the outputs of all batches, in memory that holds nothing else."""
        parts = self._parts()
        if len(parts) > 1:
            return torch.cat(parts)
        assert self.block is not None
        return self.block if self.filled == len(self.block) else parts[0].clone()


def join_stack(
    stack: Stack, rows: list[int], probe: Probe = lambda: None, final: bool = True
) -> Tensor:
    """Join the outputs of all batches of a stack along the rows: as `join` does, and it raises.

    Only batches that differ from those before them in rows or first size are looked at, and the
    first two, whose numbers are compared.
    """
    first_with: dict[tuple[int, int], int] = {}
    for number, sizes in enumerate(zip(stack.sizes, rows, strict=True)):
        first_with.setdefault(sizes, number)
    first_two = range(min(2, len(rows)))
    looked_at = sorted({*first_two, *first_with.values()})
    pieces = [stack.batch(number) for number in looked_at]
    rows_of_pieces = [rows[number] for number in looked_at]
    _Joining(rows_of_pieces, probe, final).check_tensors(pieces, [])
    return stack.joined()


class _Joining:
    """One call of `join`. `path` names a part of the outputs by its keys from the outside in."""

    def __init__(self, rows: list[int], probe: Probe, final: bool) -> None:
        self.final = final
        self.rows = rows
        self.probe = probe
        self.was_probed = False
        self.probed: tuple[Any, int] | None = None
        self.same_rows = len(set(rows)) == 1

    def join(self, pieces: list[Any], path: list[Any]) -> Any:
        """Join one part of the outputs."""
        if all(piece is None for piece in pieces):
            return None
        if any(piece is None for piece in pieces):
            other = next(piece for piece in pieces if piece is not None)
            raise ValueError(
                f"a part of the outputs{show_place(path)} is None in one batch and "
                f"{describe(other)} in another, and cannot be joined. Return the same parts for "
                f"each batch, or {BY_BATCH}."
            )
        if all(isinstance(piece, (Tensor, np.ndarray)) for piece in pieces):
            return self.join_tensors(pieces, path)
        if all(isinstance(piece, PackedSequence) for piece in pieces):
            return self.join_packed(pieces, path)
        if any(take_apart(piece) is None for piece in pieces):
            return self.join_others(pieces, path)
        if all(is_plain_list(piece) for piece in pieces) and self.has_items_by_row(pieces, path):
            return type(pieces[0])(chain.from_iterable(pieces))
        return self.join_containers(pieces, path)

    # --- containers ---

    def has_items_by_row(self, pieces: list[Any], path: list[Any]) -> bool:
        """Tell whether these lists have an item for each row, and not a fixed number of parts."""
        if [len(piece) for piece in pieces] != self.rows:
            return False
        if not self.same_rows:
            return True
        probed = self.get_probed(path) if self.final else None
        if probed is not None:
            outputs, rows = probed
            if is_plain_list(outputs) and len(outputs) in (rows, len(pieces[0])):
                return len(outputs) == rows
        if all(is_row(item) for item in chain.from_iterable(pieces)):
            return True
        try:
            self.join_containers(pieces, path)
        except ValueError:
            return True
        return False

    def join_containers(self, pieces: list[Any], path: list[Any]) -> Any:
        """Join tuples, lists, dicts or dataclasses part by part."""
        first = pieces[0]
        named = [_name_parts(piece) for piece in pieces]
        for piece, parts_of_piece in zip(pieces, named, strict=True):
            if parts_of_piece.keys() != named[0].keys():
                self.refuse_different(first, piece)
        container = take_apart(first)
        assert container is not None
        _, build = container
        joined = []
        for name in named[0]:
            same_part = [parts_of_piece[name] for parts_of_piece in named]
            joined.append(self.join(same_part, [*path, name]))
        return build(joined)

    def refuse_different(self, first: Any, other: Any) -> NoReturn:
        """Raise the error for outputs that are not built alike."""
        raise ValueError(
            f"the outputs of the batches are made in different ways, {describe(first)} and "
            f"{describe(other)}, and cannot be joined. Return the same from each, or {BY_BATCH}."
        )

    def join_others(self, pieces: list[Any], path: list[Any]) -> Any:
        """Return a string that all batches share; raise an error for anything else."""
        first = pieces[0]
        for piece in pieces:
            if type(piece) is not type(first):
                self.refuse_different(first, piece)
        if isinstance(first, str) and all(piece == first for piece in pieces):
            return first
        if is_number(first) or isinstance(first, str):
            raise ValueError(
                f"the model returned {describe(first)}{show_place(path)} for a batch of "
                f"{self.rows[0]} rows; predict joins tensors that have the rows first, and this "
                f"has none. {WAY_OUT}."
            )
        raise ValueError(
            f"the model returned {describe(first)}{show_place(path)}, which predict cannot join: "
            "it joins tensors that have the rows first, in tuples, lists, dicts and dataclasses. "
            f"Return such tensors, or {BY_BATCH}."
        )

    # --- tensors ---

    def join_tensors(self, pieces: list[Any], path: list[Any]) -> Any:
        """Concatenate tensors or arrays along their rows."""
        self.check_tensors(pieces, path)
        first = pieces[0]
        if len(pieces) == 1:
            return first
        if isinstance(first, Tensor):
            return torch.cat(pieces)
        return np.concatenate(pieces)

    def check_tensors(self, pieces: list[Any], path: list[Any]) -> None:
        """Refuse tensors or arrays that cannot be concatenated along their rows."""
        self.check_dimensions(pieces, path)
        first = pieces[0]
        multiple = self.find_multiple(pieces)
        if multiple is None:
            self.refuse_rows(pieces, path)
        shapes = sorted({tuple(piece.shape[1:]) for piece in pieces})
        if len(shapes) > 1:
            raise ValueError(
                f"the outputs of the batches have rows of different shapes, {shapes[0]} and "
                f"{shapes[-1]}, and cannot be joined. Pad them to one shape in forward, or "
                f"{BY_BATCH}."
            )
        if self.is_doubtful(pieces, multiple):
            probed = self.get_probed(path)
            if probed is not None:
                self.check_against_probe(first, probed, multiple, path)
            elif multiple != 1 and self.rows[0] == 1 and len(pieces) > 1:
                self.refuse_size(pieces, path)  # a row without a dimension for the rows

    def check_dimensions(self, pieces: list[Any], path: list[Any]) -> None:
        """Refuse tensors without dimensions, and a batch of one row that was squeezed."""
        most = max(piece.ndim for piece in pieces)
        for piece, rows in zip(pieces, self.rows, strict=True):
            if rows == 1:
                if piece.ndim < most:
                    self.refuse_squeezed(tuple(piece.shape), path)
                if piece.ndim == 0 and not self.is_number_per_batch(path):
                    self.refuse_squeezed(tuple(piece.shape), path)
            if piece.ndim == 0:
                raise ValueError(
                    f"the model returned one number{show_place(path)}, a 0-d tensor, for {rows} "
                    "rows; predict joins tensors that have the rows first, and this has none. "
                    f"{WAY_OUT}."
                )

    def is_number_per_batch(self, path: list[Any]) -> bool:
        """Tell whether another number of rows gives a single number as well."""
        probed = self.get_probed(path)
        if probed is None:
            return False
        outputs, _ = probed
        return isinstance(outputs, (Tensor, np.ndarray)) and outputs.ndim == 0

    def refuse_squeezed(self, shape: tuple[int, ...], path: list[Any]) -> NoReturn:
        """Raise the error for a batch of one row without its dimension of rows."""
        raise ValueError(
            f"the model returned shape {shape}{show_place(path)} for a batch of one row, which has "
            "lost the dimension of its rows, as squeeze() does. Name the dimension in forward: "
            "squeeze(-1)."
        )

    def find_multiple(self, pieces: list[Any]) -> int | None:
        """Return how many rows each row of a batch gives; None if that is no fixed whole number."""
        multiples = set()
        for piece, rows in zip(pieces, self.rows, strict=True):
            size = piece.shape[0]
            if not rows:
                if size:
                    return None
            elif not size or size % rows:
                return None
            else:
                multiples.add(size // rows)
        if len(multiples) > 1:
            return None
        return multiples.pop() if multiples else 1

    def refuse_rows(self, pieces: list[Any], path: list[Any]) -> NoReturn:
        """Raise the error for tensors without rows, or with the rows in another dimension."""
        for piece, rows in zip(pieces, self.rows, strict=True):
            shape = tuple(piece.shape)
            if rows not in shape[1:] or shape[0] == rows:
                continue
            dim = shape.index(rows, 1)
            if self.is_row_dimension(dim, path):
                raise ValueError(
                    f"the model returned a tensor of shape {shape}{show_place(path)} for {rows} "
                    "rows; predict joins batches along the first dimension, and the rows are in "
                    f"dimension {dim}. Return it with .transpose(0, {dim})."
                )
        self.refuse_size(pieces, path)

    def is_row_dimension(self, dim: int, path: list[Any]) -> bool:
        """Tell whether this dimension grows with the rows; True if the model cannot be probed."""
        probed = self.get_probed(path)
        if probed is None:
            return True
        outputs, rows = probed
        shape = getattr(outputs, "shape", ())
        return len(shape) > dim and shape[dim] == rows

    def refuse_size(self, pieces: list[Any], path: list[Any]) -> NoReturn:
        """Raise the error for tensors whose first size is no multiple of the rows."""
        sizes = []
        for piece, rows in zip(pieces, self.rows, strict=True):
            size = f"shape {tuple(piece.shape)} for {rows} rows"
            if size not in sizes:
                sizes.append(size)
        shown = sizes[0]
        if len(sizes) > 1:
            shown += f" and {sizes[-1]}"
        raise ValueError(
            f"the model returned {shown}{show_place(path)}; predict joins tensors that have the "
            f"rows first, one for each row of the batch or a fixed number. {WAY_OUT}. If the "
            "features do not have the rows first, give labels that have, or a batch of your own "
            "with an int `batch_size`."
        )

    def is_doubtful(self, pieces: list[Any], multiple: int) -> bool:
        """Tell whether the sizes may look like rows by accident."""
        if not self.same_rows or not self.rows[0] or not self.final:
            return False
        first = pieces[0]
        if multiple != 1 or (self.rows[0] > 1 and self.rows[0] in first.shape[1:]):
            return True
        if len(pieces) == 1:
            return False  # one batch alone is returned as it is
        # It may be a vector or a table for the whole batch, or a mean over a batch of one row.
        return first.ndim == 1 or self.rows[0] == 1 or is_same(first, pieces[1])

    def check_against_probe(
        self, first: Any, probed: tuple[Any, int], multiple: int, path: list[Any]
    ) -> None:
        """Refuse a tensor that does not grow with the rows."""
        other, rows = probed
        if not isinstance(other, (Tensor, np.ndarray)):
            return
        shape = tuple(first.shape)
        other_shape = tuple(other.shape)
        if len(shape) != len(other_shape) and self.rows[0] == 1:
            self.refuse_squeezed(shape, path)
        if other_shape[:1] != (multiple * rows,) or other_shape[1:] != shape[1:]:
            raise ValueError(
                f"the model returned shape {shape} for {self.rows[0]} rows and shape {other_shape} "
                f"for {rows} rows{show_place(path)}; predict joins tensors that have the rows "
                f"first, one for each row of the batch or a fixed number. {WAY_OUT}."
            )

    def get_probed(self, path: list[Any]) -> tuple[Any, int] | None:
        """Return this part of the outputs for another number of rows, and that number.

        None if the model cannot be probed, or gave no such part.
        """
        if not self.was_probed:
            self.probed = self.probe()
            self.was_probed = True
        if self.probed is None:
            return None
        outputs, rows = self.probed
        for name in path:
            named = _name_parts(outputs)
            if name not in named:
                return None
            outputs = named[name]
        return outputs, rows

    def join_packed(self, pieces: list[Any], path: list[Any]) -> PackedSequence:
        """Pack the sequences of all rows, in their order."""
        for piece, rows in zip(pieces, self.rows, strict=True):
            sequence_count = int(piece.batch_sizes[0])
            if sequence_count != rows:
                raise ValueError(
                    f"the model returned a PackedSequence of {sequence_count} "
                    f"rows{show_place(path)} for {rows} rows of the batch. Return one sequence for "
                    f"each row, or {BY_BATCH}."
                )
        if len(pieces) == 1:
            only: PackedSequence = pieces[0]
            return only
        sequences = []
        for piece in pieces:
            sequences.extend(unpack_sequence(piece))
        return pack_sequence(sequences, enforce_sorted=False)


def is_same(first: Any, second: Any) -> bool:
    """Tell whether two batches gave identical numbers, as a table that ignores the rows does."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return bool(np.array_equal(first, second))


def is_row(item: Any) -> bool:
    """Tell whether an item of a list is surely a row, such as a dict for each image or a name."""
    return isinstance(item, (str, bytes)) or take_apart(item) is not None


def is_plain_list(nest: Any) -> bool:
    """Tell whether a nest is a list or tuple whose parts have no names."""
    if hasattr(nest, "_fields") or isinstance(nest, PackedSequence):
        return False
    return isinstance(nest, (list, tuple))


def show_place(path: list[Any]) -> str:
    """Show where a part is in the outputs, such as " in its outputs['a'][0]"."""
    if not path:
        return ""
    return " in its outputs" + "".join(f"[{name!r}]" for name in path)


def _name_parts(nest: Any) -> dict[Any, Any]:
    """Return a container's parts by key or position; a leaf has none."""
    container = take_apart(nest)
    if container is None:
        return {}
    inner, _ = container
    names = nest if isinstance(nest, Mapping) else range(len(inner))
    return dict(zip(names, inner, strict=True))
