"""The document about a log, on a terminal."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cppo.printable import printable

_TOKENS = 10  # named
_STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan"}


def print_document(document: dict[str, Any], console: Console) -> None:
    """Print each run: what was found, what each method would have done, which thresholds fit."""
    for run in document["runs"]:
        steps = run["steps"]
        console.print(Text(f"{run['name']}  ({printable(run['method'])})", style="bold"))
        console.print(
            Text(
                f"{run['responses']:,} responses, {run['tokens']:,} tokens of the policy, updates {steps[0]} to "
                f"{steps[-1]}"
            )
        )
        console.print()
        for finding in run["findings"]:
            console.print(Text(f"{finding['level']}: {finding['title']}", style=_STYLES[finding["level"]]))
            console.print(Text(printable(finding["text"])))
            console.print()
        if not run["findings"]:
            console.print(Text("Nothing stands out.\n"))
        console.print(_methods(run))
        for spec, reason in run["left_out"].items():
            console.print(Text(f"{spec}: {reason}", style="dim"))
        console.print()
        console.print(_probabilities(run))
        console.print()
        if run["rejected_tokens"]:
            named = (
                f"{e['id'] if e['text'] is None else _quoted(e['text'])} {e['rejected']} of {e['count']}"
                for e in run["rejected_tokens"][:_TOKENS]
            )
            console.print(Text(f"Rejected most by the run's own method: {', '.join(named)}"))
            console.print()
        console.print(Text(_suggestion(run["suggestion"])))
        console.print()


def _methods(run: dict[str, Any]) -> Table:
    table = Table(title="The same tokens, judged by", title_justify="left", title_style="bold")
    table.add_column("method", overflow="fold")
    columns = {
        "masked": "masked", "token": "by_token_threshold", "budget": "by_prefix_budget", "other": "by_other_rule",
        "A > 0": "masked_positive", "A < 0": "masked_negative", "weight left": "weight_left", "differs": "differs",
    }  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in run["methods"]:
        table.add_row(Text(entry["spec"]), *(_percent(entry[key]) for key in columns.values()))
    return table


def _probabilities(run: dict[str, Any]) -> Table:
    title = "Rejected, by probability under the sampler"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("mu")
    for name in ("A > 0", "of", "A < 0", "of"):
        table.add_column(name, justify="right")
    edges, own = run["probabilities"]["edges"], run["methods"][0]
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        cells = [f"{low:g} - {high:g}"]
        for sign in ("positive", "negative"):
            cells.append(_percent(own[f"masked_{sign}_by_probability"][place]))
            cells.append(f"{run['probabilities'][f'tokens_{sign}'][place]:,}")
        table.add_row(*cells)
    return table


def _quoted(text: str) -> str:
    """Return a text that ``printable`` made, on one line."""
    return "'" + text.replace("\n", "\\n").replace("\t", "\\t") + "'"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _suggestion(found: dict[str, Any]) -> str:
    paper = found["paper"]
    beside = (
        f"The paper's delta {paper['delta']:g} and delta_b {paper['delta_b']:g} would mask {_percent(paper['masked'])}."
    )
    if found["delta"] is None or found["delta_b"] is None:
        share = _percent(found["wanted"])
        return f"No thresholds mask {share} of these tokens: too few move away from the sampler. {beside}"
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    return (
        f"To mask {found['wanted']:.1%} of these tokens, half of them by the prefix budget: delta "
        f"{found['delta']:.3g}, delta_b {found['delta_b']:.3g} ({settings}), which masks {_percent(found['masked'])}. "
        f"{beside}"
    )
