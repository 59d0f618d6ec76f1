"""The ratio methods and the corrections of the engine mismatch against TRL's own losses, gradient for gradient.

The reference is a real ``trl.GRPOTrainer`` (never this package's adapter) and its own ``_compute_loss``. The model's
forward pass alone is replaced: it returns a leaf, so that autograd gives d loss / d logp_t through TRL's code.
"""

import math
import warnings

import pytest
import torch
from datasets import Dataset
from test_trl import make_config, make_model, make_tokenizer, reward_letters
from trl import GRPOTrainer

import cppo

pytestmark = pytest.mark.train

# Completions as TRL pads them, on the right; 0: truncated, and so masked out whole. The row of 4 is all tool output.
LENGTHS = (12, 7, 1, 5, 0, 9, 1, 3, 12, 10, 4, 8)
SCALES = (0.0, 0.02, 0.1, 0.3, 1.2)  # how far the policy has drifted, by row
WIDTH, NO_ADVANTAGE, ALL_TOOL = 12, 3, 10
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
GRPO = cppo.GRPO(clip_low=0.2, clip_high=0.28)
SEEDS = range(40)


def trl_trainer(tmp_path, *, loss_type="dapo", rollout_func=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = GRPOTrainer
        if loss_type == "gmpo":  # a trainer of its own, which divides as "grpo" does
            kind, loss_type = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer, "grpo"
        config = make_config(tmp_path, loss_type=loss_type, max_completion_length=WIDTH + 1, **settings)
        trainer = kind(
            make_model(), reward_letters, args=config,
            train_dataset=Dataset.from_dict({"prompt": ["abc", "h"] * 8}), processing_class=make_tokenizer(),
            rollout_func=rollout_func,
        )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # train() would set it
    return trainer


def trl_inputs(seed=0, *, dtype=torch.float64, empty_rows=True, per_token=False):
    """A micro-batch as TRL hands it to its loss, and current log-probs of its tokens."""
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([n for n in LENGTHS if empty_rows or n])
    rows = len(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=dice, dtype=torch.float64).to(dtype)

    completion_mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    tool_mask = (torch.rand(rows, WIDTH, generator=dice) > 0.25).long()
    tool_mask[torch.arange(rows), lengths // 2] = 1  # no row is emptied by chance
    if empty_rows:
        tool_mask[ALL_TOOL] = 0
    rollout = -normal(rows, WIDTH).abs() - 0.05
    # Shuffled with the seed, so that every size of drift meets both signs of advantage.
    scale = torch.tensor(SCALES, dtype=dtype)[torch.randperm(rows, generator=dice) % len(SCALES)]
    drift = scale[:, None] * (normal(rows, WIDTH) + normal(rows, 1))
    shape = (rows, WIDTH) if per_token else (rows,)
    advantages = torch.sign(normal(*shape)) * (normal(*shape).abs() + 0.2)
    advantages[NO_ADVANTAGE] = 0
    inputs = {
        "prompt_ids": torch.randint(0, 8, (rows, 2), generator=dice),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.randint(0, 8, (rows, WIDTH), generator=dice),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": advantages,
        "old_per_token_logps": rollout,
        "num_items_in_batch": torch.tensor(137),  # the whole generation batch's, of which this is a part
    }
    return inputs, rollout + drift


def response_mask(inputs):
    return (inputs["completion_mask"] * inputs["tool_mask"]) > 0


def trl_gradient(trainer, inputs, logp):
    """d loss / d logp of TRL's own loss."""
    leaf = logp.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    (gradient,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), leaf)
    return gradient


def our_gradient(method, inputs, logp, *, rollout="old_per_token_logps", **more):
    leaf = logp.clone().requires_grad_()
    out = cppo.policy_loss(method, leaf, inputs[rollout], inputs["advantages"], response_mask(inputs), **more)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return gradient, out.decision


def trl_normaliser(trainer, inputs):
    """What TRL divides by under its loss_type, as arguments of ``policy_loss``; from TRL's documentation."""
    rows, args = len(inputs["completion_mask"]), trainer.args
    accumulation = args.gradient_accumulation_steps if trainer.model.training else 1
    match args.loss_type:
        case "grpo" | "sapo":  # every row counts, the empty ones too
            return {"reduction": "sequence-mean", "denominator": rows * accumulation}
        case "bnpo":
            return {"reduction": "token-mean", "denominator": int(response_mask(inputs).sum()) * accumulation}
        case "dr_grpo":
            length = args.max_completion_length
            return {"reduction": "fixed-length", "fixed_length": length, "denominator": rows * accumulation}
        case "luspo":  # token sums, mean over rows
            return {"reduction": "token-mean", "denominator": rows * accumulation}
    share = accumulation / args.steps_per_generation if trainer.model.training else 1
    return {"reduction": "token-mean", "denominator": int(inputs["num_items_in_batch"]) * share}


def assert_same(found, expected, dtype=torch.float64):
    exact = dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10 if exact else 2e-5, atol=1e-14 if exact else 1e-8)
    assert expected.isfinite().all()
    assert (expected != 0).any()


def acted(method, decision):
    """(tokens on which the rule acted, tokens that it left alone)."""
    if isinstance(method, cppo.CISPO):
        return decision.coefficient == method.cap, (decision.coefficient < method.cap) & (decision.coefficient > 0)
    if isinstance(method, cppo.SAPO):
        return (decision.gate < 0.5) & (decision.gate > 0), decision.gate > 0.95
    return decision.rejected_by > 0, decision.gate == 1


class Witness:
    """Remembers on which signs of advantage a method's rule acted, and on which it left tokens alone."""

    def __init__(self, method):
        self.method, self.seen = method, set()

    def __call__(self, decision):
        for name, tokens in zip(("acted", "left alone"), acted(self.method, decision), strict=True):
            signs = torch.sign(decision.batch.advantages).expand_as(tokens)[tokens]
            self.seen |= {(name, int(sign)) for sign in signs.unique()}

    def assert_both(self):
        expected = {(name, sign) for name in ("acted", "left alone") for sign in (1, -1)}
        if getattr(self.method, "clip_low", 0) >= 1:  # bounds nothing
            expected -= {("acted", -1)}
            assert ("acted", -1) not in self.seen
        assert self.seen >= expected


TOKEN_LOSSES = [
    *((loss, CLIP, GRPO) for loss in ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")),
    ("grpo", {"epsilon": 0.1}, cppo.GRPO(clip_low=0.1, clip_high=0.1)),
    ("dapo", {"epsilon": 1.0, "epsilon_high": 0.5}, cppo.GRPO(clip_low=1.0, clip_high=0.5)),
    ("cispo", {"epsilon_high": 1.2}, cppo.CISPO(cap=1.2)),
    ("cispo", {"epsilon_high": 5.0}, cppo.CISPO(cap=5.0)),
    # Temperatures that float32 holds: TRL rounds them to it, see below.
    ("sapo", {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25}, cppo.SAPO(tau_pos=1.0, tau_neg=1.25)),
    ("sapo", {"sapo_temperature_pos": 2.5, "sapo_temperature_neg": 0.75}, cppo.SAPO(tau_pos=2.5, tau_neg=0.75)),
]
SEQUENCE = {"importance_sampling_level": "sequence"}
SEQUENCE_LOSSES = [
    *(
        (loss, SEQUENCE | {"epsilon": 0.05, "epsilon_high": 0.08}, cppo.GSPO(clip_low=0.05, clip_high=0.08))
        for loss in ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
    ),
    ("grpo", SEQUENCE | {"epsilon": 3e-4, "epsilon_high": 4e-4}, cppo.GSPO(clip_low=3e-4, clip_high=4e-4)),
]


GMPO_LOSSES = [
    ("gmpo", {"epsilon": 0.4, "epsilon_high": 0.3}, cppo.GMPO(log_clip_low=0.4, log_clip_high=0.3)),
    ("gmpo", {"epsilon": 0.05}, cppo.GMPO(log_clip_low=0.05, log_clip_high=0.05)),
]


def losses(cases):
    return pytest.mark.parametrize(
        ("loss", "settings", "method"), cases, ids=[f"{loss}-{method}" for loss, _, method in cases]
    )


@losses(TOKEN_LOSSES + SEQUENCE_LOSSES + GMPO_LOSSES)
def test_trls_own_loss_has_our_gradient_at_every_token(tmp_path, loss, settings, method):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    witness = Witness(method)
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed)
        assert (response_mask(inputs).sum(1) == 0).sum() == 2
        for training in (True, False):
            trainer.model.train(training)
            expected, decision = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
            assert_same(trl_gradient(trainer, inputs, logp), expected)
        witness(decision)
    witness.assert_both()


@losses(TOKEN_LOSSES + SEQUENCE_LOSSES + GMPO_LOSSES)
def test_trls_own_loss_has_our_gradient_in_float32(tmp_path, loss, settings, method):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs(3, dtype=torch.float32)
    found = trl_gradient(trainer, inputs, logp)
    assert found.dtype == torch.float32
    assert_same(found, our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))[0], torch.float32)


@losses(TOKEN_LOSSES)
def test_trls_own_token_losses_have_our_gradient_with_an_advantage_a_token(tmp_path, loss, settings, method):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed, per_token=True)
        expected, _ = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
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


@pytest.mark.parametrize(
    "case", [TOKEN_LOSSES[1], TOKEN_LOSSES[8], TOKEN_LOSSES[9], SEQUENCE_LOSSES[0], GMPO_LOSSES[0]]
)
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


# The engine mismatch. The weights are TRL's own, from its `_generate_and_score_completions`. Not TRL's own: its switch
# `use_vllm` is set by hand after construction, since vLLM itself is not here, and a rollout function gives the engine's
# log-probs; the trainer's recomputed log-probs are made up, as the current ones are.

MISMATCH_SCALES = (0.02, 0.2, 0.5, 1.5)


class Engine:
    """A rollout function with crafted log-probs: tool output, a truncated completion, one that is all tool output."""

    def __init__(self, seed):
        dice = torch.Generator().manual_seed(seed)
        lengths = [max(length, 1) for length in LENGTHS]
        rows = len(lengths)
        self.completion_ids = [[*torch.randint(0, 8, (n - 1,), generator=dice).tolist(), 8] for n in lengths]
        self.completion_ids[4][-1] = 0  # no end of sequence
        tool_mask = torch.rand(rows, WIDTH, generator=dice) > 0.25
        tool_mask[torch.arange(rows), torch.tensor(lengths) // 2] = True
        tool_mask[ALL_TOOL] = False
        self.env_mask = [row[:n].int().tolist() for row, n in zip(tool_mask, lengths, strict=True)]
        self.sampler = -torch.randn(rows, WIDTH, generator=dice).abs() - 0.05
        by_row = torch.randn(rows, 1, generator=dice)
        mismatch = torch.tensor(MISMATCH_SCALES)[torch.arange(rows) % 4, None]
        self.proximal = self.sampler + mismatch * (0.2 * by_row + torch.randn(rows, WIDTH, generator=dice))
        scale = torch.tensor(SCALES)[torch.randperm(rows, generator=dice) % len(SCALES), None]
        self.logp = self.proximal + scale * (
            torch.randn(rows, WIDTH, generator=dice) + torch.randn(rows, 1, generator=dice)
        )
        self.unscored = []  # tokens of which the engine returns no log-prob

    def __call__(self, prompts, trainer):
        logprobs = [row[: len(ids)].tolist() for row, ids in zip(self.sampler, self.completion_ids, strict=True)]
        for row, token in self.unscored:
            logprobs[row][token] = None
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": self.completion_ids,
            "logprobs": logprobs,
            "env_mask": self.env_mask,
        }


def correcting_trainer(tmp_path, engine, mode, low, high, **settings):
    trainer = trl_trainer(
        tmp_path, rollout_func=engine, mask_truncated_completions=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high, **settings,
    )  # fmt: skip
    trainer.use_vllm = True
    trainer._last_loaded_step = trainer.state.global_step  # nothing to send to an engine
    return trainer


def trl_rollout(trainer, engine):
    """What TRL's own code makes of the engine's responses: advantages, masks, correction weights."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (engine.proximal, None, None)
    inputs = trainer._generate_and_score_completions([{"prompt": "abc"}, {"prompt": "h"}] * (len(LENGTHS) // 2))
    assert (inputs["advantages"] > 0).any()
    assert (inputs["advantages"] < 0).any()
    inputs["advantages"][NO_ADVANTAGE] = 0
    assert (response_mask(inputs).sum(1) == 0).sum() == 2
    return inputs


def our_corrected(method, correction, trainer, inputs, logp):
    return our_gradient(
        method, inputs, logp, rollout="sampling_per_token_logps", proximal_logp=inputs["old_per_token_logps"],
        correction=correction, **trl_normaliser(trainer, inputs),
    )  # fmt: skip


CORRECTIONS = [
    ("token_truncate", None, 1.5, cppo.TIS(scope="token", cap=1.5)),
    ("sequence_truncate", None, 1.3, cppo.TIS(scope="sequence", cap=1.3)),
    ("token_mask", 0.7, 1.4, cppo.MIS(scope="token", low=0.7, high=1.4)),
    ("token_mask", 0.5, 5.0, cppo.IcePop()),
    ("token_mask", None, 1.2, cppo.MIS(scope="token", high=1.2)),
    ("sequence_mask", 0.6, 1.5, cppo.MIS(scope="sequence", low=0.6, high=1.5)),
    ("sequence_mask", None, 3.0, cppo.MIS(scope="sequence", high=3.0)),  # TRL's default
]
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
        found = inputs["importance_sampling_ratio"].expand_as(mask)[mask]
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
    trainer = correcting_trainer(tmp_path, engine, mode, low, high, loss_type=loss, **settings)
    inputs = trl_rollout(trainer, engine)
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
    trainer = correcting_trainer(tmp_path, engine, mode, low, high, loss_type=loss, **settings)
    inputs = trl_rollout(trainer, engine)
    expected, _ = our_corrected(method, correction, trainer, inputs, engine.logp)
    assert_same(trl_gradient(trainer, inputs, engine.logp), expected, torch.float32)


# Where TRL and this package differ.


def test_difference_trl_counts_empty_responses_in_its_mean_and_we_do_not(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="grpo", gradient_accumulation_steps=1, **CLIP)
    inputs, logp = trl_inputs()
    rows, empty = len(LENGTHS), 2
    expected, _ = our_gradient(GRPO, inputs, logp, reduction="sequence-mean")
    assert_same(trl_gradient(trainer, inputs, logp), expected * (rows - empty) / rows)


def test_trls_delta_above_its_clip_is_our_dual_clip(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", delta=2.0, **CLIP)
    dual = cppo.GRPO(clip_low=0.2, clip_high=0.28, dual_clip=2.0)
    fired = 0
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed)
        expected, decision = our_gradient(dual, inputs, logp, **trl_normaliser(trainer, inputs))
        assert_same(trl_gradient(trainer, inputs, logp), expected)
        _, without = our_gradient(GRPO, inputs, logp, **trl_normaliser(trainer, inputs))
        fired += int((decision.rejected_by != without.rejected_by).sum())
    assert fired > 0


def test_difference_trls_delta_within_its_clip_lowers_the_upper_bound_and_leaves_negative_advantages_alone(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", delta=1.1, **CLIP)
    dual = cppo.GRPO(clip_low=0.2, clip_high=0.28, dual_clip=1.1)
    same = cppo.GRPO(clip_low=0.2, clip_high=0.1, dual_clip=1.28)  # what it comes to
    apart = set()
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed)
        expected, found = our_gradient(same, inputs, logp, **trl_normaliser(trainer, inputs))
        assert_same(trl_gradient(trainer, inputs, logp), expected)
        _, other = our_gradient(dual, inputs, logp, **trl_normaliser(trainer, inputs))
        differ = found.rejected_by != other.rejected_by
        apart |= {int(sign) for sign in torch.sign(found.batch.advantages).expand_as(differ)[differ].unique()}
    assert apart == {1, -1}


def test_difference_trls_cispo_takes_its_clips_epsilon_for_an_absolute_cap_of_a_fifth_by_default(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="cispo")
    inputs, logp = trl_inputs()
    expected, decision = our_gradient(cppo.CISPO(cap=0.2), inputs, logp, **trl_normaliser(trainer, inputs))
    assert_same(trl_gradient(trainer, inputs, logp), expected)
    assert (decision.coefficient == 0.2).float().mean() > 0.3
    assert cppo.CISPO().cap == 5.0


def test_difference_trl_rounds_sapos_temperature_to_float32(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="sapo", sapo_temperature_pos=1.1, sapo_temperature_neg=1.1)
    inputs, logp = trl_inputs()
    rounded = torch.tensor(1.1, dtype=torch.float32).item()
    method = cppo.SAPO(tau_pos=rounded, tau_neg=rounded)
    expected, _ = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
    assert rounded != 1.1
    assert_same(trl_gradient(trainer, inputs, logp), expected)


def test_difference_trl_without_recomputed_log_probs_takes_every_ratio_for_one_and_we_take_the_samplers(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", **CLIP)
    inputs, logp = trl_inputs()
    inputs["sampling_per_token_logps"] = inputs.pop("old_per_token_logps")  # as with an engine and aligned steps
    normaliser = trl_normaliser(trainer, inputs)
    on_policy, _ = our_gradient(GRPO, inputs | {"logp": logp}, logp, rollout="logp", **normaliser)
    assert_same(trl_gradient(trainer, inputs, logp), on_policy)
    ours, _ = our_gradient(GRPO, inputs, logp, rollout="sampling_per_token_logps", **normaliser)
    assert (ours - on_policy).abs().max() > 0.1 * on_policy.abs().max()


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
        expected, decision = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
        mask = response_mask(inputs)
        assert (decision.gate[mask] == float(kept)).all()
        torch.testing.assert_close(trl_gradient(trainer, inputs, logp), expected, rtol=1e-12, atol=0)


def test_difference_trl_keeps_a_token_past_the_bound_whose_ratio_rounds_to_it_and_we_do_not(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", epsilon=0.5, epsilon_high=1.0)
    inputs, logp = trl_inputs()
    inputs["advantages"] = torch.ones_like(inputs["advantages"])
    inputs["old_per_token_logps"] = torch.zeros_like(logp)
    past = math.nextafter(math.log(2), math.inf)
    assert math.exp(past) == 2.0
    logp = torch.full_like(logp, past)
    ours, _ = our_gradient(cppo.GRPO(clip_low=0.5, clip_high=1.0), inputs, logp)
    assert (ours == 0).all()
    assert (trl_gradient(trainer, inputs, logp)[response_mask(inputs)] < 0).all()


EVERY_RULE = [TOKEN_LOSSES[0], TOKEN_LOSSES[1], TOKEN_LOSSES[8], TOKEN_LOSSES[9], SEQUENCE_LOSSES[0], GMPO_LOSSES[0]]
WHOLE = (cppo.GSPO, cppo.GMPO)  # a response's tokens share one ratio


@losses(EVERY_RULE)
@pytest.mark.parametrize("garbage", [1000.0, math.nan])
def test_difference_trl_lets_what_stands_at_tool_tokens_into_the_gradient_and_we_do_not(
    tmp_path, loss, settings, method, garbage
):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs()
    mask = response_mask(inputs)
    clean, _ = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
    row = 0
    (tools,) = torch.nonzero(~mask[row], as_tuple=True)
    logp[row, tools[0]] = garbage
    ours, _ = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
    assert torch.equal(ours, clean)
    found = trl_gradient(trainer, inputs, logp)
    poisoned = torch.zeros_like(mask)
    if loss == "cispo":
        poisoned[row, tools[0]] = math.isnan(garbage)  # an infinite ratio is capped, and detached
    elif isinstance(method, WHOLE):
        poisoned[row] = math.isnan(garbage)  # the response's mean takes NaN times the mask's 0 in
    else:
        poisoned[row, tools[0]] = True  # 0 times infinity
    assert torch.equal(found.isnan(), poisoned)
    assert_same(torch.where(poisoned, clean, found), clean)


@losses(EVERY_RULE)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [19.0, 25.0, 1000.0])
def test_difference_trl_lets_ratios_overflow_and_we_take_none_for_more_than_e_to_the_20(
    tmp_path, loss, settings, method, advantage, log_ratio
):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, _ = trl_inputs()
    inputs["advantages"] = torch.full_like(inputs["advantages"], advantage)
    logp = inputs["old_per_token_logps"].clone()
    row, token = 2, 0  # a response of one token, so that a response's ratio is its token's
    logp[row, token] += log_ratio
    expected, decision = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
    found = trl_gradient(trainer, inputs, logp)
    at = found[row, token].item()
    others = torch.arange(len(LENGTHS)) != row
    assert_same(found[others], expected[others])
    if loss in ("cispo", "sapo"):
        # The cap, or the gate, comes before the overflow; but TRL's gate times an infinite ratio is no number.
        assert math.isnan(at) if (loss, log_ratio) == ("sapo", 1000.0) else at == pytest.approx(expected[row, token])
    elif advantage > 0:  # clipped: 0 times infinity, but in GMPO, which clips before the exponential
        assert expected[row, token] == 0
        assert math.isnan(at) if log_ratio == 1000 and loss != "gmpo" else at == 0
    else:  # the known hole of PPO's clip
        assert decision.coefficient[row, token] == pytest.approx(math.exp(min(log_ratio, 20)))
        scale = (expected[row, token] / decision.coefficient[row, token]).item()
        true_ratio = math.exp(log_ratio) if log_ratio < 700 else math.inf
        assert at == pytest.approx(scale * true_ratio)


@losses(EVERY_RULE)
def test_difference_a_response_token_that_is_nan_has_a_nan_gradient_in_trl_and_none_here(
    tmp_path, loss, settings, method
):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs()
    logp[0, 0] = math.nan
    assert response_mask(inputs)[0, 0]
    expected, decision = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
    found = trl_gradient(trainer, inputs, logp)
    assert found[0, 0].isnan()  # so is every parameter's gradient then
    assert expected[0, 0] == 0
    assert decision.rejected_by[0, 0] == 3
    assert_same(found[1:], expected[1:])
    if isinstance(method, WHOLE):
        assert found[0].isnan().all()
    else:
        assert_same(found[0, 1:], expected[0, 1:])


def test_difference_under_a_sequence_ratio_trl_gives_each_token_the_responses_mean_advantage_and_we_its_own(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="grpo", **SEQUENCE, epsilon=0.999, epsilon_high=1e6)  # clips nothing
    inputs, logp = trl_inputs(per_token=True)
    mask = response_mask(inputs)
    method = cppo.GSPO(clip_low=0.999, clip_high=1e6)
    ours, decision = our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs))
    assert (decision.rejected_by == 0).all()
    mean = (inputs["advantages"] * mask).sum(1) / mask.sum(1).clamp(min=1)
    averaged, _ = our_gradient(method, inputs | {"advantages": mean}, logp, **trl_normaliser(trainer, inputs))
    assert_same(trl_gradient(trainer, inputs, logp), averaged)
    assert (ours - averaged).abs().max() > 0.1 * averaged.abs().max()


def test_difference_under_a_sequence_ratio_trl_gives_each_token_the_mean_correction_weight_and_we_its_own(tmp_path):
    mode, low, high, correction = CORRECTIONS[0]
    loss, settings, method = SEQUENCE_LOSSES[0]
    engine = Engine(1)
    trainer = correcting_trainer(tmp_path, engine, mode, low, high, loss_type=loss, **settings)
    inputs = trl_rollout(trainer, engine)
    mask = response_mask(inputs)
    ours, decision = our_corrected(method, correction, trainer, inputs, engine.logp)
    weight = decision.trace.correction
    mean = weight.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    averaged = torch.where(mask, ours / weight * mean, 0.0)
    assert_same(trl_gradient(trainer, inputs, engine.logp), averaged, torch.float32)
    assert (ours - averaged).abs().max() > 0.1 * averaged.abs().max()


def test_difference_trls_gmpo_leaves_its_correction_weights_out_and_ours_takes_them(tmp_path):
    mode, low, high, correction = CORRECTIONS[1]
    _, settings, method = GMPO_LOSSES[0]
    engine = Engine(1)
    trainer = correcting_trainer(tmp_path, engine, mode, low, high, loss_type="gmpo", **settings)
    inputs = trl_rollout(trainer, engine)
    assert (inputs["importance_sampling_ratio"] != 1).any()
    without, _ = our_gradient(method, inputs, engine.logp, **trl_normaliser(trainer, inputs))
    assert_same(trl_gradient(trainer, inputs, engine.logp), without, torch.float32)
    corrected, _ = our_corrected(method, correction, trainer, inputs, engine.logp)
    assert (corrected - without).abs().max() > 0.1 * without.abs().max()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_difference_trls_truncation_can_have_a_floor_and_ours_has_none(tmp_path, scope):
    engine = Engine(1)
    trainer = correcting_trainer(tmp_path, engine, f"{scope}_truncate", 0.8, 1.3)
    inputs = trl_rollout(trainer, engine)
    mask = response_mask(inputs)
    _, decision = our_corrected(GRPO, cppo.TIS(scope=scope, cap=1.3), trainer, inputs, engine.logp)
    ours, found = decision.trace.correction[mask], inputs["importance_sampling_ratio"].expand_as(mask)[mask]
    torch.testing.assert_close(found, ours.clamp(min=0.8), rtol=1e-5, atol=0)
    assert (ours < 0.8).any()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_difference_trls_mask_can_be_without_an_upper_bound_and_ours_takes_a_large_one(tmp_path, scope):
    engine = Engine(1)
    trainer = correcting_trainer(tmp_path, engine, f"{scope}_mask", 0.7, None)
    inputs = trl_rollout(trainer, engine)
    mask = response_mask(inputs)
    with pytest.raises(ValueError, match="high=inf"):
        cppo.MIS(scope=scope, low=0.7, high=math.inf)
    # No weight counts for more than e^20, so that a bound above it never acts.
    _, decision = our_corrected(GRPO, cppo.MIS(scope=scope, low=0.7, high=1e9), trainer, inputs, engine.logp)
    found = inputs["importance_sampling_ratio"].expand_as(mask)[mask]
    torch.testing.assert_close(found, decision.trace.correction[mask], rtol=1e-5, atol=0)
    assert (found == 0).any()
    assert (found > 3).any()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_difference_a_token_that_the_engine_did_not_score_trains_uncorrected_in_trl_and_not_at_all_here(
    tmp_path, scope
):
    engine = Engine(1)
    row, token = 0, 0
    engine.unscored = [(row, token)]
    trainer = correcting_trainer(
        tmp_path, engine, f"{scope}_truncate", None, 1.3, loss_type="dapo", epsilon=1.0, epsilon_high=1e6
    )
    inputs = trl_rollout(trainer, engine)
    mask = response_mask(inputs)
    assert mask[row, token]
    method = cppo.GRPO(clip_low=1.0, clip_high=1e6)
    ours, decision = our_corrected(method, cppo.TIS(scope=scope, cap=1.3), trainer, inputs, engine.logp)
    assert decision.rejected_by[row, token] == 3
    assert ours[row, token] == 0
    # The weights of the others agree, the response's among them: neither counts the token in.
    found = inputs["importance_sampling_ratio"].expand_as(mask)
    others = mask.clone()
    others[row, token] = False
    torch.testing.assert_close(found[others], decision.trace.correction[others], rtol=1e-5, atol=0)
    if scope == "token":
        assert found[row, token] == 1
    gradient = trl_gradient(trainer, inputs, engine.logp)
    assert_same(gradient[others], ours[others], torch.float32)
    assert gradient[row, token] != 0
