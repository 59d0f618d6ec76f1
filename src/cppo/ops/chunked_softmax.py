"""Log-probs and entropies from hidden states, and their gradients, with the logits of one chunk of tokens at a time.

The backward pass computes a chunk's logits again instead of keeping them, and turns them into the gradients at once.
So the memory beside inputs and gradients does not grow with the number of tokens; four products with the output weight
are made where keeping all logits takes three. Where the weight is frozen (LoRA) the forward pass makes the hidden
states' gradient while a chunk's logits are there: two.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .projection import Projection, chunks, product
from .vocab_parallel import VocabParallel

IGNORED = -100  # the id that says "no token here", as torch's cross-entropy has it
# A difference to the row's largest logit counts as no less where it is multiplied by its exponential, which is 0 (in
# float64 1e-87): -inf times 0 would be NaN.
_LOWEST = -200.0
_TINY = 1e-30  # beside a gradient


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How one call is to be computed."""

    head: Projection
    chunk_tokens: int | None = None
    memory_budget: int | None = None
    entropy: bool = False
    differentiable: bool = False
    start: int = 0  # the id of the weight's first row
    vocab_parallel: VocabParallel | None = None


class Pass:
    """One pass over the tokens: its chunks, its buffers, and what is done to a chunk's logits."""

    def __init__(self, plan: Plan, hidden: Tensor, *, mixes: bool = False, bends: bool = False) -> None:
        head = plan.head
        self._head, self._hidden = head, hidden
        narrows = head.operand != head.dtype
        element = head.dtype.itemsize * (1 + mixes + bends) + head.operand.itemsize * narrows
        self.chunks = chunks(
            hidden.shape[0], head.vocabulary * element, hidden.device, plan.chunk_tokens, plan.memory_budget
        )
        most = self.chunks[0].stop if self.chunks else 0
        self._logits = self._buffer(most)
        self._mix = self._buffer(most) if mixes else None
        self._bend = self._buffer(most) if bends else None

    def _buffer(self, tokens: int) -> Tensor:
        return torch.empty(tokens, self._head.vocabulary, dtype=self._head.dtype, device=self._hidden.device)

    def rows(self, *width: int) -> Tensor:
        """Return an uninitialised tensor with one row a token."""
        return torch.empty(self._hidden.shape[0], *width, dtype=self._head.dtype, device=self._hidden.device)

    def states(self, chunk: slice, ids: Tensor) -> Tensor:
        """Return the chunk's hidden states as a factor; zeros where there is no token, so that NaN stays there."""
        return self._hidden[chunk].to(self._head.operand).masked_fill(ids[chunk, None] == IGNORED, 0.0)

    def logits(self, states: Tensor) -> Tensor:
        """Return the chunk's logits, in the one buffer for them."""
        tokens = len(states)
        return self._head.logits(states, self._logits[:tokens], None if self._bend is None else self._bend[:tokens])

    def mix(self, z: Tensor) -> Tensor:
        """Return the second buffer with a copy of ``z``, bounded below."""
        assert self._mix is not None
        return torch.clamp(z, min=_LOWEST, out=self._mix[: len(z)])

    def exponentials(self, z: Tensor, peak: Tensor, total: Tensor, moment: Tensor | None) -> None:
        """Turn logits into e^d, d the distance to the row's largest; write that, sum e^d, and sum e^d d."""
        # Where all logits are -inf, -inf - -inf would be NaN; so the sum is 0 there.
        torch.amax(z, 1, out=peak).clamp_(min=torch.finfo(z.dtype).min)
        z.sub_(peak[:, None])
        distance = None if moment is None else self.mix(z)
        torch.sum(z.exp_(), 1, out=total)
        if moment is not None and distance is not None:
            torch.sum(distance.mul_(z), 1, out=moment)

    def factor(self, e: Tensor, local: Tensor, own: Tensor) -> Tensor:
        """Subtract ``own`` at the sampled token of what stands for the probabilities; return it as a factor."""
        inside = (local >= 0) & (local < e.shape[1])
        e.scatter_add_(1, local.clamp(0, e.shape[1] - 1)[:, None], torch.where(inside, -own, 0.0)[:, None])
        if self._bend is not None:
            e.mul_(self._bend[: len(e)])
        return e.to(self._head.operand)


def pick(z: Tensor, local: Tensor) -> Tensor:
    """Return the logits at those columns, -inf for columns that are not here."""
    inside = (local >= 0) & (local < z.shape[1])
    return z.gather(1, local.clamp(0, z.shape[1] - 1)).masked_fill_(~inside, -torch.inf)


def whole_softmax(
    peak: Tensor, total: Tensor, moment: Tensor | None, parallel: VocabParallel | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the row maximum, sum e^d and sum e^d d over all ranks' parts of the vocabulary."""
    if parallel is None:
        return peak, total, moment
    whole = parallel.maximum_(peak.clone())
    shift = (peak - whole).clamp_(min=_LOWEST)
    shrink = shift.exp()
    if moment is None:
        return whole, parallel.sum_(total * shrink), None
    sums = parallel.sum_(torch.stack([total * shrink, (moment + shift * total) * shrink]))
    return whole, sums[0], sums[1]


class ChunkedSoftmax(torch.autograd.Function):
    """(hidden, weight, bias) -> log pi of the first wanted id [N], entropy [N], log pi of all wanted ids [N, C].

    The last carries no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Make the statistics; keep what the gradients need of them, a few numbers a token."""
        ctx.set_materialize_grads(False)
        ids, head, parallel = wanted[:, 0], plan.head, plan.vocab_parallel
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        # With a frozen head all that a gradient needs is a row of H numbers a token. Not where the entropy's gradient
        # may be asked for too, nor where the sum is known only after the last chunk.
        frozen = for_hidden and not for_weight and not for_bias
        at_once = plan.differentiable and frozen and not plan.entropy and parallel is None
        work = Pass(plan, hidden, mixes=plan.entropy, bends=at_once and head.bends)
        peak, total, chosen = work.rows(), work.rows(), work.rows(wanted.shape[1])
        moment = work.rows() if plan.entropy else None
        unit = work.rows(hidden.shape[1]) if at_once else None
        for chunk in work.chunks:
            z = work.logits(work.states(chunk, ids))
            chosen[chunk] = pick(z, wanted[chunk] - plan.start)
            work.exponentials(z, peak[chunk], total[chunk], None if moment is None else moment[chunk])
            if unit is not None:
                factor = work.factor(z.mul_(1 / total[chunk, None]), ids[chunk], torch.ones_like(total[chunk]))
                head.back(factor, unit[chunk]).mul_(-head.slope)
        peak, total, moment = whole_softmax(peak, total, moment, parallel)
        if parallel is not None:
            parallel.maximum_(chosen)
        nothing = ids == IGNORED
        # In this order: the maximum plus the logarithm of the sum would be rounded to the maximum's precision.
        every = (chosen - peak[:, None]).sub_(total.log()[:, None])
        entropy = None
        if moment is not None:
            entropy = (total.log() - moment / total).clamp_(min=0.0).masked_fill_(nothing, 0.0)
        ctx.plan, ctx.at_once = plan, at_once
        ctx.save_for_backward(hidden, weight, bias, ids, unit if at_once else peak, total, entropy)
        ctx.mark_non_differentiable(every)
        return every[:, 0].masked_fill(nothing, 0.0), entropy, every

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: object
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, bias, ids, peak_or_unit, total, entropy = ctx.saved_tensors
        nothing = ids == IGNORED
        grad_logp = torch.zeros_like(total) if grad_logp is None else grad_logp.masked_fill(nothing, 0.0)
        if ctx.at_once:
            return (peak_or_unit * grad_logp[:, None]).to(hidden.dtype), None, None, None, None
        if grad_entropy is not None:
            grad_entropy = grad_entropy.masked_fill(nothing, 0.0)
        plan: Plan = ctx.plan
        sums = _Gradients(plan, hidden, weight, bias, ctx.needs_input_grad)
        sums.add_all(ids, peak_or_unit, total, entropy, grad_logp, grad_entropy)
        return (*sums.finished(plan.vocab_parallel), None, None)


class _Gradients:
    """The gradients of hidden states, weight and bias, to which each chunk adds its part.

    d log pi(y) / d z_a = 1[a = y] - pi(a);  d entropy / d z_a = -pi(a) (log pi(a) + entropy). A chunk's ``[n, V]``
    holds these up to a factor a token; that is applied to the rows of H numbers on either side, which are fewer.
    """

    def __init__(
        self, plan: Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]
    ) -> None:
        self._plan, self._inputs = plan, (hidden, weight, bias)
        # Over ranks a row is summed before it is rounded.
        dtype = plan.head.dtype if plan.vocab_parallel else hidden.dtype
        self._hidden = torch.empty_like(hidden, dtype=dtype) if needed[0] else None
        self._weight = torch.zeros_like(weight, dtype=plan.head.dtype) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=plan.head.dtype) if needed[2] and bias is not None else None

    def add_all(
        self,
        ids: Tensor,
        peak: Tensor,
        total: Tensor,
        entropy: Tensor | None,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        plan, head = self._plan, self._plan.head
        work = Pass(plan, self._inputs[0], mixes=grad_entropy is not None, bends=head.bends)
        for chunk in work.chunks:
            states = work.states(chunk, ids)
            z = work.logits(states).sub_(peak[chunk, None])
            if grad_entropy is None or entropy is None:
                row, own, e = grad_logp[chunk], torch.ones_like(total[chunk]), z.exp_()
            else:
                # Relative to the larger one: a loss scaled for float16 would overflow in a factor of that dtype.
                size = torch.maximum(grad_logp[chunk].abs(), grad_entropy[chunk].abs()).clamp_(min=_TINY)
                share, pull = grad_logp[chunk] / size, grad_entropy[chunk] / size
                level = pull * (entropy[chunk] - total[chunk].log()) + share
                mix = work.mix(z).mul_(pull[:, None]).add_(level[:, None])
                row, own, e = size, share, z.exp_().mul_(mix)
            # Probabilities, not their multiples: those of a large vocabulary would overflow a float16 factor.
            factor = work.factor(e.mul_(1 / total[chunk, None]), ids[chunk] - plan.start, own)
            self._add(chunk, states, factor, row * -head.slope)
            if self._bias is not None:  # last, as it writes to e; a product would add token by token, this in a tree
                self._bias.add_(e.mul_((row * -head.slope)[:, None]).sum(0))

    def _add(self, chunk: slice, states: Tensor, factor: Tensor, row: Tensor) -> None:
        head = self._plan.head
        if self._hidden is not None:
            out = self._hidden[chunk]
            wide = out if out.dtype == head.dtype else torch.empty_like(out, dtype=head.dtype)
            out.copy_(head.back(factor, wide).mul_(row[:, None]))
        if self._weight is not None:
            product(factor.t(), (states * row[:, None]).to(head.operand), self._weight, add=True)

    def finished(self, parallel: VocabParallel | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in their inputs' dtypes."""
        if parallel is not None and self._hidden is not None:
            parallel.sum_(self._hidden)
        gradients = (self._hidden, self._weight, self._bias)
        hidden, weight, bias = (
            None if gradient is None or given is None else gradient.to(given.dtype)
            for gradient, given in zip(gradients, self._inputs, strict=True)
        )
        return hidden, weight, bias
