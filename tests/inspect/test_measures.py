"""Series by update and by position, against a recount in plain Python; histograms against sorting."""

import math
import random

import numpy as np
import pytest
from logs import make_rows, write_log

from cppo.inspect.measures import Gaps, Measures
from cppo.inspect.oddities import Oddities
from cppo.inspect.reading import Log
from cppo.inspect.replay import BINS

pytestmark = pytest.mark.train


def measured(tmp_path, rows, steps, tokens=60):
    measures = Measures(steps)
    for chunk in Log.open(write_log(tmp_path, rows)).chunks(tokens=tokens):
        response = np.repeat(np.arange(len(chunk.lengths)), chunk.lengths)
        measures.add(chunk, np.where(chunk.response_mask, np.abs(chunk.advantage)[response], 0.0))
    return measures


def tokens_of(row):
    pairs = zip(row["logp"], row["rollout_logp"], row["response_mask"], strict=True)
    return [(float(np.float32(p)), float(np.float32(m))) for p, m, mine in pairs if mine]


def test_every_series_equals_a_recount(tmp_path):
    rows = make_rows(2, steps=3, responses=12)
    rows[3]["advantage"] = 0.0
    rows[13]["response_mask"] = [False] * len(rows[13]["logp"])
    series = measured(tmp_path, rows, [1, 2, 3]).series()
    for step in (1, 2, 3):
        used = [row for row in rows if row["step"] == step]
        pairs = [pair for row in used for pair in tokens_of(row)]
        d = [p - m for p, m in pairs]
        rho = [math.exp(x) for x in d]
        gaps = sorted((abs(math.exp(p) - math.exp(m)) for p, m in pairs), reverse=True)
        written = [row for row in used if any(row["response_mask"])]
        weights = [abs(row["advantage"]) * sum(row["response_mask"]) for row in used]
        expected = {
            "reward": math.fsum(row["reward"] for row in used) / len(used),
            "length": len(pairs) / len(written),
            "no_advantage": sum(row["advantage"] == 0 for row in written) / len(written),
            "probability_gap": math.fsum(gaps) / len(gaps),
            "relative_log_prob_error": math.fsum(map(abs, d)) / math.fsum(-m for _, m in pairs),
            "log_perplexity_gap": math.fsum(
                abs(math.fsum(p - m for p, m in tokens_of(row)) / len(tokens_of(row))) for row in written
            ) / len(written),
            "mean_log_ratio": math.fsum(d) / len(d),
            "kl_k3": math.fsum(r - 1 - x for r, x in zip(rho, d, strict=True)) / len(d),
            "chi_squared": math.fsum(r * r for r in rho) / len(d) - 1,
            "effective_sample_size": math.fsum(rho) ** 2 / (len(d) * math.fsum(r * r for r in rho)),
            "equal_log_probs": 0.0,
            "below_sampler": sum(x < -1e-6 for x in d) / len(d),
            "largest_response": max(weights) / math.fsum(weights),
        }  # fmt: skip
        for name, value in expected.items():
            assert series[name][step - 1] == pytest.approx(value, rel=1e-5), (name, step)
        tail = gaps[: math.ceil(0.1 * len(gaps))]
        assert series["probability_gap_tail"][step - 1] == pytest.approx(math.fsum(tail) / len(tail), rel=0.02)


def test_positions_are_counted_over_the_policys_tokens(tmp_path):
    rows = make_rows(4, steps=1, responses=6)
    by_bin = measured(tmp_path, rows, [1]).by_bin
    expected = [[] for _ in range(BINS)]
    for row in rows:
        pairs = tokens_of(row)
        for place, (p, m) in enumerate(pairs):
            expected[place * BINS // len(pairs)].append(abs(math.exp(p) - math.exp(m)))
    assert by_bin.counts.sum(1).tolist() == [len(part) for part in expected]
    for mean, part in zip(by_bin.mean(), expected, strict=True):
        assert math.isnan(mean) if not part else mean == pytest.approx(sum(part) / len(part))


def test_the_histogram_gives_mean_and_tail_of_anything():
    dice = random.Random(0)
    for values in (
        [dice.random() ** 6 for _ in range(5000)], [0.0] * 10, [1.0], [dice.random() for _ in range(7)],
        [0.0] * 95 + [1.0] * 5,
    ):  # fmt: skip
        gaps = Gaps.empty(2)
        for part in (values[: len(values) // 2], values[len(values) // 2 :]):
            gaps.add(np.ones(len(part), np.int64), np.array(part))
        tail = sorted(values, reverse=True)[: math.ceil(0.1 * len(values))]
        assert gaps.mean()[1] == pytest.approx(sum(values) / len(values))
        assert gaps.tail()[1] == pytest.approx(sum(tail) / len(tail), rel=0.01, abs=1e-9)
        assert np.isnan([gaps.mean()[0], gaps.tail()[0]]).all()


@pytest.mark.parametrize("column", ["logp", "rollout_logp"])
def test_a_token_without_a_log_prob_counts_nowhere_and_is_named(tmp_path, column):
    rows = make_rows(1, steps=1, responses=4, length=6, holes=False)
    rows[2][column][3] = float("nan")
    measures = measured(tmp_path, rows, [1])
    assert measures.sums["tokens"].sum() == 23
    oddities = Oddities([])
    for chunk in Log.open(tmp_path).chunks(texts=True):
        oddities.add(chunk)
    assert oddities.no_log_prob.count == 1
    assert oddities.no_log_prob.first.endswith(f"step-000002.parquet, row 0, column {column!r}")
    assert all(np.isfinite(values).all() for values in measures.series().values())
