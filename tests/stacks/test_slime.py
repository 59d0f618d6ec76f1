"""The adapter as slime's custom loss, in one process and with responses cut over two; gradients are the core's.

Against a stand-in for slime; with CPPO_SLIME=a checkout, against its own loss.py and cp_utils.py.
"""

import dataclasses
import math
import os
import pathlib

import one_batch
import pytest
import ranks
import torch
from drivers import slime as driver
from one_batch import SPECS, core

import cppo
from cppo.adapters import slime as adapter

SPEC = SPECS[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_the_cores(spec):
    for seed in range(3):
        batch = one_batch.make_batch(seed)
        expected, _ = core(spec, batch, denominator=1.0)
        close(driver.gradient(spec, batch), expected)
    assert (expected != 0).any()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_mean_of_sample_means_is_slimes_and_rejected_tokens_stay_in_it(recompute):
    batch = one_batch.make_batch()
    args = driver.arguments(SPEC, calculate_per_token_loss=False, recompute_loss_function=recompute)
    loss, log, gradient = driver.run(args, batch)
    expected, out = core(SPEC, batch, reduction="sequence-mean", denominator=6.0)
    close(gradient, expected)
    assert loss == pytest.approx(out.loss.item(), rel=1e-4)
    per_row = ((out.decision.rejected_by > 0).sum(1) / batch.mask.sum(1).clamp(min=1)).sum().item()
    assert log["gate/masked_fraction"] == pytest.approx(per_row, rel=1e-5)  # slime divides by the step's responses
    assert log["pg_loss"] == pytest.approx(6 * out.loss.item(), rel=1e-4)


def test_what_is_logged_are_sums_that_slime_divides():
    batch = one_batch.make_batch()
    _, log, _ = driver.run(driver.arguments(SPEC), batch)
    _, out = core(SPEC, batch)
    tokens = batch.mask.sum().item()
    for name in ("gate/mean", "gate/masked_fraction", "divergence/mean"):
        assert log[name] / tokens == pytest.approx(out.metrics[name].item(), rel=1e-5), name
    gap = ((batch.logp - batch.rollout_logp).abs() * batch.mask).sum().item()
    assert log["train_rollout_logprob_abs_diff"] == pytest.approx(gap, rel=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_slimes_entropy_and_kl_terms_are_kept(unbiased):
    batch = one_batch.make_batch()
    args = driver.arguments(
        SPEC, entropy_coef=0.3, use_kl_loss=True, kl_loss_coef=0.2, use_unbiased_kl=unbiased, kl_loss_type="k2"
    )
    loss, log, gradient = driver.run(args, batch)
    _, out = core(SPEC, batch, denominator=1.0)
    leaf = batch.logp.clone().double().requires_grad_()
    inside = torch.where(batch.mask, leaf, -1.0)
    entropy = -(inside.exp() * inside + (1 - inside.exp()) * torch.log(-torch.expm1(inside)))
    ratio = (inside - batch.rollout_logp).exp() if unbiased else 1.0
    kl = ratio * (inside - (batch.rollout_logp - 0.1)) ** 2 / 2
    (0.2 * kl - 0.3 * entropy)[batch.mask].sum().backward()
    expected = core(SPEC, batch, denominator=1.0)[0] + leaf.grad.float()
    close(gradient, expected)
    assert log["kl_loss"] == pytest.approx(kl[batch.mask].sum().item(), rel=1e-4)
    assert log["entropy_loss"] == pytest.approx(entropy[batch.mask].sum().item(), rel=1e-4)
    wanted = out.loss.item() + 0.2 * log["kl_loss"] - 0.3 * log["entropy_loss"]
    assert loss == log["loss"] == pytest.approx(wanted, rel=1e-4)


def halved(total_lengths, response_lengths, loss_masks, per_token):
    assert per_token
    assert len(total_lengths) == len(response_lengths) == len(loss_masks)
    return lambda values: values.sum() / 2


def test_a_reducer_of_ones_own_is_called():
    batch = one_batch.make_batch()
    args = driver.arguments(SPEC, custom_pg_loss_reducer_function_path=f"{__name__}.halved")
    close(driver.run(args, batch)[2], core(SPEC, batch, denominator=2.0)[0])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_a_tools_tokens_may_hold_anything(junk):
    batch = one_batch.make_batch()
    advantages = batch.advantages[:, None].expand(batch.logp.shape)
    spoiled = dataclasses.replace(
        batch,
        rollout_logp=torch.where(batch.mask, batch.rollout_logp, junk),
        advantages=torch.where(batch.mask, advantages, junk),
    )
    loss, log, gradient = driver.run(driver.arguments(SPEC), spoiled)
    expected, out = core(SPEC, batch, denominator=1.0)
    close(gradient, expected)
    assert loss == pytest.approx(out.loss.item(), rel=1e-4)
    assert all(math.isfinite(value) for value in log.values())


def test_a_micro_batch_without_a_token_has_loss_zero():
    batch = one_batch.make_batch()
    loss, _, gradient = driver.run(driver.arguments(SPEC), batch, rows=[4])
    assert loss == 0
    assert (gradient == 0).all()


def test_an_advantage_a_token_is_not_taken_for_one_a_response():
    # Two responses, two tokens, both of the first.
    batch = one_batch.Batch(
        logp=torch.tensor([[-1.0, -1.0], [0.0, 0.0]]), rollout_logp=torch.tensor([[-1.0, -1.0], [0.0, 0.0]]),
        advantages=torch.tensor([[1.0, -2.0], [5.0, 5.0]]), mask=torch.tensor([[True, True], [False, False]]),
    )  # fmt: skip
    args = driver.arguments("policy_gradient")
    lengths, one_batch.LENGTHS = one_batch.LENGTHS, (2, 0)
    try:
        _, _, gradient = driver.run(args, batch)
    finally:
        one_batch.LENGTHS = lengths
    close(gradient, torch.tensor([[-1.0, 2.0], [0.0, 0.0]]))


@pytest.mark.parametrize("missing", [None, []])
def test_no_log_probs_of_the_sampler_is_an_error_that_names_the_key(missing):
    with pytest.raises(ValueError, match=r"rollout_log_probs: expected .*Sample.rollout_log_probs"):
        driver.run(driver.arguments(SPEC), one_batch.make_batch(), rollout_log_probs=missing)


# ---------------------------------------------------------------- responses cut over ranks


@pytest.fixture(scope="module", params=[2, 3])
def cut(request, tmp_path_factory):
    here, source = pathlib.Path(__file__).parent, pathlib.Path(cppo.__file__).parent.parent
    with pytest.MonkeyPatch.context() as patch:  # the processes start in another folder
        patch.setenv("PYTHONPATH", f"{here}{os.pathsep}{source}")
        if driver.REAL:
            patch.setenv("CPPO_SLIME", driver.REAL)
        folder = tmp_path_factory.mktemp("gloo")
        return request.param, ranks.run_processes(request.param, folder, "cut", module="drivers.slime")


@pytest.mark.processes
def test_the_ranks_gradients_sum_to_the_uncut_batchs(cut):
    world, answers = cut
    for index, (args, seed, rows) in enumerate(driver.cases()):
        args.allgather_cp = False  # cut otherwise, the same uncut
        loss, log, gradient = driver.run(args, one_batch.make_batch(seed), rows=rows)
        losses, logs, gradients = zip(*(answer[index] for answer in answers), strict=True)
        # Megatron averages over these ranks what slime has multiplied by their number.
        close(torch.stack(gradients).sum(0) / world, gradient)
        assert sum(losses) / world == pytest.approx(loss, rel=1e-4)
        for name in log:
            assert sum(found[name] for found in logs) == pytest.approx(log[name], rel=1e-4, abs=1e-5), name
        assert (torch.stack(gradients) != 0).sum(0).max() == 1  # no token is on two ranks
    batch = one_batch.make_batch(0)
    uncut = torch.stack([answer[0][2] for answer in answers]).sum(0) / world
    close(uncut, core(SPEC, batch, denominator=1.0)[0])


def test_some_rank_has_no_token_of_some_response_and_some_response_lies_on_one_rank():
    lengths = []
    for rank in range(2):
        stand_in = driver.StandIn(2, rank)
        for row, response in enumerate(one_batch.LENGTHS):
            _, pieces = stand_in.pieces(driver.prompt_length(row) + response, response)
            lengths.append([b - a for a, b in pieces])
    assert any(first == 0 and second > 0 for first, second in lengths)
    assert any(0 < first != second > 0 for first, second in lengths)
    assert any(first == second == 0 for first, second in lengths)


# ---------------------------------------------------------------- configuration


def test_a_launch_as_the_docs_have_it_passes():
    adapter.check(driver.arguments(SPEC))
    assert adapter.build_method(driver.arguments(SPEC)) == cppo.parse_method(SPEC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cppo_method": None}, "cppo_method=None: expected a spec such as .* --custom-config-path"),
        ({"cppo_method": {"delta": 1}}, "cppo_method={'delta': 1}: expected a spec"),
        ({"cppo_method": "cpo"}, "cpo"),
        ({"cppo_method": "cppo?detla=0.1"}, "detla"),
        ({"cppo_method": "cppo?delta=-1"}, "delta=-1"),
        ({"cppo_method": "cppo?divergence=topk_tv"}, "slime keeps the sampled token's log-prob alone"),
        ({"loss_type": "policy_loss"}, "loss_type='policy_loss': expected custom_loss"),
        ({"custom_loss_function_path": "cppo.adapters.slime"}, "expected cppo.adapters.slime.policy_loss"),
        ({"use_tis": True}, "use_tis=True: expected False; the ratio"),
        ({"get_mismatch_metrics": True}, "get_mismatch_metrics=True: expected False"),
        ({"use_opsm": True}, "use_opsm=True: expected False"),
        ({"rollout_top_k": 50}, "rollout_top_k=50: expected -1"),
    ],
)
def test_a_launch_under_which_the_region_would_not_act_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        adapter.check(driver.arguments(SPEC, **changes))


def test_the_loss_refuses_what_the_check_would_have_where_it_was_not_called():
    with pytest.raises(ValueError, match="cppo_method=None"):
        driver.run(driver.arguments(None), one_batch.make_batch())
