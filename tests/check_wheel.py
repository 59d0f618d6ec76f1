"""Run by `make wheel` in an environment that holds only the wheel and what it requires."""

import importlib.util
import pathlib
import sys

import torch

import cppo

where = pathlib.Path(cppo.__file__).parent
assert "site-packages" in where.parts, where
assert (where / "py.typed").is_file()
assert importlib.util.find_spec("transformers") is None, "the core must not need the train extra"
logp = torch.full((2, 3), -1.0, requires_grad=True)
out = cppo.policy_loss(cppo.CPPO(), logp, torch.full((2, 3), -1.1), torch.tensor([1.0, -1.0]))
out.loss.backward()
assert logp.grad is not None
assert logp.grad.isfinite().all()
print(f"cppo {cppo.__version__} from {where}, Python {sys.version.split()[0]}, torch {torch.__version__}")
