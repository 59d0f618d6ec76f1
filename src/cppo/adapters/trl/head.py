"""A transformers model's output head: what turns its last hidden states into logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from cppo.ops.projection import check_projection

# Where configurations keep a factor of the logits, and whether it divides. Of several the first that is set counts.
_SCALES = (
    ("logit_scale", False),  # Cohere
    ("output_multiplier", False),
    ("lm_head_multiplier", False),  # Falcon-H1
    ("logits_scaling", True),  # Granite; HyperCLOVA X multiplies by it
)


class OutputHead:
    """The head of a causal language model, looked up at each use: PEFT and accelerate replace modules.

    Args:
        model: a transformers model, or a PEFT model around one.
        temperature: of the sampling.
        wide: whether TRL computes the logits in float32 whatever the model's dtype (``cast_lm_head_to_fp32``).
        autocast: the context in which TRL runs the model.
        why: what the head is read for, for the errors.

    Raises:
        ValueError: if the model's logits are not what its last hidden states and its output weight give.
    """

    def __init__(
        self,
        model: Any,
        temperature: float,
        why: str,
        *,
        wide: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model = model.get_base_model() if hasattr(model, "peft_config") else model
        self._why, self._wide, self._autocast = why, wide, autocast
        config = self._model.config.get_text_config()
        self._options = {
            "temperature": float(temperature),
            "logit_scale": _read_scale(config),
            "logit_softcap": getattr(config, "final_logit_softcapping", None),
        }
        self._check()

    @property
    def backbone(self) -> torch.nn.Module:
        """The module whose output holds the last hidden states."""
        backbone: torch.nn.Module = self._model.base_model
        return backbone

    @contextmanager
    def precision(self, hidden: Tensor) -> Iterator[None]:
        """Around what is computed from the head, so that it multiplies what TRL multiplies."""
        kind = hidden.device.type
        with torch.autocast(kind, enabled=False) if self._wide else self._autocast():
            yield

    def rounds(self, hidden: Tensor) -> bool:
        """Return True if TRL rounds the logits below float32; its log-probs then have errors of their own."""
        if self._wide:
            return False
        narrow = (torch.bfloat16, torch.float16)
        with self._autocast():
            casts = torch.is_autocast_enabled(hidden.device.type)
        return casts or hidden.dtype in narrow or self._model.get_output_embeddings().weight.dtype in narrow

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """Return the arguments of ``token_statistics`` that describe the head, and ``hidden`` on its device."""
        embeddings = self._model.get_output_embeddings()
        bias = getattr(embeddings, "bias", None)
        weight = embeddings.weight.detach()
        hidden = hidden.detach().to(weight.device)
        return {
            "hidden": hidden.float() if self._wide else hidden,
            "weight": weight,
            "bias": None if bias is None else bias.detach(),
            **self._options,
        }

    @torch.no_grad()
    def _check(self) -> None:
        """Compare the model's own logits of a few tokens with those that the head as it was read would give."""
        embeddings = self._model.get_output_embeddings()
        weight = getattr(embeddings, "weight", None)
        if weight is None or weight.dim() != 2 or weight.numel() == 0 or hasattr(weight, "full_tensor"):
            raise ValueError(f"model: expected an output weight [V, H] that is whole on this device; {self._why}")
        seen: list[Tensor] = []
        handle = self.backbone.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
            with torch.autocast(weight.device.type, enabled=False):
                logits = _bare_forward(self._model)(input_ids=ids).logits[0]
        finally:
            handle.remove()
            for module, training in modes:
                module.training = training
        arguments = self.arguments(seen[0][0]) | {"temperature": 1.0}
        hidden = arguments.pop("hidden")
        columns = torch.arange(min(1024, weight.shape[0]), device=weight.device).expand(len(hidden), -1)
        with torch.autocast(weight.device.type, enabled=False):
            ours = check_projection(hidden=hidden, **arguments).selected(hidden, columns)
        theirs = logits[:, : columns.shape[1]].float()
        # Logits are rounded to the model's dtype, up to three times; a GPU may shorten float32 factors.
        rounding = torch.finfo(logits.dtype).eps
        allowed = 2 * rounding * theirs.abs() + max(rounding / 8, 1e-3) * logits.abs().max()
        if not ((ours - theirs).abs() <= allowed).all():
            raise ValueError(
                f"model: expected logits that follow from the last hidden states, the output weight and the factors of "
                f"its configuration, found a difference of {(ours - theirs).abs().max():.3g} (largest logit "
                f"{logits.abs().max():.3g}): this head does more; {self._why}"
            )


def _bare_forward(model: Any) -> Any:
    """Return the model's forward without what trainers wrap around it (autocast); device maps need their wrapper."""
    return model if hasattr(model, "_hf_hook") else functools.partial(type(model).forward, model)


def _read_scale(config: Any) -> float:
    for name, divides in _SCALES:
        value = getattr(config, name, None)
        if value is not None:
            multiplies = not divides or getattr(config, "model_type", "") == "hyperclovax"
            return float(value) if multiplies else 1 / float(value)
    return 1.0
