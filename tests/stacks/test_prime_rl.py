"""The adapter in prime-rl's compute_loss: packed sequences, weights, its scale; the gradients are the core's."""

import dataclasses
import tomllib

import pytest
import torch
from drivers import prime_rl as driver
from one_batch import SPECS, close, core, make_batch

import cppo
from cppo.adapters import prime_rl as adapter

own_code = pytest.mark.skipif(driver.CHECKOUT is None, reason="CPPO_PRIME_RL names no checkout")


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_the_cores(spec):
    method = adapter.check(spec)
    for seed in range(3):
        batch = make_batch(seed)
        found = driver.gradient(spec, batch)
        close(found, core(method, batch, denominator=1.0)[0])
        assert (found[batch.mask] != 0).any()


def test_knobs_stand_beside_a_name_too():
    batch = make_batch()
    beside = driver.run(batch, driver.ours(method="cppo", delta=0.05, delta_b=0.01))[2]
    close(beside, core(cppo.CPPO(delta=0.05, delta_b=0.01), batch, denominator=1.0)[0])
    assert not torch.equal(beside, driver.run(batch, driver.ours())[2])


def test_the_section_in_the_docstring_is_one():
    text = adapter.__doc__[adapter.__doc__.index("    [trainer.loss]") :].split("\n\n")[0]
    section = tomllib.loads(text)["trainer"]["loss"]
    assert section.pop("type") == "custom"
    found = driver.run(make_batch(), driver.CustomLossConfig(**section))[2]
    close(found, core(cppo.CPPO(delta=0.15), make_batch(), denominator=1.0)[0])


def test_prime_rl_divides_once():
    batch = make_batch()
    loss, _, gradient = driver.run(batch, driver.ours())
    scaled_loss, _, scaled = driver.run(batch, driver.ours(), rl_scale=5)
    close(scaled * 5, gradient)
    close(scaled_loss * 5, loss)
    out = cppo.policy_loss(cppo.CPPO(), batch.logp, batch.rollout_logp, batch.advantages, batch.mask, denominator=1.0)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl_tau", [0.0, 0.5])
def test_a_weight_scales_its_token_and_none_is_judged_without_it(kl_tau):
    batch = make_batch()
    weights = torch.rand(batch.logp.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    weights[0, 1] = weights[3, 2:4] = 0.0
    weights[2] = 0.0  # a whole response of another component
    found = driver.run(batch, driver.ours(kl_tau=kl_tau), rl_weights=weights)[2]
    members = dataclasses.replace(batch, mask=batch.mask & (weights != 0))
    expected = core(cppo.CPPO(), members, denominator=1.0)[0]
    expected = expected + torch.where(members.mask, 2 * kl_tau * (batch.logp - batch.rollout_logp), 0.0)
    close(found, expected * weights)


def test_the_kl_term_is_prime_rls_and_off_unless_asked_for():
    batch = make_batch()
    plain, term = driver.run(batch, driver.ours()), driver.run(batch, driver.ours(kl_tau=0.25))
    log_ratio = torch.where(batch.mask, batch.logp - batch.rollout_logp, 0.0)
    close(term[0] - plain[0], 0.25 * log_ratio.square().sum())
    close(term[2] - plain[2], 0.5 * log_ratio)


@pytest.mark.parametrize("kl_tau", [0.0, 0.5])
def test_nothing_outside_the_response_is_read(kl_tau):
    batch = make_batch()
    wanted = driver.run(batch, driver.ours(kl_tau=kl_tau))
    nan = float("nan")
    holes = dataclasses.replace(batch, rollout_logp=torch.where(batch.mask, batch.rollout_logp, nan))
    loss, _, found = driver.run(holes, driver.ours(kl_tau=kl_tau), junk=nan)
    assert torch.equal(found, wanted[2])
    assert torch.equal(loss, wanted[0])
    # compute_loss itself adds 0 times the first sequence's log-probs: what is asked here is asked of the loss alone.
    with driver.prime_rl() as stack:
        leaf = torch.tensor([nan, -0.5, nan], requires_grad=True)
        member, weights = torch.tensor([False, True, False]), torch.tensor([nan, 2.0, nan])
        inputs = stack.LossInputs(leaf, torch.tensor([nan, -0.4, nan]), None, torch.ones(3), member, weights)
        loss = adapter.trust_region_loss(inputs, kl_tau=kl_tau).loss
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad[[0, 2]].tolist() == [0.0, 0.0]
    assert leaf.grad[1].isfinite()


def test_a_broken_token_costs_itself_alone_and_no_response_costs_nothing():
    batch = make_batch()
    batch.rollout_logp[3, 5] = float("nan")
    loss, _, gradient = driver.run(batch, driver.ours(kl_tau=0.5))
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[3, 5] == 0
    nobody = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    loss, _, gradient = driver.run(nobody, driver.ours(kl_tau=0.5))
    assert loss == 0
    assert not gradient.any()


def test_metrics_are_numbers_a_sequence():
    batch = make_batch()
    _, metrics, _ = driver.run(batch, driver.ours())
    assert {tuple(values.shape) for values in metrics.values()} == {(len(batch.lengths),)}
    assert metrics["input/tokens"].tolist() == batch.mask.sum(1).tolist()
    assert metrics["gate/masked_fraction"].max() > 0
    assert "input/first_nonfinite" not in metrics


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"detla": 0.2}, "cppo has no knob 'detla': expected one of delta"),
        ({"delta": -1}, r"CPPO\(delta=-1\): expected a number"),
        ({"delta": [0.1]}, r"CPPO\(delta=\[0.1\]\): expected a number"),
        ({"method": "cpo"}, "method='cpo': expected one of cppo"),
        ({"method": "cppo?delta=0.1", "delta": 0.2}, "expected its knobs in one place"),
        ({"divergence": "topk_tv"}, "prime-rl keeps the sampled token's log-prob alone"),
        ({"method": "estr", "epsilon": 0.1, "tau": 0.1}, "needs no rollout_entropy"),
        ({"kl_tau": -1.0}, r"kl_tau=-1.0: expected a number in \[0, inf\)"),
        ({"kl_tau": "1"}, r"kl_tau='1': expected"),
        ({"kl_tau": float("inf")}, r"kl_tau=inf: expected"),
        ({"kl_tau": float("nan")}, r"kl_tau=nan: expected"),
    ],
)
def test_wrong_kwargs_are_one_clear_line(kwargs, message):
    for attempt in (lambda: adapter.check(**kwargs), lambda: driver.run(make_batch(), driver.ours(**kwargs))):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@own_code
@pytest.mark.parametrize("kl_tau", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("theirs", "kwargs"),
    [
        (driver.DefaultLossConfig(dppo_mask_low=0.05, dppo_mask_high=0.1), {"method": "dppo", "delta_low": 0.05}),
        (driver.IPOLossConfig(ipo_threshold=0.1), {"method": "ipo"}),
    ],
    ids=["default", "ipo"],
)
def test_methods_that_prime_rl_has_too_give_its_gradient(theirs, kwargs, kl_tau):
    for seed in range(4):
        batch = make_batch(seed)
        wanted = driver.run(batch, dataclasses.replace(theirs, kl_tau=kl_tau))[2]
        close(driver.run(batch, driver.ours(delta=0.1, kl_tau=kl_tau, **kwargs))[2], wanted)
