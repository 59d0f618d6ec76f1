"""The rollout log: one row a response an update, in parquet; what ``cppo inspect`` reads from any framework.

| column | type | meaning |
|---|---|---|
| step | int64 | optimizer update (1, 2, ...) in which the response was used |
| prompt, response | string | text; null where a framework's workers have no tokenizer |
| reward, advantage | float64 | of the response; the reward may be null |
| token_ids | list<int32> | the response's tokens, tool output included, padding not |
| logp | list<float32> | log pi of each token under the policy of that update, before it |
| rollout_logp | list<float32> | log mu of each token as the sampler computed it |
| response_mask | list<bool> | True = the policy wrote the token |
| divergence | list<float32>, may be null | D of each token where it was measured (top-K, exact) |

The lists of a row have one length. The schema's version stands in the file's metadata under ``cppo.rollout_log``, and
the method that judged the rows, where the writer knew it, as ``name?knob=value`` under ``cppo.method``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "1"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("token_ids", pa.list_(pa.int32())),
        ("logp", pa.list_(pa.float32())),
        ("rollout_logp", pa.list_(pa.float32())),
        ("response_mask", pa.list_(pa.bool_())),
        ("divergence", pa.list_(pa.float32())),
    ],
    metadata={"cppo.rollout_log": VERSION},
)


def write_rollouts(path: Path, rows: list[dict[str, Any]], *, method: str | None = None) -> None:
    """Write rows to one parquet file, whole or not at all (a temporary file beside it, then a rename).

    Args:
        path: the file.
        rows: a dict a response.
        method: the method that judged them, as ``name?knob=value``; kept in the file's metadata.
    """
    temporary = path.with_suffix(".tmp")
    schema = SCHEMA.with_metadata(SCHEMA.metadata | ({} if method is None else {b"cppo.method": method.encode()}))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
    os.replace(temporary, path)


class RolloutWriter:
    """Writes a training run's rollout log: rows are kept until an update is done, then written to a file of its own.

    Args:
        folder: where ``step-NNNNNN.parquet`` are written; made at the first write.
        argument: what the caller calls the folder, for the error.
    """

    def __init__(self, folder: Path, argument: str) -> None:
        self._folder, self._argument = Path(folder), argument
        self.method: str | None = None  # what judged the rows, where that is known
        self._found = in_order(self._folder.glob("step-*.parquet"))  # an earlier run's, or this one's before it resumed
        self._rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows; their ``step`` is set when they are written."""
        self._rows += rows

    def write(self, step: int, part: str = "") -> None:
        """Write the rows kept since the last call as that update's; nothing if there are none.

        Args:
            step: the update, 1, 2, ...
            part: where several processes write one update: what tells their files apart.

        Raises:
            ValueError: before the first write, if the folder has that update, or a later one, of another run.
        """
        if not self._rows:
            return
        name = f"step-{step:06d}"
        if self._found and in_order([self._found[-1], Path(name)])[-1] == self._found[-1]:
            raise ValueError(
                f"{self._argument}={str(self._folder)!r}: expected a folder without update {step}, found "
                f"{self._found[-1].name}; name another one"
            )
        self._found = []
        rows, self._rows = self._rows, []
        self._folder.mkdir(parents=True, exist_ok=True)
        write_rollouts(
            self._folder / f"{name}{part}.parquet", [row | {"step": step} for row in rows], method=self.method
        )

    def keep_tokenizer(self, tokenizer: Any) -> None:
        """Write a fast tokenizer's ``tokenizer.json`` beside the log, once; a reader cuts texts into tokens by it."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        file = self._folder / "tokenizer.json"
        if backend is None or file.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")  # several processes may be at it
        backend.save(str(temporary))
        os.replace(temporary, file)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that are kept."""
        return self._rows


def in_order(files: Iterable[Path]) -> list[Path]:
    """Return files in the order of their names, numbers in them by size: 9.parquet before 10.parquet."""

    def key(file: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", file.name)  # text and number in turn
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], file.name

    return sorted(files, key=key)


def read_rollouts(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of every ``*.parquet`` in a folder, in the order of the file names, in bounded memory."""
    for path in in_order(folder.glob("*.parquet")):
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: cannot be read as parquet: {error}") from None
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
