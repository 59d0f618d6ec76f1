"""Several runs in one document, and the learning curve of a run that has one."""

from __future__ import annotations

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
        own: the method of the runs; None: the one that each run's ``config.yaml``, or the log itself, names.
        beside: other methods to judge the same tokens by.
        wanted: the masked share for which thresholds are suggested, in (0, 1).
        responses: how many responses of each run are shown whole.
        progress: called with the number of responses read since the last call; each is read twice.

    Raises:
        ValueError: for a log that cannot be read, naming file, row and column; or a run whose method is not known.
    """
    found = [_opened(path, own) for path in paths]  # all of them before the first is judged
    runs: list[dict[str, Any]] = []
    for path, (log, method) in zip(paths, found, strict=True):
        tokenizer = TokenTexts.find(path)
        run = summarise(
            log, method, beside=beside, wanted=wanted, responses=responses,
            texts=None if tokenizer is None else TokenTexts(tokenizer), progress=progress,
        )  # fmt: skip
        runs.append(run | {"name": _free(str(run["name"]), {str(known["name"]) for known in runs})})
    return {"format": FORMAT, "runs": runs}


def _opened(path: Path, own: str | None) -> tuple[Log, str]:
    log = Log.open(path)
    method = own or _own_method(path, log)
    if method is None:
        raise ValueError(f"{path}: expected to find the method that the run used, found none; name it with --method")
    try:
        parse_method(method)
    except (TypeError, ValueError, RecursionError) as error:
        if own is not None:
            raise
        raise ValueError(
            f"{path}: names the method {method[:80]!r}, which is none ({str(error)[:200]}); name it with --method"
        ) from None
    return log, method


def _own_method(path: Path, log: Log) -> str | None:
    """Return the method that judged a log: what a ``cppo train`` run's folder says, else what the log itself does."""
    import yaml

    file = path / "config.yaml"
    if not file.is_file():
        return log.method
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return log.method
    method = config.get("method") if isinstance(config, dict) else None
    return method if isinstance(method, str) else log.method


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
    rows = [row for row in metrics if row.get("eval/accuracy") is not None or row.get("rollout/reward") is not None]
    if not rows:
        return None
    curves = {name: [row.get(key) for row in rows] for name, key in keys.items()}
    return {"label": label, "steps": [row["step"] for row in rows], **curves}
