"""The rules of the source tree that no linter knows: which way imports point, and what the library never does."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = "hf_alphaedit"
FILES = sorted((SOURCE / PACKAGE).rglob("*.py"))
STANDARD_LIBRARY = sys.stdlib_module_names

# What the files of a module or package may import beyond the standard library and themselves, at run time.
# A module that is not listed may import what pyproject.toml declares; imports in a circle are wrong everywhere.
ALLOWED = {
    f"{PACKAGE}": {PACKAGE},  # the public names, lazily
    f"{PACKAGE}.errors": set(),
    f"{PACKAGE}.config": {f"{PACKAGE}.errors"},
    f"{PACKAGE}.requests": {f"{PACKAGE}.errors"},
    f"{PACKAGE}.algorithm": {"torch"},  # the paper: nothing but torch
    f"{PACKAGE}.models": {
        "torch",
        "transformers",
        "accelerate",
        "huggingface_hub",
        f"{PACKAGE}.errors",
        f"{PACKAGE}.requests",
        f"{PACKAGE}.algorithm",
    },
}
TOP = {f"{PACKAGE}.cli": set(), f"{PACKAGE}.editor": {f"{PACKAGE}.cli", PACKAGE}}  # module: who may import it

Rule = Callable[[ast.Module, str], Iterator[tuple[int, str]]]


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node` but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from nodes_at_run_time(other)
            continue
        yield child
        yield from nodes_at_run_time(child)


def imported_modules(tree: ast.Module, name: str, is_package: bool) -> set[str]:
    """Full names of the modules that the module `name` imports at run time, inside functions as well."""
    found = set()
    for node in nodes_at_run_time(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            # `from package import name`: the name may be a module itself
            submodules = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {module}
    return found


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return imported_modules(ast.parse(path.read_text()), name, path.name == "__init__.py")


def within(module: str, *owners: str) -> bool:
    return any(module == owner or module.startswith(owner + ".") for owner in owners)


def test_imports_point_one_way() -> None:
    wrong = []
    for name in MODULES:
        for imported in sorted(imports_of(name)):
            owner = max((owner for owner in ALLOWED if within(name, owner)), key=len)
            if (
                owner != PACKAGE
                and not within(imported, owner, *ALLOWED[owner])
                and imported.split(".")[0] not in STANDARD_LIBRARY
            ):
                wrong.append(f"{name} imports {imported}; {owner} may import {sorted(ALLOWED[owner])}")
            if any(
                within(imported, top) and name not in by and not within(name, top, f"{PACKAGE}.cli")
                for top, by in TOP.items()
            ):
                wrong.append(f"{name} imports {imported}, which is above it")
    assert not wrong


def test_no_imports_in_a_circle() -> None:
    graph = {name: (imports_of(name) & MODULES.keys()) - {name, PACKAGE} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.match(r"[\w-]+", requirement)[0].replace("-", "_").lower() for requirement in requirements}
    wrong = [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in imports_of(name)
        if imported.split(".")[0] not in STANDARD_LIBRARY | declared | {PACKAGE}
    ]
    assert not wrong, f"not in pyproject.toml: {wrong}"


def forbidden_calls(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"print", "exec", "eval", "torch.save", "torch.load"} or called.endswith(".cuda"):
                yield node.lineno, f"call of {called}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
            for name in names & {"pickle", "dill", "joblib", "shelve", "marshal"}:
                yield node.lineno, f"import of {name}: nothing that can run code is read or written"


def device_literals(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"cuda(:\d+)?", str(node.value)):
            yield node.lineno, f"{node.value!r}: take the device from the weight at hand"


def unfinished_code(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.splitlines(), start=1):
        if found := re.search(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b", line):
            yield number, found[0]


def hidden_errors(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"


def mutable_state(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(getattr(node, "value", None), containers) and not all(
            name.isupper() or name.startswith("__") or name.lstrip("_").isupper() for name in names
        ):
            yield node.lineno, f"mutable state at module level: {', '.join(names)}"


def file_length(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    if (lines := source.count("\n")) > 300:
        yield lines, "a file has at most 300 lines: split it by subject"


RULES = [forbidden_calls, device_literals, unfinished_code, hidden_errors, mutable_state, file_length]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_rule(rule: Rule) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in FILES
        for line, what in rule(ast.parse(path.read_text()), path.read_text())
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (forbidden_calls, "def f(x):\n    print(x)\n"),
        (forbidden_calls, "weight.cuda()\n"),
        (forbidden_calls, "torch.save(x, y)\n"),
        (forbidden_calls, "def f():\n    from pickle import load\n"),
        (device_literals, "x.to('cuda:0')\n"),
        (unfinished_code, "raise NotImplementedError\n"),
        (hidden_errors, "try:\n    pass\nexcept:\n    pass\n"),
        (mutable_state, "cache = {}\n"),
        (mutable_state, "cache: dict[str, int] = {}\n"),
        (mutable_state, "def f():\n    global x\n"),
        (file_length, "x = 1\n" * 301),
    ],
)
def test_rules_find_what_they_forbid(rule: Rule, source: str) -> None:
    assert list(rule(ast.parse(source), source))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .update import solve\n", "hf_alphaedit.algorithm.update"),
        ("from ..models import hooks\n", "hf_alphaedit.models.hooks"),
        ("def f():\n    import transformers.utils\n", "transformers.utils"),
        ("from hf_alphaedit import cli\n", "hf_alphaedit.cli"),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b\n", "b"),
    ],
)
def test_imports_are_resolved(monkeypatch: pytest.MonkeyPatch, source: str, expected: str) -> None:
    for name in ("hf_alphaedit.models.hooks", "hf_alphaedit.cli"):
        monkeypatch.setitem(MODULES, name, ROOT)
    assert imported_modules(ast.parse(source), "hf_alphaedit.algorithm.moments", is_package=False) == {expected}


def test_the_hooks_of_accelerate_are_known_to_models_only() -> None:
    wrong = [name for name, path in MODULES.items() if "_hf_hook" in path.read_text()]
    assert [name for name in wrong if not within(name, f"{PACKAGE}.models")] == []


def test_import_is_light() -> None:
    command = f"import sys, {PACKAGE}; print(sorted({{'torch', 'transformers', 'numpy'}} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
