"""What doctor reports."""

from __future__ import annotations

import dataclasses
from typing import Literal

Status = Literal["ok", "absent", "warning", "failed"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``message`` says what was found and, unless all is well, what to do."""

    subject: str
    status: Status
    message: str
