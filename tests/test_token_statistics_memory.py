"""token_statistics holds the logits of one chunk of tokens at a time, and multiplies no more often than it says."""

import collections
import dataclasses
import itertools
import weakref

import pytest
import torch
from heads import DIVERGENCES, draw, head_logits
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

import cppo

FLOAT32 = torch.float32


class Watch(TorchDispatchMode):
    """Watches every tensor that an operation returns: its size, the memory alive at once, and the products."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.products = []  # [rows, inner, columns]
        self._holders = collections.Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        answer = operation(*arguments, **(named or {}))
        if operation._schema.name in ("aten::addmm", "aten::mm", "aten::bmm"):
            a, b = arguments[-2:]
            self.products.append([*a.shape[-2:], b.shape[-1]])
        for tensor in tree.tree_leaves(answer):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._hold(tensor, tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return answer

    def _hold(self, tensor, place, size):
        self._holders[place] += 1
        if self._holders[place] == 1:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._let_go, place, size)

    def _let_go(self, place, size):
        self._holders[place] -= 1
        if self._holders[place] == 0:
            self.alive -= size


VOCABULARY, WIDTH = 3000, 8
WAYS = {
    "everything": ((True, True, True), True, False),
    "log-probs": ((True, True, True), False, False),
    "frozen head": ((True, False, False), False, False),
    "frozen head and entropy": ((True, False, False), True, False),
    "given": ((False, False, False), False, True),
}


def watch(way, tokens, **chunking):
    needed, entropy, given = WAYS[way]
    head = draw(seed=40, shape=(64,), vocabulary=VOCABULARY, width=WIDTH, logit_softcap=5.0, dtype=FLOAT32)
    logp = head.ask(None).logp if given else None
    times = -(-tokens // 64)

    def longer(x):
        return x.repeat(times, *[1] * (x.dim() - 1))[:tokens]

    hidden, ids, mu = longer(head.hidden), longer(head.ids), head.mu
    rollout = {name: longer(x) for name, x in dataclasses.replace(head, mu=mu).rollout().items()}
    hidden = hidden.requires_grad_(needed[0])
    _, weight, bias = head.leaves(needed)
    logp = None if logp is None else longer(logp)
    with Watch() as seen:
        found = cppo.token_statistics(
            hidden, weight, ids, bias=bias, **head.shaping, **rollout, divergence="topk_kl", entropy=entropy,
            logp=logp, **chunking,
        )  # fmt: skip
        forward = len(seen.products)
        if not given:
            (found.logp.sum() + (found.entropy.sum() if entropy else 0.0)).backward()
    return seen, forward


@pytest.mark.parametrize("way", WAYS)
def test_no_tensor_is_larger_than_a_chunk_of_logits_the_weight_or_the_hidden_states(way):
    seen, _ = watch(way, 600, chunk_tokens=16)
    rows_of_weight = 16 * 5 * WIDTH if way == "given" else 0
    assert seen.largest <= max(16 * VOCABULARY, VOCABULARY * WIDTH, 600 * WIDTH, rows_of_weight)
    assert way == "given" or seen.largest >= 16 * VOCABULARY


@pytest.mark.parametrize("way", WAYS)
def test_the_memory_beside_inputs_and_gradients_grows_by_a_few_numbers_a_token(way):
    short, long = (watch(way, tokens, chunk_tokens=16)[0].peak for tokens in (64, 640))
    # Of the hidden states: their gradient, a chunkless copy or two. Of the K + 1 wanted tokens: ids, and numbers in
    # float64 (the divergence's). A row of logits would take 12,000 bytes.
    assert (long - short) / (640 - 64) <= 4 * (3 * WIDTH) + 8 * 12 * 5
    assert way == "given" or short >= 16 * VOCABULARY * 4


def test_all_logits_at_once_would_have_been_seen():
    head = draw(seed=41, shape=(64,), vocabulary=VOCABULARY, width=WIDTH, dtype=FLOAT32)
    with Watch() as seen:
        head_logits(head).log_softmax(-1)
    assert seen.largest == 64 * VOCABULARY
    assert seen.peak >= 2 * 64 * VOCABULARY * 4


def test_what_is_kept_for_the_gradients_is_a_few_numbers_a_token():
    head = draw(seed=42, shape=(50,), vocabulary=VOCABULARY, dtype=FLOAT32, logit_softcap=3.0)
    for needed, entropy in itertools.product([(True, True, True), (True, False, False)], [True, False]):
        leaves, kept = head.leaves(needed), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            head.ask(None, projection=leaves, entropy=entropy)
        fresh = [x for x in kept if not any(x is y for y in leaves)]
        assert sum(x.numel() for x in fresh) <= 50 * (5 + 8)


def test_nothing_is_kept_without_gradients():
    head = draw(seed=43, dtype=FLOAT32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        head.ask(None, entropy=True)
        with torch.no_grad():
            head.ask(None, projection=head.leaves(), entropy=True)
    assert kept == []


@pytest.mark.parametrize("way", WAYS)
def test_the_products_are_as_few_as_is_said(way):
    # 40 tokens in chunks of 16: three chunks.
    seen, forward = watch(way, 40, chunk_tokens=16)
    logits = [[n, WIDTH, VOCABULARY] for n in (16, 16, 8)]
    for_hidden = [[n, VOCABULARY, WIDTH] for n in (16, 16, 8)]
    for_weight = [[VOCABULARY, n, WIDTH] for n in (16, 16, 8)]
    wanted = {
        "everything": (logits, [*logits, *for_hidden, *for_weight]),
        "log-probs": (logits, [*logits, *for_hidden, *for_weight]),
        "frozen head": ([*logits, *for_hidden], []),
        "frozen head and entropy": (logits, [*logits, *for_hidden]),
        "given": ([[5, WIDTH, 1]] * 3, []),
    }[way]
    assert sorted(seen.products[:forward]) == sorted(wanted[0])
    assert sorted(seen.products[forward:]) == sorted(wanted[1])


def test_the_forward_pass_makes_no_gradient_that_nobody_can_ask_for():
    head = draw(seed=44)
    for hidden, grad in ((head.hidden, True), (head.hidden.clone().requires_grad_(), False)):
        with Watch() as seen, torch.set_grad_enabled(grad):
            head.ask(None, projection=(hidden, head.weight, head.bias))
        assert seen.products == [[13, 5, 37]]


@pytest.mark.parametrize(
    ("tokens", "budget", "pieces"),
    [
        (40, None, [40]),
        (40, 4 * VOCABULARY * 20, [20, 20]),  # just twenty rows of float32 logits
        (41, 4 * VOCABULARY * 20, [14, 14, 13]),
        (40, 4 * VOCABULARY * 20 - 1, [14, 14, 12]),  # not quite
        (32, 1, [16, 16]),  # sixteen at least
        (33, 1, [11, 11, 11]),
        (5, 1, [5]),
    ],
)
def test_chunks_are_as_large_as_the_budget_allows_and_almost_equal(tokens, budget, pieces):
    head = draw(seed=45, shape=(tokens,), vocabulary=VOCABULARY, width=2, dtype=FLOAT32)
    for ask in (
        lambda: head.ask(None, memory_budget=budget),
        lambda: cppo.topk_log_probs(head.hidden, head.weight, 2, bias=head.bias, memory_budget=budget),
    ):
        with Watch() as seen:
            ask()
        assert [n for n, _, _ in seen.products] == pieces


def test_whatever_stands_beside_the_logits_counts_towards_the_budget():
    # The entropy's second buffer; and the derivative of the cap, in the backward pass and in that of a frozen head.
    row = 4 * VOCABULARY

    def sizes(budget, shaping=None, entropy=False, needed=(True, True, True)):
        head = draw(seed=46, shape=(96,), vocabulary=VOCABULARY, width=2, dtype=FLOAT32, **(shaping or {}))
        leaves = head.leaves(needed)
        with Watch() as seen:
            found = head.ask(None, projection=leaves, entropy=entropy, memory_budget=budget)
            forward = len(seen.products)
            head.backward(found.logp, found.entropy, leaves)
        return seen.products[0][0], seen.products[forward][0] if forward < len(seen.products) else None

    cap = {"logit_softcap": 3.0}
    assert sizes(96 * row) == (96, 96)
    assert sizes(96 * row, entropy=True) == (48, 48)
    assert sizes(96 * row, cap) == (96, 48)
    assert sizes(96 * row, cap, entropy=True) == (48, 32)
    assert sizes(96 * row, cap, needed=(True, False, False)) == (48, None)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_given_log_probs_take_rows_of_the_weight_and_no_more_than_the_budget(kind):
    # K + 1 rows of 8 numbers a token, twice: as they come and as they are multiplied.
    head = draw(seed=47, shape=(64,), vocabulary=VOCABULARY, width=8, k=4, dtype=FLOAT32)
    logp = head.ask(None).logp
    with Watch() as seen:
        head.ask(kind, logp=logp, memory_budget=32 * 5 * 8 * 8)
    assert seen.products == ([[5, 8, 1]] * 2 if kind.startswith("topk") else [])
    assert seen.largest <= 32 * 5 * 8
