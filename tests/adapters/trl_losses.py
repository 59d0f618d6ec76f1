"""What the comparisons with TRL share: its real trainer, crafted micro-batches, its own losses and ours beside them.

The reference is a real ``trl.GRPOTrainer`` (never this package's adapter) and its own ``_compute_loss``. The model's
forward pass alone is replaced: it returns a leaf, so that autograd gives d loss / d logp_t through TRL's code.

The correction weights are TRL's own, from its ``_generate_and_score_completions``. Not TRL's own: its switch
``use_vllm`` is set by hand after construction, since vLLM itself is not here, and a rollout function gives the engine's
log-probs; the trainer's recomputed log-probs are made up, as the current ones are.
"""

import warnings

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer
from trl_training import make_config, make_model, make_tokenizer, reward_letters

import cppo

# Completions as TRL pads them, on the right; 0: truncated, and so masked out whole. The row of 4 is all tool output.
LENGTHS = (12, 7, 1, 5, 0, 9, 1, 3, 12, 10, 4, 8)
SCALES = (0.0, 0.02, 0.1, 0.3, 1.2)  # how far the policy has drifted, by row
MISMATCH_SCALES = (0.02, 0.2, 0.5, 1.5)
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


def our_gradient_as_trl_divides(method, trainer, inputs, logp, **more):
    return our_gradient(method, inputs, logp, **trl_normaliser(trainer, inputs), **more)


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


def signs_of_advantage(decision, tokens):
    """The signs of the advantages at these tokens."""
    return {int(sign) for sign in torch.sign(decision.batch.advantages).expand_as(tokens)[tokens].unique()}


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


def correcting_rollout(tmp_path, engine, mode, low, high, **settings):
    trainer = correcting_trainer(tmp_path, engine, mode, low, high, **settings)
    return trainer, trl_rollout(trainer, engine)


def trl_weights(inputs):
    """TRL's correction weights, a response's own repeated at each of its tokens."""
    return inputs["importance_sampling_ratio"].expand_as(inputs["completion_mask"])


def our_corrected(method, correction, trainer, inputs, logp):
    return our_gradient_as_trl_divides(
        method, trainer, inputs, logp, rollout="sampling_per_token_logps",
        proximal_logp=inputs["old_per_token_logps"], correction=correction,
    )  # fmt: skip


TOKEN_LOSSES = [
    *((loss, CLIP, GRPO) for loss in ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")),
    ("grpo", {"epsilon": 0.1}, cppo.GRPO(clip_low=0.1, clip_high=0.1)),
    ("dapo", {"epsilon": 1.0, "epsilon_high": 0.5}, cppo.GRPO(clip_low=1.0, clip_high=0.5)),
    ("cispo", {"epsilon_high": 1.2}, cppo.CISPO(cap=1.2)),
    ("cispo", {"epsilon_high": 5.0}, cppo.CISPO(cap=5.0)),
    # Temperatures that float32 holds, since TRL rounds them to it.
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
# One case of each rule.
EVERY_RULE = [TOKEN_LOSSES[1], TOKEN_LOSSES[8], TOKEN_LOSSES[9], SEQUENCE_LOSSES[0], GMPO_LOSSES[0]]


def losses(cases):
    return pytest.mark.parametrize(
        ("loss", "settings", "method"), cases, ids=[f"{loss}-{method}" for loss, _, method in cases]
    )


CORRECTIONS = [
    ("token_truncate", None, 1.5, cppo.TIS(scope="token", cap=1.5)),
    ("sequence_truncate", None, 1.3, cppo.TIS(scope="sequence", cap=1.3)),
    ("token_mask", 0.7, 1.4, cppo.MIS(scope="token", low=0.7, high=1.4)),
    ("token_mask", 0.5, 5.0, cppo.IcePop()),
    ("token_mask", None, 1.2, cppo.MIS(scope="token", high=1.2)),
    ("sequence_mask", 0.6, 1.5, cppo.MIS(scope="sequence", low=0.6, high=1.5)),
    ("sequence_mask", None, 3.0, cppo.MIS(scope="sequence", high=3.0)),  # TRL's default
]
