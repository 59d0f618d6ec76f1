"""What ``cppo compare`` does: search, run what is missing, and write the report."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cppo.compare.analysis import analyse
from cppo.compare.page import write_report
from cppo.compare.results import ResultFolder
from cppo.compare.runner import Runner
from cppo.compare.search import choose, first_cells, second_cells, unfinished
from cppo.compare.study import Study
from cppo.compare.tables import all_tables, as_markdown, for_terminal, headlines
from cppo.lab.folder import write_whole
from cppo.lab.problems import check_demonstrated
from cppo.lab.tasks import make_task


def run_study(study: Study, folder: ResultFolder, runner: Runner) -> None:
    """Run what is missing of a study.

    Raises:
        ValueError: for a task that does not exist or cannot be warm-started on, a folder in use, a search of which a
            run failed, or what ``Runner.run`` raises.
    """
    _check_tasks(study)
    with folder.locked(), _ended_like_an_interrupt():
        folder.sweep()
        if study.search is not None:
            runner.run("search, learning rates", first_cells(study, study.search))
            if not runner.failed:
                runner.run("search, knobs", second_cells(study, study.search, folder.rows()))
            if runner.failed:
                raise ValueError(
                    f"{len(runner.failed)} runs of the search failed ({folder.failures}), the first: {runner.failed[0]}"
                )
        runner.run("runs", study.cells(chosen_of(study, folder)))


def chosen_of(study: Study, folder: ResultFolder) -> dict[str, dict[str, Any]]:
    """Return what the search chose; empty without a search, or while one is unfinished."""
    rows = folder.rows()
    if study.search is None or unfinished(study, study.search, rows):
        folder.chosen.unlink(missing_ok=True)  # what an earlier search chose, whose study was edited since
        return {}
    chosen = choose(study, study.search, rows)
    write_whole(folder.chosen, json.dumps(chosen, indent=1, allow_nan=False) + "\n")
    return chosen


def report(study: Study, folder: ResultFolder, reference: str | None, kind: str) -> tuple[dict[str, Any], Any]:
    """Write the summary, the tables and the page; return the document, and what the terminal shows.

    Args:
        study: the study.
        folder: its folder. What is written there is of the study's own reference and, in the tables, the last
            evaluation, so that looking at it otherwise changes nothing.
        reference: the arm that is compared with in what is returned; None: the study's.
        kind: the score that is shown.
    """
    chosen = chosen_of(study, folder)
    document = analyse(study, folder.rows(), chosen, folder.failed())
    if not document["settings"]:
        raise ValueError(f"{folder.path}: expected finished runs, found none")
    write_whole(folder.summary, json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_whole(folder.tables, f"# {study.title}\n\n" + as_markdown(all_tables(document, "final")))
    write_report(folder.report, document)
    if reference not in (None, study.reference):
        other = dataclasses.replace(study, reference=reference)
        document = analyse(other, folder.rows(), chosen, folder.failed())
    return document, for_terminal(headlines(document, kind))


def _check_tasks(study: Study) -> None:
    for setting in study.settings:
        config = study.config(setting, next(iter(study.arms)), study.seeds[0])
        try:
            task = make_task(config.task)
            if config.tiny:
                check_demonstrated(task)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"setting {setting!r}: {error}") from None


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """Let SIGTERM end the workers too, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
