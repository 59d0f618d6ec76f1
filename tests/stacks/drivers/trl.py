"""TRL's own _compute_loss in the adapter's trainer; only the model's forward pass is replaced by a leaf."""

import pathlib
import sys
import tempfile

import torch

import cppo
from cppo.adapters.trl import TrustRegionTrainer

sys.path.append(str(pathlib.Path(__file__).parents[2] / "adapters"))
from trl_training import make_trainer


def gradient(spec, batch):
    """Return the gradient of TRL's "bnpo" loss (a token mean) by each log-prob, times the number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder, cppo.parse_method(spec), kind=TrustRegionTrainer, loss_type="bnpo", gradient_accumulation_steps=1
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows, width = batch.logp.shape
    completion_mask = (torch.arange(width) < torch.tensor(batch.lengths)[:, None]).long()
    leaf = batch.logp.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    inputs = {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long),
        "completion_mask": completion_mask,
        "tool_mask": torch.where(completion_mask > 0, batch.mask, True).long(),
        "advantages": batch.advantages,
        "sampling_per_token_logps": batch.rollout_logp,
        "num_items_in_batch": batch.mask.sum(),
    }
    trainer._compute_loss(trainer.model, inputs).backward()
    return leaf.grad * batch.mask.sum()
