"""A comparison's folder: the study, a line a finished run, what a search chose. Lines are only ever added."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cppo.compare.study import Rows
from cppo.lab.folder import read_lines, write_whole

# What a line must hold.
_ROW = (
    "key", "setting", "arm", "seed", "method", "learning_rate", "rollout", "accuracy", "standard_error", "curves",
    "tail", "diverged", "cpu_seconds", "wall_seconds", "config", "versions",
)  # fmt: skip


class ResultFolder:
    """``study.yaml``, ``results.jsonl``, ``chosen.json``, ``failures.jsonl``, ``starts/``, ``runs/``, the report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study = path / "study.yaml"
        self.results = path / "results.jsonl"
        self.chosen = path / "chosen.json"
        self.failures = path / "failures.jsonl"
        self.starts = path / "starts"
        self.runs = path / "runs"
        self.summary = path / "summary.json"
        self.tables = path / "tables.md"
        self.report = path / "report.html"

    @classmethod
    def create(cls, path: Path, study: str) -> ResultFolder:
        """Make a folder with the study's text, or open one whose study is the same.

        Raises:
            ValueError: if the folder holds something else or cannot be written.
        """
        folder = cls(path)
        try:
            if folder.study.is_file():
                if folder.study.read_text(encoding="utf-8") != study:
                    raise ValueError(
                        f"{path}: holds another study; expected a new folder (--into), or edit {folder.study} and "
                        f"continue with `cppo compare {path}`"
                    )
            elif path.exists() and any(path.iterdir()):
                raise ValueError(f"{path}: is not empty and holds no study.yaml; expected a new folder (--into)")
            else:
                path.mkdir(parents=True, exist_ok=True)
                write_whole(folder.study, study)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running the same comparison."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{self.path}: another `cppo compare` is running it; expected it to end first"
                ) from None
            yield

    def sweep(self) -> None:
        """Remove what a process left that was killed: unfinished runs and warm starts. Only while ``locked``."""
        for parent in (self.runs, self.starts):
            for left in parent.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)

    def rows(self) -> Rows:
        """Return the finished runs; a last line that was cut off is left out."""
        expected, read = _holds(_ROW)
        return Rows(read_lines(self.results, expected, lambda row: _check_run(read(row))))

    def failed(self) -> dict[str, str]:
        """Return the last error of the runs that failed, by key."""
        return {row["key"]: str(row["error"]) for row in read_lines(self.failures, *_holds(("key", "error")))}

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished run."""
        _append(self.results, row)

    def fail(self, row: dict[str, Any]) -> None:
        """Note a run that failed, with its traceback."""
        _append(self.failures, row)


def _append(path: Path, row: dict[str, Any]) -> None:
    line = json.dumps(row, separators=(",", ":")) + "\n"
    with path.open("ab+") as file:
        # What an earlier process left of a line that it did not finish goes.
        whole = file.seek(0, os.SEEK_END)
        if whole:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
        file.write(line.encode())


def _check_run(row: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for a line whose values a report could not use, as one that was edited by hand may be."""
    evaluations = [row["rollout"], row["accuracy"], row["standard_error"]]
    numbers = [*row["rollout"], *row["accuracy"], row["learning_rate"], row["cpu_seconds"], row["wall_seconds"]]
    curves = [*row["curves"].values(), row["tail"], row["standard_error"]]
    whole = (
        all(isinstance(row[name], str) for name in ("key", "setting", "arm", "method"))
        and all(isinstance(values, dict) for values in (row["config"], row["versions"], row.get("knobs", {})))
        and isinstance(row.get("start"), str | None)
        and len({len(values) for values in evaluations}) == 1
        and len(row["rollout"]) > 1
        and all(_is_number(value) for value in numbers)
        and all(value is None or _is_number(value) for values in curves for value in values)
    )
    if not whole or row["rollout"] != sorted(set(row["rollout"])):
        raise ValueError
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _holds(names: tuple[str, ...]) -> tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Return what ``read_lines`` asks: lines that hold these names."""

    def read(row: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            row[name]
        return row

    return f"a JSON object with {', '.join(names)}", read
