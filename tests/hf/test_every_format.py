"""Every family with every format: compressed, saved, reloaded in a fresh process, the same outputs bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsebert as sb
from packed_cases import CONFIGS
from sparsebert.nn import MODULES, Int8Linear
from sparsebert.swap import quantization_config
from tiny_models import FAMILIES, inputs, outputs, tiny_model

# Every family, under a head where it has one; test_families.py has the rest.
KINDS = [name for name in FAMILIES if not name.endswith("-bare")]
SELECTIONS = {
    "mixed": {
        "attention_output": sb.NMConfig(2, 4),
        "intermediate": sb.LowRankConfig(ratio=0.5),
        "output": sb.Int8Config(),
    },
    # The intermediate layer stays dense and loses the rows that nobody reads.
    "output alone": {"output": sb.NMConfig(2, 4, columns=0.5)},
}

_FRESH = """
import json, pathlib, sys
import torch, transformers
import sparsebert as sb
from safetensors.torch import load_file
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
root = pathlib.Path(sys.argv[1])
torch.set_num_threads(1)
results = {}
for folder in sorted(root.iterdir()):
    expected = load_file(folder / "expected.safetensors")
    want, want_neutral = expected.pop("out"), expected.pop("neutral")
    model = sb.load_pretrained(folder)
    with torch.no_grad(), sb.backend("reference"):
        strict = torch.equal(model(**expected)[0], want)
    state = {name: tensor for name, tensor in model.state_dict().items()}
    stored = load_file(folder / "model.safetensors")
    same = all(torch.equal(stored[name], state[name]) for name in stored if name in state)
    with torch.no_grad(), sb.backend("reference"):
        neutral = torch.equal(sb.prepare_(model, "neutral")(**expected)[0], want_neutral)
    results[folder.name] = {"strict": strict, "stored": same, "neutral": neutral}
print(json.dumps(results))
"""


def compressed(family, config):
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start as constants, which would hide a mix-up.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    report = sb.compress_(model, config)
    static = [m for m in model.modules() if isinstance(m, Int8Linear) and m.spec.activations == "static"]
    if static:
        sb.calibrate(model, [inputs(model)])
    return model, report


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, run_python_once):
    """What a fresh process found, by folder; a folder for each family and config."""
    root = tmp_path_factory.mktemp("formats")
    threads = torch.get_num_threads()
    # Sums come out in another order on another number of threads, and these matrices are too small for two.
    torch.set_num_threads(1)
    for family in KINDS:
        for name, config in (CONFIGS | SELECTIONS).items():
            model, _ = compressed(family, config)
            folder = root / f"{family} {name}"
            model.save_pretrained(folder)
            with sb.backend("reference"):
                out = outputs(model)
                # Int8 may be held dense, which does not quantize x.
                with sb.quantizing(model):
                    quantized = outputs(model)
                neutral = outputs(sb.prepare_(model, "neutral"))
            assert torch.isfinite(out).all()
            assert torch.allclose(neutral, quantized, atol=1e-5), (family, name)
            save_file({"out": out, "neutral": neutral, **inputs(model)}, folder / "expected.safetensors")
    torch.set_num_threads(threads)
    done = run_python_once(_FRESH, str(root))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CONFIGS | SELECTIONS)
def test_a_fresh_process_gets_the_same_outputs_bit_for_bit(fresh, name):
    found = {family: fresh[f"{family} {name}"] for family in KINDS}
    failed = [f"{family}: {what}" for family, checks in found.items() for what, held in checks.items() if not held]
    assert not failed


def test_every_format_is_there():
    assert {config.format for config in CONFIGS.values()} == set(MODULES)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dense"])
def test_formats_are_smaller_than_dense(name):
    """On disk, as the promise is, in each layer."""
    model, report = compressed("bert", CONFIGS[name])
    assert len(report.layers) == 12
    for layer in report.size.layers:
        assert layer.bytes.disk < layer.bytes.dense, layer


def test_the_layer_map_describes_every_tensor(tmp_path):
    for name, config in CONFIGS.items():
        model, _ = compressed("bert", config)
        folder = tmp_path / name.replace("/", "_")
        model.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        for path, entry in quantization_config(model)["layers"].items():
            module = sb.nn.module_from_entry(entry, name=path, device="meta")
            for key, tensor in module.state_dict().items():
                found = stored.pop(f"{path}.{key}")
                assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype), (name, path, key)
        assert not [key for key in stored if ".layer." in key and "LayerNorm" not in key]


@pytest.mark.parametrize("config", [CONFIGS["2:4@0.5"], SELECTIONS["output alone"]], ids=["both", "output alone"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_compacted_layers_must_fit_together(family, config, tmp_path):
    model, _ = compressed(family, config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("kept_rows"))
    rows = tensors[name]
    free = sorted(set(range(64)) - set(rows.tolist()))
    rows[0] = free[0] if free[0] < rows[1] else rows[0]
    changed = rows.clone()
    changed[-1] = max(set(range(128 if family == "modernbert" else 64)) - set(rows.tolist()))
    tensors[name] = changed.sort().values.to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="kept_rows are not the columns that .* is made of"):
        sb.load_pretrained(tmp_path)


def test_uncalibrated_static_layers_are_not_saved(tmp_path):
    model = tiny_model()
    sb.compress_(model, sb.Int8Config("static"))
    for save in (model.save_pretrained, lambda folder: sb.save_pretrained(model, folder)):
        with pytest.raises(ValueError, match=r"query: static activations have no input_scale yet; call .*calibrate"):
            save(tmp_path / "out")
    with pytest.raises(RuntimeError, match="static activations have no input_scale yet"):
        outputs(model)
