"""The columns of a rollout log's file: which types are taken, and their values as arrays, checked row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cppo.rollout_log import SCHEMA

# A column of nothing but nulls may have the type null.
_NULLABLE = ("prompt", "response", "reward", "divergence")
_LARGEST = float(np.finfo(np.float32).max)


def check_columns(file: Path, found: pa.Schema) -> None:
    """Refuse a file whose columns are not those of a rollout log; a missing divergence is none.

    Raises:
        ValueError: naming the file and the column.
    """
    for wanted in SCHEMA:
        if found.names.count(wanted.name) > 1:
            raise ValueError(f"{file}: expected one column {wanted.name!r}, found {found.names.count(wanted.name)}")
        if wanted.name not in found.names:
            if wanted.name == "divergence":
                continue
            raise ValueError(f"{file}: expected the column {wanted.name!r} (docs/rollout-log.md), found none")
        kind = found.field(wanted.name).type
        if not _fits(_plain(kind), wanted.type) and not (pa.types.is_null(kind) and wanted.name in _NULLABLE):
            raise ValueError(f"{file}, column {wanted.name!r}: expected {wanted.type}, got {kind}")


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type without its encoding: what a dictionary stands for, a list with offsets of any list."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether a column can be read as the documented type: any width of number, a list of such."""
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(found) and _fits(found.value_type, wanted.value_type))
    if pa.types.is_floating(wanted):
        return bool(pa.types.is_floating(found) or pa.types.is_integer(found))
    if pa.types.is_integer(wanted):
        return bool(pa.types.is_integer(found))
    if pa.types.is_boolean(wanted):
        return bool(pa.types.is_boolean(found) or pa.types.is_integer(found))
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found))


class Rows:
    """Some rows of a log, whose columns it returns as arrays.

    Args:
        parts: batches of one schema, each with its file and the number of its first row in it.
    """

    def __init__(self, parts: Sequence[tuple[Path, int, pa.RecordBatch]]) -> None:
        counts = [len(batch) for _, _, batch in parts]
        self.file = np.repeat(np.array([file for file, _, _ in parts], dtype=object), counts)
        self.row = np.concatenate([start + np.arange(len(batch)) for _, start, batch in parts])
        self._batches = [batch for _, _, batch in parts]

    def fail(self, column: str, row: int, expected: str, got: Any) -> ValueError:
        """Return the error about one value; ``row`` counts from the first here."""
        return ValueError(f"{self.file[row]}, row {self.row[row]}, column {column!r}: expected {expected}, got {got}")

    def numbers(self, column: str, kind: Any, *, null: bool = False) -> NDArray[Any]:
        """Return one number a row; a null, where it may be, is NaN."""
        values = self._values(column)
        if values.null_count and not null:
            raise self.fail(column, first(_nulls(values)), "a number", "null")
        found = values.to_numpy(zero_copy_only=False)
        self._check_range(column, found, kind, np.ones(len(values), dtype=np.int64))
        return np.array(found, dtype=kind)  # a copy: torch wants to be able to write

    def finite(self, column: str, *, null: bool = False) -> NDArray[np.float64]:
        """Return one number a row that a training step can hold; where it may be null, what is not finite is none."""
        values = self.numbers(column, np.float64, null=null)
        beyond = ~(np.abs(values) <= _LARGEST) & ~(null & ~np.isfinite(values))
        if beyond.any():
            row = first(beyond)
            raise self.fail(column, row, "a finite number that float32 holds", values[row])
        return values

    def lists(self, column: str, kind: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return the length of each row's list, and the values of all lists."""
        values = self._values(column)
        if values.null_count:
            raise self.fail(column, first(_nulls(values)), "a list", "null")
        flat, offsets = values.flatten(), np.asarray(values.offsets, dtype=np.int64)
        lengths: NDArray[np.int64] = offsets[1:] - offsets[:-1]
        if flat.null_count:
            raise self.fail(column, _row(lengths, first(_nulls(flat))), "numbers", "a null")
        found = flat.to_numpy(zero_copy_only=False)
        if kind is not np.bool_:
            self._check_range(column, found, kind, lengths)
        with np.errstate(over="ignore"):  # beyond float32: infinite, and counted as such
            return lengths, np.array(found, dtype=kind)

    def texts(self, column: str) -> NDArray[np.object_]:
        """Return one text a row, or None."""
        values = self._values(column)
        try:
            return np.array(values.to_pylist(), dtype=object)
        except UnicodeDecodeError:
            for row, value in enumerate(values):
                try:
                    value.as_py()
                except UnicodeDecodeError as error:
                    raise self.fail(column, row, "UTF-8", f"the byte {error.object[error.start]:#04x}") from None
            raise

    def missing(self, column: str) -> NDArray[np.bool_]:
        """Return which rows have no value."""
        if column not in self._batches[0].schema.names:
            return np.ones(len(self.row), dtype=bool)
        return np.concatenate([_nulls(batch.column(column)) for batch in self._batches])

    def _values(self, column: str) -> pa.Array:
        arrays = [batch.column(column) for batch in self._batches]
        plain = _plain(arrays[0].type)
        if plain != arrays[0].type:
            arrays = [values.cast(plain) for values in arrays]
        return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)

    def _check_range(self, column: str, found: NDArray[Any], kind: Any, lengths: NDArray[np.int64]) -> None:
        """Refuse a whole number that the array cannot hold; ``lengths`` says how many numbers each row has."""
        if not np.issubdtype(kind, np.integer) or not len(found):
            return
        low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
        if int(found.min()) < low or int(found.max()) > high:
            at = first((found < low) | (found > high))
            raise self.fail(column, _row(lengths, at), f"a number that {np.dtype(kind)} holds", found[at])


def first(flags: NDArray[np.bool_]) -> int:
    """Return the place of the first True."""
    return int(np.argmax(flags))


def _nulls(values: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(values.is_null().to_numpy(zero_copy_only=False), dtype=bool)


def _row(lengths: NDArray[np.int64], token: int) -> int:
    return int(np.searchsorted(np.cumsum(lengths), token, side="right"))
