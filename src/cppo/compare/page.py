"""The comparison's report: one HTML file that opens from disk."""

from __future__ import annotations

import dataclasses
import importlib.resources
from pathlib import Path
from typing import Any

from cppo.compare.scores import SCORES
from cppo.compare.tables import all_tables
from cppo.inspect.page import build_page


def write_report(path: Path, document: dict[str, Any]) -> None:
    """Write the page of a document that ``analyse`` returned."""
    assets = importlib.resources.files("cppo.compare") / "page_assets"
    tables = {kind: [dataclasses.asdict(table) for table in all_tables(document, kind)] for kind in SCORES}
    page = build_page(
        (assets / "compare.html").read_text(encoding="utf-8"),
        (assets / "compare.js").read_text(encoding="utf-8"),
        document | {"tables": tables},
        document["title"],
    )
    path.write_bytes(page)
