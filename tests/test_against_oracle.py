"""Every quantity of a decision, and the gradient, against the plain-Python oracle in float64."""

import dataclasses
import math

import oracle
import pytest
import strategies
import torch
from examples import CORRECTIONS, CPPOS, OTHERS, broken_batch, drifting_batch, label
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import every_layout, packed, padded, takes_divergence, takes_entropy

import cppo

# A comparison closer than this to a tie may fall either way in float64.
TIE = 1e-11


def knobs_of(method):
    """Return the knobs as the oracle reads them: a function goes by its kind."""
    return {k: "sigmoid" if callable(v) else v for k, v in dataclasses.asdict(method).items()}


def expected(method, responses, trace_weights=None, correction=()):
    corrections = correction if isinstance(correction, tuple) else (correction,)
    names = {kind: name for name, kind in cppo.CORRECTIONS.items()}
    return [
        oracle.judge(
            cppo.method_name(method),
            knobs_of(method),
            r.logp,
            r.rollout_logp,
            r.advantages,
            divergence=r.divergence if takes_divergence(method) else None,
            rollout_entropy=r.rollout_entropy if takes_entropy(method) else None,
            proximal_logp=r.proximal_logp,
            corrections=[(names[type(c)], dataclasses.asdict(c)) for c in corrections],
            position_weight=None if trace_weights is None else trace_weights[index],
        )
        for index, r in enumerate(responses)
    ]


def close(actual, wanted, *, slack=0.0, relative=1e-12):
    return math.isclose(actual, wanted, rel_tol=relative, abs_tol=1e-13 + slack)


def assert_lists_close(name, actual, wanted, slack, relative=1e-12):
    assert len(actual) == len(wanted), name
    for t, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert close(a, b, slack=slack[t], relative=relative), (name, t, a, b)


TOKEN_QUANTITIES = (
    "position_weight", "divergence", "weighted_divergence", "prior_account", "threshold", "statistic", "prefix_ratio",
    "ratio", "correction",
)  # fmt: skip
RESPONSE_QUANTITIES = ("delta_b", "max_divergence", "mean_divergence", "accepted")


def compare(method, responses, batch, correction=()):
    """Compare one decision and the gradients with the oracle."""
    decision = batch.decide(method, correction)
    trace = decision.trace
    weights = None
    if getattr(method, "position", None) == "shuffled":
        weights = batch.per_response(trace.position_weight)
        for w, r in zip(weights, responses, strict=True):
            linear = oracle.position_weights(len(r), method.w_min)
            assert_lists_close("shuffled multiset", sorted(w), sorted(linear), [1e-15] * len(w))
    verdicts = expected(method, responses, weights, correction)

    for index, verdict in enumerate(verdicts):
        count = len(responses[index])
        exact = [0.0] * count
        for name in TOKEN_QUANTITIES:
            wanted, values = getattr(verdict, name), getattr(trace, name)
            assert (values is None) == (wanted is None), name
            if values is not None:
                slack = verdict.slack if name in ("prior_account", "threshold") else exact
                relative = 1e-10 if name in ("ratio", "correction") else 1e-12  # products of many ratios
                assert_lists_close(name, batch.per_response(values)[index], wanted, slack, relative)
        near_tie = [margin <= TIE + 2 * slack for margin, slack in zip(verdict.margin, verdict.slack, strict=True)]
        for name in RESPONSE_QUANTITIES:
            wanted, values = getattr(verdict, name), getattr(trace, name)
            assert (values is None) == (wanted is None), name
            if values is not None and not (name == "accepted" and any(near_tie)):
                assert close(values[index].item(), wanted), name

        gate = batch.per_response(decision.gate)[index]
        coefficient = batch.per_response(decision.coefficient)[index]
        codes = batch.per_response(decision.rejected_by)[index]
        for t in range(count):
            if near_tie[t]:
                continue
            assert codes[t] == verdict.rejected_by[t], (index, t)
            assert close(gate[t], verdict.gate[t], slack=100 * verdict.slack[t], relative=1e-9), (index, t)
            assert close(coefficient[t], gate[t] * verdict.weight[t], relative=1e-10), (index, t)
    assert not batch.outside(decision.gate).any()
    assert not batch.outside(decision.coefficient).any()
    assert not batch.outside(decision.rejected_by).any()

    # The gradient, from the coefficients just compared.
    coefficients = batch.per_response(decision.coefficient)
    advantages = [r.advantages for r in responses]
    for reduction in (
        {"reduction": "token-mean"},
        {"reduction": "sequence-mean"},
        {"reduction": "fixed-length", "fixed_length": 7},
        {"reduction": "token-mean", "denominator": 12.5},
        {"reduction": "sequence-mean", "denominator": 3},
    ):
        wanted = oracle.gradients(coefficients, advantages, **reduction)
        out, gradient = batch.loss(method, correction, **reduction)
        assert not batch.outside(gradient).any()
        for got, want in zip(batch.per_response(gradient), wanted, strict=True):
            assert_lists_close(f"gradient {reduction}", got, want, [0.0] * len(got))
        total = math.fsum(g for row in wanted for g in row)
        assert close(out.loss.item(), total, slack=1e-12 * math.fsum(abs(g) for row in wanted for g in row))


@settings(max_examples=300)
@given(method=strategies.methods, data=st.data())
def test_every_quantity_agrees_with_the_oracle(method, data):
    responses = data.draw(strategies.batches())
    batch = data.draw(strategies.layouts_of(responses, dtype=torch.float64))
    compare(method, responses, batch)


@settings(max_examples=100)
@given(method=strategies.methods, correction=strategies.corrections, data=st.data())
def test_a_correction_of_the_engine_mismatch_agrees_with_the_oracle(method, correction, data):
    responses = data.draw(strategies.batches())
    batch = data.draw(strategies.layouts_of(responses, dtype=torch.float64))
    compare(method, responses, batch, correction)


@settings(max_examples=120)
@given(method=strategies.methods, data=st.data())
def test_token_shaped_advantages_of_any_signs_agree_with_the_oracle(method, data):
    responses = data.draw(strategies.batches(per_token=True, max_responses=3))
    batch = data.draw(strategies.layouts_of(responses, dtype=torch.float64, per_token=True))
    compare(method, responses, batch)


# The same comparison on fixed examples, for the mutants of tests/mutants.py: without hypothesis.


@pytest.mark.parametrize("method", CPPOS + OTHERS, ids=label)
def test_every_method_agrees_with_the_oracle_on_a_ragged_batch(method):
    responses = drifting_batch()
    layouts = every_layout(responses)
    for name in ("padded right", "packed with holes"):
        compare(method, responses, layouts[name])


@pytest.mark.parametrize("correction", [(), cppo.TIS(scope="sequence")], ids=str)
@pytest.mark.parametrize("method", CPPOS[::2] + OTHERS, ids=label)
def test_broken_numbers_cost_what_the_oracle_says(method, correction):
    responses = broken_batch(seed=5)
    for batch in (padded(responses, per_token=True, side="left", extra=2), packed(responses, per_token=True)):
        compare(method, responses, batch, correction)


CORRECTED = [cppo.CPPO(), cppo.CPPO(gate="soft"), *OTHERS[1::5], *(m for m in OTHERS if isinstance(m, cppo.TRM))]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("method", CORRECTED, ids=label)
def test_every_correction_agrees_with_the_oracle_on_a_ragged_batch(method, correction):
    responses = drifting_batch(seed=3)
    layouts = every_layout(responses)
    for name in ("padded left", "packed"):
        compare(method, responses, layouts[name], correction)


@pytest.mark.parametrize("layout", ["padded right", "padded left", "padded holes", "padded tight", "packed"])
def test_every_layout_agrees_with_the_oracle(layout):
    for seed, method in enumerate((cppo.CPPO(), cppo.CPPO(budget="fixed", delta_b=0.015, gate="soft"), cppo.GRPO())):
        responses = drifting_batch(seed=seed + 1)
        compare(method, responses, every_layout(responses)[layout])


def test_fixed_examples_cover_every_verdict():
    # Otherwise agreement with the oracle would say little.
    decision = every_layout(drifting_batch())["padded right"].decide(cppo.CPPO())
    assert set(decision.rejected_by.unique().tolist()) == {0, 1, 2}
    budgets = decision.trace.delta_b
    assert (budgets == 0.02).any()
    assert (budgets == 0.04).any()
    assert ((budgets > 0.02) & (budgets < 0.04)).any()
    assert (decision.trace.threshold < 0).any()
