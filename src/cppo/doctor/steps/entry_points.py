"""Does an installed package name our adapter to a stack?"""

from __future__ import annotations

import importlib.metadata


def named(group: str, module: str) -> bool:
    """Return whether an entry point of that group names the module."""
    return any(point.module == module for point in importlib.metadata.entry_points(group=group))
