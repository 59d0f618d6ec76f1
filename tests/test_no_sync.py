"""Nothing in a training step asks the device for a number: on the meta device, whose tensors hold none, that raises."""

import ast
import collections
import math
import pathlib
import re

import pytest
import torch
from examples import CORRECTIONS, OTHERS
from layouts import takes_divergence, takes_entropy
from torch.utils._python_dispatch import TorchDispatchMode

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


def name(method):
    """Return what tells a method apart, the same in every process: a function's repr has its address."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(method))


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_padded_steps_and_metrics_never_look(method):
    for reduction in ("token-mean", "sequence-mean", "fixed-length"):
        out = step(method, (3, 5), reduction, denominator=7.0)
        assert all(value.dim() == 0 and value.device.type == "meta" for value in out.metrics.values())
        assert out.decision.rejected_by.dtype == torch.int8


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_packed_steps_and_metrics_never_look(method):
    out = step(method, (15,), "sequence-mean", lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    assert all(value.dim() == 0 for value in out.metrics.values())


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_corrections_never_look(correction):
    step(cppo.GRPO(), (3, 5), "token-mean", correction)
    step(cppo.GRPO(), (15,), "token-mean", correction, lengths=torch.ones(3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("method", [m for m in METHODS if getattr(m, "position", "") != "shuffled"], ids=name)
def test_cut_responses_never_look(monkeypatch, method):
    # Shuffled weights ask for the longest response, as docs/method.md says.
    monkeypatch.setattr(collectives, "rank_of", lambda group, argument: 0)
    monkeypatch.setattr(collectives, "all_gather", lambda values, group: torch.stack([values, values]))
    context = cppo.ContextParallel(chunks=(0, 3))
    step(method, (4, 5), "token-mean", context_parallel=context, rows=4)
    lengths = torch.ones(4, dtype=torch.int64, device="meta")
    step(method, (15,), "sequence-mean", context_parallel=context, rows=4, lengths=lengths)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPINGS = ({}, {"temperature": 0.7, "logit_scale": 2.0, "logit_softcap": 30.0})


class Calls(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.of = collections.Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.of[str(operation)] += 1
        return operation(*arguments, **(named or {}))


def meta_head(dtype, needed=(True, True, True), vocabulary=11):
    """Return what token_statistics takes, of 40 tokens, without a number in it."""
    shapes = ((2, 20, 5), (vocabulary, 5), (vocabulary,))
    hidden, weight, bias = (
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=wanted)
        for shape, wanted in zip(shapes, needed, strict=True)
    )
    rollout = {
        "rollout_logp": torch.empty(2, 20, device="meta"),
        "rollout_topk_logp": torch.empty(2, 20, 4, device="meta"),
    }
    rollout["topk_ids"] = torch.empty(2, 20, 4, dtype=torch.int32, device="meta")
    return hidden, weight, torch.empty(2, 20, dtype=torch.int64, device="meta"), {"bias": bias} | rollout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
@pytest.mark.parametrize("entropy", [True, False])
def test_token_statistics_and_their_gradients_never_look(dtype, needed, shaping, entropy):
    wide = torch.promote_types(dtype, torch.float32)
    for kind in ("binary_tv", "binary_kl", "topk_tv", "topk_kl", None):
        hidden, weight, ids, named = meta_head(dtype, needed)
        if kind is None:
            named = {"bias": named["bias"]}
        found = cppo.token_statistics(
            hidden, weight, ids, **named, **shaping, divergence=kind, entropy=entropy, chunk_tokens=16
        )
        results = [x for x in (found.logp, found.divergence, found.entropy) if x is not None]
        assert all(x.shape == (2, 20) and x.dtype == wide and x.device.type == "meta" for x in results)
        (found.logp.sum() + (found.entropy.sum() if entropy else 0.0)).backward()
        for leaf, wanted in zip((hidden, weight, named["bias"]), needed, strict=True):
            assert (leaf.grad is None) == (not wanted)
            assert leaf.grad is None or (leaf.grad.shape == leaf.shape and leaf.grad.dtype == dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_log_probs_and_likeliest_tokens_never_look(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    hidden, weight, ids, named = meta_head(dtype)
    for kind in ("binary_kl", "topk_tv"):
        logp = torch.empty(2, 20, device="meta")
        found = cppo.token_statistics(hidden, weight, ids, **named, divergence=kind, logp=logp, chunk_tokens=16)
        assert found.divergence.shape == (2, 20)
    kept = cppo.topk_log_probs(hidden, weight, 3, token_ids=ids, bias=named["bias"], chunk_tokens=16)
    assert kept.ids.shape == kept.logp.shape == (2, 20, 3)
    assert kept.logp.dtype == wide


@pytest.mark.parametrize("start", [None, 4])
def test_a_cut_vocabulary_never_looks(monkeypatch, start):
    monkeypatch.setattr(collectives, "rank_of", lambda group, argument: 1)
    monkeypatch.setattr(collectives, "all_gather", lambda values, group: torch.stack([values, values]))
    monkeypatch.setattr(collectives, "all_reduce_", lambda values, operation, group: values)
    hidden, weight, ids, named = meta_head(torch.bfloat16)
    parallel = cppo.VocabParallel(start=start)
    found = cppo.token_statistics(
        hidden, weight, ids, **named, divergence="topk_kl", entropy=True, vocab_parallel=parallel
    )
    (found.logp.sum() + found.entropy.sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert cppo.topk_log_probs(hidden, weight, 20, vocab_parallel=parallel).ids.shape == (2, 20, 20)


def test_a_device_multiplies_narrow_factors_into_wider_sums():
    # Of 40 tokens in three chunks: logits; then logits again, hidden's gradient and the weight's.
    for dtype, name in ((torch.bfloat16, "aten.addmm.dtype_out"), (torch.float32, "aten.addmm.out")):
        hidden, weight, ids, named = meta_head(dtype)
        with Calls() as calls:
            cppo.token_statistics(hidden, weight, ids, bias=named["bias"], chunk_tokens=16).logp.sum().backward()
        products = {operation: count for operation, count in calls.of.items() if "mm" in operation}
        assert products == {name: 12}


def test_the_memory_budget_of_a_device_is_a_gibibyte():
    # 4 bytes a logit as it is accumulated and 2 as it is multiplied: 100,000 rows of 6 bytes a token.
    hidden = torch.empty(4000, 8, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(100_000, 8, dtype=torch.bfloat16, device="meta")
    with Calls() as calls:
        cppo.topk_log_probs(hidden, weight)
    assert calls.of["aten.addmm.dtype_out"] == math.ceil(4000 / (2**30 // 600_000)) == 3


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
