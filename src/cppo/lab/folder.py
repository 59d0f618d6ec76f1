"""A run's folder: made once, never overwritten, and brought back to its last whole checkpoint after any kind of end."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cppo.rollout_log import write_rollouts

# Written last into a checkpoint: one without it was cut off while being saved.
_WHOLE = "whole"


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``rollouts/``, ``checkpoints/``, ``summary.json``, ``report.html``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.report = path / "report.html"

    @classmethod
    def create(cls, path: Path, config: str) -> RunFolder:
        """Make a new folder with its configuration.

        Raises:
            ValueError: if the folder exists or cannot be made or written to.
        """
        try:
            if path.exists():
                raise FileExistsError
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            made.chmod(0o755)
            for part in ("rollouts", "checkpoints"):
                (made / part).mkdir()
            (made / "config.yaml").write_text(config, encoding="utf-8")
            made.rename(path)  # the folder appears whole, or not at all
        except FileExistsError:
            raise ValueError(
                f"run folder {path}: exists; expected a new one (choose another --name, or --resume it)"
            ) from None
        except OSError as error:
            raise ValueError(f"run folder {path}: cannot be written: {error.strerror}") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run.

        Raises:
            ValueError: if there is none.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise ValueError(f"run folder {path}: expected a run (a folder with config.yaml)")
        for part in (folder.rollouts, folder.checkpoints):
            part.mkdir(exist_ok=True)
        return folder

    def mark_whole(self, step: int) -> None:
        """Note that the checkpoint of that step was written to its end."""
        write_whole(self.checkpoints / f"checkpoint-{step}" / _WHOLE, "")

    def rewind(self) -> tuple[int, Path | None]:
        """Go back to the last whole checkpoint: drop what was written after it. Return its step (0: none) and path."""
        whole = {}
        for path in self.checkpoints.iterdir():
            if not re.fullmatch(r"checkpoint-\d+", path.name):
                continue  # not ours
            if (path / _WHOLE).is_file():
                whole[int(path.name.removeprefix("checkpoint-"))] = path
            else:
                shutil.rmtree(path)
        step = max(whole, default=0)
        kept = [row for row in read_metrics(self.metrics) if row["step"] <= step] if whole else []
        write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for path in self.rollouts.iterdir():
            ours = re.fullmatch(r"step-(\d{6,})\.(parquet|tmp)", path.name)
            if ours and (ours[2] == "tmp" or int(ours[1]) > step):
                path.unlink()
        return step, whole.get(step)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_rollout(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of one rollout batch; the file is named after its first update."""
        write_rollouts(self.rollouts / f"step-{min(row['step'] for row in rows):06d}.parquet", rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line that was cut off is left out."""
    return read_lines(path, "a JSON object with a step", lambda row: row | {"step": int(row["step"])})


def read_lines(path: Path, expected: str, read: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; one without its end was cut off and is left out.

    Args:
        path: the file; one that does not exist has no lines.
        expected: what a line is to be, for the error.
        read: takes a line's object to what is returned; what it raises makes the line a wrong one.

    Raises:
        ValueError: naming file and line.
    """
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8") from None
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        try:
            rows.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ValueError(f"{path}, line {number}: expected {expected}") from None
    return rows


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; an error names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: expected JSON") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, also where two processes write it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def free_name(root: Path, stem: str) -> str:
    """Return the first of ``stem-1``, ``stem-2``, ... that ``root`` does not hold."""
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"
