"""Every quantity of a decision, and the gradient, against the plain-Python oracle in float64."""

import dataclasses
import math

import oracle
import pytest
import strategies
import torch
from examples import CPPOS, OTHERS, drifting_batch, label
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import WORKED, every_layout, takes_divergence

import cppo

# A comparison closer than this to a tie may fall either way in float64.
TIE = 1e-11


def expected(method, responses, trace_weights=None):
    knobs = dataclasses.asdict(method)
    name = cppo.method_name(method)
    verdicts = []
    for index, r in enumerate(responses):
        verdicts.append(
            oracle.judge(
                name,
                knobs,
                r.logp,
                r.rollout_logp,
                r.advantages,
                r.divergence if takes_divergence(method) else None,
                None if trace_weights is None else trace_weights[index],
            )
        )
    return verdicts


def close(actual, wanted, *, slack=0.0, relative=1e-12):
    return math.isclose(actual, wanted, rel_tol=relative, abs_tol=1e-13 + slack)


def assert_lists_close(name, actual, wanted, slack, relative=1e-12):
    assert len(actual) == len(wanted), name
    for t, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert close(a, b, slack=slack[t], relative=relative), (name, t, a, b)


def compare(method, responses, batch):
    """Compare one decision and the three gradients with the oracle."""
    decision = batch.decide(method)
    trace = decision.trace
    weights = None
    if getattr(method, "position", None) == "shuffled":
        weights = batch.per_response(trace.position_weight)
        for w, r in zip(weights, responses, strict=True):
            linear = oracle.position_weights(len(r), method.w_min)
            assert_lists_close("shuffled multiset", sorted(w), sorted(linear), [1e-15] * len(w))
    verdicts = expected(method, responses, weights)

    for index, verdict in enumerate(verdicts):
        count = len(responses[index])
        exact = [0.0] * count
        spent = oracle.prior_sums(verdict.weighted_divergence) if verdict.weighted_divergence else exact
        account_slack = [1e-12 * (1 + s) for s in spent]
        for name, slack in (
            ("position_weight", exact),
            ("divergence", exact),
            ("weighted_divergence", exact),
            ("prior_account", account_slack),
            ("threshold", account_slack),
        ):
            wanted = getattr(verdict, name)
            values = getattr(trace, name)
            assert (values is None) == (wanted is None), name
            if values is not None:
                assert_lists_close(name, batch.per_response(values)[index], wanted, slack)
        assert (trace.delta_b is None) == (verdict.delta_b is None)
        if verdict.delta_b is not None:
            assert close(trace.delta_b[index].item(), verdict.delta_b)

        gate = batch.per_response(decision.gate)[index]
        coefficient = batch.per_response(decision.coefficient)[index]
        codes = batch.per_response(decision.rejected_by)[index]
        for t in range(count):
            if verdict.margin[t] <= TIE + 2 * account_slack[t]:
                continue
            assert codes[t] == verdict.rejected_by[t], (index, t)
            assert close(gate[t], verdict.gate[t], slack=100 * account_slack[t], relative=1e-9), (index, t)
            assert close(coefficient[t], gate[t] * verdict_ratio(method, responses[index], t), relative=1e-12)
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
        out, gradient = batch.loss(method, **reduction)
        assert not batch.outside(gradient).any()
        for got, want in zip(batch.per_response(gradient), wanted, strict=True):
            assert_lists_close(f"gradient {reduction}", got, want, [0.0] * len(got))
        total = math.fsum(g for row in wanted for g in row)
        assert close(out.loss.item(), total, slack=1e-12 * math.fsum(abs(g) for row in wanted for g in row))


def verdict_ratio(method, response, t):
    """Return the capped ratio of one token, 0 where it is not usable."""
    d = response.logp[t] - response.rollout_logp[t]
    if not math.isfinite(d):
        return 0.0
    rho = math.exp(min(d, 20.0))
    cap = getattr(method, "ratio_cap", None)
    return rho if cap is None else min(rho, cap)


@settings(max_examples=150)
@given(method=strategies.methods, data=st.data())
def test_every_quantity_agrees_with_the_oracle(method, data):
    responses = data.draw(strategies.batches())
    batch = data.draw(strategies.layouts_of(responses, dtype=torch.float64))
    compare(method, responses, batch)


@settings(max_examples=60)
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


def test_a_given_divergence_replaces_the_binary_one():
    responses = [dataclasses.replace(r, divergence=(0.01,) * len(r)) for r in WORKED]
    batch = every_layout(responses)["padded right"]
    positional, named = batch.arguments(divergence=True)
    decision = cppo.decide(cppo.CPPO(divergence="binary_tv"), *positional, **named)
    for divergence in batch.per_response(decision.trace.divergence):
        assert divergence == [0.01] * len(divergence)
    assert decision.gate.sum() == sum(len(r) for r in responses)
