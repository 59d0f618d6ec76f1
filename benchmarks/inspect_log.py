"""Time and memory of ``cppo inspect`` on rollout logs of growing size.

    python benchmarks/inspect_log.py

Writes logs of 0.5, 1 and 2 million tokens, has each inspected by a process of its own (all methods, thresholds, page),
and prints wall and CPU time and peak memory; the last column shows whether the time grows faster than the log.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cppo.rollout_log import write_rollouts

SIZES = (500_000, 1_000_000, 2_000_000)
LENGTH, A_FILE = 500, 250_000


def write_log(folder: Path, tokens: int) -> None:
    dice = np.random.default_rng(0)
    rows = []
    for number in range(tokens // LENGTH):
        rollout = -dice.exponential(0.6, LENGTH).astype(np.float32) - 1e-4
        logp = np.minimum(rollout + 0.1 * dice.standard_normal(LENGTH).astype(np.float32), -1e-4)
        rows.append(
            {
                "step": 1 + number // 64, "prompt": f"problem {number // 8}", "response": "word " * LENGTH,
                "reward": float(dice.random() < 0.5), "advantage": float(dice.standard_normal()),
                "token_ids": dice.integers(0, 150_000, LENGTH).tolist(), "logp": logp.tolist(),
                "rollout_logp": rollout.tolist(), "response_mask": [True] * LENGTH,
            }
        )  # fmt: skip
        if len(rows) * LENGTH >= A_FILE or number == tokens // LENGTH - 1:
            write_rollouts(folder / f"step-{rows[0]['step']:06d}-{number:06d}.parquet", rows, method="cppo")
            rows = []


def main() -> None:
    first = None
    with tempfile.TemporaryDirectory() as scratch:
        for tokens in SIZES:
            folder = Path(scratch) / str(tokens)
            folder.mkdir()
            write_log(folder, tokens)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            # A process that starts the command, so that its own peak is the command's alone.
            code = (
                "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
            )
            command = [sys.executable, "-m", "cppo", "inspect", str(folder), "--html", str(folder / "page.html")]
            done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            page = (folder / "page.html").stat().st_size
            first = first or cpu / tokens
            print(
                f"{tokens:9,} tokens: {wall:6.1f} s wall, {cpu:6.1f} s CPU, peak {int(done.stdout) / 1024:6.0f} MiB, "
                f"page {page / 2**20:.1f} MiB; CPU a token {cpu / tokens / first:.2f}x of the smallest log's"
            )


if __name__ == "__main__":
    main()
