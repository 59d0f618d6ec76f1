"""Findings in plain words, each with the numbers behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.measures import Measures
from cppo.inspect.oddities import Oddities
from cppo.inspect.replay import BINS, Judged
from cppo.methods import CISPO, CPPO, DRPO, PNPO, SAPO, PolicyGradient

# They weigh tokens and reject none.
REJECT_NOTHING = (CISPO, DRPO, PNPO, PolicyGradient, SAPO)

Level = Literal["problem", "warning", "note"]

_ENOUGH_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that the log shows: a short title, what it means and what to do, and the numbers."""

    level: Level
    title: str
    text: str
    numbers: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the findings are drawn from."""

    series: dict[str, NDArray[np.float64]]
    measures: Measures
    oddities: Oddities
    own: Judged
    suggested_delta: float | None  # of CPPO, at which its token rule alone would mask the wanted share
    wanted: float


def findings(evidence: Evidence) -> list[Finding]:
    """Return what the log shows, the gravest first."""
    order: dict[Level, int] = {"problem": 0, "warning": 1, "note": 2}
    tokens = evidence.measures.sums["tokens"].sum()
    found = [finding for rule in _RULES for finding in rule(evidence)]
    if not tokens:
        return [finding for finding in found if finding.title.endswith("no finite log-prob")] or [
            Finding("problem", "No token of the policy", "The log's responses are empty, or all of them is masked.", {})
        ]
    return sorted(found, key=lambda finding: order[finding.level])


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the means of the first and the last tenth of a run."""
    part = max(1, len(values) // 10)
    return _mean(values[:part]), _mean(values[-part:])


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.3%}"


# ---------------------------------------------------------------- does the region act?


def _never_acts(e: Evidence) -> Iterator[Finding]:
    masked, equal = e.own.masked, _mean(e.series["equal_log_probs"])
    gap = float(e.measures.by_step.sums.sum() / max(1, e.measures.by_step.counts.sum()))
    numbers = {"masked": masked, "equal_log_probs": equal, "probability_gap": gap}
    delta, share = e.suggested_delta, _percent(e.wanted)
    hint = "" if delta is None else f" A delta of {delta:.3g} would mask {share} of them by CPPO's token rule alone."
    if equal > 0.95:
        yield Finding(
            "problem", "The two policies' log-probs are the same",
            f"{_percent(equal)} of the uncertain tokens have equal log-probs under both policies. Either every update "
            "is the first on its rollout, or the log-probs called the sampler's were recomputed by the trainer. No "
            "trust region can act. Make several updates a rollout, or hand over the engine's log-probs.",
            numbers,
        )  # fmt: skip
    elif isinstance(e.own.method, REJECT_NOTHING):
        yield Finding(
            "note", "The run had no trust region that rejects",
            f"Its method keeps every token; |pi - mu| is {gap:.2g} on average.{hint}",
            numbers,
        )  # fmt: skip
    elif masked < 5e-4:
        yield Finding(
            "warning", "The trust region hardly acts",
            f"It rejects {_percent(masked)} of the tokens; |pi - mu| is {gap:.2g} on average, far below its "
            f"threshold.{hint} If the run is stable, it needs no trust region.",
            numbers,
        )  # fmt: skip


def _acts_on_many(e: Evidence) -> Iterator[Finding]:
    masked = e.own.masked
    if masked > 0.25:
        left = float(e.own.weight.sum() / max(e.own.unmasked_weight.sum(), 1e-300))
        yield Finding(
            "problem" if masked > 0.5 else "warning", f"The trust region rejects {_percent(masked)} of the tokens",
            f"{_percent(left)} of the gradient's weight is left. The policy moves further in a rollout than the region "
            "allows: fewer updates a rollout, a smaller learning rate, or wider thresholds.",
            {"masked": masked, "weight_left": left},
        )  # fmt: skip


def _unequal_signs(e: Evidence) -> Iterator[Finding]:
    (down, down_rejected), _, (up, up_rejected) = e.own.signs.tolist()
    if min(down, up) < _ENOUGH_TOKENS:
        return
    down_share, up_share = down_rejected / down, up_rejected / up
    if max(down_share, up_share) > 0.01 and max(down_share, up_share) > 3 * min(down_share, up_share):
        more, less = ("positive", "negative") if up_share > down_share else ("negative", "positive")
        yield Finding(
            "note", f"Tokens with a {more} advantage are rejected more often",
            f"{_percent(max(down_share, up_share))} of them, of those with a {less} one "
            f"{_percent(min(down_share, up_share))}. The net update leans the other way; compare a KL divergence, "
            "which weighs rare and common tokens otherwise.",
            {"masked_positive": up_share, "masked_negative": down_share},
        )  # fmt: skip


def _pinned_budget(e: Evidence) -> Iterator[Finding]:
    method = e.own.method
    if not isinstance(method, CPPO) or method.budget != "adaptive":
        return
    budget = e.own.delta_b[:, 0].sum() / max(1, e.own.delta_b[:, 1].sum())
    floor = method.delta_b
    if budget <= 1.02 * floor:
        yield Finding(
            "note", "The adaptive budget stays at its floor",
            f"delta_b is {budget:.4g} on average, b_min is {floor:.4g}: the responses' 90th percentile of D lies below "
            "it, so that the budget adapts to nothing. It acts as a fixed one.",
            {"delta_b": budget, "b_min": floor},
        )  # fmt: skip
    elif budget >= 1.9 * floor:
        yield Finding(
            "warning", "The adaptive budget stays at its ceiling",
            f"delta_b is {budget:.4g} on average, its ceiling is {2 * floor:.4g}: the drift is larger than b_min was "
            "chosen for. Raise b_min, or slow the drift.",
            {"delta_b": budget, "ceiling": 2 * floor},
        )  # fmt: skip


# ---------------------------------------------------------------- is the sampler what it is taken for?


def _truncated_sampler(e: Evidence) -> Iterator[Finding]:
    below, shift = float(e.series["below_sampler"][0]), float(e.series["mean_log_ratio"][0])
    # Of so many tokens, half of them below the sampler, three quarters are no chance.
    if below > 0.75 and shift < -0.003 and e.measures.sums["tokens"][0] >= _ENOUGH_TOKENS:
        yield Finding(
            "problem", "The sampler was truncated",
            f"In the first update {_percent(below)} of the tokens are likelier under the sampler than under the "
            f"policy, by a factor of {np.exp(-shift):.3f}: top-p, top-k or min-p kept about "
            f"{_percent(float(np.exp(shift)))} of the probability mass and divided by it. Sample without truncation, "
            "or the drift is wrong by that much everywhere.",
            {"below_sampler": below, "kept_mass": float(np.exp(shift))},
        )  # fmt: skip


def _engine_mismatch(e: Evidence) -> Iterator[Finding]:
    gap, tail = float(e.series["probability_gap"][0]), float(e.series["probability_gap_tail"][0])
    error = float(e.series["relative_log_prob_error"][0])
    if error > 0.02 and float(e.series["equal_log_probs"][0]) < 0.95:
        yield Finding(
            "problem" if error > 0.1 else "warning", "Sampler and trainer disagree from the start",
            f"In the first update |pi - mu| is {gap:.2g} on average and {tail:.2g} in the largest tenth, the relative "
            f"log-prob error {error:.3f} (the paper's runs: 0.02 to 0.08). Before any drift that is the engines' "
            "mismatch: other numerics, a quantised sampler, stale weights, another temperature.",
            {"probability_gap": gap, "probability_gap_tail": tail, "relative_log_prob_error": error},
        )  # fmt: skip


# ---------------------------------------------------------------- does the log hold what it should?


def _no_log_prob(e: Evidence) -> Iterator[Finding]:
    found = e.oddities.no_log_prob
    if found.count:
        yield Finding(
            "warning", f"{found.count} response tokens have no finite log-prob",
            f"The first: {found.first}. They gave no gradient and count in no mean here.",
            {"tokens": found.count},
        )  # fmt: skip


def _log_prob_above_0(e: Evidence) -> Iterator[Finding]:
    found = e.oddities.log_prob_above_0
    if found.count:
        yield Finding(
            "warning", f"{found.count} response tokens have a log-prob above 0",
            f"The first: {found.first}; the largest is {found.largest:.4g}. No probability is above 1: the column "
            "holds something else (logits, or log-probs with the other sign). The divergences take it as 0, the "
            "methods' ratios as it stands.",
            {"tokens": found.count, "largest": found.largest},
        )  # fmt: skip


def _wrong_divergence(e: Evidence) -> Iterator[Finding]:
    none, high, kinds = e.oddities.no_divergence, e.oddities.divergence_above_1, ", ".join(e.oddities.measured_by)
    if none.count:
        yield Finding(
            "warning", f"{none.count} measured divergences are none",
            f"NaN, infinite or negative; the first: {none.first}. Judged by {kinds}, a token without a finite one is "
            "rejected, and spends nothing; a negative one counts as 0.",
            {"tokens": none.count},
        )  # fmt: skip
    if high.count:
        yield Finding(
            "warning", f"{high.count} measured divergences are above 1",
            f"The first: {high.first}; the largest is {high.largest:.4g}. They are judged by {kinds}, and no total "
            "variation is above 1: the column holds another divergence, for which these thresholds were not made.",
            {"tokens": high.count, "largest": high.largest},
        )  # fmt: skip


def _in_two_files(e: Evidence) -> Iterator[Finding]:
    found = e.oddities.in_two_files
    if found.count:
        yield Finding(
            "warning", f"{found.count} responses stand in the log again",
            f"The first: {found.first}. Another file has the same update, prompt, tokens and sampler's log-probs. A "
            "file that was copied or written twice counts twice in everything here; a few short responses may be "
            "chance.",
            {"responses": found.count},
        )  # fmt: skip


# ---------------------------------------------------------------- drift, collapse, learning signal


def _collapse(e: Evidence) -> Iterator[Finding]:
    rewarded = np.isfinite(e.series["reward"])
    reward, length, gaps = (e.series[name][rewarded] for name in ("reward", "length", "probability_gap_tail"))
    steps = np.array(e.measures.steps)[rewarded]
    if len(reward) < 10:
        return
    window = max(3, len(reward) // 10)
    smooth = np.convolve(reward, np.ones(window) / window, mode="valid")
    peak, last = int(smooth.argmax()), float(smooth[-1])
    if smooth[peak] - last > 0.4 * float(np.abs(smooth).max()):
        step = int(steps[peak + window // 2])
        before, after = _mean(gaps[: peak + window]), _mean(gaps[peak + window :])
        grew = f" |pi - mu| of the largest tenth went from {before:.2g} to {after:.2g}." if after > 1.5 * before else ""
        yield Finding(
            "problem", "The run collapsed",
            f"The reward was {smooth[peak]:.3g} around update {step} and is {last:.3g} at the end; responses had "
            f"{_mean(length[peak : peak + window]):.0f} tokens then and have {_mean(length[-window:]):.0f} now.{grew} "
            "What each method would have rejected, and when, shows below.",
            {"peak_reward": float(smooth[peak]), "last_reward": last, "peak_update": float(step)},
        )  # fmt: skip


def _growing_drift(e: Evidence) -> Iterator[Finding]:
    first, last = _ends(e.series["probability_gap_tail"])
    if len(e.measures.steps) >= 10 and last > 3 * first and last > 0.02:
        yield Finding(
            "warning", "The drift grows",
            f"The largest tenth of |pi - mu| rose from {first:.2g} in the first updates to {last:.2g} in the last.",
            {"first": first, "last": last},
        )  # fmt: skip


def _early_drift(e: Evidence) -> Iterator[Finding]:
    mean = e.measures.by_bin.mean()
    early, rest = _mean(mean[: BINS // 4]), _mean(mean[BINS // 4 :])
    if early > 1.5 * rest and early > 1e-3:
        yield Finding(
            "note", "The drift sits at the beginning of the responses",
            f"|pi - mu| is {early:.2g} in the first quarter and {rest:.2g} after it. Every later token is "
            "conditioned on these; a position weight (CPPO's w_min below 1) is strict there.",
            {"first_quarter": early, "rest": rest},
        )  # fmt: skip


def _no_signal(e: Evidence) -> Iterator[Finding]:
    share = float(e.measures.sums["no_advantage"].sum() / max(1.0, e.measures.sums["responses"].sum()))
    if share > 0.4:
        yield Finding(
            "warning", f"{_percent(share)} of the responses have advantage 0",
            "Their groups got one reward each: all solved or all failed. They teach nothing and stay in the "
            "denominator; sample other problems, or leave such groups out.",
            {"no_advantage": share},
        )  # fmt: skip


def _one_response(e: Evidence) -> Iterator[Finding]:
    shares, sums = e.series["largest_response"], e.measures.sums
    teaching = sums["responses"] - sums["no_advantage"]
    crowded = np.where((teaching >= 8) & np.isfinite(shares), shares, 0.0)
    if len(crowded) and float(crowded.max()) > 0.5:
        step = e.measures.steps[int(crowded.argmax())]
        yield Finding(
            "warning", "One response dominates an update",
            f"In update {step} a single response has {_percent(float(crowded.max()))} of the gradient's weight: "
            "very long, or with ratios that nothing caps.",
            {"largest_response": float(crowded.max()), "update": float(step)},
        )  # fmt: skip


_RULES = (
    _collapse, _never_acts, _truncated_sampler, _engine_mismatch, _acts_on_many, _growing_drift, _no_log_prob,
    _log_prob_above_0, _wrong_divergence, _in_two_files, _one_response, _no_signal, _pinned_budget, _early_drift,
    _unequal_signs,
)  # fmt: skip


def as_dict(finding: Finding) -> dict[str, Any]:
    """Return a finding for JSON."""
    numbers = {name: value if np.isfinite(value) else None for name, value in finding.numbers.items()}
    return dataclasses.asdict(finding) | {"numbers": numbers}
