"""The adapter in rLLM's way from a configuration to its verl and tinker backends; the gradients are the core's."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import yaml
from drivers import rllm as driver
from one_batch import SPECS, close, core, make_batch

import cppo

adapter = driver.adapter
BACKENDS = {"tinker": driver.run_tinker, "verl": driver.run_verl}
PARAMS = {"method": "cppo", "delta": 0.05, "delta_b": 0.01}
own_code = pytest.mark.skipif(driver.CHECKOUT is None, reason="CPPO_RLLM names no checkout")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_the_cores(spec, backend):
    method = adapter.build_method({"method": spec})
    for seed in range(3):
        batch = make_batch(seed)
        found = driver.gradient(spec, batch, backend)
        close(found, core(method, batch, denominator=1.0)[0])
        assert (found[batch.mask] != 0).any()


@each_backend
def test_knobs_come_from_loss_params_and_rllms_own_are_passed_over(backend):
    batch, run = make_batch(), BACKENDS[backend]
    found = run(batch, PARAMS)[2]
    close(found, core(cppo.CPPO(delta=0.05, delta_b=0.01), batch)[0])
    assert not torch.equal(found, run(batch, {"method": "cppo"})[2])
    assert torch.equal(run(batch, PARAMS, eps_clip=0.01, eps_clip_high=0.5)[2], found)


def test_the_loss_is_the_cores_too():
    batch = make_batch()
    out = cppo.policy_loss(cppo.CPPO(), batch.logp, batch.rollout_logp, batch.advantages, batch.mask)
    for run in BACKENDS.values():
        loss = run(batch, {"method": "cppo"})[0]
        torch.testing.assert_close(torch.as_tensor(loss), out.loss, rtol=1e-5, atol=1e-7)


@each_backend
def test_every_response_weighs_the_same_where_rllm_says_so(backend):
    batch = make_batch()
    found = BACKENDS[backend](batch, PARAMS, aggregation="seq-mean-token-mean")[2]
    # verl counts the row without a response.
    responses = {"tinker": None, "verl": float(len(batch.lengths))}[backend]
    method = cppo.CPPO(delta=0.05, delta_b=0.01)
    close(found, core(method, batch, reduction="sequence-mean", denominator=responses)[0])


def test_verl_divides_by_the_steps_tokens():
    batch = make_batch()
    found = driver.run_verl(batch, PARAMS, dp_size=4, tokens=1000)[2]
    close(found, core(cppo.CPPO(delta=0.05, delta_b=0.01), batch, denominator=250.0)[0])


def test_verls_recomputed_policy_is_not_asked():
    batch = make_batch()
    found = driver.run_verl(batch, PARAMS, old_logp=torch.full_like(batch.logp, float("nan")))[2]
    assert torch.equal(found, driver.run_verl(batch, PARAMS)[2])


def test_without_the_samplers_log_probs_it_says_what_to_set():
    message = r"ctx.logp_rollout: .* got None; set actor_rollout_ref.rollout.calculate_log_probs=True"
    with pytest.raises(ValueError, match=message):
        driver.run_verl(make_batch(), PARAMS, captured=False)


@each_backend
def test_nothing_outside_the_mask_is_read(backend):
    batch, run = make_batch(), BACKENDS[backend]
    wanted = run(batch, PARAMS)[2]
    spoiled = dataclasses.replace(batch, rollout_logp=torch.where(batch.mask, batch.rollout_logp, float("nan")))
    found = run(spoiled, PARAMS, **({"junk": float("nan")} if backend == "verl" else {}))[2]
    assert torch.equal(found, wanted)


@each_backend
def test_a_broken_token_costs_itself_alone_and_no_response_costs_nothing(backend):
    batch, run = make_batch(), BACKENDS[backend]
    batch.rollout_logp[3, 5] = float("nan")
    gradient = run(batch, PARAMS)[2]
    assert gradient.isfinite().all()
    assert gradient[3, 5] == 0
    nobody = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    loss, _, gradient = run(nobody, PARAMS, **({"tokens": 9} if backend == "verl" else {}))
    assert loss == 0
    assert not gradient.any()


def test_metrics_are_floats():
    batch = make_batch()
    metrics = driver.run_verl(batch, PARAMS)[1]
    out = cppo.policy_loss(
        cppo.CPPO(delta=0.05, delta_b=0.01), batch.logp, batch.rollout_logp, batch.advantages, batch.mask
    )
    assert set(metrics) == set(out.metrics) - {"input/first_nonfinite"}
    for name, value in metrics.items():
        assert value == pytest.approx(out.metrics[name].item(), rel=1e-5), name
    assert driver.run_tinker(batch, PARAMS)[1]["gate/masked_fraction"] > 0


@each_backend
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "algorithm.loss_params.method: missing; expected a method"),
        ({"delta": 0.1}, "algorithm.loss_params.method: missing"),
        ({"method": "cppo", "detla": 0.2}, "cppo has no knob 'detla': expected one of delta"),
        ({"method": "cppo", "delta": -1}, r"CPPO\(delta=-1\): expected a number"),
        ({"method": "cpo"}, "method='cpo': expected one of cppo"),
        ({"method": "cppo?delta=0.1", "delta": 0.2}, "expected its knobs in one place"),
        ({"method": "cppo", "divergence": "topk_tv"}, "rLLM keeps the sampled token's log-prob alone"),
        ({"method": "cppo", "kl_beta": 0.01}, "algorithm.kl_beta=0.01: expected 0"),
    ],
)
def test_wrong_params_are_one_clear_line(params, message, backend):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        BACKENDS[backend](make_batch(), params)
    assert "\n" not in str(caught.value)


@each_backend
def test_the_section_in_the_docstring_is_one(backend):
    text = adapter.__doc__[adapter.__doc__.index("    algorithm:") :].split("\n\n")[0]
    section = yaml.safe_load(text)["algorithm"]
    assert section["loss_plugins"] == ["cppo.adapters.rllm"]
    found = BACKENDS[backend](make_batch(), section["loss_params"], name=section["loss_fn"])[2]
    close(found, core(cppo.CPPO(delta=0.15), make_batch())[0])


def test_the_name_cppo_is_the_same_loss_where_no_backend_has_one():
    batch = make_batch()
    assert torch.equal(driver.run_tinker(batch, PARAMS, name="cppo")[2], driver.run_tinker(batch, PARAMS)[2])


# ---------------------------------------------------------------- how rLLM finds it


def test_a_context_that_cannot_tell_the_sampler_from_the_recomputed_policy_is_refused(caplog):
    @dataclasses.dataclass
    class Older:
        pi: torch.Tensor
        mu: torch.Tensor

    older = driver.stand_in(Older)
    with pytest.raises(ImportError, match=r"rllm\.LossContext has no logp_rollout"):
        driver.load(older)
    assert older.registry == {}
    assert "cannot be loaded, no loss was registered" in caplog.text
    caplog.clear()
    without_registry = driver.stand_in()
    del without_registry.register_loss
    with pytest.raises(AttributeError, match="register_loss"):
        driver.load(without_registry)
    assert "no loss was registered" in caplog.text


@own_code
def test_verl_has_a_cppo_of_its_own_and_takes_no_loss_params_for_it():
    from cppo.adapters import verl  # noqa: F401  what verl does where this package is installed

    assert driver.resolve("verl", PARAMS, name="cppo") is None
    assert driver.resolve("verl", PARAMS).fn is adapter.trust_region


def rllm_process(code, path):
    source = pathlib.Path(cppo.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=path,
        env=os.environ | {"PYTHONPATH": f"{path}:{source}:{driver.CHECKOUT}"},
    )  # fmt: skip


@pytest.fixture
def installed(tmp_path):
    """What installing the package leaves behind for rLLM to find."""
    info = tmp_path / "cppo-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cppo\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[rllm.losses]\ntrust_region = cppo.adapters.rllm\n")
    return tmp_path


FIND = "from rllm.trainer.algorithms.loss import get_loss; print(get_loss('trust_region').__module__)"
WITHOUT = "import rllm; del rllm.LossContext.__dataclass_fields__['logp_rollout']; "


@own_code
def test_installed_is_available(installed):
    done = rllm_process(FIND, installed)
    assert done.stdout == "cppo.adapters.rllm\n", done.stderr


@own_code
def test_a_plugin_that_cannot_be_loaded_says_so(installed):
    done = rllm_process(WITHOUT + FIND, installed)
    assert done.returncode != 0
    assert "cppo.adapters.rllm: cannot be loaded, no loss was registered" in done.stderr
    assert "Unknown loss 'trust_region'" in done.stderr
