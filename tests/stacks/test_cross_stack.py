"""One batch through every stack's code: the same gradient for each token, which is the oracle's."""

import importlib
import pathlib
import sys

import pytest
import torch
from one_batch import make_batch

import cppo

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import oracle

STACKS = ("trl", "verl", "prime_rl", "skyrl", "tinker", "rllm", "slime", "nemo_rl")
SPECS = {
    "cppo": "cppo?delta=0.1&delta_b=0.02",
    "cppo, fixed budget, soft gate": "cppo?delta=0.1&delta_b=0.02&budget=fixed&gate=soft",
    "dppo": "dppo?delta=0.1",
    "trm": "trm?max_threshold=0.4&avg_threshold=0.03",
    "minpro": "minpro",
    "grpo": "grpo?dual_clip=3.0",
    "gmpo": "gmpo?log_clip_low=0.1&log_clip_high=0.1",
}


def oracles_gradient(spec, batch):
    """Return -k_t A_t in plain floats, response by response, as a tensor; and the rules that rejected."""
    method = cppo.parse_method(spec)
    knobs = {name: getattr(method, name) for name in method.__dataclass_fields__}
    gradient, rules = torch.zeros_like(batch.logp), set()
    for row, mask in enumerate(batch.mask):
        places = mask.nonzero()[:, 0]
        logp, rollout_logp = batch.logp[row, places].tolist(), batch.rollout_logp[row, places].tolist()
        advantage = batch.advantages[row].item()
        verdict = oracle.judge(cppo.methods.method_name(method), knobs, logp, rollout_logp, [advantage] * len(places))
        gradient[row, places] = torch.tensor([-k * advantage for k in verdict.coefficient])
        rules |= set(verdict.rejected_by)
    return gradient, rules


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", SPECS)
def test_the_same_batch_has_the_same_gradient_everywhere(name, stack):
    batch = make_batch()
    expected, rules = oracles_gradient(SPECS[name], batch)
    assert len(rules) > 1  # some are kept, some rejected
    found = importlib.import_module(f"drivers.{stack}").gradient(SPECS[name], batch)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    assert torch.equal(found == 0, expected == 0)


def test_the_batch_shows_both_of_cppos_rules():
    assert oracles_gradient(SPECS["cppo"], make_batch())[1] == {0, 1, 2}
