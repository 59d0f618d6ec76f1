"""Several runs in one document, and the learning curve of a run that has one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cppo.inspect.reading import Log
from cppo.inspect.statement import TokenTexts
from cppo.inspect.summary import BESIDE, FORMAT, summarise
from cppo.methods import parse_method


def inspect_runs(
    paths: Sequence[Path],
    *,
    own: str | None = None,
    beside: Sequence[str] = BESIDE,
    wanted: float = 0.02,
    responses: int = 40,
    progress: Callable[[int], None] = lambda judged: None,
) -> dict[str, Any]:
    """Return the document about some runs, ``{"format": 1, "runs": [...]}``, in their order, each with its own name.

    Args:
        paths: what ``Log.open`` opens: a run's folder, a folder of parquet files, a parquet file.
        own: the method of the runs; None: the one that each log itself, or else the run's ``config.yaml``, names.
        beside: other methods to judge the same tokens by.
        wanted: the masked share for which thresholds are suggested, in (0, 1).
        responses: how many responses of each run are shown whole.
        progress: called with the number of responses read since the last call; each is read twice.

    Raises:
        ValueError: for a log that cannot be read, naming file, row and column; a file that is given twice; or a run
            whose method is not known.
    """
    found = [_opened(path, own) for path in paths]  # all of them before the first is judged
    _check_files([file for log, _ in found for file in log.files])
    runs: list[dict[str, Any]] = []
    for path, (log, method) in zip(paths, found, strict=True):
        tokenizer = TokenTexts.find(path)
        run = summarise(
            log, method, beside=beside, wanted=wanted, responses=responses,
            texts=None if tokenizer is None else TokenTexts(tokenizer), progress=progress,
        )  # fmt: skip
        runs.append(run | {"name": _free(str(run["name"]), {str(known["name"]) for known in runs})})
    return {"format": FORMAT, "runs": runs}


def _check_files(files: Sequence[Path]) -> None:
    """Refuse a file that would be counted twice, under whatever names."""
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        about = file.stat()
        before = seen.setdefault((about.st_dev, about.st_ino), file)
        if before is not file:
            also = "" if before == file else f", also as {before}"
            raise ValueError(f"{file}: given twice{also}; expected each log once")


def _opened(path: Path, own: str | None) -> tuple[Log, str]:
    log = Log.open(path)
    method = own or log.method or _configured_method(path / "config.yaml")
    if method is None:
        raise ValueError(f"{path}: expected to find the method that the run used, found none; name it with --method")
    try:
        parse_method(method)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        if own is not None:
            raise
        raise ValueError(
            f"{path}: names the method {method[:80]!r}, which is none ({str(error)[:200]}); name it with --method"
        ) from None
    return log, method


def _configured_method(file: Path) -> str | None:
    """Return the method that a ``cppo train`` run's ``config.yaml`` names, or None."""
    import yaml

    if not file.is_file():
        return None
    try:
        # Its nodes alone: no dates, numbers or merged mappings are made of what may be anybody's text.
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, ArithmeticError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ValueError(f"{file}: cannot be read ({reason}); name the method with --method") from None
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "method" and value.tag == "tag:yaml.org,2002:str":
            return str(value.value)
    return None


def _free(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name} ({number})"
    return free


def training_curve(label: str, metrics: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return a run's learning curve for the page, or None if its metrics have neither accuracy nor reward.

    Args:
        label: the run's name in the document.
        metrics: the lines of its ``metrics.jsonl``.
    """
    keys = {"accuracy": "eval/accuracy", "standard_error": "eval/standard_error", "reward": "rollout/reward"}
    rows = [{"step": row["step"]} | {name: _number(row.get(key)) for name, key in keys.items()} for row in metrics]
    rows = [row for row in rows if row["accuracy"] is not None or row["reward"] is not None]
    if not rows:
        return None
    return {"label": label, **{f"{name}s" if name == "step" else name: [row[name] for row in rows] for name in rows[0]}}


def _number(value: Any) -> float | None:
    """Return a number of a metrics line; None for what is none, or too large for one."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None
