"""One optimizer step of verl's training worker (FSDP2, its own engine and ppo_loss), and what its gradient must be.

Run under torchrun it does the step in each layout, on this rank's share of one batch, and rank 0 saves the gradients:

    torchrun --nproc_per_node 2 tests/verl/engine_update.py MODEL_FOLDER ANSWER_FILE
"""

import functools
import os
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import cppo

ROWS = 8
PROMPTS = (3, 6, 4, 5, 3, 6, 4, 5)
RESPONSES = (16, 4, 9, 1, 12, 7, 15, 6)
# Probabilities of an untrained model of 264 tokens lie near 1/264.
METHOD = cppo.CPPO(delta=5e-4, delta_b=5e-5)
LAYOUTS = {
    "padded": {"use_remove_padding": False, "use_dynamic_bsz": False},
    "packed": {"use_remove_padding": True, "use_dynamic_bsz": False},
    "packed, dynamic": {"use_remove_padding": True, "use_dynamic_bsz": True},
}
# Without it verl computes in bfloat16, whatever fsdp_config.dtype says.
FLOAT32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
DYNAMIC_TOKENS = 24  # a micro-batch: one to three responses


def make_rows():
    """Return the whole batch: prompts, responses, masks with a tool's output and an empty row, advantages, drift."""
    generator = torch.Generator().manual_seed(3)
    tokens = lambda n: torch.randint(3, 256, (n,), generator=generator)  # noqa: E731
    rows = {
        "prompt": [tokens(n) for n in PROMPTS],
        "response": [tokens(n) for n in RESPONSES],
        "mask": [torch.ones(n, dtype=torch.long) for n in RESPONSES],
        "drift": [0.2 * torch.randn(n, generator=generator) for n in RESPONSES],
        "advantage": torch.randn(ROWS, generator=generator).tolist(),
    }
    rows["mask"][0][1:3] = 0
    rows["mask"][6][5] = 0
    rows["mask"][1][:] = 0  # what verl pads a batch with
    return rows


def log_probs(model, prompt, response):
    """Return log pi of each response token, by plain transformers and log_softmax."""
    logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def closed_form(folder):
    """Return ({parameter: gradient}, metrics) of the core's token-mean loss over the whole batch, without verl."""
    model, rows = load(folder), make_rows()
    every = [log_probs(model, *row) for row in zip(rows["prompt"], rows["response"], strict=True)]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    logp, drift = pad(every), pad(rows["drift"])
    out = cppo.policy_loss(METHOD, logp, (logp + drift).detach(), torch.tensor(rows["advantage"]), pad(rows["mask"]))
    out.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, out.metrics


# ---------------------------------------------------------------- verl


def compose(folder, use_remove_padding, use_dynamic_bsz):
    from hydra import compose, initialize_config_module

    actor = "actor_rollout_ref.actor"
    overrides = [
        f"actor_rollout_ref.model.path={folder}", f"actor_rollout_ref.model.use_remove_padding={use_remove_padding}",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa", f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size={ROWS}", f"{actor}.ppo_micro_batch_size_per_gpu=2",
        f"{actor}.optim.clip_grad=1e9",
        f"{actor}.use_dynamic_bsz={use_dynamic_bsz}", f"{actor}.ppo_max_token_len_per_gpu={DYNAMIC_TOKENS}",
        f"{actor}.use_torch_compile=False", f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.model_dtype=fp32", f"+{actor}.fsdp_config.mixed_precision={FLOAT32}",
        f"{actor}.optim.total_training_steps=10",
        f"{actor}.policy_loss._target_=cppo.adapters.verl.TrustRegionLoss", f"{actor}.policy_loss.loss_mode=cppo",
        f"+{actor}.policy_loss.delta={METHOD.delta}", f"+{actor}.policy_loss.delta_b={METHOD.delta_b}",
    ]  # fmt: skip
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def make_worker(folder, layout):
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    config = compose(folder, **LAYOUTS[layout])
    OmegaConf.resolve(config)
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = model
    settings = TrainingWorkerConfig(
        model_type="language_model", model_config=model, engine_config=actor.engine, optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint, profiler_config=None,
    )  # fmt: skip
    engine = settings.engine_config
    engine.use_dynamic_bsz = LAYOUTS[layout]["use_dynamic_bsz"]
    engine.max_token_len_per_gpu = engine.infer_max_token_len_per_gpu = DYNAMIC_TOKENS
    engine.micro_batch_size_per_gpu = engine.infer_micro_batch_size_per_gpu = 2
    worker = TrainingWorker(config=settings)
    worker.reset()
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    return worker


def update(folder, layout):
    """Return ({parameter: whole gradient}, the worker's metrics) of one step on this rank's share of the batch."""
    from verl.utils import tensordict_utils

    worker, rows, model = make_worker(folder, layout), make_rows(), load(folder)
    ranks, rank = worker.engine.get_data_parallel_size(), worker.engine.get_data_parallel_rank()
    mine = range(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)

    def jagged(make):
        return torch.nested.as_nested_tensor([make(row) for row in mine], layout=torch.jagged)

    def sampled(row):
        with torch.no_grad():
            return log_probs(model, rows["prompt"][row], rows["response"][row]) + rows["drift"][row]

    data = tensordict_utils.get_tensordict(
        {
            "prompts": jagged(lambda row: rows["prompt"][row]),
            "responses": jagged(lambda row: rows["response"][row]),
            "input_ids": jagged(lambda row: torch.cat([rows["prompt"][row], rows["response"][row]])),
            "position_ids": jagged(lambda row: torch.arange(PROMPTS[row] + RESPONSES[row])),
            "response_mask": jagged(lambda row: rows["mask"][row]),
            "loss_mask": jagged(lambda row: rows["mask"][row]),
            "old_log_probs": jagged(sampled),
            "advantages": jagged(lambda row: torch.full((RESPONSES[row],), rows["advantage"][row])),
        },
        non_tensor_dict={
            "temperature": 1.0, "calculate_entropy": False, "pad_mode": "no_padding", "global_batch_size": ROWS,
            "mini_batch_size": ROWS, "epochs": 1, "seed": 1, "dataloader_kwargs": {"shuffle": False},
        },
    )  # fmt: skip
    gradients = {}

    def before_step(optimizer, *_):
        for name, parameter in worker.engine.module.named_parameters():
            gradient = parameter.grad
            gradients[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        output = worker.train_mini_batch(data)
    finally:
        hook.remove()
    return gradients, dict(tensordict_utils.get(output, "metrics"))


def main():
    folder, answer = sys.argv[1:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {layout: update(folder, layout) for layout in LAYOUTS}
    if torch.distributed.get_rank() == 0:
        torch.save(found, answer)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in tests/ranks.py: the interpreter's own end can abort beside a thread of gloo


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
