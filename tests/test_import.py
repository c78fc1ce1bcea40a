"""What ``import sparsebert`` does, and above all what it leaves alone, seen from a fresh interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

# Only a program that asks for them may load these.
HEAVY = {
    "accelerate",
    "datasets",
    "matplotlib",
    "rich",
    "safetensors",
    "sklearn",
    "tokenizers",
    "transformers",
    "triton",
    "typer",
}
SUBMODULES = ["formats", "hf", "methods", "nn", "ops"]

# One interpreter for most tests here, since each costs seconds. What loads more comes later.
PROGRAM = """
import json, logging, os, random, sys, types, warnings
from importlib.machinery import PathFinder
import torch

def state():
    return {
        "environment": dict(os.environ),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().tolist(),
        "python_random": str(random.getstate()),
        "handlers": len(logging.root.handlers),
        "filters": str(warnings.filters),
        "path": list(sys.path),
        "hooks": [str(sys.excepthook), str(sys.displayhook), str(sys.path_hooks)],
    }

def roots(names):
    return sorted({name.split(".")[0] for name in names})

def modules_among(names):
    return sorted(name for name in names if isinstance(getattr(sparsebert, name), types.ModuleType))

def error_of(look_up):
    try:
        look_up()
    except Exception as error:
        return [type(error).__name__, str(error)]

report = {}
before, loaded, finders = state(), set(sys.modules), list(sys.meta_path)
import sparsebert

after = state()
report["changed"] = [key for key in before if before[key] != after[key]]
report["loaded"] = roots(set(sys.modules) - loaded)
report["compiler"] = [n for n in ("torch._dynamo", "torch._inductor") if n in sys.modules and n not in loaded]
report["present"] = [n for n in ("transformers", "triton") if n in sys.modules]
report["cuda"] = torch.cuda.is_initialized()
report["finders"] = [type(f).__module__ for f in sys.meta_path if f not in finders]

report["not_listed"] = sorted(set(sparsebert.__all__) - set(dir(sparsebert)))
report["has_unknown"] = hasattr(sparsebert, "no_such_name")
report["attribute_error"] = error_of(lambda: sparsebert.no_such_name)
report["import_error"] = error_of(lambda: exec("from sparsebert import no_such_name"))
report["loaded_by_looking"] = [n for n in ("transformers", "triton", "sparsebert.hf") if n in sys.modules]

report["all"] = list(sparsebert.__all__)
report["modules"] = modules_among(sparsebert.__all__)
star = {}
exec("from sparsebert import *", star)
report["not_starred"] = sorted(set(sparsebert.__all__) - set(star))

from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertModel
BertModel(BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
))
report["kernels"] = PathFinder.find_spec("kernels", [*sys.path, sys.argv[1]]).origin
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(run_python_once, tmp_path_factory) -> dict[str, Any]:
    """With the repository as working directory, where a wrong layout would do harm."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").touch()
    result = run_python_once(PROGRAM, str(folder), cwd=Path(__file__).resolve().parents[1])
    lines = result.stdout.splitlines()
    return {
        **json.loads(lines[-1]),
        "printed": lines[:-1] + result.stderr.splitlines(),
        "folder": str(folder),
    }


def test_import_loads_nothing_heavy(report):
    assert HEAVY.intersection(report["loaded"]) == set()
    assert report["compiler"] == []


def test_import_leaves_the_process_alone(report):
    assert report["changed"] == []
    assert report["cuda"] is False
    assert report["finders"] == ["sparsebert._transformers_hook"]


def test_nothing_prints(report):
    assert report["printed"] == []


def test_transformers_and_triton_are_absent_whoever_would_load_them(report):
    # The tests above count from `import torch` on; this one also sees a torch that loads triton by itself.
    assert report["present"] == []


def test_public_names_are_listed_before_they_are_loaded(report):
    assert report["not_listed"] == []
    assert report["loaded_by_looking"] == []


def test_every_public_name_resolves(report):
    assert len(report["all"]) == len(set(report["all"]))
    assert report["modules"] == SUBMODULES
    assert report["not_starred"] == []


def test_public_names_mean_the_same_when_every_module_was_loaded_before(run_python):
    # Loading a submodule binds its name in the package: a function of the same name would be lost to it.
    code = """
import importlib, json, pkgutil, types
import sparsebert

for module in pkgutil.walk_packages(sparsebert.__path__, "sparsebert."):
    if not module.name.endswith(("._C", ".__main__")) and not module.name.startswith("sparsebert.kernels"):
        importlib.import_module(module.name)
print(json.dumps([n for n in sparsebert.__all__ if isinstance(getattr(sparsebert, n), types.ModuleType)]))
"""
    assert sorted(json.loads(run_python(code).stdout)) == SUBMODULES


def test_an_unknown_name_is_an_error_that_says_it(report):
    assert report["has_unknown"] is False
    for key, kind in (("attribute_error", "AttributeError"), ("import_error", "ImportError")):
        name, message = report[key]
        assert name == kind
        assert "sparsebert" in message
        assert "no_such_name" in message


def test_the_kernels_folder_does_not_shadow_an_installed_package_of_that_name(report):
    # That package is Hugging Face's, and transformers imports names from it.
    assert report["kernels"] == str(Path(report["folder"]) / "kernels" / "__init__.py")


def test_the_kernels_folder_is_a_link_without_an_init_file(root):
    assert not list((root / "kernels").glob("__init__.*"))
    link = root / "sparsebert" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("..") / "kernels"
