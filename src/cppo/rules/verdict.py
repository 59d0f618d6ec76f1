"""The one form in which every rule answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

# Decision.rejected_by
TOKEN_THRESHOLD, PREFIX_BUDGET, OTHER_RULE = 1, 2, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule says of the usable tokens; elsewhere anything finite. k_t = gate times ``ratio``."""

    keep: Tensor  # bool, token-shaped: not rejected
    ratio: Tensor  # what stands in rho's place, bounded, token-shaped
    attenuation: Tensor | None = None  # a soft rule's gate M_t; None: 1 where kept, else 0
    # Which rule rejects, where one does; called only when somebody looks.
    cause: Callable[[], Tensor | int] = lambda: OTHER_RULE
    trace: dict[str, Tensor | float] = dataclasses.field(default_factory=dict)  # Trace's fields; a number if constant
