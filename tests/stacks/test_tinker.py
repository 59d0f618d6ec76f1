"""The adapter in tinker's own custom-loss path, on data in tinker-cookbook's form; the gradients are the core's."""

import dataclasses
import inspect

import pytest
import torch
from drivers import tinker as driver
from one_batch import SPECS, close, core, make_batch
from tinker import TensorData

import cppo
from cppo.adapters.tinker import loss_function


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_the_cores(spec):
    for seed in range(3):
        batch = make_batch(seed)
        found = driver.gradient(spec, batch)
        close(found, core(spec, batch, denominator=1.0)[0])
        assert (found[batch.mask] != 0).any()


def test_the_loss_is_a_sum_unless_a_denominator_is_given():
    batch = make_batch()
    loss, _, gradient = driver.run(batch, loss_function("cppo"))
    mean_loss, _, mean = driver.run(batch, loss_function("cppo", denominator=40))
    close(mean * 40, gradient)
    assert mean_loss * 40 == pytest.approx(loss)
    out = cppo.policy_loss(cppo.CPPO(), batch.logp, batch.rollout_logp, batch.advantages, batch.mask, denominator=1.0)
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)


def test_knobs_stand_beside_a_name_too():
    batch = make_batch()
    found = driver.run(batch, loss_function("cppo", delta=0.05, delta_b=0.01))[2]
    close(found, core(cppo.CPPO(delta=0.05, delta_b=0.01), batch, denominator=1.0)[0])
    assert not torch.equal(found, driver.gradient("cppo", batch))
    assert torch.equal(driver.run(batch, loss_function(cppo.CPPO(delta=0.05, delta_b=0.01)))[2], found)


@pytest.mark.parametrize("form", [lambda x: x, TensorData.to_torch, TensorData.tolist], ids=["data", "torch", "list"])
def test_columns_beside_the_data_are_those_inside(form):
    batch = make_batch()
    bare, columns = driver.stripped(driver.as_tinker_cookbook_has_it(batch))
    lists = {key: [form(values) for values in rows] for key, rows in columns.items()}
    fn = loss_function("cppo", rollout_logp=lists["logprobs"], advantages=lists["advantages"], mask=lists["mask"])
    assert torch.equal(driver.run(batch, fn, bare)[2], driver.gradient("cppo", batch))


def test_nothing_outside_the_mask_is_read():
    batch = make_batch()
    wanted = driver.run(batch, loss_function("cppo"))
    nan = float("nan")
    spoiled = dataclasses.replace(
        batch,
        logp=torch.where(batch.mask, batch.logp, nan),
        rollout_logp=torch.where(batch.mask, batch.rollout_logp, nan),
        advantages=torch.where(batch.mask, batch.advantages[:, None], nan),
    )
    data = driver.as_tinker_cookbook_has_it(spoiled, junk=nan)
    loss, metrics, gradient = driver.run(spoiled, loss_function("cppo"), data, junk=nan)
    assert (loss, metrics) == wanted[:2]
    assert torch.equal(gradient, wanted[2])


def test_an_empty_batch_costs_nothing_and_still_has_a_gradient():
    batch = make_batch()
    nobody = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    loss, metrics, gradient = driver.run(nobody, loss_function("cppo"))
    assert loss == 0
    assert not gradient.any()
    assert metrics["input/tokens"] == 0
    leaves = [torch.zeros(0, requires_grad=True) for _ in range(2)]
    empty = [[] for _ in leaves]
    fn = loss_function("cppo", rollout_logp=empty, advantages=empty, mask=empty)
    fn([None, None], leaves)[0].backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_advantages_are_numbers_a_token_also_beside_empty_data():
    leaves = [torch.zeros(0, requires_grad=True), torch.tensor([-0.5, -0.6], requires_grad=True)]
    columns = {
        "rollout_logp": [[], [-0.5, -0.6]], "advantages": [[], [1.0, 3.0]], "mask": [[], [1.0, 1.0]]
    }  # fmt: skip
    loss_function("policy_gradient", **columns)([None, None], leaves)[0].backward()
    close(leaves[1].grad, torch.tensor([-1.0, -3.0]))


def test_metrics_are_those_of_all_data_together():
    batch = make_batch()
    metrics = driver.run(batch, loss_function("cppo"))[1]
    out = cppo.policy_loss(cppo.CPPO(), batch.logp, batch.rollout_logp, batch.advantages, batch.mask)
    for name, value in out.metrics.items():
        if name not in ("input/first_nonfinite", "input/responses"):
            assert metrics[name] == pytest.approx(value.item(), rel=1e-5), name
    assert type(metrics["gate/masked_fraction"]) is float
    assert "input/first_nonfinite" not in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detla": 0.2}, "cppo has no knob 'detla': expected one of delta"),
        ({"delta": -1}, r"CPPO\(delta=-1\): expected a number"),
        ({"method": "cpo"}, "method='cpo': expected one of cppo"),
        ({"method": "cppo?delta=0.1", "delta": 0.2}, "expected its knobs in one place"),
        ({"divergence": "topk_tv"}, "tinker keeps the sampled token's log-prob alone"),
        ({"denominator": 0}, r"denominator=0: expected a number in \(0, inf\)"),
        ({"denominator": float("inf")}, "denominator=inf: expected"),
        ({"denominator": float("nan")}, "denominator=nan: expected"),
        ({"denominator": "3"}, "denominator='3': expected"),
    ],
)
def test_wrong_arguments_fail_before_any_data(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        loss_function(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "argument"), [("logprobs", "rollout_logp"), ("advantages", "advantages"), ("mask", "mask")]
)
def test_a_missing_or_misaligned_column_is_named(key, argument):
    batch = make_batch()
    data = driver.as_tinker_cookbook_has_it(batch)
    value = data[2].loss_fn_inputs.pop(key)
    with pytest.raises(ValueError, match=rf"data\[2\].loss_fn_inputs\['{key}'\]: missing; .* as {argument}="):
        driver.run(batch, loss_function("cppo"), data)
    data[2].loss_fn_inputs[key] = TensorData.from_torch(value.to_torch()[1:])
    with pytest.raises(
        ValueError, match=rf"data\[2\].loss_fn_inputs\['{key}'\]: expected 1-D, like .*\[9\], got \[8\]"
    ):
        driver.run(batch, loss_function("cppo"), data)
    with pytest.raises(ValueError, match=f"{argument}: expected one entry a datum, 6, got 1"):
        driver.run(batch, loss_function("cppo", **{argument: [[0.0]]}))
    rows = driver.stripped(driver.as_tinker_cookbook_has_it(batch))[1][key]
    with pytest.raises(ValueError, match=rf"{argument}\[0\]: expected 1-D, like .*\[13\], got \[1\]"):
        driver.run(batch, loss_function("cppo", **{argument: [[0.0], *rows[1:]]}))


def test_several_targets_a_position_are_refused():
    leaf = torch.zeros(2, 3, requires_grad=True)
    fn = loss_function("cppo", rollout_logp=[leaf.detach()], advantages=[leaf.detach()], mask=[leaf.detach()])
    with pytest.raises(ValueError, match=r"expected 1-D, like target_tokens \[2, 3\]"):
        fn([None], [leaf])


def test_the_function_has_the_form_that_the_sdk_calls():
    assert driver.VERSION == "0.38.0"
    assert list(inspect.signature(loss_function("cppo")).parameters) == ["data", "logprobs"]
