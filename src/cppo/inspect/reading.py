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

from cppo.inspect.columns import Rows, check_columns, first
from cppo.rollout_log import SCHEMA, VERSION, in_order

Floats = NDArray[np.float32]

# Tokens, and responses, read at once: large enough that a call a method costs little, small enough for any machine.
_CHUNK_TOKENS = 1 << 18
_CHUNK_ROWS = 1 << 13
_TEXTS = ("prompt", "response")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some responses of a log; token columns one response after the other, ``lengths`` long each."""

    file: NDArray[np.object_]  # [R] the path
    row: NDArray[np.int64]  # [R], in its file
    step: NDArray[np.int64]  # [R]
    reward: NDArray[np.float64]  # [R]; NaN where the log has none
    advantage: NDArray[np.float64]  # [R]
    lengths: NDArray[np.int64]  # [R]
    logp: Floats  # [N]
    rollout_logp: Floats  # [N]
    response_mask: NDArray[np.bool_]  # [N]
    divergence: Floats | None  # [N]
    token_ids: NDArray[np.int32]  # [N]
    prompt: NDArray[np.object_] | None = None  # [R] text or None, where texts were asked for
    response: NDArray[np.object_] | None = None

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each response starts, and where the last ends, ``[R + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def place(self, row: int) -> str:
        """Return where a response stands, in words."""
        return f"{self.file[row]}, row {self.row[row]}"


_PER_ROW = ("file", "row", "step", "reward", "advantage", "lengths", *_TEXTS)
_PER_TOKEN = ("logp", "rollout_logp", "response_mask", "divergence", "token_ids")


def take(chunk: Chunk, rows: Sequence[int]) -> Chunk:
    """Return a chunk of some responses."""
    kept = np.zeros(len(chunk.lengths), dtype=bool)
    kept[list(rows)] = True
    if kept.all():
        return chunk  # of one giant response no copy
    tokens = np.repeat(kept, chunk.lengths)
    columns = {name: getattr(chunk, name) for name in (*_PER_ROW, *_PER_TOKEN)}
    taken: dict[str, Any] = {
        name: None if values is None else values[kept if name in _PER_ROW else tokens]
        for name, values in columns.items()
    }
    return Chunk(**taken)


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Return several chunks' responses in one; a column that one of them lacks is lacking."""
    if len(chunks) == 1:
        return chunks[0]
    columns = {name: [getattr(chunk, name) for chunk in chunks] for name in (*_PER_ROW, *_PER_TOKEN)}
    joined: dict[str, Any] = {
        name: None if any(part is None for part in parts) else np.concatenate(parts) for name, parts in columns.items()
    }
    return Chunk(**joined)


@dataclasses.dataclass(frozen=True)
class Log:
    """One run's rollout log: parquet files in the order of their names, 9 before 10."""

    name: str
    files: tuple[Path, ...]
    responses: int
    tokens: int  # an empty response counts as one
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
            files = in_order((path / "rollouts").glob("*.parquet")) or in_order(path.glob("*.parquet"))
            name = path.resolve().name
            if not files:
                raise ValueError(f"{path}: expected *.parquet in it or in its rollouts/, found none")
        else:
            raise ValueError(f"{path}: expected a run's folder, a folder of parquet files or a parquet file")
        rows, tokens, known, methods = 0, 0, None, set()
        for file in files:
            with _opened(file) as parquet:
                schema = parquet.schema_arrow
                rows, tokens = rows + int(parquet.metadata.num_rows), tokens + _tokens(parquet)
            if known is None or not schema.equals(known, check_metadata=True):
                methods.add(_check_schema(file, schema))
                known = schema
        if not rows:
            raise ValueError(f"{path}: expected responses, found none in {len(files)} file(s)")
        # Of several none is the log's: the user names one.
        return Log(name, tuple(files), rows, tokens, methods.pop() if len(methods) == 1 else None)

    def survey(self) -> tuple[list[int], bool]:
        """Return the log's updates, in order, and whether every response has a measured divergence."""
        steps: set[int] = set()
        measured = True
        for rows in self._rows(["step", "divergence"], _CHUNK_TOKENS):
            steps.update(rows.numbers("step", np.int64).tolist())
            measured = measured and not rows.missing("divergence").any()
        return sorted(steps), measured

    def chunks(self, *, texts: bool = False, tokens: int = _CHUNK_TOKENS) -> Iterator[Chunk]:
        """Yield the log in order, about ``tokens`` tokens at a time, whole responses each, small files together.

        Raises:
            ValueError: naming file, row and column of the first value that cannot be used.
        """
        step = 0
        for rows in self._rows([name for name in SCHEMA.names if texts or name not in _TEXTS], tokens):
            chunk = _chunk(rows, texts)
            falls = np.diff(chunk.step, prepend=step) < 0
            if falls.any():
                raise rows.fail(
                    "step", first(falls), "one run's updates in order, files in that of their names",
                    f"{chunk.step[first(falls)]} after a later one",
                )  # fmt: skip
            step = int(chunk.step[-1])
            yield chunk

    def _rows(self, columns: list[str], tokens: int) -> Iterator[Rows]:
        """Yield those columns of the log in order, about ``tokens`` tokens at a time, of one schema each."""
        waiting: list[tuple[Path, int, pa.RecordBatch]] = []
        size = rows = 0
        for file in self.files:
            with _opened(file) as parquet:
                length = max(1, _tokens(parquet) // max(1, parquet.metadata.num_rows))
                row = 0
                for batch in _batches(file, parquet, min(max(1, tokens // length), _CHUNK_ROWS), columns):
                    full = size + length * len(batch) > tokens or rows + len(batch) > _CHUNK_ROWS
                    if waiting and (full or batch.schema != waiting[0][2].schema):
                        yield Rows(waiting)
                        waiting, size, rows = [], 0, 0
                    waiting.append((file, row, batch))
                    row, rows, size = row + len(batch), rows + len(batch), size + length * len(batch)
        if waiting:
            yield Rows(waiting)


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except UnicodeEncodeError:
        raise ValueError(f"{file}: expected a name in UTF-8; rename it, or its folder") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _batches(file: Path, parquet: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        for batch in parquet.iter_batches(batch_size=rows, columns=columns, use_threads=False):
            if len(batch):
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None


def _check_schema(file: Path, schema: pa.Schema) -> str | None:
    """Refuse a file that is no rollout log; return the method that judged its rows, if it says so."""
    metadata = {key: value.decode(errors="replace") for key, value in (schema.metadata or {}).items()}
    version = metadata.get(b"cppo.rollout_log", VERSION)
    if version != VERSION:
        raise ValueError(f"{file}: expected a rollout log of version {VERSION}, got {version!r}")
    check_columns(file, schema)
    return metadata.get(b"cppo.method")


def _tokens(parquet: pq.ParquetFile) -> int:
    """Return how many tokens a file has, an empty response counted as one."""
    metadata = parquet.metadata
    values = 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            part = metadata.row_group(group).column(column)
            if part.path_in_schema.startswith("logp."):
                values += part.num_values
    return int(values)


def _chunk(rows: Rows, texts: bool) -> Chunk:
    lengths, logp = rows.lists("logp", np.float32)

    def beside(column: str, kind: Any) -> NDArray[Any]:
        others, values = rows.lists(column, kind)
        if (others != lengths).any():
            row = first(others != lengths)
            raise rows.fail(column, row, f"a list as long as logp's, {lengths[row]}", others[row])
        return values

    step = rows.numbers("step", np.int64)
    if (step < 0).any():
        raise rows.fail("step", first(step < 0), "the number of an update, 0 or more", step[first(step < 0)])
    missing = rows.missing("divergence")
    if (mixed := (missing[1:] != missing[:-1]) & (rows.file[1:] == rows.file[:-1])).any():
        row = first(mixed) + int(missing[first(mixed) + 1])
        raise rows.fail("divergence", row, "a list, as in the rows before or after", "null")
    return Chunk(
        file=rows.file, row=rows.row, step=step, reward=rows.finite("reward", null=True),
        advantage=rows.finite("advantage"), lengths=lengths, logp=logp,
        rollout_logp=beside("rollout_logp", np.float32), response_mask=beside("response_mask", np.bool_),
        token_ids=beside("token_ids", np.int32),
        divergence=None if missing.any() else beside("divergence", np.float32),
        prompt=rows.texts("prompt") if texts else None, response=rows.texts("response") if texts else None,
    )  # fmt: skip
