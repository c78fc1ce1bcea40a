"""The quantizer plug-in is registered in every order of imports, and transformers is never imported for it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

_CHECK = """
from transformers.quantizers import auto
from sparsebert.hf.quantizer import SparsebertConfig, SparsebertHfQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sparsebert"] is SparsebertConfig
assert auto.AUTO_QUANTIZER_MAPPING["sparsebert"] is SparsebertHfQuantizer
"""

_SCRIPTS = {
    "sparsebert first": """
import sys
import sparsebert
assert "transformers" not in sys.modules and "triton" not in sys.modules
import transformers
assert "sparsebert.hf.quantizer" not in sys.modules
import transformers.quantizers.auto
assert "sparsebert.hf.quantizer" in sys.modules, "not registered when the module was loaded"
"""
    + _CHECK
    + """
# The module keeps its own loader, and a reload, which builds the tables anew, registers again.
import importlib
assert type(auto.__loader__).__name__ == "SourceFileLoader"
assert auto.__spec__.loader is auto.__loader__
tables = auto.AUTO_QUANTIZER_MAPPING
assert importlib.reload(auto).AUTO_QUANTIZER_MAPPING is not tables
"""
    + _CHECK,
    "transformers first": "import transformers\nimport sparsebert\n" + _CHECK,
    "AutoModel resolved first": "from transformers import AutoModel\nimport sparsebert\n" + _CHECK,
    "quantizers.auto first": """
import transformers.quantizers.auto
import sparsebert, sys
assert "sparsebert.hf.quantizer" in sys.modules, "not registered at once"
"""
    + _CHECK,
    "the plug-in itself first": "import sparsebert.hf.quantizer\n" + _CHECK,
    "transformers absent": """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import sparsebert, torch
layer = sparsebert.nn.NMLinear(8, 4, 2, 4)
sparsebert.size_report(torch.nn.Sequential(layer))
try:
    import transformers
except ModuleNotFoundError as error:
    assert error.name == "transformers"
else:
    raise SystemExit("an import of transformers was expected to fail as it does without sparsebert")
""",
}

# Reads {name: script} and runs each in a process of its own where neither transformers nor sparsebert was ever
# imported. Their dependencies were, in the process that they are forked from: otherwise that is all the time goes to.
_RUNNER = """
import json, os, sys, traceback, warnings
import transformers.quantizers.auto
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
    del sys.modules[name]
warnings.simplefilter("error", RuntimeWarning)
pipes = {}
for name, script in json.load(sys.stdin).items():
    read, write = os.pipe()
    if not os.fork():
        status = "ok"
        try:
            exec(compile(script, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            status = traceback.format_exc()
        os.write(write, status[-4000:].encode())
        os._exit(0)
    os.close(write)
    pipes[name] = os.fdopen(read)
print(json.dumps({name: pipe.read() for name, pipe in pipes.items()}))
"""


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps(_SCRIPTS),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("order", list(_SCRIPTS))
def test_registered_in_every_import_order(outcomes, order):
    assert outcomes[order] == "ok", outcomes[order]


@pytest.fixture
def hook(monkeypatch, tmp_path):
    """The hook aimed at a module of our own, with its registration counted."""
    from sparsebert import _transformers_hook

    (tmp_path / "sparsebert_hook_target.py").write_text(
        "import os\nif os.environ.get('FAIL'): raise ImportError('own')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_Finder"])
    monkeypatch.setattr(_transformers_hook, "TARGET", "sparsebert_hook_target")
    calls: list[str] = []
    monkeypatch.setattr(_transformers_hook, "_register", lambda: calls.append("registered"))
    yield _transformers_hook, calls
    sys.modules.pop("sparsebert_hook_target", None)


def test_install_twice_adds_one_finder(hook):
    module, calls = hook
    before = len(sys.meta_path)
    module.install()
    module.install()
    assert len(sys.meta_path) == before + 1
    importlib.import_module(module.TARGET)
    assert calls == ["registered"]


def test_looking_for_the_module_does_not_register(hook):
    module, calls = hook
    module.install()
    spec = importlib.util.find_spec(module.TARGET)
    assert spec is not None and spec.loader.get_source(module.TARGET).startswith("import os")
    assert calls == []


def test_error_of_the_module_itself_is_not_swallowed(hook, monkeypatch):
    module, calls = hook
    module.install()
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(ImportError, match="own"):
        importlib.import_module(module.TARGET)
    assert calls == []
    monkeypatch.delenv("FAIL")
    importlib.import_module(module.TARGET)
    assert calls == ["registered"]


def test_two_copies_of_the_hook_do_not_call_each_other_forever(hook):
    module, calls = hook
    module.install()
    copy = importlib.util.module_from_spec(importlib.util.find_spec(module.__name__))
    copy.__spec__.loader.exec_module(copy)
    sys.meta_path.insert(0, copy._Finder())
    copy.TARGET = module.TARGET
    assert importlib.util.find_spec(module.TARGET) is not None
    module.install()
    assert sum(type(f).__name__ == "_Finder" for f in sys.meta_path) == 1


def test_failed_registration_warns_and_leaves_transformers_usable(monkeypatch):
    from sparsebert import _transformers_hook

    def broken(name):
        raise AttributeError("HfQuantizer is gone")

    monkeypatch.setattr(_transformers_hook.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="random weights: AttributeError: HfQuantizer is gone"):
        _transformers_hook._register()
