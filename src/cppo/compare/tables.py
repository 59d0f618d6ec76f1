"""The comparison's tables, as rows of text: for the terminal and for Markdown."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Bounds = Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Plain:
    """One table: a title, headings, rows, and what is to be known about it."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def all_tables(document: dict[str, Any], kind: str = "final") -> list[Plain]:
    """Return the tables of a comparison's document, scored by ``kind``: final, best or area."""
    tables = []
    for name, setting in document["settings"].items():
        tables += [scores(name, setting, kind), stability(name, setting)]
    if len(document["settings"]) > 1:
        tables.append(overall(document, kind))
    if document["chosen"]:
        tables.append(searches(document))
    tables.append(seeds(document, kind))
    return tables


def headlines(document: dict[str, Any], kind: str) -> list[Plain]:
    """Return one narrow table a setting: what stands at the end of a comparison in 80 columns. lost: collapsed."""
    tables = []
    for name, setting in document["settings"].items():
        rows = []
        for arm, entry in setting["arms"].items():
            score, figures = entry["scores"][kind], entry["stability"]
            against = score.get("reference_less_arm", {})
            rows.append((
                arm, str(len(entry["seeds"])), _estimate(score, "mean", 2),
                _signed(against.get("mean"), against.get("interval"), 2), _p(against.get("p_holm")),
                str(entry["collapsed"]), _number(figures["gap"], 2), _share(figures["masked"]),
            ))  # fmt: skip
        tables.append(Plain(
            f"{name}: {kind} accuracy",
            ("arm", "n", "mean [95 %]", "reference less arm", "p", "lost", "drift", "masked"), rows,
            (_diverged(setting) + _unmatched(setting)).strip(),
        ))  # fmt: skip
    return tables


def scores(name: str, setting: dict[str, Any], kind: str) -> Plain:
    """Return one setting's scores: a row an arm."""
    rows = []
    for arm, entry in setting["arms"].items():
        score = entry["scores"][kind]
        against = score.get("reference_less_arm", {})
        rows.append((
            arm, str(len(entry["seeds"])), f"{entry['start']:.3f}",
            _estimate(score, "mean"), _estimate(score, "iqm"),
            f"{entry['scores']['best']['mean']:.3f}", f"{entry['scores']['area']['mean']:.3f}",
            _signed(against.get("mean"), against.get("interval")),
            _plain(against.get("probability"), against.get("probability_interval")),
            _p(against.get("p_holm")), _collapses(against),
            " ".join(f"{value:.2f}" for value in sorted(score["values"])),
        ))  # fmt: skip
    references = {
        entry["scores"][kind]["reference_less_arm"]["reference"]
        for entry in setting["arms"].values()
        if "reference_less_arm" in entry["scores"][kind]
    }
    return Plain(
        f"{name}: {kind} accuracy on held-out problems",
        ("arm", "seeds", "start", "mean", "IQM", "best", "area", "reference less arm", "P(reference better)",
         "p (Holm)", "collapsed alone: reference, arm", "every seed, sorted"),
        rows,
        f"Intervals: 95 %, bootstrap over seeds. Reference: {', '.join(sorted(references)) or 'none'}, the same seeds "
        f"in both. best: in a window of {setting['window']} rollouts. area: mean of the evaluations after the start. "
        "p: sign flips of the paired differences, adjusted for the number of the study's arms, as given and searched "
        "apart. "
        f"One evaluation's own standard error is {_number(setting['evaluation_standard_error'], 2)}."
        f"{_unmatched(setting)}{_without(setting['without'])}",
    )  # fmt: skip


def stability(name: str, setting: dict[str, Any]) -> Plain:
    """Return one setting's stability figures: a row an arm."""
    rows = []
    for arm, entry in setting["arms"].items():
        figures = entry["stability"]
        rows.append((
            arm, f"{entry['collapsed']} of {len(entry['seeds'])}", _number(figures["first_gap"]),
            _number(figures["gap"]), _drifts(figures.get("gap_reference_less_arm")), _number(figures["tail"]),
            _number(figures["gradient_norm"]), _number(figures["largest_gradient_norm"]),
            _number(figures["last_entropy"]), _share(figures["masked"]), _share(figures["masked_positive"]),
            _share(figures["masked_negative"]), _share(figures["budget_share"]), f"{entry['cpu_seconds']:.0f}",
        ))  # fmt: skip
    return Plain(
        f"{name}: stability",
        ("arm", "collapsed", "drift, 1st rollout", "drift", "reference less arm: drift", "drift, top tenth",
         "gradient norm", "largest", "entropy, end", "masked", "of A > 0", "of A < 0", "by budget alone", "CPU s"),
        rows,
        "drift: mean |pi - mu| of the sampled tokens over all updates; top tenth: of the tenth that drifted most. "
        "reference less arm: paired, 95 % bootstrap interval, and in how many seeds the reference drifted less. "
        "collapsed: ends below half of its best evaluation, or below its start by two standard errors. by budget "
        f"alone: of the masked tokens. CPU s: of a run, its warm start apart.{_diverged(setting)}",
    )  # fmt: skip


def overall(document: dict[str, Any], kind: str) -> Plain:
    """Return the scores over all settings: a row an arm that has run in all of them."""
    rows = []
    for arm, entry in document["overall"].items():
        score = entry[kind]
        against = score.get("reference_less_arm", {})
        rows.append((
            arm, str(entry["settings"]), str(entry["seeds"]), _estimate(score, "mean"), _estimate(score, "iqm"),
            entry["reference"] if against else "-",
            _signed(against.get("mean"), against.get("interval")),
            _plain(against.get("probability"), against.get("probability_interval")),
            _p(against.get("p_holm")), f"{entry['collapsed']}",
        ))  # fmt: skip
    return Plain(
        f"All settings: {kind} accuracy",
        ("arm", "settings", "seeds", "mean", "IQM", "reference", "reference less arm", "P(reference better)",
         "p (Holm)", "collapsed"),
        rows,
        "Over the seeds that the arm and its reference have in all settings; each setting weighs the same. A seed is "
        "drawn with all its settings, and its differences flip their sign together. The IQM is over all runs."
        + (f" Not begun, and not in it: {', '.join(document['not_begun'])}." if document["not_begun"] else ""),
    )  # fmt: skip


def searches(document: dict[str, Any]) -> Plain:
    """Return what the search chose, and every candidate's score."""
    rows = [
        (setting, arm, choice["method"], f"x {choice['factor']:g}",
         ", ".join(f"{t['method']} x {t['factor']:g}: {t['score']:.3f}" for t in choice["tried"]))
        for setting, arms in document["chosen"].items() for arm, choice in arms.items()
    ]  # fmt: skip
    return Plain(
        "Search: the best of equally many candidates, on seeds that are not reported",
        ("setting", "arm", "chosen", "learning rate", "candidates: mean area"), rows,
    )  # fmt: skip


def seeds(document: dict[str, Any], kind: str) -> Plain:
    """Return how many paired seeds a difference of a given size would need."""
    rows = []
    for name, setting in document["settings"].items():
        for arm, entry in setting["arms"].items():
            against = entry["scores"][kind].get("reference_less_arm")
            if against and against["seeds_needed"]:
                needed = against["seeds_needed"].values()
                rows.append((name, arm, f"{against['deviation']:.3f}", *map(str, needed)))
    return Plain(
        f"How many paired seeds would show a difference in {kind} accuracy",
        ("setting", "arm", "deviation of the difference", "of 0.02", "of 0.05", "of 0.1"), rows,
        "With a probability of 80 %, at a two-sided level of 5 % over all arms of the setting; never fewer than those "
        "with which a sign-flip test of so many arms can show anything.",
    )  # fmt: skip


def for_terminal(tables: list[Plain]) -> Group:
    """Return the tables for rich."""
    shown: list[Table | Text] = []
    for plain in tables:
        table = Table(title=escape(plain.title), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for index, heading in enumerate(plain.headings):
            table.add_column(escape(heading), justify="left" if index == 0 else "right", overflow="fold")
        for row in plain.rows:
            table.add_row(*map(escape, row))
        shown += [table, *([Text(plain.note, style="dim")] if plain.note else []), Text("")]
    return Group(*shown)


def as_markdown(tables: list[Plain]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for plain in tables:
        lines = [f"### {plain.title}", ""]
        lines.append("| " + " | ".join(map(_cell, plain.headings)) + " |")
        lines.append("|" + "---|" * len(plain.headings))
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in plain.rows]
        parts.append("\n".join([*lines, *(["", plain.note] if plain.note else [])]))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("|", "\\|"))  # what would be markup


def _estimate(score: dict[str, Any], name: str, digits: int = 3) -> str:
    low_high: Bounds = score[f"{name}_interval"]
    bounds = "" if low_high is None else f" [{low_high[0]:.{digits}f}, {low_high[1]:.{digits}f}]"
    return f"{score[name]:.{digits}f}{bounds}"


def _signed(value: float | None, interval: Bounds, digits: int = 3) -> str:
    if value is None:
        return "-"
    bounds = "" if interval is None else f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"
    return f"{value:+.{digits}f}{bounds}"


def _drifts(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    bounds = "" if found["interval"] is None else " [{:+.2g}, {:+.2g}]".format(*found["interval"])
    return f"{found['mean']:+.2g}{bounds}, {found['reference_lower']} of {found['pairs']}"


def _plain(value: float | None, interval: Bounds) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _collapses(against: dict[str, Any]) -> str:
    return f"{against['only_reference_collapsed']}, {against['only_arm_collapsed']}" if against else "-"


def _diverged(setting: dict[str, Any]) -> str:
    """Say which arms' policies became no numbers, and what stands of them."""
    counts = [f"{arm}: {entry['diverged']}" for arm, entry in setting["arms"].items() if entry["diverged"]]
    if not counts:
        return ""
    return (
        f" Runs that diverged, to a policy that is no numbers: {', '.join(counts)}. Their curves are averaged up to "
        "there, and their drift is compared with none."
    )


def _unmatched(setting: dict[str, Any]) -> str:
    """Say which seeds are no pairs."""
    if not setting["unmatched"]:
        return ""
    return (
        f" Not every arm began from the same warm start in seeds {', '.join(map(str, setting['unmatched']))}: their "
        "lines come from machines whose arithmetic differs."
    )


def _without(arms: dict[str, dict[str, int]]) -> str:
    """Say which runs are not in the table."""
    said = [
        f" {arm}: {n} {'failed' if why == 'failed' else 'not run yet'}."
        for arm, counts in arms.items() for why, n in counts.items() if n
    ]  # fmt: skip
    return "".join(said)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
