"""A comparison's folder: the study, a line a finished run, what a search chose. Lines are only ever added."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cppo.compare.study import Rows
from cppo.lab.folder import write_whole

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

    def rows(self) -> Rows:
        """Return the finished runs; a last line that was cut off is left out."""
        return Rows(read_lines(self.results, _ROW))

    def failed(self) -> dict[str, str]:
        """Return the last error of the runs that failed, by key."""
        return {row["key"]: str(row["error"]) for row in read_lines(self.failures, ("key", "error"))}

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


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; a last one that was cut off is left out.

    Raises:
        ValueError: naming file and line, for a line that is no object with the needed keys.
    """
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(key in row for key in needed):
            rows.append(row)
        elif number < len(lines) or line.endswith("\n"):
            raise ValueError(f"{path}, line {number}: expected a JSON object with {', '.join(needed)}")
    return rows
