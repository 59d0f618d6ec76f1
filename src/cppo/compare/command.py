"""``cppo compare`` on the command line."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cppo.compare.results import ResultFolder

EXAMPLES = (
    "Examples:  cppo compare --quick  |  cppo compare --method cppo --method dppo --method grpo --seeds 8 "
    "--set epochs=4  |  cppo compare studies/drift.yaml --into docs/studies/drift  |  cppo compare docs/studies/drift"
)


def compare(
    study: Annotated[
        Path | None, typer.Argument(help="A study (YAML), or the folder of one that was begun (docs/compare.md).")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Without a study: compare this method. Repeatable; the first is the reference."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --method: how many, from 0; default: 8.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --method: NAME=VALUE, a setting of `cppo train --config`. Repeatable."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="A built-in study of ten minutes on two cores.")] = False,
    into: Annotated[Path | None, typer.Option(help="The folder of the results; default: comparisons/NAME.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, a thread each; default: one a core.")] = None,
    keep_runs: Annotated[bool, typer.Option(help="Keep every run's folder, for `cppo inspect`.")] = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(help="The folder of another study, from which runs that are the same are taken. Repeatable."),
    ] = None,
    report_only: Annotated[bool, typer.Option(help="Run nothing; make the report of what is there.")] = False,
    reference: Annotated[
        str | None, typer.Option(help="Print the comparison with this arm; the folder's files keep the study's own.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="Print the tables of this score, final, best or area; tables.md has the final one.")
    ] = "final",
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as JSON and nothing else.")] = False,
) -> None:
    """Compare trust regions: the same starts, problems and budgets for all, seed by seed, with intervals.

    A folder keeps a line a finished run. The same command continues where it ended; an arm or a seed that is added to
    its study.yaml later runs alone.
    """
    from cppo.compare.experiment import report, run_study
    from cppo.compare.runner import Runner
    from cppo.compare.scores import SCORES
    from cppo.compare.study import load_study

    if score not in SCORES:
        raise ValueError(f"--score {score!r}: expected one of {', '.join(SCORES)}")
    given = [name for name, value in (("STUDY", study), ("--quick", quick), ("--method", method)) if value]
    if len(given) != 1:
        raise ValueError(f"expected one of STUDY, --quick and --method, got {' and '.join(given) or 'none'}")
    for name, value in (("--set", settings), ("--seeds", seeds)):
        if method is None and value:
            raise ValueError(f"{name}: expected --method; a study has its own in its file")
    others = _others(reuse or [], report_only=report_only)
    folder = _begun(study, into)
    if folder is None:
        if report_only:
            raise ValueError("--report-only: expected the folder of a comparison that was begun")
        folder = _begin(study, method, seeds or 8, settings or [], into)
    plan = load_study(folder.study)
    if reference is not None:
        dataclasses.replace(plan, reference=reference)  # a wrong one is refused before anything runs
    console = Console(stderr=as_json)
    runner = Runner(folder, jobs or _cores(), console, keep=keep_runs, quiet=as_json, reuse=others)
    if not report_only:
        run_study(plan, folder, runner)
    if runner.failed and not len(folder.rows()):
        raise ValueError(f"all runs failed ({folder.failures} has the tracebacks), the first: {runner.failed[0]}")
    with console.status("report"):
        document, tables = report(plan, folder, reference, score)
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        console.print(tables)
        console.print(f"Pictures: {folder.report}\nTables: {folder.tables}", markup=False)
    if runner.failed:
        raise ValueError(
            f"{len(runner.failed)} runs failed ({folder.failures} has the tracebacks), the first: {runner.failed[0]}"
        )


def _cores() -> int:
    """Return how many cores this process may use; macOS says only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _others(paths: list[Path], *, report_only: bool) -> list[ResultFolder]:
    from cppo.compare.results import ResultFolder

    if paths and report_only:
        raise ValueError("--reuse: expected a command that runs; with --report-only nothing is taken")
    for path in paths:
        if not (path / "study.yaml").is_file():
            raise ValueError(f"--reuse {path}: expected the folder of a comparison, with study.yaml")
    return [ResultFolder(path) for path in paths]


def _begun(study: Path | None, into: Path | None) -> ResultFolder | None:
    """Return the folder that STUDY is, if it is one."""
    from cppo.compare.results import ResultFolder

    if study is None or not (study / "study.yaml").is_file():
        return None
    if into is not None:
        raise ValueError(f"--into {into}: expected none with the folder {study}, which goes on where it is")
    return ResultFolder(study)


def _begin(
    study: Path | None, methods: list[str] | None, seeds: int, settings: list[str], into: Path | None
) -> ResultFolder:
    """Make the folder of a new comparison, or open that of the same one."""
    from cppo.compare.results import ResultFolder
    from cppo.compare.study import load_study

    if study is not None and study.is_file():
        load_study(study)  # a wrong study makes no folder
    name, text = _study_text(study, methods, seeds, settings)
    return ResultFolder.create(into or Path("comparisons") / name, text)


def _study_text(study: Path | None, methods: list[str] | None, seeds: int, settings: list[str]) -> tuple[str, str]:
    if study is not None:
        if not study.is_file():
            raise ValueError(f"{study}: expected a study (YAML), or a folder with study.yaml")
        return study.stem, study.read_text(encoding="utf-8")
    if methods is None:
        return "quick", (importlib.resources.files("cppo.compare") / "quick.yaml").read_text(encoding="utf-8")
    import yaml

    from cppo.compare.study import make_study

    base: dict[str, Any] = {}
    for item in settings:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r}: expected NAME=VALUE")
        try:
            base[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ValueError(f"--set {item!r}: expected a value as in YAML") from None
    if len(set(methods)) != len(methods):
        raise ValueError(f"--method: expected methods that differ, got {', '.join(methods)}")
    content = {
        "title": " beside ".join(methods), "seeds": {"first": 0, "count": seeds}, "base": base,
        "arms": {name: name for name in methods}, "reference": methods[0],
    }  # fmt: skip
    make_study(content)
    return "-".join(name.partition("?")[0] for name in methods), yaml.safe_dump(content, sort_keys=False)
