"""Who may import whom: every import statement of the library is read, inside functions too."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = "sparsebert"


@dataclass(frozen=True)
class Rule:
    """What a part of the package may import besides itself and the standard library.

    ``uses`` and ``packages`` may be imported anywhere, ``lazy_uses`` and ``lazy_packages`` only inside a
    function or for type checking. "public" is the package itself, as in ``from sparsebert import NMConfig``.
    """

    uses: tuple[str, ...] = ()
    lazy_uses: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("torch",)
    lazy_packages: tuple[str, ...] = ()


# A part is a module or folder right under sparsebert/.
RULES = {
    # The entry points. The package resolves its public names on first use.
    "__init__": Rule(
        uses=("ops", "_transformers_hook"),
        lazy_uses=(
            "formats",
            "nn",
            "methods",
            "hf",
            "configs",
            "plan",
            "roles",
            "swap",
            "report",
            "tuning",
            "calibration",
            "runner",
            "ops",
        ),
    ),
    "__main__": Rule(uses=("cli",)),
    "_transformers_hook": Rule(lazy_uses=("hf",), packages=()),
    # What reads the files of a checkpoint: it must not depend on what it guards.
    "storage": Rule(packages=()),
    # The core, from the bottom up: torch alone.
    "configs": Rule(packages=()),
    "roles": Rule(),
    "formats": Rule(uses=("configs",)),
    "kernels": Rule(packages=("torch", "triton")),
    "ops": Rule(uses=("formats",), lazy_uses=("kernels", "_C"), lazy_packages=("triton",)),
    "nn": Rule(uses=("ops", "formats", "configs")),
    "plan": Rule(uses=("formats", "configs", "roles", "storage"), packages=("torch", "safetensors")),
    "report": Rule(uses=("nn", "ops", "formats", "plan", "roles", "configs")),
    "swap": Rule(uses=("nn", "formats", "configs", "plan", "roles", "report")),
    "methods": Rule(uses=("formats", "configs", "plan", "roles")),
    "calibration": Rule(uses=("nn", "formats", "report", "roles")),
    "tuning": Rule(uses=("nn", "ops", "roles", "report", "swap", "bench.timing")),
    "graphs": Rule(),
    "runner": Rule(uses=("graphs", "nn", "ops", "report")),
    # transformers lives here and nowhere else.
    "hf": Rule(
        uses=("swap", "methods", "nn", "ops", "report", "plan", "configs", "roles", "storage"),
        packages=("torch", "transformers", "safetensors"),
        lazy_packages=("accelerate",),
    ),
    # On top: the public API. `roles` and `configs` are the words a user types, `plan` the file he gives.
    # bench also measures layouts and kernels one by one, by what selection sees of them, and loads the peers it names.
    "bench": Rule(
        uses=("public", "ops", "nn", "formats", "configs"),
        lazy_uses=("tuning",),
        packages=("torch", "numpy"),
        lazy_packages=("matplotlib", "transformers", "torchao"),
    ),
    "cli": Rule(
        uses=("public", "bench", "configs", "plan", "calibration", "roles", "storage"),
        packages=("torch", "typer", "rich", "safetensors"),
        lazy_packages=("matplotlib", "numpy", "sklearn", "datasets"),
    ),
}

# What "public" means as an import: the package itself and these of its modules, but nothing inside them.
PUBLIC = ("formats", "hf", "methods", "nn", "ops")

# (module, what it imports) -> why, for what the table would refuse; packages still only inside a function. "?" is an
# import of a computed name.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("sparsebert", "?"): "public names come from a table, and stand in the type-checking block too",
    ("sparsebert.hf", "?"): "likewise",
    ("sparsebert._transformers_hook", "transformers"): (
        "only where it is being imported already, to wait for the thread that does"
    ),
    ("sparsebert.cli.models", "transformers"): "loads dense models and tokenizers, which hf has no business with",
    ("sparsebert.cli.models", "huggingface_hub"): "keeps its progress bars out of ours",
    ("sparsebert.cli.models", "sparsebert.swap"): "the names that tell a packed checkpoint from a dense one",
    ("sparsebert.cli.info", "sparsebert.swap"): "likewise",
    ("sparsebert.cli.info", "sparsebert.ops.layouts"): "shows what there is to choose from",
    ("sparsebert.cli.info", "sparsebert.ops.select"): "likewise",
    ("sparsebert.cli.info", "sparsebert.ops.measurements"): "shows what was measured on this machine",
    ("sparsebert.cli.info", "sparsebert.ops.devices"): "likewise",
}

# Loading with these runs what the file says.
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.package"}
UNSAFE_CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.serialization.load", "eval", "exec"}

COMPILED = {"sparsebert._C"}


@dataclass(frozen=True)
class Import:
    module: str
    target: str
    lazy: bool
    line: int


def library(root: Path) -> dict[str, Path]:
    """Module name -> file, through the link to kernels/."""
    found = {}
    for folder, folders, files in os.walk(root / PACKAGE, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(".py"):
                file = Path(folder, name)
                parts = file.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


class Reader(ast.NodeVisitor):
    """Collects a module's imports as absolute names, and the calls that no module of the library may make."""

    def __init__(self, module: str, file: Path, modules: set[str]) -> None:
        self.module, self.modules = module, modules
        self.package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        self.imports: list[Import] = []
        self.problems: list[str] = []
        self.lazy = 0
        self.names: dict[str, str] = {}
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                        self.names[target.id] = node.value.value
        self.aliases: dict[str, str] = {}
        # Aliases first: a function may use a name that is imported further down.
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.split(".")[0]
                    self.aliases[alias.asname or name] = name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        self.visit(tree)

    def add(self, target: str, node: ast.AST) -> None:
        self.imports.append(Import(self.module, target, self.lazy > 0, node.lineno))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            base = resolve_name("." * node.level + base, self.package)
        for alias in node.names:
            name = f"{base}.{alias.name}"
            # `from sparsebert import nn` imports the module nn, `... import NMConfig` the package.
            is_module = name in self.modules or name in COMPILED or name in UNSAFE_MODULES
            is_folder = any(known.startswith(f"{name}.") for known in self.modules)
            self.add(name if is_module or is_folder else base, node)

    def visit_If(self, node: ast.If) -> None:
        checking = self.dotted(node.test) in ("typing.TYPE_CHECKING", "TYPE_CHECKING")
        self.lazy += checking
        for child in node.body:
            self.visit(child)
        self.lazy -= checking
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.lazy += 1
        self.generic_visit(node)
        self.lazy -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.lazy += 1
        self.generic_visit(node)
        self.lazy -= 1

    def visit_Assert(self, node: ast.Assert) -> None:
        self.problems.append(f"{self.module}:{node.lineno}: assert vanishes under -O; raise ValueError")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func)
        if name in ("importlib.import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                target = argument.value
            elif isinstance(argument, ast.Name) and argument.id in self.names:
                target = self.names[argument.id]
            else:
                target = "?"
            self.add(resolve_name(target, self.package), node)
        elif name == "print" and self.module.split(".")[1:2] != ["cli"]:
            self.problems.append(f"{self.module}:{node.lineno}: print outside cli")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.refuse_unsafe(node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.refuse_unsafe(node)

    def refuse_unsafe(self, node: ast.Attribute | ast.Name) -> None:
        if (name := self.dotted(node)) in UNSAFE_CALLS and isinstance(node.ctx, ast.Load):
            self.problems.append(f"{self.module}:{node.lineno}: {name} runs what a file or a text says")

    def dotted(self, node: ast.AST) -> str | None:
        """``torch.jit.load`` for that expression, whatever name the module was imported under."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (base := self.dotted(node.value)):
            return f"{base}.{node.attr}"
        return None


def part_of(module: str) -> str:
    """``nn`` for ``sparsebert.nn.nm_linear``, ``__init__`` for the package itself."""
    return (module.split(".") + ["__init__"])[1]


def excepted(found: Import) -> tuple[str, str] | None:
    """The exception that lets this import pass."""
    for module, target in EXCEPTIONS:
        if found.module == module and within(found.target, (target,)):
            if found.lazy or target == "?" or within(target, (PACKAGE,)):
                return module, target
    return None


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def refusal(found: Import) -> str | None:
    """None, or why the table has no room for this import."""
    if excepted(found):
        return None
    root = found.target.split(".")[0]
    if found.target == "?":
        return "imports a computed name, which nothing can check"
    if found.target in UNSAFE_MODULES or root in UNSAFE_MODULES:
        return "loading with it runs what the file says; use safetensors and JSON"
    if root in sys.stdlib_module_names:
        return None
    rule = RULES[part_of(found.module)]
    if root != PACKAGE:
        name, now, later = root, rule.packages, rule.lazy_packages
    else:
        name = ".".join(found.target.split(".")[1:]) or "public"
        now, later = (part_of(found.module), *rule.uses), rule.lazy_uses
        if "public" in now and name in PUBLIC:
            return None
    if within(name, now):
        return None
    if within(name, later):
        return None if found.lazy else f"may import {name} only inside a function"
    return f"may not import {found.target}"


def check(root: Path) -> Iterator[str]:
    """Every break of a rule in the library under ``root``, as ``module:line: what``."""
    files = library(root)
    for module, file in files.items():
        reader = Reader(module, file, set(files))
        yield from reader.problems
        if part_of(module) not in RULES:
            yield f"{module}: this part of the package is not in the table"
            continue
        for found in reader.imports:
            if reason := refusal(found):
                yield f"{module}:{found.line}: {reason}"


def test_the_library_keeps_to_the_table(root):
    assert list(check(root)) == []


def test_every_part_that_exists_is_read(root):
    modules = library(root)
    for name in (
        "sparsebert",
        "sparsebert.formats.nm",
        "sparsebert.ops.select",
        "sparsebert.nn",
        "sparsebert.swap",
    ):
        assert name in modules
    kernels = {f"sparsebert.kernels.{file.stem}" for file in (root / "kernels").glob("*.py")}
    assert kernels <= set(modules)


def test_every_exception_is_still_needed(root):
    files = library(root)
    used = {
        excepted(found)
        for module, file in files.items()
        for found in Reader(module, file, set(files)).imports
        if within(found.module, tuple(module for module, _ in EXCEPTIONS))
    }
    assert set(EXCEPTIONS) - used == set()


def test_the_table_has_no_cycle():
    # Lazy edges may point back (the hook, the package's own names); the others order the parts.
    needs = {part: {used.split(".")[0] for used in rule.uses} - {"public"} for part, rule in RULES.items()}
    while free := [part for part, below in needs.items() if not below & needs.keys()]:
        for part in free:
            del needs[part]
    assert needs == {}


@pytest.fixture
def tree(tmp_path):
    """A library of empty modules; ``tree(path, text)`` writes one more and checks them all."""
    for path in ("__init__", "formats/nm", "formats/__init__", "nn/__init__", "ops/__init__", "ops/select"):
        file = tmp_path / PACKAGE / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "nm_linear.py").touch()
    (tmp_path / PACKAGE / "kernels").symlink_to(Path("..") / "kernels")

    def write(path: str, text: str) -> list[str]:
        file = tmp_path / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return list(check(tmp_path))

    return write


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("methods/a.py", "from sparsebert import nn", "sparsebert.methods.a:1: may not import sparsebert.nn"),
        ("methods/a.py", "import sparsebert.ops as ops", "may not import sparsebert.ops"),
        ("methods/a.py", "from ..ops import select", "may not import sparsebert.ops"),
        (
            "methods/a.py",
            "def f():\n    from sparsebert.nn import NMLinear",
            "a:2: may not import sparsebert.nn",
        ),
        ("methods/a.py", "import transformers", "may not import transformers"),
        ("methods/a.py", "import sparsebert as sb", "may not import sparsebert"),
        ("swap.py", "from sparsebert.hf.checkpoint import load_pretrained", "may not import sparsebert.hf"),
        (
            "swap.py",
            "try:\n    import transformers\nexcept ImportError:\n    pass",
            "may not import transformers",
        ),
        (
            "nn/a.py",
            "import importlib\nimportlib.import_module('sparsebert.hf')",
            "may not import sparsebert.hf",
        ),
        ("nn/a.py", "from importlib import import_module as load\nload('triton')", "may not import triton"),
        ("nn/a.py", "from importlib import import_module\nimport_module('..hf', 'x')", "may not import"),
        ("nn/a.py", "import importlib, sys\nimportlib.import_module(sys.argv[1])", "a computed name"),
        (
            "nn/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
            "may not import",
        ),
        ("ops/triton/nm.py", "from sparsebert.kernels import nm_linear", "only inside a function"),
        ("ops/triton/nm.py", "import triton", "may import triton only inside a function"),
        ("ops/cuda.py", "from sparsebert import _C", "may import _C only inside a function"),
        ("ops/cuda.py", "class A:\n    from sparsebert import _C", "may import _C only inside a function"),
        (
            "kernels/a.py",
            "from sparsebert.formats import nm",
            "sparsebert.kernels.a:1: may not import sparsebert.formats",
        ),
        ("formats/a.py", "import numpy", "may not import numpy"),
        ("formats/a.py", "from tests import helpers", "may not import tests"),
        ("cli/a.py", "import benchmarks.gpu_check", "may not import benchmarks"),
        ("cli/a.py", "from examples import swap_layers", "may not import examples"),
        ("cli/a.py", "from sparsebert.ops import select", "may not import sparsebert.ops.select"),
        ("cli/a.py", "def f():\n    import transformers", "may not import transformers"),
        ("cli/models.py", "import transformers", "may not import transformers"),
        ("surprise.py", "", "not in the table"),
        ("hf/a.py", "import pickle", "use safetensors"),
        ("hf/a.py", "from torch import package", "use safetensors"),
        ("hf/a.py", "from joblib import load", "use safetensors"),
        ("hf/a.py", "import torch\ntorch.load('x')", "torch.load runs"),
        ("hf/a.py", "import torch as t\nread = t.load", "torch.load runs"),
        ("hf/a.py", "from torch import load as read\nread('x')", "torch.load runs"),
        ("hf/a.py", "eval('1')", "eval runs"),
        ("nn/a.py", "def f(x):\n    assert x", "a:2: assert"),
        ("nn/a.py", "print('here')", "print outside cli"),
    ],
)
def test_the_check_finds(tree, path, text, complaint):
    (found,) = tree(path, text)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("methods/a.py", "import json\nimport torch.nn.functional as F\nfrom sparsebert.formats import nm"),
        ("methods/a.py", "from .b import helper\nfrom . import b"),
        ("ops/triton/nm.py", "def run():\n    import triton\n    from sparsebert.kernels import nm_linear"),
        ("ops/cuda.py", "def run():\n    from sparsebert import _C"),
        (
            "ops/a.py",
            "import typing\nif typing.TYPE_CHECKING:\n    import triton\nelse:\n    triton = None",
        ),
        ("kernels/a.py", "import torch\nimport triton\nimport triton.language as tl"),
        ("nn/a.py", "import importlib\nNAME = 'sparsebert.ops'\nimportlib.import_module(NAME)"),
        ("hf/a.py", "from transformers import AutoModel\nmodel.load('x')\nmodel.eval()"),
        ("cli/a.py", "import sparsebert as sb\nfrom sparsebert import NMConfig, nn\nprint(sb)"),
        ("cli/models.py", "def f():\n    from transformers.utils import logging"),
    ],
)
def test_the_check_passes(tree, path, text):
    assert tree(path, text) == []
