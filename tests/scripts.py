"""The scripts of studies/ and recipes/, which are in no package, as modules."""

import importlib.util
import pathlib
import types

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def load_script(path: str) -> types.ModuleType:
    """The script at this path of the repository."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
