"""From one array of the user's to a tensor, or to rows that are fetched batch by batch.

as_tensor(array)    the whole array as a tensor of its own
as_rows(array)      what batches are cut from, and nothing is written into; no more is copied than must be
    TensorRows          a tensor, or the very memory of a NumPy array: a read-only memmap stays in its file
    FetchedRows         rows by number, as a sparse matrix gives them

Floats become torch's default dtype and integers int64 (uint8 stays). A tensor keeps its dtype.
"""

from __future__ import annotations

import decimal
import io
import mmap
import numbers
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import (
    is_bool_dtype,
    is_datetime64_any_dtype,
    is_integer_dtype,
    is_numeric_dtype,
    is_timedelta64_dtype,
)
from torch import Tensor

Array = np.ndarray[Any, Any]

LISTS = " A list is many arrays: pass one array of equal rows, numpy.array(rows), or a DataLoader with a collate_fn."
LARGE = 2**26  # bytes from which a DataFrame is not made larger than it is
CHUNK = 2**22  # bytes of a DataFrame's rows that are put into row order at once
VIEWED = "biufc"  # kinds of NumPy dtypes whose memory torch can take as it is


class TensorRows:
    """The rows of a tensor, which may be the memory of an array; a batch of them comes in `dtype`."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype if dtype is None else dtype

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of all rows together."""
        return tuple(self.tensor.shape)


class FetchedRows:
    """Rows that are asked for by number: `fetch` gives the tensor of a batch from its row numbers, (batch,) int64."""

    def __init__(
        self, fetch: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.fetch = fetch
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]


def is_array(data: Any) -> bool:
    """Whether data is one array or frame, of any library, whose first dimension is the rows."""
    if isinstance(data, (Tensor, np.ndarray, pd.DataFrame, pd.Series)) or is_sparse_matrix(data):
        return True
    kind = type(data)  # attributes of the type: an object may answer to any name
    return hasattr(kind, "__array__") or _is_other_frame(data)


def is_sparse_matrix(data: Any) -> bool:
    """Whether data is a matrix or an array of scipy.sparse."""
    return type(data).__module__.startswith("scipy.sparse") and hasattr(data, "tocsr")


# --- a whole array ---


def as_tensor(array: Any, name: str = "data") -> Tensor:
    """A tensor of an array: floats in torch's default dtype, integers in int64 (uint8 stays); a tensor as it is.

    >>> as_tensor(np.array([1.0, 2.0])).dtype
    torch.float32
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray) and array.ndim == 0:  # a batch's label may be one number
        return as_tensor(array.reshape(1), name).reshape(())
    rows = as_rows(array, name)
    if isinstance(rows, FetchedRows):
        return rows.fetch(torch.arange(len(rows)))
    tensor = rows.tensor.to(rows.dtype)
    borrowed = tensor is rows.tensor and isinstance(array, np.ndarray) and not array.flags.writeable
    if borrowed or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # a forward may write into it
    return tensor


def as_rows(array: Any, name: str) -> TensorRows | FetchedRows:
    """The rows of an array, none of them copied that need not be.

    Raises:
        TypeError: something other than numbers.
        ValueError: missing or masked values, no rows, or whole numbers that int64 cannot hold.
    """
    if isinstance(array, Tensor):
        return _rows_of_tensor(array, name)
    if array is None:
        raise TypeError(
            f"{name} holds None where an array of numbers is expected. Pass X, (X, y) or (X, y, "
            "weights)."
        )
    if isinstance(array, (int, float)):
        raise TypeError(f"{name} holds {array!r}; expected an array of numbers.{LISTS}")
    if isinstance(array, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} holds {_file_or_text(array)}")
    if isinstance(array, (set, frozenset)):
        raise TypeError(
            f"{name} holds a {type(array).__name__}, which has no order; expected an array of "
            "numbers."
        )
    if is_sparse_matrix(array):
        return _rows_of_sparse_matrix(array, name)
    if isinstance(array, (pd.Index, pd.api.extensions.ExtensionArray)):
        array = pd.Series(array)
    if isinstance(array, pd.Series):
        rows = _rows_of_frame(array.to_frame(), name, is_series=True)
        assert isinstance(rows, TensorRows)  # columns of several dtypes alone are fetched
        return TensorRows(rows.tensor[:, 0], rows.dtype)
    if isinstance(array, pd.DataFrame):
        return _rows_of_frame(array, name)
    if _is_other_frame(array):
        return _rows_of_frame(_pandas_frame(array, name), name)
    if isinstance(array, Mapping):
        if isinstance(getattr(array, "batch_size", None), tuple):
            return _rows_of_tensors_by_name(array, name)
        raise TypeError(
            f"{name} holds a {type(array).__name__}; expected arrays or a plain dict. Pass "
            "dict(features)."
        )
    if np.ma.isMaskedArray(array):
        return _rows_of_array(_without_mask(array, name), name)
    return _rows_of_array(np.asarray(array), name)


def _rows_of_array(array: Array, name: str) -> TensorRows | FetchedRows:
    if array.dtype.kind == "O":
        array = _numbers_of_objects(array, name)
    if array.dtype.kind not in VIEWED:
        raise TypeError(
            f"{name} holds {array.dtype} values; expected numbers. {_remedy_of_array(array)}"
        )
    if array.ndim == 0:
        raise ValueError(
            f"{name} holds the single number {array[()]!r}; expected an array with the rows first. "
            f"For one row pass an array of shape (1, ...), as array.reshape(1, 1) has."
        )
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise ValueError(
            f"{name} holds {array.max()}; expected whole numbers below 2**63, int64's. Pass floats."
        )
    dtype = _dtype_of_batch(array.dtype)
    in_file = _is_in_file(array)
    if not _can_be_viewed(array):
        if in_file:
            shape = tuple(array.shape)
            return FetchedRows(
                lambda rows: as_tensor(np.asarray(array[rows.numpy()]), name), shape, dtype
            )
        size = min(
            array.dtype.itemsize, 16 if array.dtype.kind == "c" else 8
        )  # torch has no longer numbers
        array = array.astype(f"={array.dtype.kind}{size}", order="C")
    tensor = view_of(array)
    if in_file or (tensor.is_contiguous() and dtype.itemsize > tensor.dtype.itemsize):
        return TensorRows(tensor, dtype)
    if (
        dtype.itemsize > tensor.dtype.itemsize
    ):  # made wide batch by batch: the whole would be larger than the array
        return TensorRows(tensor.contiguous(), dtype)
    return TensorRows(tensor.to(dtype).contiguous(), dtype)


def _dtype_of_batch(dtype: np.dtype[Any]) -> torch.dtype:
    """The dtype in which values of a NumPy dtype reach the model."""
    if dtype.kind == "f":
        return torch.get_default_dtype()
    if dtype.kind == "b":
        return torch.bool
    if dtype.kind == "c":
        return torch.complex64 if dtype.itemsize == 8 else torch.complex128
    return torch.uint8 if dtype == np.uint8 else torch.int64


def _can_be_viewed(array: Array) -> bool:
    """Whether torch can take the memory of an array as it is."""
    known = array.dtype.isnative and array.dtype.itemsize <= (16 if array.dtype.kind == "c" else 8)
    return known and all(
        stride >= 0 and stride % array.dtype.itemsize == 0 for stride in array.strides
    )


def view_of(array: Array) -> Tensor:
    """A tensor in the memory of an array, to be read only."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The given NumPy array is not writ"
        )  # nothing is written into it
        return torch.from_numpy(array)


def _is_in_file(array: Any) -> bool:
    """Whether an array is, or is a part of, a file that is mapped into memory."""
    while array is not None:
        if isinstance(array, (np.memmap, mmap.mmap)):
            return True
        array = getattr(array, "base", None)
    return False


def _without_mask(array: Any, name: str) -> Array:
    hidden = int(np.count_nonzero(np.ma.getmaskarray(array)))
    if hidden:
        raise ValueError(
            f"{name} holds a masked array with {hidden} of {array.size} values masked; expected an "
            "array without a mask. Pass array.filled(0), or another number in place of 0, or "
            "leave those rows out."
        )
    return np.ma.getdata(array)


def _numbers_of_objects(array: Array, name: str) -> Array:
    """An array of Python's and NumPy's numbers as one of numbers; anything else in it is a TypeError."""
    kinds = set(map(type, array.ravel().tolist()))
    if not array.size:
        return array.astype(np.float64)
    whole = (numbers.Integral, np.integer)
    if all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        return array.astype(np.bool_)
    if all(issubclass(kind, (*whole, bool, np.bool_)) for kind in kinds):
        try:
            return array.astype(np.int64)
        except OverflowError:
            raise ValueError(
                f"{name} holds whole numbers that int64 cannot hold; expected -2**63 to 2**63 - 1. "
                "Pass floats."
            ) from None
    if all(issubclass(kind, (numbers.Real, decimal.Decimal, np.bool_)) for kind in kinds):
        return array.astype(np.float64)
    missing = int(pd.isna(array).sum()) if array.ndim else 0
    if missing and kinds <= {type(None), type(pd.NA), float, int, bool}:
        raise ValueError(
            f"{name} holds {missing} missing values (None or NA) among {array.size}; expected "
            "numbers. Fill them, for instance with "
            "pandas.DataFrame(array).fillna(0).astype('float32'), or leave their rows out."
        )
    shown = ", ".join(sorted(kind.__name__ for kind in kinds))
    remedy = _remedy_of_array(array)
    if any(issubclass(kind, (Tensor, np.ndarray, list, tuple)) for kind in kinds):
        remedy = "Pad the rows to one length and stack them: numpy.stack(rows)."
    raise TypeError(f"{name} holds objects ({shown}); expected numbers. {remedy}")


def _remedy_of_array(array: Array) -> str:
    """How an array that is not of numbers becomes one that is."""
    if array.dtype.kind == "M":
        return "Pass the time since the first: (array - array.min()) / numpy.timedelta64(1, 'D')."
    if array.dtype.kind == "m":
        return "Pass array / numpy.timedelta64(1, 'D')."
    if array.dtype.kind in "US" and array.size:
        try:
            array.ravel()[:1000].astype(np.float64)
        except ValueError:
            pass
        else:
            return "They are written numbers: pass array.astype('float32')."
    if array.ndim == 1 and array.dtype.kind in "OUST":
        return "Encode them as numbers first: as class numbers, pandas.factorize(array)[0]."
    if array.ndim == 2 and array.dtype.kind in "OUST":
        return "Encode them as numbers first: pandas.get_dummies(pandas.DataFrame(array).infer_objects(), dtype=float)."
    return "Encode them as numbers first."


# --- frames ---


def _rows_of_frame(
    frame: pd.DataFrame, name: str, is_series: bool = False
) -> TensorRows | FetchedRows:
    """A frame's values in row order, in a dtype that needs no more memory than the frame where there is one."""
    frame = _with_numbers_for_objects(frame)
    _check_numeric(frame, name, is_series)
    _check_none_missing(frame, name, is_series)
    dtypes = [_numpy_dtype(dtype) for dtype in frame.dtypes]
    kept: np.dtype[Any]  # while it waits; a batch comes in `dtype`
    if dtypes and all(is_bool_dtype(dtype) for dtype in frame.dtypes):
        kept, dtype = np.dtype(np.bool_), torch.bool
    elif dtypes and all(is_integer_dtype(dtype) for dtype in frame.dtypes):
        kept, dtype = np.result_type(*dtypes), torch.int64
        if kept.kind == "f":  # of int64 and uint64, for which NumPy has no common integer
            kept = np.dtype(np.int64)
        for position, of_column in enumerate(dtypes):
            column = frame.iloc[:, position]
            if of_column == np.uint64 and len(column) and column.max() >= 2**63:
                raise ValueError(
                    f"{name} holds {column.max()}; expected whole numbers below 2**63, int64's. "
                    "Pass floats."
                )
    elif any(of_column.kind == "c" for of_column in dtypes):
        kept, dtype = np.dtype(np.complex128), torch.complex128
    else:
        dtype = torch.get_default_dtype()
        kept = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        if dtypes and all(of_column == np.float16 for of_column in dtypes):
            kept = np.dtype(np.float16)
    size = frame.shape[0] * frame.shape[1] * kept.itemsize
    own_size = frame.shape[0] * sum(of_column.itemsize for of_column in dtypes)
    if size > max(
        own_size, LARGE
    ):  # many bools beside a float: slower, and the frame stays the only copy
        return FetchedRows(
            lambda rows: view_of(_in_row_order(frame.iloc[rows.numpy()], kept)).to(dtype),
            tuple(frame.shape),
            dtype,
        )
    values = _in_row_order(frame, kept)
    if kept == np.uint64:
        values = values.view(np.int64)
    tensor = view_of(values)
    if dtype.itemsize <= tensor.dtype.itemsize:
        tensor = tensor.to(dtype)
    return TensorRows(tensor, dtype)


def _in_row_order(frame: pd.DataFrame, dtype: np.dtype[Any]) -> Array:
    """A frame's values with each row in one place, as a frame of columns has not; made a part of the rows at a time."""
    values = np.empty(frame.shape, dtype)
    step = max(CHUNK // max(frame.shape[1] * 8, 1), 1)
    for start in range(0, len(frame), step):
        part = frame.iloc[start : start + step]
        values[start : start + step] = part.to_numpy(np.float32 if dtype == np.float16 else dtype)
    return values


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype for a column's: of nullable and sparse columns, that of the values."""
    for name in ("numpy_dtype", "subtype"):
        inner: Any = getattr(dtype, name, None)
        if isinstance(inner, np.dtype):
            return inner
    plain: np.dtype[Any] = np.dtype(dtype)
    return plain


def _with_numbers_for_objects(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with columns of objects that are all numbers as columns of numbers."""
    changed: dict[int, Array] = {}
    for position, dtype in enumerate(frame.dtypes):
        if dtype.kind == "O" and isinstance(dtype, np.dtype):
            try:
                changed[position] = _numbers_of_objects(frame.iloc[:, position].to_numpy(), "")
            except (TypeError, ValueError):  # told of by the column's name
                continue
    if not changed:
        return frame
    columns: list[Any] = []
    for position in range(frame.shape[1]):
        column = (
            pd.Series(changed[position], frame.index)
            if position in changed
            else frame.iloc[:, position]
        )
        columns.append(column)
    numbered: pd.DataFrame = pd.concat(columns, axis=1)
    numbered.columns = frame.columns
    return numbered


def _check_numeric(frame: pd.DataFrame, name: str, is_series: bool) -> None:
    odd: list[str] = []
    remedies: list[str] = []
    for position, dtype in enumerate(frame.dtypes):
        if is_numeric_dtype(dtype):
            continue
        odd.append(str(frame.columns[position]))
        remedy = _remedy_of_column(frame.iloc[:, position], is_series)
        if remedy not in remedies:
            remedies.append(remedy)
    if odd:
        what = f"has columns that are not numbers: {', '.join(odd)}"
        if is_series:
            what = f"holds a Series of {frame.dtypes.iloc[0]} values, which are not numbers"
        raise TypeError(f"{name} {what}. {' '.join(remedies)}")


def _remedy_of_column(column: pd.Series[Any], is_series: bool) -> str:
    """How a column that is not of numbers becomes one that is."""
    if is_datetime64_any_dtype(column.dtype):
        return (
            "Pass a date as the time since the first: (column - column.min()).dt.total_seconds()."
        )
    if is_timedelta64_dtype(column.dtype):
        return "Pass a time span as column.dt.total_seconds()."
    if is_series:
        return "Encode them first: as class numbers, column.astype('category').cat.codes."
    return (
        "Encode them first, for instance with pandas.get_dummies(frame, dtype=float) or "
        "column.astype('category').cat.codes."
    )


def _check_none_missing(frame: pd.DataFrame, name: str, is_series: bool) -> None:
    """Integers and bools have no NaN: a missing one must not become some number."""
    missing: list[str] = []
    filled = "fillna(0)"
    for position, dtype in enumerate(frame.dtypes):
        if isinstance(dtype, np.dtype) or not (is_integer_dtype(dtype) or is_bool_dtype(dtype)):
            continue
        count = int(frame.iloc[:, position].isna().sum())
        if count:
            missing.append(
                f"{count} of {len(frame)}" if is_series else f"{frame.columns[position]} ({count})"
            )
            if is_bool_dtype(dtype):  # which pandas does not fill with 0
                filled = "astype('float64').fillna(0)"
    if missing:
        where = (
            f"{missing[0]} values are missing"
            if is_series
            else f"values are missing in {', '.join(missing)}"
        )
        whose = "column" if is_series else "frame"
        raise ValueError(
            f"{name}: {where} (NA), and whole numbers and bools have none for it. Fill them, "
            f"{whose}.{filled}, or leave their rows out; {whose}.astype('float64') makes them NaN."
        )


def _is_other_frame(array: Any) -> bool:
    """Whether this is a frame of columns by name, of another library than pandas."""
    kind = type(array)
    if hasattr(kind, "__dataframe__"):
        return True
    return hasattr(kind, "to_numpy") and hasattr(kind, "columns") and hasattr(kind, "__getitem__")


def _pandas_frame(frame: Any, name: str) -> pd.DataFrame:
    """A frame of another library, column by column: names stay, and numbers are not copied where that can be."""
    if not hasattr(type(frame), "to_numpy"):
        return pd.DataFrame(frame.to_pandas())
    columns: dict[str, Any] = {}
    for column in frame.columns:
        values = frame[column]
        as_array = values.to_numpy()
        nulls = getattr(values, "null_count", None)
        integral = str(getattr(values, "dtype", "")).lower().startswith(("int", "uint", "bool"))
        if callable(nulls) and integral and nulls():
            raise ValueError(
                f"{name}: values are missing in {column} ({nulls()}), and whole numbers and bools "
                "have none for it. Fill them, frame.fill_null(0), or leave their rows out."
            )
        columns[str(column)] = as_array
    return pd.DataFrame(columns, copy=False)


# --- rows that are fetched ---


def _rows_of_tensor(tensor: Tensor, name: str) -> TensorRows | FetchedRows:
    if tensor.ndim == 0:
        raise ValueError(
            f"{name} holds a 0-d tensor, one number; expected a tensor with the rows first. "
            f"For one row pass a tensor of shape (1, ...), as tensor.reshape(1, 1) has."
        )
    if tensor.is_meta:
        raise ValueError(
            f"{name} holds a tensor on the meta device, which has no values. Pass one with values."
        )
    if tensor.is_nested:
        if tensor.layout is not torch.jagged:
            raise ValueError(
                f"{name} holds a nested tensor of the strided layout, which has no shape; expected "
                "one of the jagged layout, or a tensor of equal rows. Build it with "
                "torch.nested.nested_tensor(rows, layout=torch.jagged), or pass "
                "torch.nested.to_padded_tensor(tensor, 0.0)."
            )
        parts = tensor.unbind()

        def nested(rows: Tensor) -> Tensor:
            batch: Tensor = torch.nested.as_nested_tensor(
                [parts[row] for row in rows.tolist()], layout=torch.jagged
            )
            return batch

        return FetchedRows(nested, (tensor.size(0),), tensor.dtype)
    if tensor.layout is torch.strided:
        return TensorRows(tensor)
    by_place = tensor.to_sparse_coo().coalesce()  # the one sparse layout whose rows torch picks

    def sparse(rows: Tensor) -> Tensor:
        batch: Tensor = by_place.index_select(0, rows.to(by_place.device))
        return batch if tensor.layout is torch.sparse_coo else batch.to_sparse(layout=tensor.layout)

    return FetchedRows(sparse, tuple(tensor.shape), tensor.dtype)


def _rows_of_sparse_matrix(matrix: Any, name: str) -> FetchedRows:
    """A batch of a sparse matrix is dense: every layer takes it, and it is small."""
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} holds a sparse array of shape {matrix.shape}; expected (rows, columns). Pass "
            "array.toarray()."
        )
    if matrix.dtype.kind not in VIEWED:
        raise TypeError(
            f"{name} holds {matrix.dtype} values; expected numbers. Pass matrix.astype('float32')."
        )
    by_row = matrix.tocsr()

    def dense(rows: Tensor) -> Tensor:
        return as_tensor(by_row[rows.numpy()].toarray(), name)

    return FetchedRows(dense, tuple(by_row.shape), _dtype_of_batch(by_row.dtype))


def _rows_of_tensors_by_name(tensors: Any, name: str) -> FetchedRows:
    """Tensors that are indexed as one, such as a TensorDict."""
    if not len(tensors.batch_size):
        raise ValueError(
            f"{name} holds a {type(tensors).__name__} without a batch_size; expected [rows]. Set "
            "it."
        )
    return FetchedRows(lambda rows: tensors[rows], (int(tensors.batch_size[0]),), torch.float32)


# --- what is no data ---

READERS: Mapping[str, str] = {
    ".csv": "frame = pandas.read_csv({})",
    ".tsv": "frame = pandas.read_csv({}, sep='\\t')",
    ".parquet": "frame = pandas.read_parquet({})",
    ".xlsx": "frame = pandas.read_excel({})",
    ".npy": "X = numpy.load({}, mmap_mode='r')",
    ".pt": "X, y = torch.load({})",
}


def _file_or_text(value: Any) -> str:
    """What came in the place of data, and what to do."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes; expected an array of numbers. Pass numpy.frombuffer(data, dtype=numpy.uint8)."
    path = os.fspath(value)
    shown = repr(path)
    reader = READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        shown = repr(path if len(path) <= 60 else path[:57] + "...")
        return (
            f"the text {shown}; expected an array of numbers. Read the file that it names first; "
            "if texts are the labels, pass pandas.factorize(numpy.array(labels))[0]."
        )
    return f"the path {shown}; expected data. Read it first: {reader.format(shown)}."


def check_no_path(data: Any, name: str) -> None:
    """A path, bytes, a set or a class where data is meant.

    Raises:
        TypeError: with what to pass instead.
    """
    if isinstance(data, bytearray | memoryview):
        data = bytes(data)
    if isinstance(data, (str, bytes, os.PathLike)):
        text = _file_or_text(data)
        if "frame =" in text:
            text += (
                " Then pass its columns as (X, y): (frame.drop(columns='label'), frame[['label']])."
            )
        raise TypeError(f"{name} is {text}")
    if isinstance(data, io.IOBase):
        raise TypeError(
            f"{name} is an open file; expected data. Read it first: frame = pandas.read_csv(file). "
            "Then pass its columns as (X, y)."
        )
    if isinstance(data, (set, frozenset)):
        kind = type(data).__name__
        raise TypeError(
            f"{name} is a {kind}, which has no order. Pass arrays (X, y) or a list of batches."
        )
    if isinstance(data, type):
        raise TypeError(
            f"{name} is the class {data.__name__}; expected an instance. Pass {data.__name__}(...)."
        )
    if type(data) is list and data and isinstance(data[0], (str, bytes, os.PathLike)):
        raise TypeError(
            f"{name} is a list of {type(data[0]).__name__}; expected a list of (features, labels) "
            "batches. If they name files, write a torch.utils.data.Dataset whose __getitem__ "
            "reads one of them."
        )
    if hasattr(type(data), "collect") and hasattr(type(data), "columns") and not is_array(data):
        raise TypeError(
            f"{name} is a {type(data).__name__}, which is not computed yet. Pass {name}.collect()."
        )
