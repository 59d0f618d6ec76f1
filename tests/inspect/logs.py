"""Rollout logs made up for the tests."""

import math
import random

import pyarrow as pa
import pyarrow.parquet as pq

from cppo.rollout_log import SCHEMA, write_rollouts


def make_row(dice, step=1, *, length=None, drift=0.3, advantage=None, holes=True, divergence=False, prompt="1+1="):
    """Return one response: rollout log-probs of all sizes, drifted by ``drift``."""
    count = dice.randint(1, 24) if length is None else length
    rollout = [-dice.expovariate(1.0) - 1e-3 for _ in range(count)]
    logp = [min(-1e-4, m + drift * dice.gauss(0, 1)) for m in rollout]
    mask = [not holes or dice.random() > 0.15 for _ in range(count)]
    row = {
        "step": step, "prompt": prompt, "response": "x" * count, "reward": float(dice.random() < 0.5),
        "advantage": dice.gauss(0, 1) if advantage is None else advantage, "token_ids": list(range(count)),
        "logp": logp, "rollout_logp": rollout, "response_mask": mask,
    }  # fmt: skip
    if divergence:
        row["divergence"] = [abs(math.exp(p) - math.exp(m)) * 1.5 for p, m in zip(logp, rollout, strict=True)]
    return row


def make_rows(seed=0, *, steps=4, responses=8, **settings):
    dice = random.Random(seed)
    return [make_row(dice, step, **settings) for step in range(1, steps + 1) for _ in range(responses)]


def write_log(folder, rows, *, files=2):
    """Write rows to a folder's ``rollouts``, in order, in several files."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // files)
    for number in range(files):
        part = rows[number * size : (number + 1) * size]
        if part:
            write_rollouts(folder / "rollouts" / f"step-{number + 1:06d}.parquet", part)
    return folder


def write_raw(path, rows, schema=SCHEMA):
    """Write rows under another schema."""
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path
