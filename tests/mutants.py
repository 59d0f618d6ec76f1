"""One-line mutants of the core, and the run that shows that the tests kill each of them.

A mutant replaces one piece of source text that occurs exactly once in its file. Where the source is rewritten, anchor
the mutant to the new text; what it means stands in its name. Run by hand:

    python tests/mutants.py                     every mutant, with the test that kills it
    python tests/mutants.py threshold account   those whose name contains a word

The run collects the tests once and forks once a mutant. The fork grafts the mutated functions into the loaded package
(their code objects are exchanged, so that every reference sees the mutant) and runs tests until one fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import types
from dataclasses import dataclass

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "src" / "cppo"
# The deterministic tests of these files: no hypothesis, nothing that is expected to fail.
KILLERS = (
    "test_ties.py",
    "test_vectors.py",
    "test_metrics.py",
    "test_divergence.py",
    "test_selection.py",
    "test_gradients.py",
    "test_against_oracle.py",
    "test_properties.py",
    "test_numerics.py",
)
SECONDS_A_MUTANT = 120
PASSED, FAILED, DOES_NOT_RUN = "passed", "failed", "does not run"


@dataclass(frozen=True)
class Mutant:
    """``before`` occurs exactly once in ``file`` (below src/cppo) and becomes ``after``."""

    name: str
    file: str
    before: str
    after: str


def _mutants(file: str, *rows: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, before, after) for name, before, after in rows]


MUTANTS = [
    *_mutants(
        "ops/account.py",
        (
            "weights divided by T",
            "(layout.lengths - 1).clamp(min=1).to(dtype)",
            "layout.lengths.clamp(min=1).to(dtype)",
        ),
        ("weights increase", "slope = (w_min - 1.0) /", "slope = (1.0 - w_min) /"),
        ("weights start at w_min's complement", "slope = (w_min - 1.0) /", "slope = -w_min /"),
        (
            "weights outside the mask",
            "return zero_outside_(torch.addcmul(one, index, layout.spread(slope)), bit_mask(layout.mask, dtype))",
            "return torch.addcmul(one, index, layout.spread(slope))",
        ),
        (
            "shuffle ignores the response",
            "key = _mix(t + _mix(layout.spread(salt)))",
            "key = _mix(t + 0 * layout.spread(salt))",
        ),
        ("shuffle shuffles nothing", "_linear_weight(layout.rank(key).to(dtype),", "_linear_weight(t.to(dtype),"),
        ("percentile 10 for 90", "clamped_percentile(divergence, 90,", "clamped_percentile(divergence, 10,"),
        ("adaptive budget without a ceiling", "90, b_min, 2 * b_min)", "90, b_min, 1e9)"),
        ("adaptive budget's ceiling at b_min", "90, b_min, 2 * b_min)", "90, b_min, b_min)"),
        ("adaptive budget without a floor", "90, b_min, 2 * b_min)", "90, 0.0, 2 * b_min)"),
        (
            "account includes the token itself",
            "return layout.prior_sum_(flow.sub_(weighted_divergence.to(flow.dtype)))",
            "return layout.prior_sum_(flow.sub_(weighted_divergence.to(flow.dtype))) + flow",
        ),
        (
            "token's own deposit counts",
            "return layout.prior_sum_(flow.sub_(weighted_divergence.to(flow.dtype)))",
            "return layout.prior_sum_(flow.sub_(weighted_divergence.to(flow.dtype))) + flow + weighted_divergence",
        ),
        (
            "account adds what is spent",
            "flow.sub_(weighted_divergence.to(flow.dtype))",
            "flow.add_(weighted_divergence.to(flow.dtype))",
        ),
        (
            "deposits without weight",
            "flow = position_weight.to(accumulation_dtype(position_weight.device), copy=True)",
            "flow = (position_weight > 0).to(accumulation_dtype(position_weight.device), copy=True)",
        ),
        (
            "deposits in float32",
            "flow = position_weight.to(accumulation_dtype(position_weight.device), copy=True)",
            "flow = position_weight.to(torch.float32, copy=True)",
        ),
        ("threshold above delta", "(prior_account + delta).clamp_(max=delta)", "(prior_account + delta)"),
        ("threshold without the slack delta", "(prior_account + delta).clamp_", "(prior_account + 0.0).clamp_"),
        ("threshold never negative", ".clamp_(max=delta)", ".clamp_(min=0.0, max=delta)"),
        ("excess of the budget alone", "torch.maximum(weighted_divergence / delta, by_prefix)", "by_prefix"),
        (
            "excess of the token alone",
            "torch.maximum(weighted_divergence / delta, by_prefix)",
            "weighted_divergence / delta",
        ),
        ("excess takes the smaller", "torch.maximum(", "torch.minimum("),
        ("excess allows no delta", ".add_(delta)", ".add_(0.0)"),
        (
            "excess with the account's sign turned",
            "(weighted_divergence - delta - prior_account)",
            "(weighted_divergence - delta + prior_account)",
        ),
        (
            "excess without deposits",
            "allowance.mul_(layout.spread(delta_b) if isinstance(delta_b, Tensor) else delta_b)",
            "allowance.mul_(0.0)",
        ),
        (
            "a tie rejects",
            "if isinstance(limit, Tensor) else weighted_divergence) <= limit",
            "if isinstance(limit, Tensor) else weighted_divergence) < limit",
        ),
    ),
    *_mutants(
        "ops/divergence.py",
        ("another smallest probability", "math.log(2.2250738585072014e-308)", "math.log(1e-300)"),
        ("another probability next to one in float32", "else -1e-7", "else -1e-4"),
        ("another probability next to one in float64", "nearly_one = -1e-12 if", "nearly_one = -1e-7 if"),
        ("top-K KL with a large floor", ".clamp_(min=1e-12)", ".clamp_(min=1e-3)"),
        (
            "top-K KL with a negative bucket",
            "rest_m = (1 - lm_k.exp().sum(-1) - lm.exp() * own).clamp_(min=0.0)",
            "rest_m = 1 - lm_k.exp().sum(-1) - lm.exp() * own",
        ),
        ("signed total variation", "return p.sub_(m).abs_()", "return p.sub_(m)"),
        ("squared total variation", "return p.sub_(m).abs_()", "return p.sub_(m).square_()"),
        (
            "probabilities above one",
            "p = logp.detach().to(dtype).exp().clamp_(max=1.0)",
            "p = logp.detach().to(dtype).exp()",
        ),
        (
            "binary KL from pi to mu",
            "_relative_entropy_term(lm, lp) + _relative_entropy_term(rest_m, rest_p)",
            "_relative_entropy_term(lp, lm) + _relative_entropy_term(rest_p, rest_m)",
        ),
        (
            "binary KL of the sampled token alone",
            "_relative_entropy_term(lm, lp) + _relative_entropy_term(rest_m, rest_p)",
            "_relative_entropy_term(lm, lp)",
        ),
        (
            "binary KL below zero",
            "_relative_entropy_term(rest_m, rest_p)).clamp_(min=0.0)",
            "_relative_entropy_term(rest_m, rest_p))",
        ),
        ("binary KL infinite at pi = 1", "rest_p = _log1mexp(lp.clamp(max=nearly_one))", "rest_p = _log1mexp(lp)"),
        ("log-probs without a floor", "clamp(min=_LOG_TINY, max=0.0)", "clamp(max=0.0)"),
        ("terms without mass are NaN", "torch.where(log_m == -math.inf, torch.zeros_like(term), term)", "term"),
        (
            "log(1 - exp) by one branch",
            "torch.where(logp > -_LN2, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))",
            "torch.log1p(-torch.exp(logp))",
        ),
        (
            "top-K without the sampled token",
            "(topk_ids != token_ids[..., None]).all(dim=-1)",
            "(token_ids != token_ids)",
        ),
        (
            "top-K counts the sampled token twice",
            "(topk_ids != token_ids[..., None]).all(dim=-1)",
            "(token_ids == token_ids)",
        ),
        ("top-K outside by any id", ".all(dim=-1)", ".any(dim=-1)"),
        ("top-K TV without the bucket", " + (rest_p - rest_m).abs()) / 2", ") / 2"),
        ("top-K TV not halved", "(rest_p - rest_m).abs()) / 2", "(rest_p - rest_m).abs())"),
        (
            "top-K TV with a negative bucket",
            "rest_m = (1 - m_k.sum(-1) - m).clamp_(min=0.0)",
            "rest_m = 1 - m_k.sum(-1) - m",
        ),
        ("top-K KL without the bucket", "(support + _relative_entropy_term(rest_m.log(), rest_p.log()))", "support"),
        ("top-K KL without the sampled token", ".sum(-1) + sampled", ".sum(-1)"),
        ("exact TV not halved", ".abs_().sum(-1) / 2", ".abs_().sum(-1)"),
        ("exact TV signed", ".abs_().sum(-1) / 2", ".sum(-1) / 2"),
        (
            "exact KL from pi to mu",
            "_relative_entropy_term(lm, lp).sum(-1).clamp_",
            "_relative_entropy_term(lp, lm).sum(-1).clamp_",
        ),
    ),
    *_mutants(
        "ops/gates.py",
        (
            "standing still is outward",
            "torch.sign(advantages) * log_ratio <= 0",
            "torch.sign(advantages) * log_ratio < 0",
        ),
        ("direction turned", "torch.sign(advantages) * log_ratio <= 0", "torch.sign(advantages) * log_ratio >= 0"),
        (
            "direction from a product that underflows",
            "torch.sign(advantages) * log_ratio <= 0",
            "advantages * log_ratio <= 0",
        ),
        ("direction without the advantage", "torch.sign(advantages) * log_ratio <= 0", "log_ratio <= 0 * advantages"),
        ("soft gate above one", "x.clamp(min=1.0).reciprocal_()", "x.reciprocal()"),
        ("soft gate squared", "x.clamp(min=1.0).reciprocal_()", "x.clamp(min=1.0).reciprocal_().square_()"),
        ("clip at its upper bound", "log_ratio > math.log1p(clip_high)", "log_ratio >= math.log1p(clip_high)"),
        ("clip at its lower bound", "log_ratio < math.log1p(-clip_low)", "log_ratio <= math.log1p(-clip_low)"),
        ("clip bound in log-ratios", "math.log1p(clip_high)", "clip_high"),
        ("clip from above whatever the sign", "& (advantages > 0)", "& (advantages == advantages)"),
        ("clip from below whatever the sign", "& (advantages < 0))", "& (advantages == advantages))"),
        ("clip on one side only", "return too_high | (", "return too_high & ("),
        ("lower clip never disabled", "if clip_low >= 1:", "if clip_low > 1:"),
    ),
    *_mutants(
        "ops/ratios.py",
        ("ratio without its cap", "ratio if ratio_cap is None else ratio.clamp_(max=ratio_cap)", "ratio"),
        ("ratio cap as a floor", "ratio.clamp_(max=ratio_cap)", "ratio.clamp_(min=ratio_cap)"),
        ("ratio without a bound", "log_ratio.clamp(max=MAX_LOG_RATIO).exp_()", "log_ratio.exp()"),
        ("ratio bounded from below too", "clamp(max=MAX_LOG_RATIO)", "clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)"),
        ("ratio bound of 10", "MAX_LOG_RATIO = 20.0", "MAX_LOG_RATIO = 10.0"),
    ),
    *_mutants(
        "ops/reduction.py",
        ("loss maximised", "return advantages / -denominator", "return advantages / denominator"),
        ("fixed length ignored", "denominator = denominator * fixed_length", "denominator = denominator * 1"),
        ("sequence-mean without its own length", 'if reduction == "sequence-mean":', 'if reduction == "":'),
        ("token-mean over responses", 'if reduction == "token-mean" else', 'if reduction == "" else'),
        ("token-mean over padding too", "layout.lengths.sum()", "torch.tensor(layout.mask.numel())"),
        ("empty responses in the denominator", "(layout.lengths > 0).sum()", "(layout.lengths >= 0).sum()"),
        ("denominator of zero", "return count.clamp(min=1)", "return count"),
        ("denominator ignored", "if denominator is not None:", "if denominator is not None and denominator is None:"),
        ("upstream gradient ignored", "(weights * upstream)", "weights.clone()"),
        ("the saved gradient is handed out", "return (weights * upstream).to", "return weights.mul_(upstream).to"),
    ),
    *_mutants(
        "ops/layout.py",
        ("padded sums of two tokens are lost", "if self.shape[1] > 1:", "if self.shape[1] > 2:"),
        ("packed sums of two tokens are lost", "if not self.shape[0]:", "if self.shape[0] < 3:"),
        (
            "positions are columns",
            "self.mask.cumsum(dim=1, dtype=torch.int32)",
            "torch.ones_like(self.mask).cumsum(dim=1, dtype=torch.int32)",
        ),
        ("positions from one", ".sub_(1).to(dtype)", ".to(dtype)"),
        (
            "T is the padded width",
            "self.lengths = mask.sum(dim=1)",
            "self.lengths = torch.full_like(mask.sum(dim=1), mask.shape[1])",
        ),
        (
            "padded sums include the token",
            "torch.cumsum(values[:, :-1], dim=1, out=shifted[:, 1:])",
            "torch.cumsum(values, dim=1, out=shifted)",
        ),
        (
            "account in float32",
            'return torch.float32 if device.type == "mps" else torch.float64',
            "return torch.float32",
        ),
        ("packed sums run on through responses", "running.sub_(self.spread(running[starts]))\n", "pass\n"),
        ("packed positions run on", "before = self._starts\n", "before = 0 * self._starts\n"),
        (
            "packed holes take a position",
            "running = self.mask.cumsum(0, dtype=torch.int32)",
            "running = torch.ones_like(self.mask).cumsum(0, dtype=torch.int32)",
        ),
        (
            "packed positions from one",
            "before = self._at(running, self._starts) + 1",
            "before = self._at(running, self._starts)",
        ),
        (
            "packed holes count as tokens",
            "segment_lengths if self._dense else self.total(mask.to(torch.int64))",
            "segment_lengths",
        ),
        ("packed blocks lose their mask", "mask = None if self._dense else self.mask[tokens]", "mask = None"),
        (
            "packed blocks lose the tail",
            "if end - start >= tokens or index == len(self._segment_lengths) - 1:",
            "if end - start >= tokens:",
        ),
        (
            "padded blocks lose a row",
            "yield block, block",
            "yield slice(block.start, max(block.stop - 1, 1)), slice(block.start, max(block.stop - 1, 1))",
        ),
        (
            "packed ranks among all responses",
            "order = order[self.response[order].argsort(stable=True)]",
            "order = order.clone()",
        ),
        (
            "packed holes take a rank",
            "torch.where(self.mask, keys, torch.iinfo(keys.dtype).max).argsort(stable=True)",
            "keys.argsort(stable=True)",
        ),
        (
            "lost digits are not given back",
            "return running.add_(lost.sub_(self.spread(lost[starts])))",
            "return running",
        ),
        ("lost digits of the neighbours", "lost.sub_(self.spread(lost[starts]))", "lost"),
        (
            "rounding errors of the wrong sign",
            "return (before - (after - step)).add_(added - step)",
            "return -(before - (after - step)).add_(added - step)",
        ),
    ),
    *_mutants(
        "ops/selection.py",
        ("percentile rank of T", "scaled = percent * last", "scaled = percent * lengths"),
        ("percentile without interpolation", "lower + weight * (upper - lower)", "lower"),
        ("percentile between the wrong ends", "lower + weight * (upper - lower)", "upper + weight * (lower - upper)"),
        (
            "percentile rounds its rank up",
            'rounding_mode="floor"',
            'rounding_mode="trunc") + (scaled % 100 > 0).to(scaled.dtype',
        ),
        ("percentile below its floor", ".clamp_(min=low, max=high)", ".clamp_(max=high)"),
        ("percentile above its ceiling", ".clamp_(min=low, max=high)", ".clamp_(min=low)"),
        (
            "padding counted below the floor",
            "at_low = (values <= low).sum(1) - padding > upper",
            "at_low = (values <= low).sum(1) > upper",
        ),
        ("floor decided one rank early", "- padding > upper", "- padding >= upper"),
        ("ceiling decided one rank early", "- padding <= lower)", "- padding <= upper)"),
        (
            "padded order statistic one off",
            "top.gather(1, (last - lower)[:, None])",
            "top.gather(1, (last - upper)[:, None])",
        ),
        ("packed bin one off", "(reached <= lower_rank[:, None])", "(reached < lower_rank[:, None])"),
        (
            "packed successor too early",
            "torch.where(up_to > upper_rank, origin, successor)",
            "torch.where(up_to >= upper_rank, origin, successor)",
        ),
        ("packed successor never", "torch.where(up_to > upper_rank, origin, successor)", "origin"),
        ("packed successor is the largest", 'above, "amin"', 'above, "amax"'),
        ("packed holes counted", " | (bit_mask(~mask, values.dtype) & beyond)", ""),
        (
            "empty packed responses without a budget",
            "torch.where(lengths > 0, result, low)",
            "torch.where(lengths > 0, result, 0.0)",
        ),
    ),
    *_mutants(
        "ops/masking.py",
        ("zeroing by a product", "values.view(bits.dtype).bitwise_and_(bits)", "values.mul_(bits != 0)"),
        (
            "zeroing what should stay",
            "values.view(bits.dtype).bitwise_and_(bits)",
            "values.view(bits.dtype).bitwise_and_(~bits)",
        ),
        ("zeroing nothing", "values.view(bits.dtype).bitwise_and_(bits)", "pass"),
        (
            "infinity counts as finite",
            "bitwise_and(exponent).sub_(exponent)",
            "bitwise_and(exponent).sub_(exponent + 1)",
        ),
    ),
    *_mutants(
        "objective.py",
        (
            "a tie with delta rejects (DPPO)",
            "keep = (measured <= method.delta).logical_or_",
            "keep = (measured < method.delta).logical_or_",
        ),
        (
            "inward steps are tested too",
            "keep = account.within(spent, limit).logical_or_(gates.moves_toward(batch.advantages, tokens.log_ratio))",
            "keep = account.within(spent, limit)",
        ),
        (
            "inward steps are tested too (DPPO)",
            "keep = (measured <= method.delta).logical_or_(gates.moves_toward(batch.advantages, tokens.log_ratio))",
            "keep = measured <= method.delta",
        ),
        ("spending without weight", "spent = weight * measured", "spent = measured.clone()"),
        (
            "account of the plain divergence",
            "account.prior_account(weight, spent, delta_b, layout)",
            "account.prior_account(weight, measured, delta_b, layout)",
        ),
        (
            "budget from the weighted divergence",
            "account.adaptive_budget(measured, layout,",
            "account.adaptive_budget(spent, layout,",
        ),
        (
            "fixed and adaptive swapped",
            'adaptive = method.budget == "adaptive"',
            'adaptive = method.budget != "adaptive"',
        ),
        (
            "budget ignored",
            "limit = account.threshold(prior, delta)",
            "limit = account.threshold(prior, delta).fill_(delta)",
        ),
        ("uniform weights are linear", 'if method.position == "uniform":', 'if method.position == "":'),
        (
            "soft gate attenuates inward steps",
            "torch.where(keep, 1.0, gates.soft_gate(excess))",
            "gates.soft_gate(excess)",
        ),
        (
            "causes swapped",
            "torch.where(spent <= delta, PREFIX_BUDGET, TOKEN_THRESHOLD)",
            "torch.where(spent <= delta, TOKEN_THRESHOLD, PREFIX_BUDGET)",
        ),
        ("cause of a tie", "torch.where(spent <= delta, PREFIX_BUDGET", "torch.where(spent < delta, PREFIX_BUDGET"),
        ("clip turned", "_Verdict(~gates.clips(", "_Verdict(gates.clips("),
        ("clip without a lower bound", "method.clip_low, method.clip_high))", "1.0, method.clip_high))"),
        ("gate open outside the response", "gate = zero_outside_(gate, tokens.bits)", "gate = gate.clone()"),
        ("coefficient without the gate", "return gate, ratio.mul_(gate)", "return gate, ratio"),
        ("coefficient without the ratio", "return gate, ratio.mul_(gate)", "return gate, gate.clone()"),
        ("cap ignored", 'getattr(method, "ratio_cap", None)', "None"),
        (
            "advantage without its sign",
            "loss_scale(block.advantages, block.layout",
            "loss_scale(block.advantages.abs(), block.layout",
        ),
        (
            "a given divergence below zero",
            "clamp(min=0.0, max=_LARGEST_DIVERGENCE)",
            "clamp(max=_LARGEST_DIVERGENCE)",
        ),
        (
            "a given divergence without an end",
            "clamp(min=0.0, max=_LARGEST_DIVERGENCE)",
            "clamp(min=0.0)",
        ),
        ("padding and broken tokens spend", "return zero_outside_(measured, tokens.bits)", "return measured"),
        ("shuffle by padding too", "bits.masked_fill(~layout.mask, 0)", "bits"),
        ("shuffle seed ignored", "+ method.shuffle_seed", "+ 0 * method.shuffle_seed"),
        ("broken tokens without a code", "(mask & ~usable) * OTHER_RULE", "(mask & ~usable) * 0"),
        ("kept tokens carry a code", "(usable & ~verdict.keep) * verdict.cause()", "usable * verdict.cause()"),
        ("trace outside the response", "k: torch.where(mask, v, 0) for k, v", "k: v.expand(mask.shape) for k, v"),
    ),
    *_mutants(
        "inputs.py",
        (
            "broken advantages reach the gradient",
            "advantages.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)",
            "advantages",
        ),
        (
            "narrower than the rollout",
            "torch.promote_types(torch.promote_types(logp.dtype, rollout_logp.dtype), torch.float32)",
            "torch.promote_types(logp.dtype, torch.float32)",
        ),
        ("broken advantages are judged", ".bitwise_and_(self.advantages_bits)", ""),
        ("broken advantages are not looked for", "            and self.advantages_bits.all()\n", ""),
        ("broken divergences are judged", "bits.bitwise_and_(finite_bits(self.divergence))", "pass"),
        (
            "padding is judged",
            "bits = bit_mask(self.layout.mask, self.dtype)",
            "bits = bit_mask(torch.ones_like(self.layout.mask), self.dtype)",
        ),
        ("log-ratio turned", "log_ratio = self.logp - self.rollout_logp", "log_ratio = self.rollout_logp - self.logp"),
        (
            "broken log-ratios are judged",
            "bits.bitwise_and_(finite_bits(log_ratio)).bitwise_and_(",
            "bits.bitwise_and_(",
        ),
        ("broken log-ratios are not looked for", "and math.isfinite(total)", "and True"),
        ("broken divergences are not looked for", "and self.divergence is None\n", "and True\n"),
    ),
    *_mutants(
        "metrics.py",
        (
            "broken tokens count as masked",
            "rejected = (decision.rejected_by > 0) & usable",
            "rejected = decision.rejected_by > 0",
        ),
        (
            "means over padding",
            "torch.where(usable, binary_tv(batch.logp, batch.rollout_logp), 0.0)",
            "binary_tv(batch.logp, batch.rollout_logp)",
        ),
        ("budget share of the token threshold", "PREFIX_BUDGET = 2", "PREFIX_BUDGET = 1"),
        ("masked fraction of the other sign", "(rejected & positive).sum()", "(rejected & negative).sum()"),
        ("overdrawn at zero", "(trace.prior_account < 0).sum()", "(trace.prior_account <= 0).sum()"),
        (
            "mean budget over empty responses",
            "(torch.where(responses, trace.delta_b, 0).sum(), responses.sum())",
            "(torch.where(responses, trace.delta_b, 0).sum(), responses.new_tensor(len(responses)))",
        ),
        ("KL estimator without the log", "ratio - 1 - log_ratio, 0.0", "ratio - 1, 0.0"),
        (
            "last broken token named",
            "flags.to(torch.uint8).argmax()",
            "len(flags) - 1 - flags.flip(0).to(torch.uint8).argmax()",
        ),
        (
            "counts are divided",
            "torch.where(denominators > 0, means, numerators)",
            "means * 0 + numerators / denominators.clamp(min=2)",
        ),
        ("tallies keep the first peak", "torch.maximum(self.peaks, other.peaks)", "self.peaks"),
        ("tallies forget the second part", "sums=self.sums + other.sums", "sums=self.sums"),
        (
            "tallies name the last broken token",
            "torch.where(self.first_nonfinite >= 0, self",
            "torch.where(other.first_nonfinite < 0, self",
        ),
    ),
]


def occurrences(mutant: Mutant) -> int:
    """Return how often the mutant's text stands in its file."""
    return (PACKAGE / mutant.file).read_text().count(mutant.before)


# ---------------------------------------------------------------- grafting


def _function(value: object) -> types.FunctionType | None:
    """Return the plain function inside a method, a property or a decorator."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    return value if isinstance(value, types.FunctionType) else None


def _graft_into(here: object, there: object, module: str) -> int:
    """Exchange the code of ``here``'s functions by that of ``there``'s; return how many changed."""
    changed = 0
    for name, value in list(vars(there).items()):
        mine = vars(here).get(name)
        function, own = _function(value), _function(mine)
        if isinstance(value, type) and value.__module__ == module:
            changed += _graft_into(mine, value, module)
        elif function is not None and function.__module__ == module:
            changed += own.__code__ != function.__code__
            own.__code__ = function.__code__
        elif isinstance(value, int | float) and not name.startswith("__") and value != mine:
            setattr(here, name, value)
            changed += 1
    return changed


def graft(mutant: Mutant) -> None:
    """Turn the loaded package into the mutant."""
    if occurrences(mutant) != 1:
        raise ValueError(f"{mutant.name}: its text occurs {occurrences(mutant)} times in {mutant.file}")
    file = PACKAGE / mutant.file
    name = ".".join(("cppo", *pathlib.PurePath(mutant.file).with_suffix("").parts))
    module, mutated = importlib.import_module(name), types.ModuleType(name)
    mutated.__package__, mutated.__file__ = module.__package__, str(file)
    exec(compile(file.read_text().replace(mutant.before, mutant.after), str(file), "exec"), vars(mutated))
    if not _graft_into(module, mutated, name):
        raise ValueError(f"{mutant.name}: changes no function and no number of {name}")


# ---------------------------------------------------------------- running


class MutantRun:
    """A pytest plugin that runs the collected tests once against the package and once against each mutant of it."""

    def __init__(self, mutants: list[Mutant], report) -> None:
        self.mutants = mutants
        self.report = report  # called with (mutant, result) after each; the mutant is None for the package as it is
        self._answer = lambda answer: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call) -> None:
        # Not from the report: its traceback takes longer to print than most tests take to run.
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self._answer({"status": FAILED, "test": item.nodeid})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session) -> bool:
        if session.testsfailed or not session.items:
            raise session.Interrupted("the tests cannot be collected")
        items = [item for item in session.items if not item.get_closest_marker("xfail")]
        with tempfile.TemporaryDirectory(prefix="cppo-mutants-") as scratch:
            answer = pathlib.Path(scratch) / "answer.json"
            for mutant in [None, *self.mutants]:
                result = self._run_in_fork(mutant, items, answer)
                if mutant is None:
                    items = _cheapest_of_each_first(items, result.pop("durations", {}))
                self.report(mutant, result)
        return True

    def _run_in_fork(self, mutant: Mutant | None, items: list, answer: pathlib.Path) -> dict:
        start = time.monotonic()
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._judge(mutant, items, answer)
        os.waitpid(child, 0)
        result = {"status": DOES_NOT_RUN, "test": "no answer"}
        if answer.exists():
            result = json.loads(answer.read_text())
        return result | {"seconds": round(time.monotonic() - start, 2)}

    def _judge(self, mutant: Mutant | None, items: list, answer: pathlib.Path) -> None:
        """Write the verdict on one mutant and end this process, a fork."""

        def leave(verdict: dict) -> None:
            answer.write_text(json.dumps(verdict))
            os._exit(0)

        try:
            signal.alarm(SECONDS_A_MUTANT)
            self._answer = leave
            durations = {}
            if mutant is not None:
                graft(mutant)
            for item, following in zip(items, [*items[1:], None], strict=True):
                start = time.perf_counter()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                durations[item.nodeid] = time.perf_counter() - start
            leave({"status": PASSED, "test": "", "durations": durations})
        except BaseException as error:  # noqa: BLE001  a fork must not run on into its parent's work
            leave({"status": DOES_NOT_RUN, "test": repr(error)})


def _cheapest_of_each_first(items: list, durations: dict[str, float]) -> list:
    """Return the items so that one case of every test comes before the second of any, quick tests first."""
    seen: dict[str, int] = {}
    key = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        key[item] = (seen[name], durations.get(item.nodeid, 0.0))
    return sorted(items, key=key.__getitem__)


def run(mutants: list[Mutant], report) -> None:
    """Judge the package, then each mutant; ``report(mutant or None, result)`` hears of each."""
    import torch

    torch.set_num_threads(1)
    # Its first call loads half a thousand modules: once here, not once a fork.
    torch.testing.assert_close(torch.ones(1), torch.ones(1))
    # Without a terminal reporter, whose options the configuration would ask for.
    quiet = ["-s", "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    pytest.main(
        [*quiet, "-m", "not hypothesis", *(str(TESTS / name) for name in KILLERS)], plugins=[MutantRun(mutants, report)]
    )


def main() -> int:
    """Run the mutants that were asked for and print one line each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in m.name for word in options.words)]
    results: dict[str, dict] = {}

    def report(mutant: Mutant | None, result: dict) -> None:
        name = "(unmutated)" if mutant is None else mutant.name
        results[name] = result
        if not options.json:
            print(f"{result['seconds']:6.2f}  {result['status']:12}  {name:45}  {result['test']}", flush=True)

    run(chosen, report)
    if options.json:
        print(json.dumps(results))
    wrong = [name for name, r in results.items() if r["status"] != (PASSED if name == "(unmutated)" else FAILED)]
    return 1 if wrong or len(results) != 1 + len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
