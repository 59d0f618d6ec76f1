"""Nothing in a training step asks the device for a number: on the meta device, whose tensors hold none, that raises."""

import ast
import pathlib

import pytest
import torch
from examples import CORRECTIONS, OTHERS
from layouts import takes_divergence, takes_entropy

import cppo
from cppo.ops import collectives

METHODS = [
    *OTHERS,
    *[cppo.CPPO(budget=budget, gate=gate) for budget in ("adaptive", "fixed", "none") for gate in ("hard", "soft")],
    cppo.CPPO(position="uniform", divergence="binary_kl"),
    cppo.CPPO(position="shuffled", divergence="exact_tv"),
]


def step(method, shape, reduction, correction=None, rows=3, **layout):
    def meta(*size, **options):
        return torch.ones(*size, device="meta", **options)

    out = cppo.policy_loss(
        method,
        meta(*shape, requires_grad=True),
        meta(*shape),
        meta(rows),
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


@pytest.mark.parametrize("method", [m for m in METHODS if getattr(m, "position", "") != "shuffled"], ids=repr)
def test_cut_responses_never_look(monkeypatch, method):
    # Shuffled weights ask for the longest response, as docs/method.md says.
    monkeypatch.setattr(collectives, "rank_of", lambda group, argument: 0)
    monkeypatch.setattr(collectives, "all_gather", lambda values, group: torch.stack([values, values]))
    context = cppo.ContextParallel(chunks=(0, 3))
    step(method, (4, 5), "token-mean", context_parallel=context, rows=4)
    lengths = torch.ones(4, dtype=torch.int64, device="meta")
    step(method, (15,), "sequence-mean", context_parallel=context, rows=4, lengths=lengths)


def test_the_probe_would_see_a_look():
    with pytest.raises(RuntimeError):
        torch.ones((), device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").nonzero()


CORE = sorted(pathlib.Path(cppo.__file__).parent.glob("*.py")) + sorted(
    file for room in ("ops", "rules") for file in (pathlib.Path(cppo.__file__).parent / room).glob("*.py")
)


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.name)
def test_no_number_of_the_host_is_copied_to_a_device(file):
    # The meta device does not see such copies; a device waits for them.
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            copies = node.func.attr in ("tensor", "as_tensor", "from_numpy", "new_tensor")
            assert not (copies and any(keyword.arg == "device" for keyword in node.keywords)), node.lineno
            assert node.func.attr not in ("new_tensor", "cuda", "cpu"), node.lineno
