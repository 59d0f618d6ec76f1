"""The ratio methods against TRL's own losses, gradient for gradient."""

import math

import pytest
import torch
from trl_losses import (
    CLIP,
    EVERY_RULE,
    GMPO_LOSSES,
    GRPO,
    SEEDS,
    SEQUENCE,
    SEQUENCE_LOSSES,
    TOKEN_LOSSES,
    WIDTH,
    acted,
    assert_same,
    losses,
    our_gradient,
    our_gradient_as_trl_divides,
    response_mask,
    signs_of_advantage,
    trl_gradient,
    trl_inputs,
    trl_normaliser,
    trl_trainer,
)

import cppo

pytestmark = pytest.mark.train


class Witness:
    """Remembers on which signs of advantage a method's rule acted, and on which it left tokens alone."""

    def __init__(self, method):
        self.method, self.seen = method, set()

    def __call__(self, decision):
        for name, tokens in zip(("acted", "left alone"), acted(self.method, decision), strict=True):
            self.seen |= {(name, sign) for sign in signs_of_advantage(decision, tokens)}

    def assert_both(self):
        expected = {(name, sign) for name in ("acted", "left alone") for sign in (1, -1)}
        if getattr(self.method, "clip_low", 0) >= 1:  # bounds nothing
            expected -= {("acted", -1)}
            assert ("acted", -1) not in self.seen
        assert self.seen >= expected


@losses(TOKEN_LOSSES + SEQUENCE_LOSSES + GMPO_LOSSES)
def test_trls_own_loss_has_our_gradient_at_every_token(tmp_path, loss, settings, method):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    witness = Witness(method)
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed)
        assert (response_mask(inputs).sum(1) == 0).sum() == 2
        for training in (True, False):
            trainer.model.train(training)
            expected, decision = our_gradient_as_trl_divides(method, trainer, inputs, logp)
            assert_same(trl_gradient(trainer, inputs, logp), expected)
        witness(decision)
    witness.assert_both()


@losses(TOKEN_LOSSES + SEQUENCE_LOSSES + GMPO_LOSSES)
def test_trls_own_loss_has_our_gradient_in_float32(tmp_path, loss, settings, method):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs(3, dtype=torch.float32)
    found = trl_gradient(trainer, inputs, logp)
    assert found.dtype == torch.float32
    assert_same(found, our_gradient_as_trl_divides(method, trainer, inputs, logp)[0], torch.float32)


@losses(TOKEN_LOSSES)
def test_trls_own_token_losses_have_our_gradient_with_an_advantage_a_token(tmp_path, loss, settings, method):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed, per_token=True)
        expected, _ = our_gradient_as_trl_divides(method, trainer, inputs, logp)
        assert_same(trl_gradient(trainer, inputs, logp), expected)


@pytest.mark.parametrize(
    ("loss", "settings", "method", "reduction"),
    [
        ("grpo", CLIP, GRPO, {"reduction": "sequence-mean"}),
        ("bnpo", CLIP, GRPO, {"reduction": "token-mean"}),
        ("dapo", CLIP, GRPO, {"reduction": "token-mean"}),
        ("dr_grpo", CLIP, GRPO, {"reduction": "fixed-length", "fixed_length": WIDTH + 1}),
        ("cispo", {"epsilon_high": 5.0}, cppo.CISPO(), {"reduction": "token-mean"}),
        ("sapo", {}, cppo.SAPO(), {"reduction": "sequence-mean"}),
        ("grpo", SEQUENCE | {"epsilon": 3e-4, "epsilon_high": 4e-4}, cppo.GSPO(), {"reduction": "sequence-mean"}),
        ("gmpo", {"epsilon": 0.4}, cppo.GMPO(), {"reduction": "sequence-mean"}),
    ],
)
def test_without_empty_rows_and_accumulation_our_denominators_are_trls(tmp_path, loss, settings, method, reduction):
    trainer = trl_trainer(tmp_path, loss_type=loss, gradient_accumulation_steps=1, steps_per_generation=1, **settings)
    inputs, logp = trl_inputs(1, empty_rows=False)
    inputs["num_items_in_batch"] = response_mask(inputs).sum()  # this call is the whole batch
    expected, _ = our_gradient(method, inputs, logp, **reduction)
    # TRL's default temperature of 1.05 is one that float32 rounds.
    assert_same(trl_gradient(trainer, inputs, logp), expected, torch.float32 if loss == "sapo" else torch.float64)


@pytest.mark.parametrize("case", EVERY_RULE)
def test_trls_own_loss_and_forward_pass_have_our_parameter_gradient(tmp_path, case):
    loss, settings, method = case
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs(2, dtype=torch.float32)
    drift = logp - inputs["old_per_token_logps"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, WIDTH, compute_entropy=True)
    # What the stand-in of the other tests returns has this form.
    logp, entropies, auxiliary = scores
    assert logp.shape == entropies.shape == inputs["completion_mask"].shape
    assert auxiliary is None

    def parameter_gradient(value):
        trainer.model.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    inputs["old_per_token_logps"] = logp.detach() - drift
    found = parameter_gradient(trainer._compute_loss(trainer.model, inputs))
    out = cppo.policy_loss(
        method, logp, inputs["old_per_token_logps"], inputs["advantages"], response_mask(inputs),
        **trl_normaliser(trainer, inputs),
    )  # fmt: skip
    expected = parameter_gradient(out.loss)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_trls_delta_above_its_clip_is_our_dual_clip(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", delta=2.0, **CLIP)
    dual = cppo.GRPO(clip_low=0.2, clip_high=0.28, dual_clip=2.0)
    fired = 0
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed)
        expected, decision = our_gradient_as_trl_divides(dual, trainer, inputs, logp)
        assert_same(trl_gradient(trainer, inputs, logp), expected)
        _, without = our_gradient_as_trl_divides(GRPO, trainer, inputs, logp)
        fired += int((decision.rejected_by != without.rejected_by).sum())
    assert fired > 0


@pytest.mark.parametrize(
    ("advantage", "bound", "knobs"), [(1.0, 2.0, {}), (-1.0, 0.5, {}), (-1.0, 4.0, {"delta": 4.0})]
)
def test_a_ratio_exactly_on_a_bound_is_kept_by_trl_and_by_us(tmp_path, advantage, bound, knobs):
    trainer = trl_trainer(tmp_path, loss_type="dapo", epsilon=0.5, epsilon_high=1.0, **knobs)
    method = cppo.GRPO(clip_low=0.5, clip_high=1.0, dual_clip=knobs.get("delta"))
    inputs, logp = trl_inputs()
    inputs["advantages"] = torch.full_like(inputs["advantages"], advantage)
    inputs["old_per_token_logps"] = torch.zeros_like(logp)
    outward = math.inf if bound > 1 else -math.inf
    edge = math.log(bound)
    assert math.exp(edge) == bound
    beyond = math.nextafter(math.nextafter(edge, outward), outward)
    for log_ratio, kept in ((edge, True), (beyond, False)):
        logp = torch.full_like(logp, log_ratio)
        expected, decision = our_gradient_as_trl_divides(method, trainer, inputs, logp)
        mask = response_mask(inputs)
        assert (decision.gate[mask] == float(kept)).all()
        torch.testing.assert_close(trl_gradient(trainer, inputs, logp), expected, rtol=1e-12, atol=0)
