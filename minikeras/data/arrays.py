"""Convert one array to a tensor, or to rows that are fetched batch by batch.

as_tensor(array)    the whole array as a tensor
as_rows(array)      read-only rows that batches are cut from; copies only what must be copied
    TensorRows          a tensor, or the memory of a NumPy array itself: a memmap stays in its file
    FetchedRows         rows by number, as from a sparse matrix

Floats become torch's default dtype and integers int64 (uint8 stays). A tensor keeps its dtype.
"""

from __future__ import annotations

import decimal
import io
import mmap
import numbers
import os
from collections.abc import Mapping
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

from minikeras.arrays import (
    Array,
    FetchedRows,
    TensorRows,
    can_be_viewed,
    check_fits_int64,
    choose_batch_dtype,
    get_largest_itemsize,
    is_array,
    is_other_frame,
    is_sparse_matrix,
    unmask,
    view_as_tensor,
)
from minikeras.errors import describe
from minikeras.nests import map_leaves

LISTS = (
    " A list counts as many arrays: pass one array of rows with equal length, numpy.array(rows), "
    "or a DataLoader with a collate_fn."
)
# codes of `astype('category')` would change with the rows that a table happens to have
CODES = (
    "pandas.Index(categories).get_indexer(column) + 1, where 0 is any other category. Keep the "
    "categories of the training rows, and use them for new rows too."
)
LARGE = 2**26  # bytes; a DataFrame whose conversion needs more than this stays the only copy
CHUNK = 2**22  # bytes of a DataFrame that are copied to row-major order at once
NUMBER_KINDS = "biufc"  # kinds of NumPy dtypes that torch can hold


# --- arrays ---


def as_tensor(array: Any, name: str = "data") -> Tensor:
    """Convert an array to a tensor; return a tensor unchanged.

    Floats become torch's default dtype and integers int64 (uint8 stays).

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
    is_view = tensor is rows.tensor
    is_read_only = is_view and isinstance(array, np.ndarray) and not array.flags.writeable
    if is_read_only or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # a forward may write into it
    return tensor


def as_rows(array: Any, name: str) -> TensorRows | FetchedRows:
    """Convert an array to rows that batches are cut from, and copy only what must be copied.

    Raises:
        TypeError: the array holds something other than numbers.
        ValueError: values are missing or masked, there are no rows, or int64 cannot hold a number.
    """
    if isinstance(array, Tensor):
        return _convert_tensor(array, name)
    if array is None:
        raise TypeError(
            f"{name} holds None where an array of numbers is expected. Pass X, (X, y) or (X, y, "
            "weights)."
        )
    if isinstance(array, (int, float)):
        raise TypeError(f"{name} holds {array!r}; expected an array of numbers.{LISTS}")
    if isinstance(array, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} holds {_describe_file_or_text(array)}")
    if isinstance(array, (set, frozenset)):
        raise TypeError(
            f"{name} holds a {type(array).__name__}, which has no order; expected an array of "
            "numbers."
        )
    if is_sparse_matrix(array):
        return _convert_sparse_matrix(array, name)
    if isinstance(array, (pd.Index, pd.api.extensions.ExtensionArray)):
        array = pd.Series(array)
    if isinstance(array, pd.Series):
        rows = _convert_frame(array.to_frame(), name, is_series=True)
        assert isinstance(rows, TensorRows)  # only columns of several dtypes are fetched
        return TensorRows(rows.tensor[:, 0], rows.dtype)
    if isinstance(array, pd.DataFrame):
        return _convert_frame(array, name)
    if is_other_frame(array):
        return _convert_frame(_to_pandas(array, name), name)
    if isinstance(array, Mapping):
        if isinstance(getattr(array, "batch_size", None), tuple):
            return _convert_tensors_by_name(array, name)
        raise TypeError(
            f"{name} holds a {type(array).__name__}; expected arrays or a plain dict. Pass "
            "dict(features)."
        )
    if np.ma.isMaskedArray(array):
        return _convert_array(unmask(array, name), name)
    return _convert_array(np.asarray(array), name)


def _convert_array(array: Array, name: str) -> TensorRows | FetchedRows:
    """Convert a NumPy array to rows."""
    if array.dtype.kind == "O":
        array = _convert_objects(array, name)
    if array.dtype.kind not in NUMBER_KINDS:
        raise TypeError(
            f"{name} holds {array.dtype} values; expected numbers. {_suggest_for_array(array)}"
        )
    if array.ndim == 0:
        raise ValueError(
            f"{name} holds the single number {array[()]!r}; expected an array with the rows first. "
            f"For one row pass an array of shape (1, ...), as array.reshape(1, 1) has."
        )
    check_fits_int64(array, name)
    dtype = choose_batch_dtype(array.dtype)
    is_in_file = _is_in_file(array)
    if not can_be_viewed(array):
        if is_in_file:

            def fetch(rows: Tensor) -> Tensor:
                return as_tensor(np.asarray(array[rows.numpy()]), name)

            return FetchedRows(fetch, tuple(array.shape), dtype)
        size = min(array.dtype.itemsize, get_largest_itemsize(array.dtype))
        array = array.astype(f"={array.dtype.kind}{size}", order="C")
    tensor = view_as_tensor(array)
    if is_in_file:
        return TensorRows(tensor, dtype)
    if dtype.itemsize > tensor.dtype.itemsize:
        # Cast batch by batch: all rows at once would need more memory than the array.
        return TensorRows(tensor.contiguous(), dtype)
    return TensorRows(tensor.to(dtype).contiguous(), dtype)


def _is_in_file(array: Any) -> bool:
    """Tell whether an array is, or is a view of, a memory-mapped file."""
    while array is not None:
        if isinstance(array, (np.memmap, mmap.mmap)):
            return True
        array = getattr(array, "base", None)
    return False


def _convert_objects(array: Array, name: str) -> Array:
    """Convert an array of Python and NumPy number objects to an array of numbers.

    Raises:
        TypeError: an object is no number.
        ValueError: values are missing, or int64 cannot hold a number.
    """
    kinds = {type(value) for value in array.ravel().tolist()}
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
            "pandas.DataFrame(array).fillna(0).astype('float32'), or drop those rows."
        )
    shown = ", ".join(sorted(kind.__name__ for kind in kinds))
    remedy = _suggest_for_array(array)
    if any(issubclass(kind, (Tensor, np.ndarray, list, tuple)) for kind in kinds):
        remedy = "Pad the rows to one length and stack them: numpy.stack(rows)."
    raise TypeError(f"{name} holds objects ({shown}); expected numbers. {remedy}")


def _suggest_for_array(array: Array) -> str:
    """Say how to convert an array of other values to numbers."""
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
            return "They are numbers written as text: pass array.astype('float32')."
    if array.ndim == 1 and array.dtype.kind in "OUST":
        return "Encode them as numbers first: as class numbers, pandas.factorize(array)[0]."
    if array.ndim == 2 and array.dtype.kind in "OUST":
        return (
            "Encode them as numbers first: "
            "pandas.get_dummies(pandas.DataFrame(array).infer_objects(), dtype=float)."
        )
    return "Encode them as numbers first."


# --- frames ---


def _convert_frame(
    frame: pd.DataFrame, name: str, is_series: bool = False
) -> TensorRows | FetchedRows:
    """Convert a DataFrame to rows.

    They are kept in a dtype that needs no more memory than the frame, if there is such a dtype.
    """
    frame = _convert_object_columns(frame)
    _check_numeric(frame, name, is_series)
    _check_none_missing(frame, name, is_series)
    dtypes = [_get_numpy_dtype(dtype) for dtype in frame.dtypes]
    stored: np.dtype[Any]  # the dtype of all rows in memory; a batch comes in `dtype`
    if dtypes and all(is_bool_dtype(dtype) for dtype in frame.dtypes):
        stored = np.dtype(np.bool_)
        dtype = torch.bool
    elif dtypes and all(is_integer_dtype(dtype) for dtype in frame.dtypes):
        stored = np.result_type(*dtypes)
        dtype = torch.int64
        if stored.kind == "f":  # of int64 and uint64, for which NumPy has no common integer
            stored = np.dtype(np.int64)
        for position, column_dtype in enumerate(dtypes):
            column = frame.iloc[:, position]
            if column_dtype == np.uint64 and len(column) and column.max() >= 2**63:
                raise ValueError(
                    f"{name} holds {column.max()}; expected whole numbers below 2**63, int64's. "
                    "Pass floats."
                )
    elif any(column_dtype.kind == "c" for column_dtype in dtypes):
        stored = np.dtype(np.complex128)
        dtype = torch.complex128
    else:
        dtype = torch.get_default_dtype()
        stored = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        if dtypes and all(column_dtype == np.float16 for column_dtype in dtypes):
            stored = np.dtype(np.float16)
    size = frame.shape[0] * frame.shape[1] * stored.itemsize
    frame_size = frame.shape[0] * sum(column_dtype.itemsize for column_dtype in dtypes)
    if size > max(frame_size, LARGE):
        # Such as many bools next to a float: fetching is slower, but the frame stays the only copy.

        def fetch(rows: Tensor) -> Tensor:
            return view_as_tensor(_copy_by_row(frame.iloc[rows.numpy()], stored)).to(dtype)

        return FetchedRows(fetch, tuple(frame.shape), dtype)
    values = _copy_by_row(frame, stored)
    if stored == np.uint64:
        values = values.view(np.int64)
    tensor = view_as_tensor(values)
    if dtype.itemsize <= tensor.dtype.itemsize:
        tensor = tensor.to(dtype)
    return TensorRows(tensor, dtype)


def _copy_by_row(frame: pd.DataFrame, dtype: np.dtype[Any]) -> Array:
    """Copy a frame's values in row-major order, some rows at a time; a frame stores columns."""
    values = np.empty(frame.shape, dtype)
    step = max(CHUNK // max(frame.shape[1] * 8, 1), 1)
    read_as = np.dtype(np.float32) if dtype == np.float16 else dtype
    for start in range(0, len(frame), step):
        part = frame.iloc[start : start + step]
        values[start : start + step] = part.to_numpy(read_as)
    return values


def _get_numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of a column; of nullable and sparse columns, that of the values."""
    for name in ("numpy_dtype", "subtype"):
        inner: Any = getattr(dtype, name, None)
        if isinstance(inner, np.dtype):
            return inner
    plain: np.dtype[Any] = np.dtype(dtype)
    return plain


def _convert_object_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert the columns of objects in which all values are numbers to columns of numbers."""
    converted: dict[int, Array] = {}
    for position, dtype in enumerate(frame.dtypes):
        if dtype.kind == "O" and isinstance(dtype, np.dtype):
            try:
                converted[position] = _convert_objects(frame.iloc[:, position].to_numpy(), "")
            except (TypeError, ValueError):  # `_check_numeric` raises it with the column's name
                continue
    if not converted:
        return frame
    columns: list[Any] = []
    for position in range(frame.shape[1]):
        if position in converted:
            columns.append(pd.Series(converted[position], frame.index))
        else:
            columns.append(frame.iloc[:, position])
    result: pd.DataFrame = pd.concat(columns, axis=1)
    result.columns = frame.columns
    return result


def _check_numeric(frame: pd.DataFrame, name: str, is_series: bool) -> None:
    """Check that all columns are numbers, and say of the others how to convert them."""
    odd: list[str] = []
    remedies: list[str] = []
    for position, dtype in enumerate(frame.dtypes):
        if is_numeric_dtype(dtype):
            continue
        odd.append(str(frame.columns[position]))
        remedy = _suggest_for_column(frame.iloc[:, position], is_series)
        if remedy not in remedies:
            remedies.append(remedy)
    if odd:
        what = f"has columns that are not numbers: {', '.join(odd)}"
        if is_series:
            what = f"holds a Series of {frame.dtypes.iloc[0]} values, which are not numbers"
        raise TypeError(f"{name} {what}. {' '.join(remedies)}")


def _suggest_for_column(column: pd.Series[Any], is_series: bool) -> str:
    """Say how to convert a column of other values to numbers."""
    if is_datetime64_any_dtype(column.dtype):
        return (
            "Pass a date as the time since the first: (column - column.min()).dt.total_seconds()."
        )
    if is_timedelta64_dtype(column.dtype):
        return "Pass a time span as column.dt.total_seconds()."
    if is_series:
        return f"Encode them first: as class numbers, {CODES}"
    return f"Encode them first, for instance with pandas.get_dummies(frame, dtype=float) or {CODES}"


def _check_none_missing(frame: pd.DataFrame, name: str, is_series: bool) -> None:
    """Check that no integer or bool is missing: they have no NaN and would become some number."""
    missing: list[str] = []
    filled = "fillna(0)"
    for position, dtype in enumerate(frame.dtypes):
        if isinstance(dtype, np.dtype) or not (is_integer_dtype(dtype) or is_bool_dtype(dtype)):
            continue
        count = int(frame.iloc[:, position].isna().sum())
        if not count:
            continue
        if is_series:
            missing.append(f"{count} of {len(frame)}")
        else:
            missing.append(f"{frame.columns[position]} ({count})")
        if is_bool_dtype(dtype):  # which pandas does not fill with 0
            filled = "astype('float64').fillna(0)"
    if missing:
        where = f"values are missing in {', '.join(missing)}"
        whose = "frame"
        if is_series:
            where = f"{missing[0]} values are missing"
            whose = "column"
        raise ValueError(
            f"{name}: {where} (NA), and whole numbers and bools have none for it. Fill them, "
            f"{whose}.{filled}, or drop those rows; {whose}.astype('float64') makes them NaN."
        )


def _to_pandas(frame: Any, name: str) -> pd.DataFrame:
    """Convert a frame of another library to pandas, without a copy of the numbers if possible."""
    if not hasattr(type(frame), "to_numpy"):
        return pd.DataFrame(frame.to_pandas())
    columns: dict[str, Any] = {}
    for column in frame.columns:
        values = frame[column]
        array = values.to_numpy()
        null_count = getattr(values, "null_count", None)
        dtype_name = str(getattr(values, "dtype", "")).lower()
        is_integral = dtype_name.startswith(("int", "uint", "bool"))
        if callable(null_count) and is_integral and null_count():
            raise ValueError(
                f"{name}: values are missing in {column} ({null_count()}), and whole numbers and "
                "bools have none for it. Fill them, frame.fill_null(0), or drop those rows."
            )
        columns[str(column)] = array
    return pd.DataFrame(columns, copy=False)


# --- rows that are fetched ---


def _convert_tensor(tensor: Tensor, name: str) -> TensorRows | FetchedRows:
    """Convert a tensor, which may be nested or sparse, to rows."""
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
        tensors = tensor.unbind()

        def fetch_nested(rows: Tensor) -> Tensor:
            selected = [tensors[row] for row in rows.tolist()]
            batch: Tensor = torch.nested.as_nested_tensor(selected, layout=torch.jagged)
            return batch

        return FetchedRows(fetch_nested, (tensor.size(0),), tensor.dtype)
    if tensor.layout is torch.strided:
        return TensorRows(tensor)
    coo = tensor.to_sparse_coo().coalesce()  # the only sparse layout with index_select

    def fetch_sparse(rows: Tensor) -> Tensor:
        batch: Tensor = coo.index_select(0, rows.to(coo.device))
        if tensor.layout is torch.sparse_coo:
            return batch
        return batch.to_sparse(layout=tensor.layout)

    return FetchedRows(fetch_sparse, tuple(tensor.shape), tensor.dtype)


def _convert_sparse_matrix(matrix: Any, name: str) -> FetchedRows:
    """Convert a SciPy sparse matrix to rows.

    Its batches are dense: every layer takes them, and they are small.
    """
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} holds a sparse array of shape {matrix.shape}; expected (rows, columns). Pass "
            "array.toarray()."
        )
    if matrix.dtype.kind not in NUMBER_KINDS:
        raise TypeError(
            f"{name} holds {matrix.dtype} values; expected numbers. Pass matrix.astype('float32')."
        )
    csr = matrix.tocsr()

    def fetch_dense(rows: Tensor) -> Tensor:
        return as_tensor(csr[rows.numpy()].toarray(), name)

    return FetchedRows(fetch_dense, tuple(csr.shape), choose_batch_dtype(csr.dtype))


def _convert_tensors_by_name(tensors: Any, name: str) -> FetchedRows:
    """Convert tensors that are indexed as one, such as a TensorDict, to rows."""
    if not len(tensors.batch_size):
        raise ValueError(
            f"{name} holds a {type(tensors).__name__} without a batch_size; expected [rows]. "
            "Set it."
        )
    return FetchedRows(lambda rows: tensors[rows], (int(tensors.batch_size[0]),), torch.float32)


# --- what is not data ---

READERS: Mapping[str, str] = {
    ".csv": "frame = pandas.read_csv({})",
    ".tsv": "frame = pandas.read_csv({}, sep='\\t')",
    ".parquet": "frame = pandas.read_parquet({})",
    ".xlsx": "frame = pandas.read_excel({})",
    ".npy": "X = numpy.load({}, mmap_mode='r')",
    ".pt": "X, y = torch.load({})",
}


def _describe_file_or_text(value: Any) -> str:
    """Describe a path, text or bytes passed as data, and say what to pass instead."""
    if isinstance(value, bytes):
        return (
            f"{len(value)} bytes; expected an array of numbers. "
            "Pass numpy.frombuffer(data, dtype=numpy.uint8)."
        )
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
    """Check that data is no path, text, bytes, open file, set or class.

    Raises:
        TypeError: it is one; the message says what to pass instead.
    """
    if isinstance(data, bytearray | memoryview):
        data = bytes(data)
    if isinstance(data, (str, bytes, os.PathLike)):
        text = _describe_file_or_text(data)
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


def unequal_lengths(name: str, arrays: Any, lengths: list[int]) -> ValueError:
    """Return the error for arrays that have not the same number of rows."""
    sizes = [str(length) for length in dict.fromkeys(lengths)]
    shown = " and ".join(sizes[:3])
    if len(sizes) > 3:
        shown += " and ..."
    got = describe(
        map_leaves(lambda rows: torch.empty(rows.shape, dtype=rows.dtype, device="meta"), arrays)
    )
    hint = ""
    if "[" in got:
        hint = LISTS
    elif type(arrays) is tuple and len(arrays) == 2 and 1 in lengths and _is_row(arrays):
        hint = " A column has shape (rows, 1): pass y.T."
    return ValueError(
        f"{name} holds arrays of {shown} rows; expected as many rows in each. Got {got}.{hint}"
    )


def _is_row(arrays: tuple[Any, ...]) -> bool:
    """Whether the labels have the shape (1, rows)."""
    features: tuple[int, ...] = getattr(arrays[0], "shape", ())
    labels: tuple[int, ...] = getattr(arrays[1], "shape", ())
    return len(labels) == 2 and labels[0] == 1 and features[:1] == labels[1:]
