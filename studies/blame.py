"""What a trust region leaves of the push on each kind of token, in runs of ``cppo train`` on a sum task.

``python studies/blame.py RUN ..``: folders with their rollout log. The push on a token is k |A| (1 - pi), k the
method's coefficient: the gradient with respect to the token's logits has an L1 norm of twice that; (1 - pi) keeps sure
tokens, which hardly move, from counting. A sum is right if it follows from the response's own sum before it.

First table, responses with A < 0, which are pushed down: of the sums that are wrong in them, and of those that are
right, how many, the share that the method rejects, and the mean push on one, times 1,000; the end token is left out.
Second table, the push on all tokens: its share by the sign of A and the side of rho, and in brackets the share that
would go if k were capped at 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cppo.inspect.reading import Chunk, Log
from cppo.inspect.replay import decide_chunk
from cppo.lab.running_sum import ChainOfSums
from cppo.lab.tasks import make_task
from cppo.methods import parse_method

QUADRANTS = {(1, 1): "A > 0, rho > 1", (1, 0): "A > 0, rho <= 1", (-1, 1): "A < 0, rho > 1", (-1, 0): "A < 0, rho <= 1"}


def measure(run: Path) -> tuple[str, NDArray[np.float64], dict[tuple[int, int], NDArray[np.float64]]]:
    """Return a run's method; of right and wrong sums how many, rejected, push; a quadrant's push, beyond k = 1."""
    if not (run / "config.yaml").is_file():
        sys.exit(f"{run}: expected the folder of a run of `cppo train`")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    task = make_task(settings["task"])
    if not isinstance(task, ChainOfSums):
        sys.exit(f"{run}: expected a run on a sum task, got {task.name}")
    method = parse_method(settings["method"])
    sums, quadrants = np.zeros((2, 3)), {key: np.zeros(2) for key in QUADRANTS}
    for chunk in Log.open(run).chunks(texts=True):
        decision = decide_chunk(method, chunk)
        rejected, coefficient = decision.rejected_by.numpy() > 0, decision.coefficient.abs().numpy()
        advantage = np.repeat(chunk.advantage, chunk.lengths)
        unit = np.abs(advantage) * -np.expm1(chunk.logp)
        wrong = _wrong(chunk, task)
        for kind in (0, 1):
            these = wrong == kind
            sums[kind] += these.sum(), rejected[these].sum(), (coefficient * unit)[these].sum()
        for sign, above in QUADRANTS:
            these = (np.sign(advantage) == sign) & ((chunk.logp > chunk.rollout_logp) == bool(above))
            quadrants[sign, above] += (
                (coefficient * unit)[these].sum(),
                (np.maximum(coefficient - 1, 0) * unit)[these].sum(),
            )
    return settings["method"], sums, quadrants


def _wrong(chunk: Chunk, task: ChainOfSums) -> NDArray[np.int64]:
    """Of each token: 1 for a wrong sum of a response with A < 0, 0 for a right one, -1 for any other token."""
    wrong = np.full(int(chunk.lengths.sum()), -1)
    assert chunk.prompt is not None
    assert chunk.response is not None
    for row in np.flatnonzero(chunk.advantage < 0):
        follows = task.follows(chunk.prompt[row], chunk.response[row])[: chunk.lengths[row]]
        wrong[chunk.offsets[row] :][: len(follows)] = [not right for right in follows]
    return wrong


def main(runs: list[Path]) -> None:
    """Print both tables."""
    console = Console(width=120)
    blame, weight = Table(title="Responses with A < 0"), Table(title="Shares of the push, and beyond k = 1")
    for heading in ("method", "wrong sums", "rejected", "push", "right sums", "rejected", "push"):
        blame.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    for heading in ("method", "push", *QUADRANTS.values()):
        weight.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    for run in runs:
        spec, sums, quadrants = measure(run)
        cells = [
            [f"{many:,.0f}", f"{out / many:.1%}", f"{1000 * push / many:.0f}"]
            for many, out, push in (sums[1], sums[0])
        ]  # fmt: skip
        blame.add_row(spec, *cells[0], *cells[1])
        total = sum(push for push, _ in quadrants.values())
        shares = (f"{push / total:.0%} ({beyond / total:.0%})" for push, beyond in quadrants.values())
        weight.add_row(spec, f"{total:,.0f}", *shares)
    console.print(blame, weight)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
