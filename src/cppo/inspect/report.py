"""The report page of one or more runs: one self-contained HTML file with its pictures inside."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cppo.inspect import plots

_CAPTIONS = (
    (
        plots.learning_curve,
        "Success on problems that were never trained on, before and during training. Bars: one standard error over "
        "the problems.",
    ),
    (
        plots.divergence_by_position,
        "How far the policy had drifted from the one that sampled, token by token, over all updates. Early drift "
        "changes everything after it; the position weight is strict there.",
    ),
    (
        plots.effective_budget,
        "What a token deposits in its response's account. An adaptive budget follows the 90th percentile of the "
        "response's own divergence, between b_min and 2 b_min.",
    ),
    (
        plots.masked_by_cause,
        "Tokens whose gradient was dropped: because they alone moved too far, or because the prefix before them had "
        "used up the budget.",
    ),
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{
  font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 64rem; padding: 1rem;
  background: #fff; color: #222;
}}
h1 {{ font-size: 1.4rem; }}
figure {{ margin: 0; }}
figcaption {{ font-size: 0.9rem; color: #555; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.5rem; }}
svg {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
@media (max-width: 26rem) {{ .figures {{ grid-template-columns: 1fr; }} }}
</style></head><body>
<h1>{title}</h1>
<p>{task}</p>
<div class="scroll">{table}</div>
<div class="figures">{figures}</div>
</body></html>
"""


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt and no date: the same run gives the same page.
    with mpl.rc_context({"svg.hashsalt": "cppo", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _table(summaries: list[dict[str, Any]]) -> str:
    heads = ("method", "start", "final", "best", "masked", "by budget", "mean |pi - mu|")
    rows = []
    for summary in summaries:
        result = summary["result"]
        share = result["budget_share"]
        cells = (
            summary["method"],
            f"{result['start_accuracy']:.3f}",
            f"{result['final_accuracy']:.3f} ± {result['standard_error'] or 0:.3f}",
            f"{result['best_accuracy']:.3f}",
            f"{result['masked_fraction'] or 0:.1%}",
            "-" if share is None else f"{share:.0%}",
            f"{result['probability_gap'] or 0:.4f}",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in heads) + "</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def write_report(path: Path, runs: list[plots.RunData], summaries: list[dict[str, Any]]) -> None:
    """Write the page of these runs; ``summaries`` stand in the same order."""
    figures = "".join(
        f"<figure>{_svg(draw(runs))}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for draw, caption in _CAPTIONS
    )
    first = summaries[0]
    page = _PAGE.format(
        title=html.escape(f"Run {first['run']}"),
        task=html.escape(f"Task {first['task']}. Accuracy is Avg@k on held-out problems."),
        table=_table(summaries),
        figures=figures,
    )
    path.write_text(page, encoding="utf-8")
