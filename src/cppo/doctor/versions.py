"""Which versions are installed, and which of them this package was tested with."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from .finding import Finding

# What this package was tested with; below and above nobody has looked.
WINDOWS: dict[str, str | None] = {
    "torch": ">=2.6",
    "transformers": ">=5.2,<6",
    "trl": ">=1.10,<1.17",
    "verl": ">=0.9.1,<0.10",
    "vllm": None,
    "tinker": ">=0.38,<0.39",
    "skyrl": ">=0.3,<0.4",
}
# Those without releases to name, by distribution: the commit, and its date.
COMMITS = {
    "prime-rl": ("559b44772", "2026-08-21"),
    "rllm": ("a12c0500, branch feat/miles-backend", "2026-08-22"),
    "slime": ("624b824a8", "2026-08-21"),
    "nemo-rl": ("7ea279abf", "2026-08-22"),
}
# verl asks for an older transformers than TRL does.
_WITH_VERL = {"transformers": "<5.11"}


def installed(package: str) -> str | None:
    """Return the version of an installed distribution; a folder of that name that can be imported is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> Iterator[Finding]:
    """Yield what is installed, and what does not go together."""
    has_verl = installed("verl") is not None
    for package, window in WINDOWS.items():
        version = installed(package)
        if version is None:
            yield Finding(package, "absent", "not installed")
            continue
        wanted = _WITH_VERL.get(package, window) if has_verl else window
        if wanted is None:
            yield Finding(package, "warning", f"{version}: never run by this package's tests")
        elif SpecifierSet(wanted).contains(version, prereleases=True):
            yield Finding(package, "ok", f"{version}, tested window {wanted}")
        else:
            yield Finding(package, "failed", f"{version}: expected {wanted}, with which this package was tested")
    for package, (commit, date) in COMMITS.items():
        version = installed(package)
        if version is None:
            yield Finding(package, "absent", "not installed")
        else:  # no window to be outside of: the self-test tells
            yield Finding(package, "ok", f"{version}: tested at commit {commit} ({date}), not at a release")
    trl = installed("trl")
    if has_verl and trl is not None and not _has_value_head():
        yield Finding(
            "verl beside trl", "failed",
            f"verl {installed('verl')}'s workers do not start where trl {trl} can be imported: they import "
            "AutoModelForCausalLMWithValueHead from it, which it does not have; give each an environment of its own",
        )  # fmt: skip


def _has_value_head() -> bool:
    """Return whether verl finds in TRL what its workers import of it; both places, as verl looks."""
    for place in ("trl.experimental.ppo", "trl"):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            if hasattr(importlib.import_module(place), "AutoModelForCausalLMWithValueHead"):
                return True
    return False
