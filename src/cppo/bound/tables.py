"""The verdicts and the constants, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cppo.bound.constants import Constants, RunConstants
from cppo.bound.verify import TOLERANCE, Verdict
from cppo.printable import printable


def _table(columns: Iterable[str], *, left: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _length(value: int | None) -> str:
    return "2^40 or more" if value is None else f"{value:,}"


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print a line a statement: how often it was checked, whether it held, how tight it is."""
    table = _table(
        ("statement", "claim", "problems", "violations", "in fractions", "violations", "min", "quartile", "median",
         "quartile", "attained"), left=2,
    )  # fmt: skip
    for v in verdicts:
        tightness = list(v.tightness.values()) if v.tightness else [None] * 4
        table.add_row(
            v.statement, Text(v.text), f"{v.instances:,}", f"{v.violations:,}", f"{v.exact_instances:,}",
            f"{v.exact_violations:,}", *(_number(q) for q in tightness), _number(v.attained),
        )  # fmt: skip
    console.print(table)
    comparisons = sum(v.comparisons for v in verdicts)
    excess = max(v.excess for v in verdicts)
    console.print(
        Text(
            f"\n{comparisons:,} comparisons; in float64 up to {TOLERANCE:g} of the size of what is compared (the "
            f"largest difference against a statement: {excess:.1e}), in fractions exactly. min to quartile: bound / "
            "quantity over the problems; attained: the same in the statement's saturating problem, in fractions."
        )
    )
    console.print(Text("\nMedian of bound / quantity by the number of tokens"))
    lengths = sorted({T for v in verdicts for T in v.tightness_by_tokens})
    table = _table(("statement", *(f"T = {T}" for T in lengths)), left=1)
    for v in verdicts:
        if v.tightness_by_tokens:
            table.add_row(v.statement, *(_number(v.tightness_by_tokens.get(T)) for T in lengths))
    console.print(table)


def print_constants(rows: Sequence[Constants], console: Console) -> None:
    """Print a line a setting."""
    columns = ("setting", "T", "delta", "delta_b", "w_min", "Theorem 1", "+ slack of Eq. 8", "uniform", "ratio",
               "with slack", "a gain to T", "uniform to T", "")  # fmt: skip
    table = _table(columns, left=1)
    for row in rows:
        table.add_row(
            Text(row.label), f"{row.T:,}", _number(row.delta), _number(row.delta_b), _number(row.w_min),
            _number(row.penalty), _number(row.slack), _number(row.uniform), _number(row.ratio),
            _number(row.total_ratio), _length(row.longest), _length(row.uniform_longest),
            "vacuous" if row.vacuous else "",
        )  # fmt: skip
    console.print(table)
    reach, budget = 2 * rows[0].xi, rows[0].penalty is not None
    constant = "(Theorem 1 + slack)" if budget else "uniform"
    rule = "Eq. 8" if budget else "D_t <= delta"
    console.print(
        Text(
            f"\nxi = {rows[0].xi:g}: rewards within a range of {reach:g}. J(pi) - J(mu) >= L' - {constant} under "
            f"{rule}, which limits L' too. A gain to T: the longest response for which the largest L' within the rule "
            f"exceeds the constant; beyond it the bound shows no gain, whatever the policy did. Vacuous: nor "
            f"does it exclude the largest loss, {reach:g}."
        )
    )


def print_run(run: RunConstants, console: Console) -> None:
    """Print a run's settings, what was observed, and its constants."""
    console.print(Text(f"{printable(run.run)}  ({printable(run.method)})", style="bold"))
    console.print(
        Text(f"{run.responses:,} responses of {run.shortest:,} to {run.longest:,} tokens, median {run.median:,}")
    )
    if run.delta_b is not None:
        spread = ", ".join(f"{name} {value:.4g}" for name, value in run.delta_b.items())
        console.print(Text(f"delta_b over responses: {spread}"))
    if run.tokens_within is not None and run.responses_within is not None:
        console.print(
            Text(
                f"Z_t <= c_t at {run.tokens_within:.2%} of the tokens; at all tokens of {run.responses_within:.2%} of "
                "the responses. The theorem asks for it at every token of every response; the mask stops the gradient "
                "of those that break it, it does not undo the drift."
            )
        )
    for note in run.notes:
        console.print(Text(f"note: {note}"))
    console.print()
    print_constants(run.rows, console)
