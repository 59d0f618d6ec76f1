"""What the package may import, and what `import cppo` may load."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import cppo

ROOT = pathlib.Path(cppo.__file__).parent
HEAVY = (
    "transformers",
    "trl",
    "verl",
    "ray",
    "triton",
    "matplotlib",
    "plotly",
    "accelerate",
    "datasets",
    "peft",
    "pandas",
    "rich",
    "scipy",
)
CORE = (
    "methods",
    "specs",
    "checks",
    "inputs",
    "rules",
    "decision",
    "objective",
    "metrics",
    "certificate",
    "theory",
    "ops",
)
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file):
    """Return the absolute names of the modules that a file imports anywhere, functions included."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import methods` names a module, `from .methods import CPPO` a name inside one.
            for alias in node.names:
                inside = ROOT.parent / f"{stem}.{alias.name}".replace(".", "/")
                is_module = not node.module or inside.is_dir() or inside.with_suffix(".py").is_file()
                found.add(f"{stem}.{alias.name}" if is_module else stem)
    return found


def room(module):
    """Return the first name below cppo: "ops", "lab", "methods"; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_core(file):
    return room(module_name(file)) in CORE


CORE_FILES = [f for f in FILES if is_core(f)]


def ids(file):
    return str(file.relative_to(ROOT))


def test_the_walk_sees_the_package():
    names = {ids(f) for f in FILES}
    assert {"__init__.py", "methods/__init__.py", "objective.py", "ops/account.py", "ops/layout.py"} <= names
    assert {"cppo.ops.layout", "cppo.methods", "torch"} <= imports(ROOT / "inputs.py")
    assert {"cppo.ops.account", "cppo.ops.gates"} <= imports(ROOT / "rules" / "divergence_regions.py")


def test_import_cppo_loads_torch_and_no_framework():
    code = "import sys, cppo; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    # numpy comes with torch; the rest must wait until somebody asks.
    assert not set(HEAVY) & set(loaded)


def test_import_cppo_loads_no_room_above_the_core():
    code = "import sys, cppo; print(*[name for name in sys.modules if name.startswith('cppo.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {room(name) for name in loaded} <= set(CORE)


def test_methods_can_be_read_without_torch():
    for file in (*(ROOT / "methods").glob("*.py"), ROOT / "specs.py"):
        outside = {m for m in imports(file) if m.split(".")[0] not in sys.stdlib_module_names}
        assert all(m.startswith("cppo.") and room(m) in ("methods", "specs") for m in outside), outside


@pytest.mark.parametrize("file", CORE_FILES, ids=ids)
def test_the_core_imports_torch_the_standard_library_and_itself(file):
    for module in imports(file):
        top = module.split(".")[0]
        if top == "cppo":
            assert room(module) in CORE, module
        else:
            assert top == "torch" or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("file", sorted((ROOT / "ops").glob("*.py")), ids=ids)
def test_ops_import_nothing_of_the_package_but_ops(file):
    assert {room(m) for m in imports(file) if m.split(".")[0] == "cppo"} <= {"ops"}


def test_imports_inside_ops_run_in_no_circle():
    graph = {module_name(f): {m for m in imports(f) if m.startswith("cppo.")} for f in CORE_FILES}
    done, doing = set(), []

    def visit(module):
        assert module not in doing, " -> ".join([*doing, module])
        if module in done or module not in graph:
            return
        doing.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(doing.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("file", sorted((ROOT / "adapters").rglob("*.py")), ids=ids)
def test_adapters_know_the_core_and_no_laboratory(file):
    assert not {room(m) for m in imports(file) if m.startswith("cppo")} & {"lab", "cli", "doctor", "compare"}


@pytest.mark.parametrize("file", sorted((ROOT / "lab").rglob("*.py")), ids=ids)
def test_the_laboratory_knows_no_comparison(file):
    assert not {room(m) for m in imports(file) if m.startswith("cppo")} & {"compare", "cli", "doctor"}


@pytest.mark.parametrize("file", sorted((ROOT / "inspect").rglob("*.py")), ids=ids)
def test_inspect_reads_logs_and_knows_nobody_who_writes_them(file):
    assert not {room(m) for m in imports(file) if m.startswith("cppo")} & {"adapters", "lab", "cli", "doctor"}


@pytest.mark.parametrize("file", sorted((ROOT / "bound").rglob("*.py")), ids=ids)
def test_bound_reads_logs_and_the_core_and_only_its_command_a_runs_settings(file):
    above = {"lab"} if file.name == "command.py" else set()
    assert {room(m) for m in imports(file) if m.startswith("cppo.")} <= {"bound", "inspect", "printable", *CORE} | above


def test_the_enumeration_takes_nothing_from_the_package():
    for name in ("policies", "enumeration"):
        assert {room(m) for m in imports(ROOT / "bound" / f"{name}.py") if m.startswith("cppo")} <= {"bound"}


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_nothing_imports_the_command_line(file):
    if room(module_name(file)) not in ("cli", "__main__"):
        assert "cli" not in {room(m) for m in imports(file) if m.startswith("cppo.")}


# ---------------------------------------------------------------- names

OLD = re.compile(r"(^|_)old(_|$)", re.IGNORECASE)


def own_identifiers(file):
    """Yield the names that a file makes up: variables, arguments, functions, classes, and keywords that it passes.

    In adapters an attribute or a keyword can be a framework's word; a string key always can.
    """
    guest = room(module_name(file)) == "adapters"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Attribute) and not guest:
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg and not guest:
            yield node.arg


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_no_name_says_old(file):
    assert [name for name in own_identifiers(file) if OLD.search(name)] == []


def test_no_file_is_called_utils():
    assert [ids(f) for f in FILES if f.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_the_public_names_exist_once():
    assert all(hasattr(cppo, name) for name in cppo.__all__)
    assert len(set(cppo.__all__)) == len(cppo.__all__)
