"""Hypothesis strategies: ragged batches with extreme probabilities, their padding, and every method's knobs."""

from __future__ import annotations

import math

from hypothesis import strategies as st
from layouts import INF, NAN, SIDES, Response, packed, padded

import cppo

# log-probs: ordinary ones, certain tokens, tokens below every float's smallest normal number.
EXTREME_LOGP = (0.0, -1e-300, -1e-12, -1e-7, -1e-3, -20.0, -87.5, -104.0, -709.0, -1e4)
ordinary_logp = st.floats(1e-4, 1.0).map(math.log)
logps = st.one_of(ordinary_logp, ordinary_logp, st.sampled_from(EXTREME_LOGP))
drifts = st.one_of(st.just(0.0), st.floats(-0.4, 0.4), st.floats(-3.0, 3.0))
advantages = st.one_of(
    st.floats(-3.0, 3.0), st.sampled_from((0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e3)), st.floats(-1.0, 1.0)
)
divergences = st.one_of(st.floats(0.0, 0.3), st.sampled_from((0.0, 0.15, 1.0, 40.0)))
entropies = st.one_of(st.floats(0.0, 10.0), st.just(0.0))
mismatches = st.one_of(st.just(0.0), st.floats(-0.05, 0.05), st.floats(-3.0, 3.0))
token_counts = st.one_of(st.integers(0, 3), st.integers(0, 12), st.integers(13, 40))


@st.composite
def tokens(draw):
    """Draw (logp, rollout_logp): near each other, or unrelated."""
    rollout = draw(logps)
    logp = draw(logps) if draw(st.integers(0, 4)) == 0 else min(rollout + draw(drifts), 0.0)
    return logp, rollout


@st.composite
def responses(draw, lengths=token_counts, per_token=False):
    """Draw one response; its divergence and entropy are drawn apart from its probabilities."""
    length = draw(lengths)
    pairs = draw(st.lists(tokens(), min_size=length, max_size=length))
    if per_token:
        advantage = draw(st.lists(advantages, min_size=length, max_size=length))
    else:
        advantage = [draw(advantages)] * length
    return Response(
        tuple(p for p, _ in pairs),
        tuple(m for _, m in pairs),
        tuple(advantage),
        tuple(draw(st.lists(divergences, min_size=length, max_size=length))),
        tuple(draw(st.lists(entropies, min_size=length, max_size=length))),
        tuple(min(m + draw(mismatches), 0.0) for _, m in pairs),
    )


def batches(max_responses=4, per_token=False, lengths=token_counts):
    """Draw a ragged batch of at least one response."""
    return st.lists(responses(lengths=lengths, per_token=per_token), min_size=1, max_size=max_responses)


garbages = st.sampled_from((0.0, NAN, INF, -INF, 1e30, -1e30))


@st.composite
def layouts_of(draw, batch, dtype, per_token=False):
    """Draw one layout of a batch: padded on either side, with holes, or packed, with garbage in the spare places."""
    same = {"garbage": draw(garbages), "dtype": dtype, "per_token": per_token, "extra": draw(st.integers(0, 4))}
    side = draw(st.sampled_from((*SIDES, "packed")))
    return packed(batch, **same) if side == "packed" else padded(batch, side=side, **same)


caps = st.one_of(st.none(), st.floats(0.05, 30.0))
deltas = st.one_of(st.sampled_from((0.15, 0.2, 0.1)), st.floats(1e-3, 1.5))
gaps = st.one_of(st.sampled_from(("binary_tv", "binary_kl")), st.sampled_from(cppo.methods.DIVERGENCES))

cppos = st.builds(
    cppo.CPPO,
    delta=deltas,
    delta_b=st.one_of(st.sampled_from((0.0, 0.002, 0.015, 0.02)), st.floats(0.0, 0.2)),
    budget=st.sampled_from(("adaptive", "fixed", "none")),
    w_min=st.one_of(st.sampled_from((0.8, 0.6, 1.0)), st.floats(0.01, 1.0)),
    position=st.sampled_from(("linear", "uniform", "shuffled")),
    gate=st.sampled_from(("hard", "soft", cppo.sigmoid_gate)),
    divergence=gaps,
    ratio_cap=caps,
    shuffle_seed=st.integers(0, 5),
)
dppos = st.builds(cppo.DPPO, delta=deltas, delta_low=st.one_of(st.none(), deltas), divergence=gaps, ratio_cap=caps)
ipos = st.builds(cppo.IPO, delta=deltas, divergence=gaps, ratio_cap=caps)
drpos = st.builds(cppo.DRPO, delta=st.one_of(st.just(12.5), deltas))
widths = st.floats(0.0, 1.2)
sampled = st.sampled_from(cppo.methods.SAMPLED_DIVERGENCES)
trms = st.one_of(
    st.builds(cppo.TRM, max_threshold=deltas, divergence=st.one_of(sampled, gaps)),
    st.builds(
        cppo.TRM,
        max_threshold=deltas,
        avg_threshold=deltas,
        divergence=st.one_of(sampled, gaps),
        avg_divergence=st.one_of(st.none(), sampled),
    ),
)
trm_criteria = st.one_of(
    st.builds(cppo.TRMMax, max_threshold=deltas, divergence=sampled),
    st.builds(cppo.TRMAvg, avg_threshold=deltas, divergence=sampled),
)
estrs = st.builds(cppo.ESTR, tau=st.floats(1e-3, 10.0), epsilon=st.floats(1e-3, 1.0), clip_low=widths, clip_high=widths)
grpos = st.builds(
    cppo.GRPO,
    clip_low=widths,
    clip_high=st.floats(0.0, 2.0),
    dual_clip=st.one_of(st.none(), st.floats(1.0, 20.0, exclude_min=True)),
)
cispos = st.builds(cppo.CISPO, cap=st.floats(0.5, 10.0), floor=st.floats(0.0, 0.5))
optional_widths = st.one_of(st.none(), widths)
minpros = st.builds(
    cppo.MinPRO, clip_low=optional_widths, clip_high=optional_widths, ratio_cap=caps, cap_prefix_at_one=st.booleans()
)
gspos = st.builds(cppo.GSPO, clip_low=st.one_of(st.just(3e-4), widths), clip_high=st.one_of(st.just(4e-4), widths))
sapos = st.builds(cppo.SAPO, tau_pos=st.floats(0.1, 5.0), tau_neg=st.floats(0.1, 5.0))
gmpos = st.builds(cppo.GMPO, log_clip_low=widths, log_clip_high=widths)
pnpos = st.builds(cppo.PNPO, ratio_cap=caps)
ctpos = st.builds(cppo.CTPO, epsilon=st.floats(1e-3, 3.0), ratio_cap=caps)
policy_gradients = st.builds(cppo.PolicyGradient, ratio_cap=caps)
methods = st.one_of(
    cppos, cppos, cppos, dppos, ipos, drpos, trms, trm_criteria, estrs, grpos, cispos, minpros, gspos, sapos, gmpos,
    pnpos, ctpos, policy_gradients,
)  # fmt: skip

scopes = st.sampled_from(("token", "sequence"))
one_correction = st.one_of(
    st.builds(cppo.TIS, scope=scopes, cap=st.floats(0.5, 10.0)),
    st.builds(cppo.MIS, scope=scopes, low=st.floats(0.0, 1.0), high=st.floats(1.0, 10.0)),
    st.builds(cppo.IcePop, low=st.floats(0.0, 1.0), high=st.floats(1.0, 10.0)),
    st.builds(cppo.GeometricMask, low=st.floats(0.0, 1.0), high=st.floats(1.0, 10.0)),
)
masks = st.builds(cppo.GeometricMask, low=st.floats(0.0, 1.0), high=st.floats(1.0, 10.0))
corrections = st.one_of(one_correction, st.tuples(one_correction, masks), st.tuples(masks, masks, one_correction))
