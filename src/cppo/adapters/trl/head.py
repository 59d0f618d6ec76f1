"""A transformers model's output head: what turns its last hidden states into logits."""

from __future__ import annotations

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
        why: what the head is read for, for the errors.

    Raises:
        ValueError: if the model's logits are not what its last hidden states and its output weight give.
    """

    def __init__(self, model: Any, temperature: float, why: str) -> None:
        self._model = model.get_base_model() if hasattr(model, "peft_config") else model
        self._why = why
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

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """Return the arguments of ``token_statistics`` that describe the head, and ``hidden`` on its device."""
        embeddings = self._model.get_output_embeddings()
        bias = getattr(embeddings, "bias", None)
        weight = embeddings.weight.detach()
        return {
            "hidden": hidden.detach().to(weight.device),
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
        training = self._model.training
        self._model.eval()
        try:
            ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
            logits = self._model(input_ids=ids).logits[0].float() / self._options["temperature"]
        finally:
            handle.remove()
            self._model.train(training)
        arguments = self.arguments(seen[0][0])
        hidden = arguments.pop("hidden")
        head = check_projection(hidden=hidden, **arguments)
        columns = torch.arange(min(1024, weight.shape[0]), device=weight.device).expand(len(hidden), -1)
        ours = head.selected(hidden, columns).float()
        # The model's own logits are rounded to its dtype.
        allowed = 8 * torch.finfo(torch.promote_types(weight.dtype, hidden.dtype)).eps * logits.abs().max() + 1e-6
        distance = (ours - logits[:, : columns.shape[1]]).abs().max()
        if not distance <= max(allowed, 1e-4 * logits.abs().max()):
            raise ValueError(
                f"model: expected logits that follow from the last hidden states, the output weight and the factors of "
                f"its configuration, found a difference of {distance:.3g} (largest logit {logits.abs().max():.3g}): "
                f"this head does more; {self._why}"
            )


def _read_scale(config: Any) -> float:
    for name, divides in _SCALES:
        value = getattr(config, name, None)
        if value is not None:
            multiplies = not divides or getattr(config, "model_type", "") == "hyperclovax"
            return float(value) if multiplies else 1 / float(value)
    return 1.0
