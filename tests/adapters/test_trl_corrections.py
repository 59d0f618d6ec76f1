"""The corrections of the engine mismatch against TRL's own: the same weights, and the same gradient under them."""

import pytest
import torch
from trl_losses import (
    CORRECTIONS,
    GRPO,
    SEEDS,
    SEQUENCE_LOSSES,
    TOKEN_LOSSES,
    Engine,
    acted,
    assert_same,
    correcting_rollout,
    correcting_trainer,
    our_corrected,
    response_mask,
    trl_gradient,
    trl_rollout,
    trl_weights,
)

import cppo

pytestmark = pytest.mark.train

corrections = pytest.mark.parametrize(
    ("mode", "low", "high", "correction"), CORRECTIONS, ids=[f"{c[0]}-{c[1]}-{c[2]}" for c in CORRECTIONS]
)


@corrections
def test_trls_own_correction_weights_are_ours(tmp_path, mode, low, high, correction):
    trainer, weights = correcting_trainer(tmp_path, Engine(0), mode, low, high), []
    for seed in SEEDS:
        trainer.rollout_func = engine = Engine(seed)
        inputs = trl_rollout(trainer, engine)
        _, decision = our_corrected(GRPO, correction, trainer, inputs, engine.logp)
        mask = response_mask(inputs)
        found = trl_weights(inputs)[mask]
        torch.testing.assert_close(found, decision.trace.correction[mask], rtol=1e-5, atol=0)
        weights.append(found)
    weights = torch.cat(weights)
    if mode.endswith("truncate"):
        assert (weights == high).any()
        assert (weights < high).any()
    else:
        assert (weights == 0).any()
        assert (weights > 1).any()
        assert ((weights > 0) & (weights < 1)).any()


@corrections
@pytest.mark.parametrize("case", [TOKEN_LOSSES[0], TOKEN_LOSSES[1], TOKEN_LOSSES[7], TOKEN_LOSSES[9]])
def test_trls_own_loss_under_its_own_correction_weights_has_our_gradient(tmp_path, case, mode, low, high, correction):
    loss, settings, method = case
    engine = Engine(1)
    trainer, inputs = correcting_rollout(tmp_path, engine, mode, low, high, loss_type=loss, **settings)
    expected, decision = our_corrected(method, correction, trainer, inputs, engine.logp)
    assert_same(trl_gradient(trainer, inputs, engine.logp), expected, torch.float32)
    # Both acted, the correction and the method.
    plain = cppo.decide(method, engine.logp, inputs["old_per_token_logps"], inputs["advantages"], response_mask(inputs))
    assert (decision.coefficient - plain.coefficient).abs().max() > 0.1
    for tokens in acted(method, plain):
        assert (tokens & response_mask(inputs)).any()


@pytest.mark.parametrize("case", [case for case in CORRECTIONS if case[0].startswith("sequence")])
def test_trls_own_sequence_ratio_under_its_own_sequence_weights_has_our_gradient(tmp_path, case):
    mode, low, high, correction = case
    loss, settings, method = SEQUENCE_LOSSES[0]
    engine = Engine(1)
    trainer, inputs = correcting_rollout(tmp_path, engine, mode, low, high, loss_type=loss, **settings)
    expected, _ = our_corrected(method, correction, trainer, inputs, engine.logp)
    assert_same(trl_gradient(trainer, inputs, engine.logp), expected, torch.float32)
