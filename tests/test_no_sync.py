"""Nothing in a training step asks the device for a number: on the meta device, whose tensors hold none, that raises."""

import pytest
import torch
from examples import CORRECTIONS, OTHERS
from layouts import takes_divergence, takes_entropy

import cppo

METHODS = [
    *OTHERS,
    *[cppo.CPPO(budget=budget, gate=gate) for budget in ("adaptive", "fixed", "none") for gate in ("hard", "soft")],
    cppo.CPPO(position="uniform", divergence="binary_kl"),
    cppo.CPPO(position="shuffled", divergence="exact_tv"),
]


def step(method, shape, reduction, correction=None, **layout):
    def meta(*size, **options):
        return torch.ones(*size, device="meta", **options)

    responses = 3
    out = cppo.policy_loss(
        method,
        meta(*shape, requires_grad=True),
        meta(*shape),
        meta(responses),
        meta(*shape, dtype=torch.bool),
        divergence=meta(*shape) if takes_divergence(method) else None,
        rollout_entropy=meta(*shape) if takes_entropy(method) else None,
        proximal_logp=meta(*shape) if correction else None,
        correction=correction,
        reduction=reduction,
        fixed_length=8 if reduction == "fixed-length" else None,
        **layout,
    )
    out.loss.backward()
    return out


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_padded_steps_and_metrics_never_look(method):
    for reduction in ("token-mean", "sequence-mean", "fixed-length"):
        out = step(method, (3, 5), reduction, denominator=7.0)
        assert all(value.dim() == 0 and value.device.type == "meta" for value in out.metrics.values())
        assert out.decision.rejected_by.dtype == torch.int8


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_packed_steps_and_metrics_never_look(method):
    out = step(method, (15,), "sequence-mean", lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    assert all(value.dim() == 0 for value in out.metrics.values())


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_corrections_never_look(correction):
    step(cppo.GRPO(), (3, 5), "token-mean", correction)
    step(cppo.GRPO(), (15,), "token-mean", correction, lengths=torch.ones(3, dtype=torch.int64, device="meta"))


def test_the_probe_would_see_a_look():
    with pytest.raises(RuntimeError):
        torch.ones((), device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").nonzero()
