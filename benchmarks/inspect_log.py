"""Time and memory of ``cppo inspect`` on rollout logs of several sizes and shapes.

    python benchmarks/inspect_log.py

Writes logs of 0.5, 1 and 2 million tokens, one of 5,000 files of 8 short responses, and one of a single response of 2
million tokens; has each inspected by a process of its own (all methods, thresholds, page), and prints wall and CPU
time and peak memory.
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


def make_row(dice: np.random.Generator, number: int, step: int, length: int) -> dict[str, object]:
    rollout = -dice.exponential(0.6, length).astype(np.float32) - 1e-4
    logp = np.minimum(rollout + 0.1 * dice.standard_normal(length).astype(np.float32), -1e-4)
    return {
        "step": step, "prompt": f"problem {number // 8}", "response": "word " * length,
        "reward": float(dice.random() < 0.5), "advantage": float(dice.standard_normal()),
        "token_ids": dice.integers(0, 150_000, length).tolist(), "logp": logp.tolist(),
        "rollout_logp": rollout.tolist(), "response_mask": [True] * length,
    }  # fmt: skip


def write_log(folder: Path, tokens: int, length: int = LENGTH, an_update: int = 64, a_file: int = A_FILE) -> None:
    """Write a log of so many tokens, responses of one length, so many an update and so many tokens a file."""
    dice = np.random.default_rng(0)
    rows = []
    for number in range(tokens // length):
        rows.append(make_row(dice, number, 1 + number // an_update, length))
        if len(rows) * length >= a_file or number == tokens // length - 1:
            write_rollouts(folder / f"step-{rows[0]['step']:06d}-{number:06d}.parquet", rows, method="cppo")
            rows = []


def inspect(name: str, folder: Path) -> None:
    """Inspect a log and print what it took."""
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
    page = (folder / "page.html").stat().st_size / 2**20
    peak = int(done.stdout) / 1024
    print(f"{name:>30}: {wall:6.1f} s wall, {cpu:6.1f} s CPU, peak {peak:6.0f} MiB, page {page:.1f} MiB")


def main() -> None:
    logs = {f"{tokens:,} tokens": {"tokens": tokens} for tokens in SIZES}
    logs["5,000 files of 8 x 20 tokens"] = {"tokens": 800_000, "length": 20, "an_update": 8, "a_file": 160}
    logs["1 response of 2,000,000 tokens"] = {"tokens": 2_000_000, "length": 2_000_000}
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in logs.items():
            folder = Path(scratch) / name
            folder.mkdir()
            write_log(folder, **settings)
            inspect(name, folder)


if __name__ == "__main__":
    main()
