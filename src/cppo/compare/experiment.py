"""What ``cppo compare`` does: search, run what is missing, and write the report."""

from __future__ import annotations

import json
from typing import Any

from cppo.compare.analysis import analyse
from cppo.compare.page import write_report
from cppo.compare.results import ResultFolder
from cppo.compare.runner import Runner
from cppo.compare.search import choose, first_cells, second_cells
from cppo.compare.study import Study
from cppo.compare.tables import all_tables, as_markdown, for_terminal, headlines
from cppo.lab.folder import write_whole


def run_study(study: Study, folder: ResultFolder, runner: Runner) -> dict[str, dict[str, Any]]:
    """Run what is missing of a study; return what the search chose (empty without one)."""
    chosen: dict[str, dict[str, Any]] = {}
    with folder.locked():
        if study.search is not None:
            runner.run("search, learning rates", first_cells(study, study.search))
            runner.run("search, knobs", second_cells(study, study.search, folder.rows()))
            chosen = choose(study, study.search, folder.rows())
            write_whole(folder.chosen, json.dumps(chosen, indent=1) + "\n")
        runner.run("runs", study.cells(chosen))
    return chosen


def report(study: Study, folder: ResultFolder, kind: str) -> tuple[dict[str, Any], Any]:
    """Write the summary, the tables and the page; return the document, and what the terminal shows."""
    rows = folder.rows()
    chosen = choose(study, study.search, rows) if study.search is not None else {}
    document = analyse(study, rows, chosen)
    if not document["settings"]:
        raise ValueError(f"{folder.path}: expected finished runs, found none")
    write_whole(folder.summary, json.dumps(document, indent=1) + "\n")
    write_whole(folder.tables, f"# {study.title}\n\n" + as_markdown(all_tables(document, kind)))
    write_report(folder.report, document)
    return document, for_terminal(headlines(document, kind))
