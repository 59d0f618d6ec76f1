"""Reading rollout logs: validated, in bounded memory, as flat arrays. An error names file, row and column."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cppo.rollout_log import SCHEMA, VERSION

Floats = NDArray[np.float32]

# Tokens read at once: large enough that a call a method costs little, small enough for any machine.
_CHUNK_TOKENS = 1 << 18
_LISTS = ("token_ids", "logp", "rollout_logp", "response_mask")
_TEXTS = ("prompt", "response")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some responses of one file; token columns one response after the other, ``lengths`` long each."""

    file: Path
    first_row: int
    step: NDArray[np.int64]  # [R]
    reward: NDArray[np.float64]  # [R]; NaN where the log has none
    advantage: NDArray[np.float64]  # [R]
    lengths: NDArray[np.int64]  # [R]
    logp: Floats  # [N]
    rollout_logp: Floats  # [N]
    response_mask: NDArray[np.bool_]  # [N]
    divergence: Floats | None  # [N]
    token_ids: NDArray[np.int32]  # [N]
    prompt: Sequence[str | None] | None = None  # [R], where texts were asked for
    response: Sequence[str | None] | None = None

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each response starts, and where the last ends, ``[R + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths)])


_PER_ROW = ("step", "reward", "advantage", "lengths")
_PER_TOKEN = ("logp", "rollout_logp", "response_mask", "divergence", "token_ids")


def take(chunk: Chunk, rows: Sequence[int]) -> Chunk:
    """Return a chunk of some responses, at least one; ``file`` and ``first_row`` are the first one's."""
    kept = np.zeros(len(chunk.lengths), dtype=bool)
    kept[list(rows)] = True
    tokens = np.repeat(kept, chunk.lengths)
    columns = {name: getattr(chunk, name) for name in (*_PER_ROW, *_PER_TOKEN)}
    changes: dict[str, Any] = {
        name: None if values is None else values[kept if name in _PER_ROW else tokens]
        for name, values in columns.items()
    }
    for name in _TEXTS:
        texts = getattr(chunk, name)
        changes[name] = None if texts is None else [text for text, keep in zip(texts, kept, strict=True) if keep]
    return dataclasses.replace(chunk, first_row=chunk.first_row + _first(kept), **changes)


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Return several chunks' responses in one, without their texts."""
    columns = {name: [getattr(chunk, name) for chunk in chunks] for name in (*_PER_ROW, *_PER_TOKEN)}
    joined = {
        name: None if any(part is None for part in parts) else np.concatenate(parts) for name, parts in columns.items()
    }
    return dataclasses.replace(chunks[0], prompt=None, response=None, **joined)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Log:
    """One run's rollout log: parquet files in the order of their names."""

    name: str
    files: tuple[Path, ...]
    responses: int
    method: str | None = None  # that judged the rows, if the log says so

    @staticmethod
    def open(path: Path) -> Log:
        """Find a run's log and look at every file's schema.

        Args:
            path: a run's folder (``rollouts/*.parquet`` in it), a folder of parquet files, or one file.

        Raises:
            ValueError: naming the file and what was expected.
        """
        if path.is_file():
            files, name = [path], path.stem
        elif path.is_dir():
            files = sorted((path / "rollouts").glob("*.parquet")) or sorted(path.glob("*.parquet"))
            name = path.resolve().name
            if not files:
                raise ValueError(f"{path}: expected *.parquet in it or in its rollouts/, found none")
        else:
            raise ValueError(f"{path}: expected a run's folder, a folder of parquet files or a parquet file")
        looks = [_look_at(file) for file in files]
        rows = sum(count for count, _ in looks)
        if not rows:
            raise ValueError(f"{path}: expected responses, found none in {len(files)} file(s)")
        methods = {method for _, method in looks}
        # Of several none is the log's: the user names one.
        return Log(name, tuple(files), rows, methods.pop() if len(methods) == 1 else None)

    def chunks(self, *, texts: bool = False, tokens: int = _CHUNK_TOKENS) -> Iterator[Chunk]:
        """Yield the log in order, about ``tokens`` tokens at a time, whole responses each.

        Raises:
            ValueError: naming file, row and column of the first value that cannot be used.
        """
        columns = [name for name in SCHEMA.names if texts or name not in _TEXTS]
        step = 0
        for file in self.files:
            row = 0
            with _opened(file) as parquet:
                length = max(1, _mean_length(parquet))
                for batch in _batches(file, parquet, max(1, tokens // length), columns):
                    chunk = _chunk(file, row, batch, texts)
                    falls = np.diff(chunk.step, prepend=step) < 0
                    if falls.any():
                        first = _first(falls)
                        raise ValueError(
                            f"{file}, row {row + first}, column 'step': expected one run's updates in order, got "
                            f"{chunk.step[first]} after a later one"
                        )
                    row += batch.num_rows
                    if len(chunk.step):
                        step = int(chunk.step[-1])
                        yield chunk


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _batches(file: Path, parquet: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(batch_size=rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None


def _look_at(file: Path) -> tuple[int, str | None]:
    """Check one file's schema; return its rows, and the method that judged them, if it says so."""
    with _opened(file) as parquet:
        found = parquet.schema_arrow
        version = (found.metadata or {}).get(b"cppo.rollout_log")
        if version is not None and version.decode(errors="replace") != VERSION:
            raise ValueError(
                f"{file}: expected a rollout log of version {VERSION}, got {version.decode(errors='replace')!r}"
            )
        for wanted in SCHEMA:
            if found.names.count(wanted.name) > 1:
                raise ValueError(f"{file}: expected one column {wanted.name!r}, found {found.names.count(wanted.name)}")
            if wanted.name not in found.names:
                if wanted.name == "divergence":
                    continue
                raise ValueError(f"{file}: expected the column {wanted.name!r} (docs/rollout-log.md), found none")
            if not _fits(found.field(wanted.name).type, wanted.type):
                raise ValueError(
                    f"{file}, column {wanted.name!r}: expected {wanted.type}, got {found.field(wanted.name).type}"
                )
        method = (found.metadata or {}).get(b"cppo.method")
        return int(parquet.metadata.num_rows), None if method is None else method.decode(errors="replace")


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether a column can be read as the documented type: any width of number, a list of either size."""
    if pa.types.is_list(wanted):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return bool(is_list and _fits(found.value_type, wanted.value_type))
    if pa.types.is_floating(wanted):
        return bool(pa.types.is_floating(found) or pa.types.is_integer(found))
    if pa.types.is_integer(wanted):
        return bool(pa.types.is_integer(found))
    if pa.types.is_boolean(wanted):
        return bool(pa.types.is_boolean(found) or pa.types.is_integer(found))
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found))


def _mean_length(parquet: pq.ParquetFile) -> int:
    metadata = parquet.metadata
    values = 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            part = metadata.row_group(group).column(column)
            if part.path_in_schema.startswith("logp."):
                values += part.num_values
    return int(values // max(1, metadata.num_rows))


def _chunk(file: Path, first_row: int, batch: pa.RecordBatch, texts: bool) -> Chunk:
    def fail(column: str, row: int, expected: str, got: Any) -> ValueError:
        return ValueError(f"{file}, row {first_row + row}, column {column!r}: expected {expected}, got {got}")

    def per_row(column: str, kind: Any, *, null: bool = False) -> NDArray[Any]:
        values = batch.column(column)
        if values.null_count and not null:
            raise fail(column, _first(values.is_null().to_numpy(zero_copy_only=False)), "a number", "null")
        return np.array(values.to_numpy(zero_copy_only=False), dtype=kind)  # a copy: torch wants to be able to write

    def per_token(column: str, kind: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
        values = batch.column(column)
        if values.null_count:
            raise fail(column, _first(values.is_null().to_numpy(zero_copy_only=False)), "a list", "null")
        offsets = np.asarray(values.offsets, dtype=np.int64)
        flat = values.flatten()
        lengths = np.diff(offsets)
        if flat.null_count:
            token = _first(flat.is_null().to_numpy(zero_copy_only=False))
            raise fail(column, int(np.searchsorted(np.cumsum(lengths), token, side="right")), "numbers", "a null")
        return lengths, np.array(flat.to_numpy(zero_copy_only=False), dtype=kind)

    lengths, logp = per_token("logp", np.float32)
    columns: dict[str, NDArray[Any]] = {"logp": logp}
    for column, kind in (("rollout_logp", np.float32), ("response_mask", np.bool_), ("token_ids", np.int32)):
        others, columns[column] = per_token(column, kind)
        if (others != lengths).any():
            row = _first(others != lengths)
            raise fail(column, row, f"a list as long as logp's, {lengths[row]}", others[row])
    columns |= {"divergence": _divergence(batch, lengths, fail)}  # type: ignore[dict-item]
    advantage = per_row("advantage", np.float64)
    if not np.isfinite(advantage).all():
        row = _first(~np.isfinite(advantage))
        raise fail("advantage", row, "a finite number", advantage[row])
    step = per_row("step", np.int64)
    return Chunk(
        file, first_row, step, per_row("reward", np.float64, null=True), advantage, lengths,
        prompt=_texts(batch, "prompt", fail) if texts else None,
        response=_texts(batch, "response", fail) if texts else None,
        **columns,
    )  # fmt: skip


def _texts(batch: pa.RecordBatch, column: str, fail: Any) -> list[str | None]:
    found: list[str | None] = []
    for row, value in enumerate(batch.column(column)):
        try:
            found.append(value.as_py())
        except UnicodeDecodeError as error:
            raise fail(column, row, "UTF-8", f"the byte {error.object[error.start]:#04x}") from None
    return found


def _divergence(batch: pa.RecordBatch, lengths: NDArray[np.int64], fail: Any) -> Floats | None:
    """Return the measured divergences: of all responses of the chunk, or of none."""
    if "divergence" not in batch.schema.names:
        return None
    values = batch.column("divergence")
    missing = values.is_null().to_numpy(zero_copy_only=False)
    if missing.all():
        return None
    if missing.any():
        raise fail("divergence", _first(missing), "a list, as in the rows before or after", "null")
    others = np.diff(np.asarray(values.offsets, dtype=np.int64))
    if (others != lengths).any():
        row = _first(others != lengths)
        raise fail("divergence", row, f"a list as long as logp's, {lengths[row]}", others[row])
    return np.array(values.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)


def _first(flags: NDArray[np.bool_]) -> int:
    return int(np.argmax(flags))
