"""One step through each stack's real code, on a CPU, in seconds, against the closed form; and is our loss found?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from torch import Tensor

from cppo.methods import CPPO, Method

from .batch import Batch, closed_form, make_batch
from .finding import Finding, Status
from .steps import nemo_rl, prime_rl, rllm, skyrl, slime, tinker, trl, verl

# Thresholds so narrow that a little drift reaches them, so that the self-test sees the region act.
METHOD = CPPO(delta=0.02, delta_b=0.002)
_TOLERANCE = 1e-4  # of the largest entry; float32

Found = tuple[Tensor, Tensor, float]  # the gradient, the closed form's, the share of tokens that was masked
Answer = tuple[Status, str]


def _on_shared_batch(gradient: Callable[[Method, Batch], Tensor]) -> Callable[[CPPO], Found]:
    def step(method: CPPO) -> Found:
        batch = make_batch()
        return gradient(method, batch), *closed_form(method, batch)

    return step


def _gradient(
    stack: str, step: Callable[[CPPO], Found], registration: Callable[[], Answer] | None = None
) -> Callable[[], Iterator[Finding]]:
    def test() -> Iterator[Finding]:
        yield _ask(f"{stack}: gradient of one step", lambda: _compare(stack, *step(METHOD)))
        if registration is not None:
            yield _ask(f"{stack}: registration", registration)

    return test


def _slime() -> Iterator[Finding]:
    yield _ask("slime: calls of the adapter", lambda: ("ok", slime.check()))


# By the name of the distribution.
SELF_TESTS: dict[str, Callable[[], Iterator[Finding]]] = {
    "trl": _gradient("trl", trl.step),
    "verl": _gradient("verl", _on_shared_batch(verl.gradient), verl.registration),
    "tinker": _gradient("tinker", _on_shared_batch(tinker.gradient)),
    "skyrl": _gradient("skyrl", _on_shared_batch(skyrl.gradient), skyrl.registration),
    "prime-rl": _gradient("prime-rl", _on_shared_batch(prime_rl.gradient)),
    "rllm": _gradient("rllm", _on_shared_batch(rllm.gradient), rllm.registration),
    "slime": _slime,
    "nemo-rl": _gradient("nemo-rl", _on_shared_batch(nemo_rl.gradient)),
}


def _ask(subject: str, question: Callable[[], Answer]) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Finding(subject, *question())
    except Exception as error:  # noqa: BLE001  whatever a drifted framework raises is the finding
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return Finding(subject, "failed", f"the self-test could not run: {type(error).__name__}: {reason}")


def _compare(stack: str, found: Tensor, expected: Tensor, masked: float) -> Answer:
    distance = ((found - expected).abs().max() / expected.abs().max()).item()
    if not distance < _TOLERANCE:
        return "failed", (
            f"differs from the closed form by {distance:.1e} of its largest entry (expected < {_TOLERANCE:.0e}): "
            f"this {stack} does something else with the loss; use a version in the tested window"
        )
    if not 0 < masked < 1:
        return "failed", f"the trust region masked {masked:.0%} of the tokens; expected some and not all"
    return "ok", f"equals the closed form to {distance:.0e}, with {masked:.0%} of the tokens masked"
