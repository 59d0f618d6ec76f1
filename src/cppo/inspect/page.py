"""The report page: one HTML file with its data, its script and plotly inside; nothing in it reaches the network."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import math
import re
from pathlib import Path
from typing import Any

from cppo.printable import printable

_SCRIPTS = ("elements.js", "pictures.js", "response.js", "page.js")


def write_page(path: Path, document: dict[str, Any], training: list[dict[str, Any]] | None = None) -> None:
    """Write the page of one or more runs.

    Args:
        path: the HTML file.
        document: ``{"format": 1, "runs": [...]}``, each run as ``summarise`` returns it.
        training: learning curves, one entry a run that has one: ``label`` (the run's name in the document), and
            ``steps``, ``accuracy``, ``standard_error``, ``reward`` of one length, None where an update has no value
            (``training_curve`` makes such an entry).
    """
    from plotly.offline import get_plotlyjs

    names = ", ".join(str(run["name"]) for run in document["runs"])
    scripts = {"plotly": get_plotlyjs(), "script": "".join(_asset(name) for name in _SCRIPTS)}
    parts = scripts | {
        "style": _asset("page.css"),
        "policy": _policy(list(scripts.values())),
        "title": html.escape(printable(names)),
        "data": _as_json(document | {"training": training or []}),
    }
    # One pass over the template alone: what is put in is not searched.
    page = re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], _asset("page.html"))
    path.write_bytes(page.encode())


def _asset(name: str) -> str:
    text = (importlib.resources.files("cppo.inspect") / "page_assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")  # a browser hashes the text after it did the same


def _policy(scripts: list[str]) -> str:
    """Return a Content-Security-Policy under which these scripts run and nothing else does, nor is anything loaded."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    # plotly writes a style sheet of its own.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _as_json(document: dict[str, Any]) -> str:
    """Return JSON that can stand inside a ``<script>``: ASCII, without ``<``, ``>`` and ``&``; null for NaN."""
    text = json.dumps(_finite(document), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
