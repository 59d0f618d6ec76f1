"""A comparison's folder: the study, a line a finished run, what a search chose; nothing in it is ever overwritten."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cppo.lab.folder import write_whole


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

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the finished runs by key; a last line that was cut off is left out."""
        return {row["key"]: row for row in read_lines(self.results, ("key", "accuracy"))}

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished run."""
        _append(self.results, row)

    def fail(self, row: dict[str, Any]) -> None:
        """Note a run that failed, with its traceback."""
        _append(self.failures, row)


def _append(path: Path, row: dict[str, Any]) -> None:
    text = path.read_bytes()[-1:] if path.is_file() else b""
    with path.open("a", encoding="utf-8") as file:
        # A line that was cut off by the end of an earlier process must not swallow this one.
        file.write(("" if text in (b"", b"\n") else "\n") + json.dumps(row, separators=(",", ":")) + "\n")


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; lines that were cut off are left out.

    Raises:
        ValueError: naming file and line, for a whole line that is no object with the needed keys.
    """
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off: that run is done again
        if not isinstance(row, dict) or not all(key in row for key in needed):
            raise ValueError(f"{path}, line {number}: expected a JSON object with {', '.join(needed)}")
        rows.append(row)
    return rows
