"""``cppo bound verify`` and ``cppo bound constants``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(
    help="The policy-improvement theorem, run: its statements verified, its constants at a setting.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=200)


@app.command(
    epilog="Examples:  cppo bound verify  |  cppo bound verify --instances 20000 --seed 1  |  cppo bound verify --json"
)
def verify(
    instances: Annotated[int, typer.Option(help="Random problems, two policies and a reward each.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check every statement of the theory on small random problems by enumerating all responses; exit 1 if one fails.

    Three problems of fifty are checked in exact fractions too. The table says how tight each bound is, and whether its
    saturating problem attains it.
    """
    from cppo.bound.tables import print_verdicts
    from cppo.bound.verify import verify as run

    with Progress(console=_console(stderr=True), transient=True, disable=as_json) as progress:
        bar = progress.add_task("enumerating", total=max(instances, 0))
        verdicts = run(instances, seed, progress=lambda done: progress.advance(bar, done))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2))
    else:
        print_verdicts(verdicts, _console(stderr=False))
    if any(verdict.violations or verdict.exact_violations for verdict in verdicts):
        sys.exit(1)


@app.command(
    epilog="Examples:  cppo bound constants  |  cppo bound constants --length 64 --delta 0.1 --delta-b 0.01  |  "
    "cppo bound constants --run runs/cppo-1  |  cppo bound constants --json"
)
def constants(
    length: Annotated[
        int | None, typer.Option(help="T, the response's tokens; without it the paper's settings.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Token threshold; default 0.15.")] = None,
    delta_b: Annotated[float | None, typer.Option(help="Prefix budget; default 0.02.")] = None,
    w_min: Annotated[float | None, typer.Option(help="Smallest position weight; default 0.8.")] = None,
    xi: Annotated[
        float | None,
        typer.Option(help="Half the reward's range; default 1/2 (rewards 0 and 1); of a run, of those seen."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="A run's folder: its settings, lengths and budgets.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print Theorem 1's constant at a setting, the slack that Eq. 8 adds, and a uniform threshold's beside them."""
    given = {"length": length, "delta": delta, "delta_b": delta_b, "w_min": w_min}
    names = ", ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None)
    if xi is not None and not xi > 0:
        raise ValueError(f"--xi {xi}: expected a number > 0")
    if run is not None:
        if names:
            raise ValueError(f"--run {run}: expected no other settings (the run has its own), got {names}")
        _print_run(run, xi, as_json=as_json)
        return
    if names and length is None:
        raise ValueError(f"{names}: expected --length too, the constants grow with it")
    from cppo.bound.constants import PAPER, Setting
    from cppo.bound.constants import constants as of
    from cppo.bound.tables import print_constants

    settings: tuple[Setting, ...] = PAPER
    if length is not None:
        knobs = (
            0.15 if delta is None else delta,
            0.02 if delta_b is None else delta_b,
            0.8 if w_min is None else w_min,
        )
        settings = (Setting("given", length, *knobs),)
    rows = [of(setting, 0.5 if xi is None else xi) for setting in settings]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, allow_nan=False))
    else:
        print_constants(rows, _console(stderr=False))


def _print_run(path: Path, xi: float | None, *, as_json: bool) -> None:
    from cppo.bound.constants import run_constants
    from cppo.bound.tables import print_run
    from cppo.inspect.reading import Log
    from cppo.lab.config import load_config
    from cppo.methods import parse_method

    spec = load_config(path / "config.yaml").method
    with Progress(console=_console(stderr=True), transient=True, disable=as_json) as progress:
        bar = progress.add_task("reading", total=Log.open(path).responses)
        found = run_constants(path, spec, parse_method(spec), xi, progress=lambda read: progress.advance(bar, read))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2, allow_nan=False))
    else:
        print_run(found, _console(stderr=False))
