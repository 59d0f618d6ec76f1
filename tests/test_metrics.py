"""Metrics of parts of a batch add up to the metrics of the whole."""

import pytest
import torch
from examples import CPPOS, OTHERS, drifting_batch, label
from layouts import NAN, Response, packed, padded

import cppo
from cppo.metrics import tally


def metrics_of(parts, method):
    """Return the metrics of the sum of the parts' tallies."""
    total = None
    for part in parts:
        mine = tally(part.decide(method))
        total = mine if total is None else total + mine
    return {key: value.item() for key, value in total.metrics().items()}


@pytest.mark.parametrize("method", CPPOS[::6] + OTHERS, ids=label)
def test_tallies_of_parts_add_up_to_the_whole(method):
    responses = drifting_batch(seed=50)
    whole = {key: value.item() for key, value in padded(responses).loss(method)[0].metrics.items()}
    assert metrics_of([padded(responses)], method) == whole
    # Parts of unequal size, one of them empty, in either layout.
    parts = [padded(responses[:1]), packed(responses[1:2]), packed(responses[2:6], extra=1), padded(responses[6:])]
    for order in (parts, parts[::-1]):
        added = metrics_of(order, method)
        assert added.keys() == whole.keys()
        for key, value in whole.items():
            assert added[key] == pytest.approx(value, rel=1e-6), key


def test_tallies_of_different_methods_do_not_add_up():
    batch = padded(drifting_batch(seed=52))
    with pytest.raises(ValueError, match="tally: expected parts that count the same"):
        tally(batch.decide(OTHERS[0])) + tally(batch.decide(cppo.GRPO()))
    # As many quantities, but others.
    with pytest.raises(ValueError, match="tally: expected parts that count the same"):
        tally(batch.decide(cppo.IPO())) + tally(batch.decide(cppo.GRPO(), cppo.TIS()))


def test_a_part_without_tokens_weighs_nothing():
    full, empty = padded(drifting_batch(seed=51)), padded([Response(*[()] * 6)], extra=3, garbage=NAN)
    for method in (*CPPOS[::9], *OTHERS):
        wanted = metrics_of([full], method)
        assert metrics_of([full, empty], method) == metrics_of([empty, full], method) == wanted


def test_log_probs_above_zero_are_counted_not_their_rounding():
    good = Response((-1.0, 5e-6, 0.0), (-1.0, -1.0, 5e-6), (1.0,) * 3)
    negated = Response((-1.0, 0.5, 2.0), (0.7, 0.5, -2.0), (1.0,) * 3)
    method = cppo.CPPO()
    for layout in (padded, packed):
        assert metrics_of([layout([good], garbage=9.0, extra=2)], method)["input/above_zero"] == 0
        assert metrics_of([layout([good, negated]), layout([negated])], method)["input/above_zero"] == 6
    assert metrics_of([padded([Response((NAN,), (-1.0,), (1.0,))])], method)["input/above_zero"] == 0


def test_a_peak_stands_wherever_it_is_and_the_first_broken_token_is_named():
    calm = Response((-1.0,) * 3, (-1.0,) * 3, (1.0,) * 3)
    wild = Response((-0.1, NAN, -1.0), (-3.0, -1.0, -1.0), (1.0,) * 3)
    method = OTHERS[0]
    top = pytest.approx(torch.tensor(2.9).exp().item(), rel=1e-6)
    for order in ([calm, wild], [wild, calm]):
        metrics = metrics_of([padded([r]) for r in order], method)
        assert metrics["ratio/max"] == top
        assert metrics["divergence/max"] == pytest.approx(0.855, abs=1e-3)
        assert metrics["input/first_nonfinite"] == 1
        assert metrics["input/nonfinite"] == 1
    twice = metrics_of([packed([calm, wild]), padded([wild])], method)
    assert twice["input/first_nonfinite"] == 4
    assert metrics_of([padded([calm])] * 2, method)["input/first_nonfinite"] == -1
