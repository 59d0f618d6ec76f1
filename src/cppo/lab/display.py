"""What a person sees of a run while it runs: a bar, the last update's numbers, a line for every evaluation."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# metric, heading, format
_COLUMNS = (
    ("step", "update", "{:.0f}"),
    ("rollout/reward", "reward", "{:.3f}"),
    ("eval/accuracy", "held-out", "{:.3f}"),
    ("gate/masked_fraction", "masked", "{:.1%}"),
    ("gate/budget_share", "by budget", "{:.0%}"),
    ("divergence/probability_gap", "mean |pi - mu|", "{:.4f}"),
)


class LiveDisplay:
    """A live display on a terminal; on anything else one plain line an evaluation."""

    def __init__(self, title: str, console: Console, *, quiet: bool = False) -> None:
        self._console, self._title, self._quiet = console, escape(title), quiet
        self._progress = Progress(
            TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._task: Any = None
        self._last: dict[str, Any] = {}
        self._shown: list[dict[str, Any]] = []
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        if not self._quiet:
            if self._console.is_terminal:
                self._live.start()
            else:
                self._console.print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.update(self._render(done=error is None))
            self._live.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase of ``total`` steps."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total)
        self._refresh()

    def advance(self, row: dict[str, Any] | None = None) -> None:
        """Take in one step; an optimizer update brings its metrics."""
        if row is None or row["step"] > 0:
            self._progress.advance(self._task)
        if row is not None:
            self._last |= row
            if "eval/accuracy" in row:
                self._shown.append(dict(self._last))
                if not self._console.is_terminal and not self._quiet:
                    self._console.print("  " + "  ".join(f"{h} {_show(self._last, m, f)}" for m, h, f in _COLUMNS))
        self._refresh()

    def _refresh(self) -> None:
        if self._live.is_started:
            self._live.update(self._render())

    def _render(self, *, done: bool = False) -> Group:
        table = Table(title=self._title, title_justify="left", box=None, pad_edge=False)
        for _, heading, _ in _COLUMNS:
            table.add_column(heading, justify="right")
        for row in self._shown:
            table.add_row(*(_show(row, metric, form) for metric, _, form in _COLUMNS))
        if self._last and not done:
            table.add_row(*(_show(self._last | {"eval/accuracy": None}, m, f) for m, _, f in _COLUMNS), style="dim")
        return Group(table) if done else Group(table, self._progress)


def _show(row: dict[str, Any], metric: str, form: str) -> str:
    value = row.get(metric)
    return "-" if value is None else form.format(value)


def final_table(summaries: list[dict[str, Any]]) -> Table:
    """Return the table that closes a run: one line a method."""
    table = Table(title="Held-out accuracy (Avg@k) and what the trust region did", title_justify="left")
    for heading in ("method", "start", "final", "best", "masked", "by budget", "mean |pi - mu|", "CPU s / rollout"):
        # A method is not cut off: its last knob may be what tells two runs apart.
        table.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    for summary in summaries:
        result, cost = summary["result"], summary["cost"]
        table.add_row(
            escape(summary["method"]),
            f"{result['start_accuracy']:.3f}",
            f"{result['final_accuracy']:.3f} ± {result['standard_error'] or 0:.3f}",
            f"{result['best_accuracy']:.3f}",
            f"{result['masked_fraction'] or 0:.1%}",
            "-" if result["budget_share"] is None else f"{result['budget_share']:.0%}",
            f"{result['probability_gap'] or 0:.4f}",
            f"{cost['cpu_seconds_a_rollout']:.2f}",
        )
    return table
