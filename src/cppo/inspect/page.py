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

_SHARED = ("elements.js", "pictures.js")
_SCRIPTS = ("response.js", "page.js")


def write_page(path: Path, document: dict[str, Any], training: list[dict[str, Any]] | None = None) -> None:
    """Write the page of one or more runs.

    Args:
        path: the HTML file.
        document: ``{"format": 1, "runs": [...]}``, each run as ``summarise`` returns it.
        training: learning curves, one entry a run that has one: ``label`` (the run's name in the document), and
            ``steps``, ``accuracy``, ``standard_error``, ``reward`` of one length, None where an update has no value
            (``training_curve`` makes such an entry).
    """
    names = ", ".join(str(run["name"]) for run in document["runs"])
    script = "".join(map(_asset, _SCRIPTS))
    path.write_bytes(build_page(_asset("page.html"), script, document | {"training": training or []}, names))


def build_page(template: str, script: str, document: dict[str, Any], title: str) -> bytes:
    """Return a page that opens from disk: its data, its script, plotly and the shared look inside.

    Args:
        template: HTML with the places ``@@policy@@``, ``@@title@@``, ``@@style@@``, ``@@data@@``, ``@@plotly@@`` and
            ``@@script@@``.
        script: runs after ``elements.js`` and ``pictures.js``.
        document: the data, which the script finds in the element ``data``.
        title: plain text.
    """
    from plotly.offline import get_plotlyjs

    scripts = {"plotly": get_plotlyjs(), "script": "".join(map(_asset, _SHARED)) + script}
    parts = scripts | {
        "style": _asset("page.css"),
        "policy": _policy(list(scripts.values())),
        "title": html.escape(printable(title)),
        "data": _as_json(document),
    }
    # One pass over the template alone: what is put in is not searched.
    return re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], template).encode()


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
