"""Hidden states, an output projection and tokens at random, and what a full softmax over the vocabulary says of them.

Twice: in plain Python floats, which know neither torch nor this package, and in torch with autograd.
"""

from __future__ import annotations

import dataclasses
import math

import oracle
import torch
from torch import Tensor
from torch.nn import functional

import cppo

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
IGNORED = -100
SHAPINGS = (
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"logit_scale": -1.5},
    {"logit_softcap": 1.5},
    {"temperature": 1.3, "logit_scale": 2.5, "logit_softcap": 2.0},
)


@dataclasses.dataclass(frozen=True)
class Head:
    """What token_statistics is given, mu's whole distribution, and how strongly the gradients are asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    mu: Tensor  # [..., V], log-probs
    topk_ids: Tensor
    shaping: dict = dataclasses.field(default_factory=dict)  # temperature, logit_scale, logit_softcap
    pull: Tensor | None = None  # [2, ...]: d loss / d logp and d loss / d entropy

    @property
    def projection(self):
        return (self.hidden, self.weight, self.bias)

    def rollout(self):
        """Return the three tensors of the rollout policy; garbage where there is no token or an empty place."""
        chosen = self.mu.gather(-1, self.ids.clamp(min=0)[..., None])[..., 0].masked_fill(self.ids < 0, math.nan)
        topk = self.mu.gather(-1, self.topk_ids.clamp(min=0)).masked_fill(self.topk_ids < 0, math.nan)
        return {"rollout_logp": chosen, "topk_ids": self.topk_ids, "rollout_topk_logp": topk}

    def ask(self, divergence="topk_tv", *, projection=None, **named):
        """Call token_statistics."""
        hidden, weight, bias = projection or self.projection
        rollout = self.rollout() if divergence else {}
        return cppo.token_statistics(
            hidden, weight, self.ids, bias=bias, **self.shaping, **rollout, divergence=divergence, **named
        )

    def leaves(self, needed=(True, True, True), dtype=None):
        """Return hidden, weight and bias anew; those that are needed ask for a gradient."""
        return tuple(
            None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_(wanted)
            for x, wanted in zip(self.projection, needed, strict=True)
        )

    def backward(self, logp, entropy, leaves):
        """Return the gradients of the leaves under this head's pulls."""
        loss = (logp * self.pull[0].to(logp.dtype)).sum()
        if entropy is not None:
            loss = loss + (entropy * self.pull[1].to(entropy.dtype)).sum()
        loss.backward()
        return tuple(None if x is None else x.grad for x in leaves)


def draw(
    seed=0,
    shape=(13,),
    vocabulary=37,
    width=5,
    k=4,
    *,
    bias=True,
    spread=1.0,
    ignored=0.0,
    dtype=torch.float64,
    **shaping,
):
    """Draw a head whose rollout policy is near the current one; tokens and top K are the rollout policy's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(*shape, width).to(dtype), (normal(vocabulary, width) * spread / math.sqrt(width)).to(dtype)
    offset = normal(vocabulary).to(dtype) if bias else None
    head = Head(hidden, weight, offset, torch.zeros(shape, dtype=torch.int64), hidden, hidden, shaping)
    mu = (head_logits(head, torch.float64) + 0.5 * normal(*shape, vocabulary)).log_softmax(-1)
    ids = (
        torch.multinomial(mu.exp().view(-1, vocabulary), 1, generator=generator).view(shape) if mu.numel() else head.ids
    )
    ids = torch.where(torch.rand(shape, generator=generator) < ignored, IGNORED, ids)
    topk_ids = mu.topk(min(k, vocabulary)).indices
    empty = torch.full((*shape, k - topk_ids.shape[-1]), -1)
    return dataclasses.replace(head, ids=ids, mu=mu, topk_ids=torch.cat([topk_ids, empty], -1), pull=normal(2, *shape))


# ---------------------------------------------------------------- all logits at once


def head_logits(head, dtype=None, projection=None):
    """Return all logits with plain torch, computed in ``dtype``, or as the inputs come."""
    hidden, weight, bias = (None if x is None else x.to(dtype or x.dtype) for x in projection or head.projection)
    logits = functional.linear(hidden, weight, bias) * head.shaping.get("logit_scale", 1.0)
    softcap = head.shaping.get("logit_softcap")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / head.shaping.get("temperature", 1.0)


def plain(head, dtype=torch.float64, projection=None):
    """Return log pi of the tokens and pi's entropy, and log pi over the vocabulary, by log_softmax over it."""
    every = head_logits(head, dtype, projection).log_softmax(-1)
    there = head.ids >= 0
    logp = every.gather(-1, head.ids.clamp(min=0)[..., None])[..., 0]
    finite = torch.where(every.isinf(), 0.0, every)
    entropy = -(every.exp() * finite).sum(-1)
    return torch.where(there, logp, 0.0), torch.where(there, entropy, 0.0), every


def plain_divergence(head, kind, every):
    """Return a divergence from log pi over the vocabulary, by cells that are summed one by one."""
    found = []
    for ids, places, mu, pi in zip(
        head.ids.flatten().tolist(),
        head.topk_ids.reshape(-1, head.topk_ids.shape[-1]).tolist()
        if head.topk_ids.numel()
        else [[]] * head.ids.numel(),
        head.mu.exp().reshape(-1, head.mu.shape[-1]).tolist(),
        every.exp().reshape(-1, every.shape[-1]).tolist(),
        strict=True,
    ):
        found.append(0.0 if ids < 0 else on_cells(kind, mu, pi, ids, places))
    return torch.tensor(found, dtype=torch.float64).view(head.ids.shape)


# ---------------------------------------------------------------- plain Python


def on_cells(kind, mu, pi, sampled, places):
    """Return a divergence of two lists of probabilities, on the sampled token, the places, and the rest."""
    support = {sampled} if kind.startswith("binary") else {sampled, *(a for a in places if a >= 0)}
    cells = [[a] for a in support] + [[a for a in range(len(mu)) if a not in support]]
    return (oracle.tv_on if kind.endswith("tv") else oracle.kl_on)(cells, mu, pi)


def by_hand(hidden, weight, bias, *, temperature=1.0, logit_scale=1.0, logit_softcap=None):
    """Return one token's log-probs over the vocabulary, from lists of floats."""
    logits = []
    for row, offset in zip(weight, bias, strict=True):
        z = logit_scale * (math.fsum(h * w for h, w in zip(hidden, row, strict=True)) + offset)
        z = z if logit_softcap is None else logit_softcap * math.tanh(z / logit_softcap)
        logits.append(z / temperature)
    peak = max(logits)
    total = math.fsum(math.exp(z - peak) for z in logits)
    return [z - peak - math.log(total) for z in logits]


# ---------------------------------------------------------------- comparing


def close(found, wanted, slack=1e-12):
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=slack)


def assert_like_the_full_softmax(head, needed=(True, True, True), entropy=True, **chunking):
    """Compare values and gradients."""
    mine, theirs = head.leaves(needed), head.leaves(needed)
    found = head.ask(None, projection=mine, entropy=entropy, **chunking)
    logp, entropies, every = plain(head, projection=theirs)
    close(found.logp, logp)
    assert found.divergence is None
    if entropy:
        close(found.entropy, entropies)
    else:
        assert found.entropy is None
    for kind in DIVERGENCES:
        again = head.ask(kind, projection=mine, **chunking)
        assert torch.equal(again.logp, found.logp)
        assert not again.divergence.requires_grad
        close(again.divergence, plain_divergence(head, kind, every.detach()), 1e-11)
    if any(x is not None and x.requires_grad for x in mine):
        gradients = head.backward(found.logp, found.entropy, mine)
        wanted = head.backward(logp, entropies if entropy else None, theirs)
        for one, other in zip(gradients, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                close(one, other)
