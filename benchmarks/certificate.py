"""What the certificate in a run's log costs: the laboratory's default run with and without it, in one process.

    python benchmarks/certificate.py                # five pairs of default runs, three minutes
    python benchmarks/certificate.py --pairs 2 --rollouts 4

The runs take turns from one warm start, with the same seed, so that they do the same work; that they log the same
numbers is checked first, and no ratio is printed where they do not. CPU seconds of the process, one thread: generation,
scoring, updates and the laboratory's own work, evaluations left out. The two lines are two ways to ask: the ratio of
medians of whole runs, which the machine's mood moves by more than the certificate does, and the seconds spent inside
the certificate's own functions over all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import transformers

from cppo.certificate import BoundTally
from cppo.lab import trainer
from cppo.lab.config import RunConfig
from cppo.lab.folder import read_metrics
from cppo.lab.run import Run, start_run

PHASES = ("generation", "scoring", "updates", "own")


class Silence:
    def phase(self, name, total=None):
        pass

    def advance(self, row=None):
        pass


class Stopwatch:
    """Adds up the CPU seconds inside some functions."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, function):
        def timed(*arguments, **named):
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.process_time() - start

        return timed


def train(config, path, start):
    run = Run(config, start_run(config, path), Silence(), start)
    run.train()
    rows = [row for row in read_metrics(path / "metrics.jsonl") if row["step"] > 0]
    plain = [{name: value for name, value in row.items() if not name.startswith("bound/")} for row in rows]
    return sum(run.ledger.seconds[name] for name in PHASES), plain


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=RunConfig().rollouts)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    without = RunConfig(rollouts=options.rollouts, eval_every=options.rollouts, eval_problems=32)
    with_it = dataclasses.replace(without, certificate=True)
    inside = Stopwatch()
    trainer.bound_tally = inside.around(trainer.bound_tally)
    BoundTally.metrics = inside.around(BoundTally.metrics)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        train(dataclasses.replace(without, rollouts=1), root / "warm", None)
        start = root / "warm" / "checkpoints" / "start"
        seconds, shares = {True: [], False: []}, []
        for pair in range(options.pairs):
            logged = {}
            for certified in (pair % 2 == 0, pair % 2 == 1):
                inside.seconds = 0.0
                spent, logged[certified] = train(with_it if certified else without, root / f"{pair}-{certified}", start)
                seconds[certified].append(spent)
                if certified:
                    shares.append(inside.seconds / spent)
            if logged[True] != logged[False]:
                raise SystemExit("WRONG: the run with the certificate logs other numbers; no ratio")
    updates = without.rollouts * without.updates
    mine, plain = (statistics.median(seconds[certified]) for certified in (True, False))
    print(f"{options.pairs} pairs of {updates} updates of {without.minibatch} responses, {without.task}")
    print(f"CPU seconds of a run, median: {mine:.2f} with, {plain:.2f} without, ratio {mine / plain:.4f}")
    spread = sorted(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    print(f"ratios of the pairs: {', '.join(f'{ratio:.3f}' for ratio in spread)}")
    share = statistics.median(shares)
    print(f"inside the certificate: {share:.2%} of a run, {share * mine / updates * 1e3:.2f} ms an update")


if __name__ == "__main__":
    main()
