"""verl on a CPU, through its own registries: a platform, and a rollout server that samples with transformers.

verl 0.9.1 ships neither. Named in ``VERL_USE_EXTERNAL_MODULES`` (with ``VERL_PLATFORM=cpu``, and
``VERL_ENGINE_DEVICE=cuda`` so that the FSDP engine is chosen), this module makes ``main_ppo`` and the training worker
run without a GPU. Run as a script it writes a tiny Qwen3 with a byte tokenizer:

    python tests/verl/cpu_verl.py FOLDER
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import types

import torch
import torch.distributed

# ---------------------------------------------------------------- the platform


class _CpuModule(types.ModuleType):
    """What verl asks of ``torch.cuda``, answered by ``torch.cpu`` or by nothing."""

    def __getattr__(self, name):
        if name.startswith("__") or not hasattr(torch.cpu, name):
            raise AttributeError(name)
        return getattr(torch.cpu, name)


def _nothing(*_, **__):
    return None


def _device_module():
    module = _CpuModule("cpu_verl_device")
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "synchronize", "set_device"):
        setattr(module, name, _nothing)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    module.mem_get_info = lambda *_, **__: (0, 0)
    module.current_device = lambda: "cpu"
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.get_device_name = lambda *_, **__: "CPU"
    module.get_rng_state = lambda *_, **__: torch.get_rng_state()
    module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    return module


def _register_platform():
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    answers = {
        "is_available": True, "current_device": "cpu", "device_count": 1, "get_device_capability": (None, None),
        "communication_backend_name": "gloo", "visible_devices_envvar": "CUDA_VISIBLE_DEVICES",
        "ray_resource_name": "GPU",  # verl counts GPUs; the test gives Ray as many as there are workers
        "is_ipc_supported": False, "set_device": None, "synchronize": None, "set_allocator_settings": None,
        "empty_cache": None, "profiler_start": None, "profiler_stop": None, "cudart": None,
    }  # fmt: skip
    names = {
        "device_name": "cpu",
        "vendor_name": "cpu",
        "device_module": _device_module(),
        "manual_seed": lambda self, seed: torch.manual_seed(seed),
        "manual_seed_all": lambda self, seed: torch.manual_seed(seed),
        "ray_noset_envvars": lambda self: [],
        "nvtx_range": lambda self, message: contextlib.nullcontext(),
    }
    for name, value in answers.items():
        names[name] = lambda self, *_, _value=value, **__: _value
    PlatformRegistry.register(platform="cpu")(type("CpuPlatform", (PlatformBase,), names))


def _one_backend():
    """verl asks for "DEVICE:BACKEND,cpu:gloo", which torch does not take when the device is the CPU."""
    init = torch.distributed.init_process_group

    def init_process_group(backend=None, *args, **kwargs):
        return init("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


# ---------------------------------------------------------------- the rollout


class Server:
    """Samples with transformers, a token at a time; answers with each token's log-prob."""

    def __init__(self, path, response_length):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.response_length, self.step = response_length, 0

    async def load(self, weights, global_steps=None):
        missing = self.model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys, missing
        self.step = global_steps or 0

    async def generate(self, prompt_ids, sampling_params, request_id, **_):
        from verl.workers.rollout.replica import TokenOutput

        temperature = float(sampling_params.get("temperature") or 1.0)
        ids, cache, tokens, log_probs = torch.tensor([list(prompt_ids)]), None, [], []
        with torch.no_grad():
            while len(tokens) < self.response_length:
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logp = torch.log_softmax(out.logits[0, -1].float() / temperature, -1)
                token = int(torch.multinomial(logp.exp(), 1))
                tokens.append(token)
                log_probs.append(float(logp[token]))
                if token == self.model.config.eos_token_id:
                    break
                ids = torch.tensor([[token]])
                await asyncio.sleep(0)
        extra = {"global_steps": self.step}
        return TokenOutput(token_ids=tokens, log_probs=log_probs, stop_reason="completed", extra_fields=extra)


async def _later(self, *_, **__):
    """Answer the calls that an engine with a cache and sleeping weights needs."""


for _name in (
    "wake_up", "sleep", "abort_all_requests", "resume_generation", "clear_kv_cache", "release_kv_cache",
    "resume_kv_cache", "start_profile", "stop_profile",
):  # fmt: skip
    setattr(Server, _name, _later)


def _register_rollout():
    import ray
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
    from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

    class Replica(RolloutReplica):
        async def launch_servers(self):
            model = self.model_config
            path = model.path if hasattr(model, "path") else model["path"]
            options = {"name": f"cpu_rollout_{self.replica_rank}", "num_cpus": 0.1, "max_concurrency": 64}
            handle = ray.remote(Server).options(**options).remote(path, self.config.response_length)
            self.servers, self._server_handle = [handle], handle
            self._server_address = f"cpu://{self.replica_rank}"

    class Adapter(BaseRollout):
        async def resume(self, tags):
            pass

        async def release(self):
            pass

        async def update_weights(self, weights, *_, global_steps=None, **__):
            state = {name: weight.detach().float().cpu().clone() for name, weight in weights}
            await ray.get_actor(f"cpu_rollout_{torch.distributed.get_rank()}").load.remote(state, global_steps)

    globals()["Adapter"] = Adapter
    RolloutReplicaRegistry.register("cpu", lambda: Replica)
    _ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.Adapter"


# ---------------------------------------------------------------- the model


def write_model(folder):
    """Write a Qwen3 of 90k parameters, and a tokenizer of bytes with ChatML's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=letters, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=256,
        eos_token_id=258, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    write_model(sys.argv[1])
else:
    _one_backend()
    _register_platform()
    _register_rollout()
