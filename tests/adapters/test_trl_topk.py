"""Top-K divergences in TRL's real trainer: D from full logits by another route, and the gradient that follows."""

import math
import types

import pytest
import torch
import trl_training
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig
from trl.generation import vllm_generation
from trl_training import (
    Recorder,
    closed_form_gradient,
    make_model,
    make_trainer,
    relative_error,
    whole_log_probs,
)

import cppo
from cppo.adapters.trl import meter
from cppo.adapters.trl.configuration import check_engine
from cppo.adapters.trl.engine_topk import EngineTopK, collect
from cppo.ops import projection

pytestmark = pytest.mark.train

K = 3
METHODS = {
    "cppo tv": cppo.CPPO(delta=0.02, delta_b=0.002, divergence="topk_tv"),
    "cppo kl": cppo.CPPO(delta=0.005, delta_b=0.0005, divergence="topk_kl", budget="fixed"),
    "dppo tv": cppo.DPPO(delta=0.03, divergence="topk_tv"),
    "dppo kl": cppo.DPPO(delta=0.005, divergence="topk_kl"),
    "trm kl": cppo.TRM(max_threshold=0.02, divergence="topk_kl"),
}


class Watcher(Recorder):
    """Keeps the divergences that the adapter measured, in the order of the micro-batches."""

    def on_decision(self, decision):
        super().on_decision(decision)
        self.measured = [*getattr(self, "measured", []), decision.batch.divergence]


def bucketed(log_m, log_p, kind):
    """D of two distributions over the same cells, given as log-probs in their last dimension."""
    m, p = log_m.double().exp(), log_p.double().exp()
    if kind == "topk_tv":
        return (m - p).abs().sum(-1) / 2
    return torch.where(m > 0, m * (m / p).log(), 0.0).sum(-1)


def on_the_partition(log_mu, log_pi, ids, kind, k):
    """D on {mu's top k, the sampled token, everything else}, made cell by cell from whole distributions."""
    found = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            mu, pi = log_mu[row, t].double(), log_pi[row, t].double()
            support = sorted({*mu.topk(min(k, len(mu))).indices.tolist(), ids[row, t].item()})
            rest = [a for a in range(len(mu)) if a not in support]
            cells = [torch.stack([x[a] for a in support]) for x in (mu, pi)]
            if rest:
                cells = [torch.cat([c, x[rest].logsumexp(0)[None]]) for c, x in zip(cells, (mu, pi), strict=True)]
            found[row, t] = bucketed(*cells, kind)
    return found


def check_against_full_logits(trainer, make=make_model, k=K, needs_action=True):
    """Every optimizer step's gradient, and every micro-batch's D, against those from full logits."""
    config, kind = trainer.args, trainer.method.divergence
    updates = config.steps_per_generation // config.gradient_accumulation_steps * config.num_iterations
    rejected = kept = count = 0
    for number, (micro_batches, gradient, weights) in enumerate(trainer.steps):
        sampler = make()
        sampler.load_state_dict(trainer.steps[number // updates * updates][2])

        def divergence(batch, log_pi, sampler=sampler):
            nonlocal count
            with torch.no_grad():
                log_mu = whole_log_probs(sampler, batch, config.temperature)
            expected = on_the_partition(log_mu, log_pi, batch["completion_ids"], kind, k)
            mask = batch["completion_mask"] > 0
            found = trainer.measured[count]
            count += 1
            assert ((found - expected) * mask).abs().max() < 1e-5
            return expected.float()

        expected, decisions = closed_form_gradient(trainer, micro_batches, weights, make=make, divergence=divergence)
        assert relative_error(gradient, expected) < 1e-5
        rejected += sum(int((decision.rejected_by > 0).sum()) for decision in decisions)
        kept += sum(int((decision.gate == 1).sum()) for decision in decisions)
    assert count == len(trainer.measured)
    assert not needs_action or (rejected > 0 and kept > 0)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_has_the_gradient_of_the_divergence_from_full_logits(tmp_path, name):
    trainer = make_trainer(tmp_path, METHODS[name], kind=Watcher, arguments={"divergence_top_k": K})
    trainer.train()
    assert len(trainer.steps) == 6
    check_against_full_logits(trainer)


@pytest.mark.parametrize(
    "overrides",
    [
        {"gradient_checkpointing": True},
        {"temperature": 0.7, "mask_truncated_completions": True, "max_completion_length": 12},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "steps_per_generation": 8},
        {"loss_type": "grpo", "num_iterations": 3, "gradient_accumulation_steps": 1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_other_schedules_and_checkpointing_change_nothing(tmp_path, overrides):
    settings = {"max_steps": 4, **overrides}
    trainer = make_trainer(tmp_path, METHODS["cppo tv"], kind=Watcher, arguments={"divergence_top_k": K}, **settings)
    trainer.train()
    check_against_full_logits(trainer)


def test_a_vocabulary_smaller_than_k_gives_the_exact_divergence(tmp_path):
    trainer = make_trainer(tmp_path, METHODS["cppo tv"], kind=Watcher, max_steps=3)
    trainer.train()
    check_against_full_logits(trainer, k=10)


# ---------------------------------------------------------------- rounded logits


def make_sharp_model(dtype=torch.float32):
    """Logits of about 20, as trained models have: in bfloat16 neighbours are 0.125 apart there."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model.to(dtype)


PRECISIONS = {
    "bfloat16 model": (torch.bfloat16, {}),
    "autocast": (torch.float32, {"bf16": True}),
    "bfloat16 model, wide head": (torch.bfloat16, {"cast_lm_head_to_fp32": True}),
    "autocast, wide head": (torch.float32, {"bf16": True, "cast_lm_head_to_fp32": True}),
}


@pytest.mark.parametrize("k", [1, K])  # 1: often without the sampled token, whose own log-prob then counts
@pytest.mark.parametrize("as_accelerator", [False, True])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_policy_that_has_not_moved_has_no_divergence_however_trl_rounds(
    tmp_path, monkeypatch, name, as_accelerator, k
):
    if as_accelerator:  # factors as they come, or as autocast casts them

        def operand(device, factors, accumulator):
            return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else factors

        monkeypatch.setattr(projection, "_operand", operand)
    dtype, overrides = PRECISIONS[name]
    trainer = make_trainer(
        tmp_path, METHODS["cppo tv"], kind=Watcher, model=make_sharp_model(dtype), arguments={"divergence_top_k": k},
        learning_rate=1e-12, max_steps=4, **overrides,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.measured) == 8
    # Hidden states of a batch of other rows may differ in a last bit; logits that TRL rounds differ by 0.01 in D.
    assert max(found.abs().max() for found in trainer.measured) < 1e-4
    assert trainer._meter._head.rounds(torch.zeros(1, dtype=dtype)) == ("wide" not in name)


def test_rounded_logits_would_have_shown_a_divergence_by_the_short_cut(tmp_path, monkeypatch):
    # Why the short cut from TRL's own log-prob is not taken there; should TRL stop rounding, it can be.
    monkeypatch.setattr(meter.OutputHead, "rounds", lambda head, hidden: False)
    trainer = make_trainer(
        tmp_path, METHODS["cppo tv"], kind=Watcher, model=make_sharp_model(torch.bfloat16), learning_rate=1e-12,
        max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert max(found.abs().max() for found in trainer.measured) > 0.005


def test_a_model_that_a_mixed_precision_trainer_has_used_is_not_refused(tmp_path):
    model = make_sharp_model()
    make_trainer(tmp_path, cppo.CPPO(), model=model, bf16=True, max_steps=1).train()
    make_trainer(tmp_path, METHODS["cppo tv"], model=model)


# ---------------------------------------------------------------- models


LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def make_lora_model():
    model = get_peft_model(make_model(), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapters would need many steps to move the policy
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_lora_and_the_reference_pass_through_its_backbone(tmp_path, beta):
    # With beta the reference policy is the same model without its adapters, scored after the rollout policy: were its
    # likeliest tokens taken, D would be large at the first, on-policy, step.
    arguments = {"divergence_top_k": K}
    trainer = make_trainer(
        tmp_path,
        METHODS["cppo tv"],
        kind=Watcher,
        model=make_lora_model(),
        arguments=arguments,
        beta=beta,
        use_bias_correction_kl=False,
        max_steps=4,
    )
    trainer.train()
    on_policy = [divergence.abs().max() for divergence in trainer.measured[:2]]
    assert max(on_policy) < 1e-5
    if beta == 0.0:
        check_against_full_logits(trainer, make_lora_model)


SMALL = {
    "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 9, "eos_token_id": 8,
    "bos_token_id": 7, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "capped and tied": Gemma2Config(
        **SMALL, final_logit_softcapping=1.5, query_pre_attn_scalar=8, tie_word_embeddings=True
    ),
    "scaled up": CohereConfig(**SMALL, logit_scale=0.25),
    "scaled down": GraniteConfig(**SMALL, logits_scaling=3.0, tie_word_embeddings=False),
}


def make_other(name):
    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_that_cap_or_scale_their_logits(tmp_path, name):
    make = make_other(name)
    trainer = make_trainer(
        tmp_path, cppo.CPPO(delta=0.005, delta_b=0.0005, divergence="topk_tv"), kind=Watcher, model=make(),
        arguments={"divergence_top_k": K}, max_steps=4,
    )  # fmt: skip
    trainer.train()
    check_against_full_logits(trainer, make)


def test_a_head_that_does_more_is_refused(tmp_path):
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output + args[0].sum(-1, keepdim=True) * 0 + 1.0)
    with pytest.raises(ValueError, match="this head does more; divergence='topk_tv' is measured from them"):
        make_trainer(tmp_path, METHODS["cppo tv"], model=model)


# ---------------------------------------------------------------- engines


def engine(prompts, trainer, *, keys=("topk_ids", "topk_logprobs"), spoil=None):
    """A rollout function of an engine of its own: returns the K likeliest tokens of each place besides the sampled."""
    tokenizer = trainer.processing_class
    generator = torch.Generator().manual_seed(len(prompts) + trainer.state.global_step)
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completion_ids, logprobs, ids, topk = [], [], [], []
    for number in range(len(prompts)):
        length = 3 + number % 4
        every = (2 * torch.randn(length, 10, generator=generator)).log_softmax(-1)
        tokens = [*torch.randint(0, 8, (length - 1,), generator=generator).tolist(), 8]
        likeliest = every.topk(K)
        completion_ids.append(tokens)
        logprobs.append(every.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())
        ids.append(likeliest.indices.tolist())
        topk.append(likeliest.values.tolist())
        trainer.truth.append(every)
    extra = dict(zip(keys, (ids, topk), strict=False))
    if spoil:
        spoil(extra)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, **extra}


class EngineWatcher(Watcher):
    def __init__(self, *args, **kwargs):
        self.truth = []
        super().__init__(*args, **kwargs)


SCHEDULE = {"gradient_accumulation_steps": 4, "num_iterations": 1, "max_steps": 2}


def truths(trainer, batch):
    """The engine's distribution at each token of a micro-batch, found by the sampled tokens' log-probs."""
    found = torch.zeros(*batch["completion_ids"].shape, 10)
    for row, mask in enumerate(batch["completion_mask"]):
        length = int(mask.sum())
        wanted = batch["sampling_per_token_logps"][row, :length]
        ids = batch["completion_ids"][row, :length]
        fits = [
            every for every in trainer.truth
            if len(every) == length and torch.allclose(every.gather(1, ids[:, None])[:, 0], wanted, atol=1e-6)
        ]  # fmt: skip
        found[row, :length] = fits[0]
    return found


@pytest.mark.parametrize("name", ["cppo tv", "cppo kl", "dppo tv"])
def test_a_rollout_function_brings_the_engines_likeliest_tokens(tmp_path, name):
    method = METHODS[name].__class__(**{"delta": 0.3, "divergence": METHODS[name].divergence})
    arguments = {"rollout_func": engine, "divergence_top_k": K}
    trainer = make_trainer(tmp_path, method, kind=EngineWatcher, arguments=arguments, **SCHEDULE)
    trainer.train()
    count = 0
    for micro_batches, gradient, weights in trainer.steps:

        def divergence(batch, log_pi):
            nonlocal count
            expected = on_the_partition(truths(trainer, batch), log_pi, batch["completion_ids"], method.divergence, K)
            mask = batch["completion_mask"] > 0
            assert (trainer.measured[count][mask] - expected[mask]).abs().max() < 1e-5
            count += 1
            return expected.float()

        expected, decisions = closed_form_gradient(trainer, micro_batches, weights, divergence=divergence)
        assert relative_error(gradient, expected) < 1e-5
        assert sum(int((decision.rejected_by > 0).sum()) for decision in decisions) > 0


def without(name):
    return lambda extra: extra.pop(name)


def one_tensor(extra):
    extra["topk_ids"] = torch.zeros(16, 6, 3)


def cut_short(extra):
    extra["topk_ids"][2].pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("topk_logprobs"), "rollout_func: expected 'topk_logprobs' in what it returns.*divergence='topk_tv'"),
        (one_tensor, r"'topk_ids' to be a list of one \[T, K\] a completion, got one tensor \[16, 6, 3\]"),
        (cut_short, "expected a list for each of the 5 tokens of completion 2, .* got 4 and 5"),
    ],
)
def test_a_rollout_function_that_brings_too_little_is_told_so(tmp_path, spoil, message):
    def spoiled(prompts, trainer):
        return engine(prompts, trainer, spoil=spoil)

    arguments = {"rollout_func": spoiled}
    trainer = make_trainer(tmp_path, METHODS["cppo tv"], kind=EngineWatcher, arguments=arguments, **SCHEDULE)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def output_of(places):
    """A stand-in for vLLM's output of one request: for each place {token: (log-prob, rank)}."""
    logprobs = [
        {token: types.SimpleNamespace(logprob=logprob, rank=rank) for token, (logprob, rank) in place.items()}
        for place in places
    ]
    return types.SimpleNamespace(
        prompt_token_ids=[0, 1],
        outputs=[types.SimpleNamespace(token_ids=[next(iter(p)) for p in places], logprobs=logprobs)],
    )


class FakeLLM:
    """vLLM's ``generate``: samples from the trainer's own policy plus noise; gives the N likeliest and the sampled."""

    def __init__(self, trainer):
        self.trainer, self.asked = trainer, []

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked.append(sampling_params["logprobs"])
        generator = torch.Generator().manual_seed(len(self.asked))
        outputs = []
        for number, prompt in enumerate(prompts):
            length = 3 + number % 4
            every = (2 * torch.randn(length, 10, generator=generator)).log_softmax(-1)
            self.trainer.truth.append(every)
            tokens = [*torch.randint(0, 8, (length - 1,), generator=generator).tolist(), 8]
            places = []
            for t, token in enumerate(tokens):
                order = every[t].argsort(descending=True).tolist()
                wanted = [token, *[a for a in order[: sampling_params["logprobs"]] if a != token]]  # sampled first
                places.append({a: (every[t, a].item(), order.index(a) + 1) for a in wanted})
            output = output_of(places)
            output.prompt_token_ids = prompt["prompt_token_ids"]
            outputs.append(output)
        return outputs


def with_vllm(trainer, monkeypatch):
    """Give the trainer TRL's real vLLM client in front of a stand-in for the engine, as it would be after start-up."""
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **settings: settings, raising=False)
    client = object.__new__(vllm_generation.VLLMGeneration)
    vars(client).update(
        accelerator=trainer.accelerator, mode="colocate", temperature=1.0, top_p=1.0, top_k=0, min_p=None,
        repetition_penalty=1.0, max_completion_length=7, logprobs=0, generation_kwargs={}, tensor_parallel_size=1,
        structured_outputs_regex=None, enable_sleep_mode=False, model=trainer.model, llm=FakeLLM(trainer),
        sync_weights=lambda: None,
    )  # fmt: skip
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, client, -1
    trainer.vllm_importance_sampling_correction = False
    return client


def test_vllm_gives_the_likeliest_tokens_and_the_sampled_ones_log_prob(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, METHODS["cppo tv"], kind=EngineWatcher, arguments={"divergence_top_k": K})
    client = with_vllm(trainer, monkeypatch)
    trainer._meter = trainer._make_meter(K)
    trainer.train()
    assert client.llm.asked == [K] * len(client.llm.asked)
    for count, batch in enumerate(b for micro_batches, _, _ in trainer.steps for b in micro_batches):
        model = make_model()
        model.load_state_dict(trainer.steps[count // 2][2])
        with torch.no_grad():
            log_pi = whole_log_probs(model, batch, 1.0)
        log_mu = truths(trainer, batch)  # the log-probs that TRL kept are the sampled tokens', or nothing fits
        expected = on_the_partition(log_mu, log_pi, batch["completion_ids"], "topk_tv", K)
        mask = batch["completion_mask"] > 0
        assert (trainer.measured[count][mask] - expected[mask]).abs().max() < 1e-5
        ranks = batch["rollout_topk_logp"][mask]
        assert (ranks[:, :-1] >= ranks[:, 1:]).all()


def test_without_the_wrapper_trl_would_take_the_likeliest_tokens_log_prob(tmp_path, monkeypatch):
    # The trap that the wrapper is for: should TRL mend it, the wrapper can go.
    trainer = make_trainer(tmp_path, cppo.CPPO(), kind=EngineWatcher)
    client = with_vllm(trainer, monkeypatch)
    client.logprobs = K
    _, completions, logprobs, ids = client.generate([[0, 1]], None, 1)
    assert any(place[0] != token for place, token in zip(ids[0], completions[0], strict=True))
    taken = trainer._generate_single_turn([[0, 1]], None, {}, 1)[1][0]
    assert taken == [max(place) for place in trainer.truth[-1].tolist()] != logprobs[0]


def test_an_engine_that_gives_no_ids_or_not_the_sampled_token_is_refused():
    def make(answer):
        generation = types.SimpleNamespace(generate=lambda: answer, logprobs=0)
        return EngineTopK(generation, K), generation

    _, generation = make(([[0]], [[1]], [[[-0.5]]], None))
    with pytest.raises(ValueError, match="expected log-probs with their token ids, got none"):
        generation.generate()
    _, generation = make(([[0]], [[1]], [[[-0.5]]], [[[2]]]))
    with pytest.raises(ValueError, match=r"expected the sampled token 1 among those with a log-prob, got \[2\]"):
        generation.generate()


def test_a_server_whose_log_probs_are_not_the_samplers_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, cppo.CPPO(), temperature=0.8)
    info = {"model_config": {"logprobs_mode": "raw_logprobs"}}
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    trainer.vllm_generation = types.SimpleNamespace(vllm_client=types.SimpleNamespace(get_server_info=lambda: info))
    with pytest.raises(
        ValueError, match=r"logprobs-mode raw_logprobs: expected processed_logprobs with temperature=0\.8"
    ):
        check_engine(trainer)
    info["model_config"]["logprobs_mode"] = "processed_logprobs"
    check_engine(trainer)
    trainer.vllm_generation.vllm_client = object()  # TRL before 1.16, and every process but the main one
    check_engine(trainer)


# ---------------------------------------------------------------- lists into tensors


def test_lists_of_unequal_length_and_missing_numbers_leave_empty_places():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    rows = [
        ([[4, 2, 7], [5], []], [[-1.2, -0.5, -3.0], [-0.1], []]),
        ([[1, 2], [3, 4]], [[None, -1.0], [math.nan, -math.inf]]),
        ([[6, 8]], [[-1.0, -2.0]]),  # dropped by the trainer, whatever its length
    ]
    ids, logp = collect(rows, mask, 2)
    assert ids[0].tolist() == [[2, 4], [5, -1], [-1, -1]]  # the likeliest two, likeliest first
    assert logp[0].tolist() == [[-0.5, pytest.approx(-1.2)], [pytest.approx(-0.1), -math.inf], [-math.inf] * 2]
    assert ids[1].tolist() == [[2, -1], [-1, -1], [-1, -1]]
    assert logp[1, 0].tolist() == [-1.0, -math.inf]
    assert ids[2, 0].tolist() == [6, 8]
    ids, _ = collect([([[], []], [[], []])], torch.ones(1, 2), 2)
    assert ids.tolist() == [[[-1, -1], [-1, -1]]]


def test_tensors_and_lists_are_the_same():
    mask = torch.ones(2, 4)
    ids, logp = torch.arange(24).reshape(2, 4, 3), -2 - torch.rand(2, 4, 3)
    from_tensors = collect(list(zip(ids, logp, strict=True)), mask, 3)
    from_lists = collect(list(zip(ids.tolist(), logp.tolist(), strict=True)), mask, 3)
    assert all(torch.equal(a, b) for a, b in zip(from_tensors, from_lists, strict=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected a list for each of 1 completions, got 0"),
        ([([[1], [2]], [[-1.0]])], "completion 0, .* got 2 and 1"),
        ([([[1], [2], [3]], [[-1.0]] * 3)], "each of the 2 tokens of completion 0, .* got 3 and 3"),
        ([([[1, 2], [2, 3]], [[-1.0] * 2, [-1.0]])], "as many of each, got 2 and 1 at token 1 of completion 0"),
        (
            [(torch.ones(2, 2), torch.ones(2, 1))],
            r"expected \[T, K\] each of completion 0, got \[2, 2\] and \[2, 1\]",
        ),
        ([([[1], [2]], [[-0.1], [0.4]])], "expected log-probs <= 0, got 0.4 at token 1 of completion 0; probabilities"),
        ([([[1, 2], [3, 3]], [[-1.0, -2.0]] * 2)], r"got one twice at token 1 of completion 0: \[3, 3\]"),
        ([([[1, 2], [3, 4]], [[-1.0, -2.0], [-0.1, -0.1]])], "sum to at most 1, got 1.81 at token 1 of completion 0"),
    ],
)
def test_lists_that_do_not_fit_name_their_completion(rows, message):
    with pytest.raises(ValueError, match=message):
        collect(rows, torch.ones(1, 2), 2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [max]}, "tools: expected none with .*the loop of tool calls"),
        ({"environment_factory": dict}, "environment_factory: expected none with .*the loop of tool calls"),
        ({"divergence_top_k": 0}, "divergence_top_k=0: expected a positive integer"),
        ({"divergence_top_k": True}, "divergence_top_k=True: expected a positive integer"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, METHODS["cppo tv"], arguments=arguments)


def test_more_log_probs_than_a_colocated_vllm_gives_are_refused(tmp_path):
    overrides = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": False}
    with pytest.raises(ValueError, match="divergence_top_k=21: expected at most 20"):
        make_trainer(tmp_path, METHODS["cppo tv"], arguments={"divergence_top_k": 21}, **overrides)


def test_a_sharded_head_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, METHODS["cppo tv"])
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP or DeepSpeed ZeRO-3 shards; divergence='topk_tv' is measured"):
        trainer._make_meter(K)


def test_virtual_tokens_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, cppo.CPPO())
    trainer.model.active_peft_config = types.SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="virtual tokens shift the hidden states' places"):
        trainer._make_meter(K)


def test_what_the_arguments_tell_is_refused_before_anything_is_loaded(tmp_path):
    class NotLoaded:
        pass

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens shift the hidden states' places"):
        make_trainer(tmp_path, METHODS["cppo tv"], model=NotLoaded(), arguments={"peft_config": prompts})


def test_the_default_stays_binary_and_listens_to_nothing(tmp_path):
    trainer = make_trainer(tmp_path, cppo.CPPO())
    assert trainer._meter is None
    assert not trainer.model.base_model._forward_hooks
    assert trl_training.make_config(tmp_path).use_vllm is False
