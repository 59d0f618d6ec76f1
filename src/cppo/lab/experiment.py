"""What ``cppo train`` and ``cppo eval`` do: one or more runs from one start, a report; or one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from cppo.inspect.page import write_page
from cppo.inspect.reading import Log
from cppo.inspect.runs import inspect_runs, training_curve
from cppo.lab.allocator import keep_freed_memory
from cppo.lab.config import RunConfig, load_config
from cppo.lab.display import LiveDisplay
from cppo.lab.evaluation import Evaluation, evaluate
from cppo.lab.folder import RunFolder, free_name, read_json, read_metrics
from cppo.lab.model import load_pretrained
from cppo.lab.run import Run, beside_config, start_run
from cppo.lab.tasks import make_task

Outcome = tuple[list[dict[str, Any]], Path]


def begin(config: RunConfig, root: Path, name: str | None, console: Console, *, quiet: bool = False) -> Outcome:
    """Start a new run, and those beside it; return their summaries and the report's path."""
    if name is not None and (not name or Path(name).name != name):
        raise ValueError(f"--name {name!r}: expected a folder name without separators")
    path = root / (name or free_name(root, config.method.partition("?")[0]))
    for other, _ in _beside(path, config):
        if other.exists():
            raise ValueError(
                f"run folder {other}: exists; expected a new one for the run beside (choose another --name)"
            )
    return _finish(start_run(config, path), config, console, quiet=quiet)


def carry_on(path: Path, console: Console, *, quiet: bool = False) -> Outcome:
    """Continue a run, and those beside it, from the last whole checkpoints."""
    folder = RunFolder.open(path)
    return _finish(folder, load_config(folder.config), console, quiet=quiet)


def _finish(folder: RunFolder, config: RunConfig, console: Console, *, quiet: bool) -> Outcome:
    keep_freed_memory()
    start = folder.checkpoints / "start"
    runs = [(folder, config)]
    for other, settings in _beside(folder.path, config):
        if other.exists() and load_config(RunFolder.open(other).config) != settings:
            raise ValueError(
                f"run folder {other}: expected the settings of {folder.path} with method {settings.method!r}"
            )
        runs.append((RunFolder.open(other) if other.exists() else start_run(settings, other), settings))
    summaries = []
    for part, settings in runs:
        if part.summary.is_file():
            summaries.append(read_json(part.summary))
            continue
        with LiveDisplay(f"{settings.method}  ({part.path})", console, quiet=quiet) as display:
            summaries.append(Run(settings, part, display, start).train())
    _report([part for part, _ in runs], console, quiet=quiet)
    return summaries, folder.report


def _report(runs: list[RunFolder], console: Console, *, quiet: bool) -> None:
    """Write each run's page; the first one's shows all of them."""
    paths = [run.path for run in runs]
    with Progress(console=console, transient=True, disable=quiet) as progress:
        # Each response is read twice.
        bar = progress.add_task("report", total=sum(2 * Log.open(path).responses for path in paths))
        document = inspect_runs(paths, progress=lambda read: progress.advance(bar, read))
    curves = [
        training_curve(entry["name"], read_metrics(run.metrics))
        for entry, run in zip(document["runs"], runs, strict=True)
    ]
    write_page(runs[0].report, document, [curve for curve in curves if curve])
    for entry, curve, run in list(zip(document["runs"], curves, runs, strict=True))[1:]:
        write_page(run.report, document | {"runs": [entry]}, [curve] if curve else [])


def _beside(path: Path, config: RunConfig) -> list[tuple[Path, RunConfig]]:
    """Return the folder and the settings of each run beside the run at ``path``."""
    return [
        (path.with_name(f"{path.name}.{number}-{method.partition('?')[0]}"), beside_config(config, method))
        for number, method in enumerate(config.beside, start=1)
    ]


def evaluate_model(
    name: str,
    *,
    task: str | None,
    problems: int,
    samples: int,
    temperature: float | None,
    max_tokens: int | None,
    gguf_file: str | None,
    seed: int,
    batch_size: int,
    threads: int,
    console: Console,
) -> Evaluation:
    """Return Avg@k of a run's final model, or of any other."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    path = Path(name)
    if (path / "config.yaml").is_file():
        config = load_config(path / "config.yaml")
        # What is not asked for otherwise is as the run had it.
        task = task or config.task
        temperature = config.temperature if temperature is None else temperature
        max_tokens = max_tokens or config.max_completion_tokens
        final = path / "checkpoints" / "final"
        if not final.is_dir():
            raise ValueError(f"run folder {path}: expected a finished run (checkpoints/final); resume it first")
        name = str(final)
    elif not path.exists() and path.parent.name == "runs":
        raise ValueError(f"run folder {name}: there is none")
    if task is None:
        raise ValueError("--task: expected one, because the model is no run folder")
    source = make_task(task)
    model, tokenizer = load_pretrained(name, gguf_file=gguf_file)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("sampling", total=problems * samples)
        return evaluate(
            model, tokenizer, source, source.problems("test", problems, seed), samples=samples, seed=seed,
            temperature=1.0 if temperature is None else temperature,
            max_tokens=max_tokens or source.max_completion_tokens, batch_size=batch_size,
            on_batch=lambda done: progress.advance(bar, done),
        )  # fmt: skip
