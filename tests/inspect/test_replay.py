"""What-if: every method's counts equal a recount with ``decide``, response by response, in plain Python."""

import math

import numpy as np
import pytest
import torch
from logs import make_rows, write_log

import cppo
from cppo.inspect.reading import Log
from cppo.inspect.replay import BINS, Replay, replayable
from cppo.inspect.runs import inspect_runs

pytestmark = pytest.mark.train

SPECS = [
    "cppo?delta=0.1&delta_b=0.02", "cppo?delta=0.1&delta_b=0.02&budget=fixed&gate=soft", "cppo?divergence=binary_kl",
    *(name for name in cppo.METHODS if name not in ("estr", "ctpo", "cppo")), "ctpo?epsilon=0.1",
]  # fmt: skip
MEASURED = ["cppo?divergence=topk_tv&delta=0.1", "dppo?divergence=exact_kl&delta=0.1"]


def recount(spec, rows, steps):
    """Return a method's counts by step, bin and cause, and by mu and sign; sums of k |A| and rho |A| by step."""
    method = cppo.parse_method(spec)
    counts = np.zeros((len(steps), BINS, 4), dtype=int)
    likelihoods = np.zeros((6, 3, 2), dtype=int)
    weight, plain, budget = [], [], []
    for row in rows:
        step = steps.index(row["step"])
        divergence = torch.tensor([row["divergence"]]) if row.get("divergence") else None
        if getattr(method, "divergence", "binary_tv").startswith("binary"):
            divergence = None
        columns = [torch.tensor([row[name]]) for name in ("logp", "rollout_logp")]
        decision = cppo.decide(
            method, *columns, torch.tensor([row["advantage"]]), torch.tensor([row["response_mask"]]),
            divergence=divergence,
        )  # fmt: skip
        codes, coefficients = decision.rejected_by[0].tolist(), decision.coefficient[0].tolist()
        written = [t for t, mine in enumerate(row["response_mask"]) if mine]
        for place, t in enumerate(written):
            counts[step, place * BINS // len(written), codes[t]] += 1
            mu = math.exp(row["rollout_logp"][t])
            likelihood = sum(mu >= edge for edge in (0.001, 0.01, 0.1, 0.5, 0.9))
            likelihoods[likelihood, int(np.sign(row["advantage"])) + 1, int(codes[t] > 0)] += 1
            weight.append((step, abs(coefficients[t]) * abs(row["advantage"])))
            plain.append(
                (
                    step,
                    math.exp(np.float32(row["logp"][t]) - np.float32(row["rollout_logp"][t])) * abs(row["advantage"]),
                )
            )
        if written and decision.trace.delta_b is not None:
            budget.append((step, decision.trace.delta_b.item()))
    sums = [
        [math.fsum(v for s, v in part if s == step) for step in range(len(steps))] for part in (weight, plain, budget)
    ]
    return counts, likelihoods, *sums


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("tokens", [40, 10**6])
def test_counts_equal_a_recount_response_by_response(tmp_path, divergence, tokens):
    rows = make_rows(3, steps=3, responses=10, divergence=divergence)
    rows[4]["response_mask"] = [False] * len(rows[4]["logp"])  # a response of tool output alone
    rows[7]["advantage"] = 0.0
    log, steps = Log.open(write_log(tmp_path, rows)), [1, 2, 3]
    specs = SPECS + (MEASURED if divergence else [])
    replay = Replay(specs, steps)
    for chunk in log.chunks(tokens=tokens):
        replay.add(chunk)
    acted = 0
    for judged in replay.judged:
        counts, likelihoods, weight, plain, budget = recount(judged.spec, rows, steps)
        np.testing.assert_array_equal(judged.counts, counts, err_msg=judged.spec)
        np.testing.assert_array_equal(judged.by_probability, likelihoods, err_msg=judged.spec)
        assert judged.signs.tolist() == [[int(pair.sum()), int(pair[1])] for pair in likelihoods.sum(0)]
        np.testing.assert_allclose(judged.weight, weight, rtol=1e-5, err_msg=judged.spec)
        np.testing.assert_allclose(judged.unmasked_weight, plain, rtol=1e-5, err_msg=judged.spec)
        np.testing.assert_allclose(judged.delta_b[:, 0], budget, rtol=1e-5, err_msg=judged.spec)
        assert judged.masked == pytest.approx(counts[:, :, 1:].sum() / counts.sum())
        acted += counts[:, :, 1:].sum() > 0
    assert acted > 10
    own, other = replay.judged[0], replay.judged[3]
    assert own.differs == 0
    assert other.differs > 0


def test_what_differs_is_the_number_of_tokens_with_another_verdict(tmp_path):
    rows = make_rows(5)
    replay = Replay(["dppo?delta=0.1", "cppo?delta=0.1"], [1, 2, 3, 4])
    for chunk in Log.open(write_log(tmp_path, rows)).chunks():
        replay.add(chunk)
    wanted = 0
    for row in rows:
        mask = torch.tensor([row["response_mask"]])
        columns = [torch.tensor([row[name]]) for name in ("logp", "rollout_logp")]
        verdicts = [
            cppo.decide(method, *columns, torch.tensor([row["advantage"]]), mask).rejected_by > 0
            for method in (cppo.DPPO(delta=0.1), cppo.CPPO(delta=0.1))
        ]
        wanted += int((verdicts[0] != verdicts[1]).sum())
    assert replay.judged[1].differs == wanted > 0


def test_a_log_without_what_a_method_needs_says_so():
    assert replayable(cppo.CPPO(), log_has_divergence=False) is None
    assert "measured divergence" in replayable(cppo.CPPO(divergence="topk_tv"), log_has_divergence=False)
    assert replayable(cppo.CPPO(divergence="topk_tv"), log_has_divergence=True) is None
    assert "entropy" in replayable(cppo.parse_method("estr?tau=0.1"), log_has_divergence=True)


def test_the_tokens_that_were_rejected_most_are_counted(tmp_path):
    rows = make_rows(6)
    (run,) = inspect_runs([write_log(tmp_path, rows)], own="dppo?delta=0.1", beside=())["runs"]
    counts = {}
    for row in rows:
        columns = [torch.tensor([row[name]]) for name in ("logp", "rollout_logp")]
        mask = torch.tensor([row["response_mask"]])
        codes = (
            cppo.decide(cppo.DPPO(delta=0.1), *columns, torch.tensor([row["advantage"]]), mask).rejected_by[0].tolist()
        )
        for token, code, mine in zip(row["token_ids"], codes, row["response_mask"], strict=True):
            if mine:
                count, rejected = counts.get(token, (0, 0))
                counts[token] = (count + 1, rejected + (code > 0))
    wanted = sorted(((-rejected, token, count) for token, (count, rejected) in counts.items() if rejected))[:20]
    found = [(-entry["rejected"], entry["id"], entry["count"]) for entry in run["rejected_tokens"]]
    assert found == wanted
    assert len(found) > 5
