"""The scripts of studies/, imported as modules."""

import importlib.util
import pathlib
import types

STUDIES = pathlib.Path(__file__).resolve().parents[1] / "studies"


def load_script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
