"""What is used of other libraries beyond their public API is what docs/dependencies.md lists, and is still there."""

from __future__ import annotations

import ast
import importlib
import mmap
import pkgutil
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from poise import env

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/dependencies.md").read_text()
FILES = sorted(file for folder in ("platform", "tests") for file in (ROOT / folder).rglob("*.py"))
VARIABLE = re.compile(r"(?:RAY|TUNE|VLLM|TORCHDYNAMO)_\w*[A-Za-z]")
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of Python: named tuples, os._exit


def listed(heading: str) -> list[str]:
    """The names in the first column of the table under a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_third_party(module: str) -> bool:
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("poise", "tests", "")


def shortened(dotted: str) -> str:
    """A dotted name up to its first private part."""
    parts = dotted.split(".")
    for index, part in enumerate(parts):
        if is_private(part):
            return ".".join(parts[: index + 1])
    return ""


@cache
def own_names() -> frozenset[str]:
    """Every private name that the code of Poise and its tests define."""
    names: set[str] = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return frozenset(filter(is_private, names))


class Uses(ast.NodeVisitor):
    """Collects the private names of third-party libraries that a module uses."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.imports: dict[str, str] = {}
        self.bases: list[list[str]] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
            self.use(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            dotted = f"{node.module}.{alias.name}"
            self.imports[alias.asname or alias.name] = dotted
            self.use(dotted)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self.dotted(base) for base in node.bases]
        third_party = [base for base in bases if base and is_third_party(base)]
        for base in third_party:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and is_private(item.name) and has_attribute(base, item.name):
                    self.found.add(f"{base}.{item.name}")
        self.bases.append(third_party)
        self.generic_visit(node)
        self.bases.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = self.dotted(node)
        if dotted:
            self.use(dotted)
        elif is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner == "super()":
                bases = self.bases[-1] if self.bases else []
                self.found |= {f"{base}.{node.attr}" for base in bases}
            elif owner not in ("self", "cls") and node.attr not in own_names() | DOCUMENTED:
                self.found.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("getattr", "hasattr", "setattr", "delattr"):
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    self.string(argument.value)
        self.generic_visit(node)

    def string(self, text: str) -> None:
        """An attribute that is named by a string, alone or with the path to it."""
        if "." in text:
            if find_spec_of_top(text):
                self.use(text)
        elif is_private(text) and text not in own_names() and text not in STANDARD_LIBRARY:
            self.found.add(text)

    def use(self, dotted: str) -> None:
        if is_third_party(dotted) and (short := shortened(dotted)):
            self.found.add(short)

    def dotted(self, node: ast.expr) -> str:
        """The full name of an expression that begins with an imported name; empty for any other."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self.imports:
            return ".".join([self.imports[node.id], *parts])
        return ""


STANDARD_LIBRARY = {"_candidate_tempdir_list"}  # of tempfile; tests replace it


def find_spec_of_top(dotted: str) -> bool:
    return dotted.partition(".")[0].isidentifier() and find_spec(dotted.partition(".")[0]) is not None


def has_attribute(dotted: str, name: str) -> bool:
    """Whether a class of another library has an attribute of its own of this name."""
    module, _, attribute = dotted.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):  # a module of an extra, or a class inside a class
        return False
    return hasattr(owner, name)


def uses_of(source: str) -> set[str]:
    visitor = Uses()
    visitor.visit(ast.parse(source))
    return visitor.found


def test_every_private_name_that_is_used_is_on_the_page_and_no_other():
    found = {name: file for file in FILES for name in uses_of(file.read_text())}
    missing = {name: str(file.relative_to(ROOT)) for name, file in found.items() if name not in listed("Private names")}
    assert not missing, "list them in docs/dependencies.md, or use a public name"
    assert set(listed("Private names")) == set(found), "the page lists names that are used no longer"


PLANTED = [
    ("from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy", "ray.train.v2._internal"),
    ("import ray._private.worker", "ray._private"),
    ("from vllm.v1.engine import _hidden", "vllm.v1.engine._hidden"),
    ("import torch\ntorch._C._set_worker_signal_handlers()", "torch._C"),
    (
        "from torch import nn\nnn.modules.module._global_backward_hooks",
        "torch.nn.modules.module._global_backward_hooks",
    ),
    ("from torch import nn\nclass A(nn.Module):\n def _apply(self, fn):\n  return self", "torch.nn.Module._apply"),
    (
        "from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer\n"
        "class T(DataParallelTrainer):\n def fit(self):\n  return super()._create_default_callbacks()",
        "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._create_default_callbacks",
    ),
    ("def parameters(model):\n return model._parameters", "_parameters"),
    ("def hooks(model):\n return getattr(model, '_forward_hooks')", "_forward_hooks"),
    ("def patch(monkeypatch):\n monkeypatch.setattr('botocore._private.x', 1)", "botocore._private"),
]


@pytest.mark.parametrize(("source", "name"), PLANTED)
def test_a_planted_use_is_found(source, name):
    assert name in uses_of(source)


@pytest.mark.parametrize(
    "source",
    [
        "from poise.store.s3 import _endpoint",
        "class A:\n def f(self):\n  return self._anything",
        "import os\nos._exit(1)",
        "def f(output):\n return output._replace(loss=1)",
        "import torch\ntorch.nn.functional.relu",
    ],
)
def test_names_of_our_own_and_public_ones_are_not(source):
    assert uses_of(source) == set()


def names_of_compiled_weights() -> bool:
    compiled = torch.compile(nn.Linear(1, 1))
    return hasattr(compiled, "_orig_mod") and all(name.startswith("_orig_mod.") for name in compiled.state_dict())


@pytest.mark.parametrize("name", listed("Private names"))
def test_a_private_name_is_still_there(name):
    if name == "_orig_mod":
        assert names_of_compiled_weights()
        return
    owner, _, attribute = name.rpartition(".")
    assert hasattr(pkgutil.resolve_name(owner), attribute)


def test_the_environment_variables_on_the_page_are_those_that_the_code_names():
    named = set()
    for file in (ROOT / "platform").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                named.add(node.value)
    constants = {name for name in named if hasattr(env, name)}  # names in its __all__
    assert named - constants == set(listed("Environment variables"))


@cache
def sources(library: str) -> bytes:
    """The Python sources of an installed library."""
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{library} is not installed")
    folder = Path(spec.submodule_search_locations[0])
    return b"".join(file.read_bytes() for file in folder.rglob("*.py"))


def is_in_binaries_of_ray(text: bytes) -> bool:
    spec = find_spec("ray")
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    for file in (folder / "_raylet.so", folder / "core/src/ray/raylet/raylet"):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(text) >= 0:
                return True
    return False


def is_read_by(library: str, variable: str) -> bool:
    """Whether an installed library mentions an environment variable; its C++ code does so without the prefix RAY_."""
    if variable.encode() in sources(library):
        return True
    return library == "ray" and is_in_binaries_of_ray(variable.removeprefix("RAY_").encode())


@pytest.mark.parametrize("variable", listed("Environment variables"))
def test_an_environment_variable_is_still_read(variable):
    library = {"RAY": "ray", "TUNE": "ray", "VLLM": "vllm", "TORCHDYNAMO": "torch._dynamo"}[variable.partition("_")[0]]
    assert is_read_by(library, variable)
    assert not is_read_by(library, f"{variable}_OF_NOBODY")


def defines(library: str) -> Callable[[str], bool]:
    return lambda name: (
        re.search(rb"\b(?:def %b\(|%b\b *[:=])" % (name.encode(), name.encode()), sources(library)) is not None
    )


UNDOCUMENTED: dict[str, Callable[[str], bool]] = {
    "ray.scripts.scripts": lambda name: find_spec(name) is not None,
    "NodeInfoGcsService/GetClusterId": lambda name: all(
        is_in_binaries_of_ray(part.encode()) for part in name.split("/")
    ),
    "ray::": lambda name: is_in_binaries_of_ray(b"ray::IDLE"),
    "RetriesExceededError": lambda name: hasattr(importlib.import_module("s3transfer.exceptions"), name),
    "sys.exit(0)": lambda name: name.encode() in sources("ray.train.v2.api"),
}


@pytest.mark.parametrize("name", listed("Undocumented behaviour"))
def test_undocumented_behaviour_is_still_there(name):
    assert UNDOCUMENTED.get(name, defines("vllm"))(name)


def test_the_tests_that_the_page_names_exist():
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    rows = [line for line in PAGE.partition("## Undocumented behaviour")[2].splitlines() if line.startswith("| `")]
    assert all("`tests/" in row for row in rows)
