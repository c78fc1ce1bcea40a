"""Checkpoints: what was packed comes back bit for bit in a fresh process, and nothing malformed comes in."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import sparsebert as sb

_SIZES = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
_DISTIL = DistilBertConfig(
    vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40, pad_token_id=0
)
# name -> (class, config, Auto class that loads it)
MODELS = {
    "bert": (BertModel, BertConfig(**_SIZES), "AutoModel"),
    "bert_classifier": (BertForSequenceClassification, BertConfig(**_SIZES), "AutoModelForSequenceClassification"),
    "roberta_classifier": (
        RobertaForSequenceClassification,
        RobertaConfig(**_SIZES),
        "AutoModelForSequenceClassification",
    ),
    "distilbert_classifier": (
        DistilBertForSequenceClassification,
        _DISTIL,
        "AutoModelForSequenceClassification",
    ),
    "electra": (ElectraModel, ElectraConfig(**_SIZES, embedding_size=16), "AutoModel"),
}
IDS = torch.tensor([[2, 5, 9, 40, 77, 3], [2, 8, 15, 99, 1, 3]])
QUERY = "bert.encoder.layer.0.attention.self.query"


def build(name):
    cls, config, _ = MODELS[name]
    torch.manual_seed(7)
    model = cls(type(config).from_dict(config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start as constants, which would hide a mix-up.
            parameter.add_(torch.randn_like(parameter) * 0.05)
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
        # Rounds to zero in float16, so the packed form of the cast weight has other slots.
        layer.weight[0] = torch.tensor([0.0, 0.0, 1e-9, -1e-9]).repeat(layer.in_features // 4)
    return model


def pack(name, dtype=torch.float32):
    model = build(name).to(dtype)
    sb.compress_(model, sb.NMConfig(2, 4))
    return model


@torch.no_grad()
def output(model):
    return model(IDS)[0]


# First transformers alone, then with sparsebert: one process, since importing transformers is what takes time.
_FRESH = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file
root = pathlib.Path(sys.argv[1])
transformers.utils.logging.disable_progress_bar()
model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
    root / "bert_classifier" / "stock", output_loading_info=True
)
assert "sparsebert" not in sys.modules
without = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}

import sparsebert as sb
results = {}
for name, (cls, auto) in json.loads((root / "models.json").read_text()).items():
    expected = load_file(root / name / "expected.safetensors")
    ids, want, half, base = (expected[key] for key in ("ids", "out", "half", "base"))
    run = lambda model: model(ids)[0].detach()
    auto = getattr(transformers, auto)
    stock, sharded = root / name / "stock", root / name / "sharded"
    loaded, info = auto.from_pretrained(stock, output_loading_info=True)
    results[name] = {
        "stock": torch.equal(run(loaded), want),
        "no loose keys": not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")),
        "stock sharded": torch.equal(run(auto.from_pretrained(sharded)), want),
        "strict": torch.equal(run(sb.load_pretrained(stock)), want),
        "strict class": type(sb.load_pretrained(stock)).__name__ == cls,
        "strict sharded": torch.equal(run(sb.load_pretrained(sharded, auto)), want),
        "float16": torch.equal(run(auto.from_pretrained(stock, dtype=torch.float16)), half),
        "bare encoder": torch.equal(run(transformers.AutoModel.from_pretrained(stock)), base),
        "bare encoder float16": {
            p.dtype for p in transformers.AutoModel.from_pretrained(stock, dtype="float16").parameters()
        } == {torch.float16},
    }
    loaded.save_pretrained(root / name / "again")
    sb.load_pretrained(stock, dtype=torch.float16).save_pretrained(root / name / "half")
print(json.dumps({"without": without, "results": results}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with every model saved; ``fresh`` adds what a new process saved from there."""
    root = tmp_path_factory.mktemp("checkpoints")
    (root / "models.json").write_text(
        json.dumps({name: (cls.__name__, auto) for name, (cls, _, auto) in MODELS.items()})
    )
    for name in MODELS:
        model = pack(name)
        base = getattr(model, model.base_model_prefix, model)
        expected = {"ids": IDS, "out": output(model), "base": output(base)}
        model.save_pretrained(root / name / "stock")
        model.save_pretrained(root / name / "sharded", max_shard_size="20KB")
        assert (root / name / "sharded" / "model.safetensors.index.json").is_file()
        expected["half"] = output(sb.decompress_(model).half())
        save_file(expected, root / name / "expected.safetensors")
    return root


@pytest.fixture(scope="module")
def process(saved):
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, str(saved)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def fresh(process):
    return process[0]["results"]


@pytest.mark.parametrize("name", list(MODELS))
def test_fresh_process_gets_the_same_outputs_bit_for_bit(fresh, name):
    failed = [what for what, passed in fresh[name].items() if not passed]
    assert len(fresh[name]) == 9
    assert not failed


@pytest.mark.parametrize("name", list(MODELS))
def test_saving_again_writes_the_same_tensors_and_map(saved, fresh, name):
    root = saved / name
    first, again = (load_file(root / kind / "model.safetensors") for kind in ("stock", "again"))
    assert first.keys() == again.keys()
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    maps = [json.loads((root / kind / "config.json").read_text())["quantization_config"] for kind in ("stock", "again")]
    assert maps[0] == maps[1]


@pytest.mark.parametrize("name", list(MODELS))
def test_saved_in_another_dtype_than_loaded_from(saved, fresh, name):
    root = saved / name
    described = json.loads((root / "half" / "config.json").read_text())
    assert described["dtype"] == "float16"
    assert {entry["dtype"] for entry in described["quantization_config"]["layers"].values()} == {"float16"}
    model = sb.load_pretrained(root / "half")
    assert torch.equal(output(model), load_file(root / "expected.safetensors")["half"])


def test_without_sparsebert_packed_names_never_meet_dense_ones(saved, process):
    """What the model card warns of: transformers alone loads random weights, with a warning and no error."""
    info, stderr = process[0]["without"], process[1]
    stored = load_file(saved / "bert_classifier" / "stock" / "model.safetensors")
    packed = {key for key in stored if key.endswith((".values", ".positions"))}
    assert set(info["unexpected_keys"]) == packed
    assert set(info["missing_keys"]) == {f"{key.removesuffix('.values')}.weight" for key in packed if "values" in key}
    assert info["mismatched_keys"] == []
    assert "Unknown quantization type, got sparsebert" in stderr


def test_head_and_bare_encoder_load_each_other(saved, tmp_path):
    encoder = BertModel.from_pretrained(saved / "bert_classifier" / "stock")
    paths = set(encoder.config.quantization_config.layers)
    assert QUERY.removeprefix("bert.") in paths and QUERY not in paths
    encoder.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    assert set(model.config.quantization_config.layers) == {f"bert.{path}" for path in paths}
    assert torch.equal(output(model.bert), output(encoder))


def test_part_of_a_packed_model_saves_by_itself(tmp_path):
    model = pack("bert_classifier")
    model.bert.save_pretrained(tmp_path)
    assert torch.equal(output(sb.load_pretrained(tmp_path)), output(model.bert))


def test_packed_head_is_left_out_of_a_bare_encoder(tmp_path):
    model = build("roberta_classifier")
    sb.compress_(model, {"query": sb.NMConfig(2, 4), "classifier.dense": sb.NMConfig(1, 4)})
    model.save_pretrained(tmp_path)
    encoder, info = type(model.roberta).from_pretrained(tmp_path, output_loading_info=True)
    assert {key.partition(".")[0] for key in info["unexpected_keys"]} == {"classifier"}
    assert torch.equal(encoder(IDS)[0], model.roberta(IDS)[0])
    assert torch.equal(output(sb.load_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored_dtype_is_kept_and_can_be_widened(tmp_path, dtype):
    model = pack("bert_classifier", dtype)
    model.save_pretrained(tmp_path)
    same = sb.load_pretrained(tmp_path)
    assert same.dtype == dtype and torch.equal(output(same), output(model))
    wide = sb.load_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(output(wide), output(sb.decompress_(model).float()))


def test_cast_after_packing_then_saved_by_stock(tmp_path):
    """The map in the config still says float32 then; what is stored counts."""
    model = pack("bert_classifier").half()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(sb.load_pretrained(tmp_path)), output(model))


def test_overflow_of_a_cast_names_the_layer(tmp_path):
    model = build("bert_classifier")
    with torch.no_grad():
        model.get_submodule(QUERY).weight[0, 0] = 1e6
    sb.compress_(model, sb.NMConfig(2, 4))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{QUERY}: cannot be held in torch.float16"):
        sb.load_pretrained(tmp_path, dtype=torch.float16)


def test_returns_eval_mode_on_the_device(saved):
    model = sb.load_pretrained(saved / "bert" / "stock", device="cpu")
    assert not any(module.training for module in model.modules())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_save_writes_card_and_tokenizer_and_spares_a_foreign_readme(tmp_path, caplog):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    model = pack("bert")
    sb.save_pretrained(model, tmp_path, tokenizer=tokenizer, max_shard_size="20KB")
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "model.safetensors.index.json").is_file()
    card = (tmp_path / "README.md").read_text()
    sb.save_pretrained(model.half(), tmp_path)
    # transformers leaves the index of the shards that it removed.
    assert torch.equal(output(sb.load_pretrained(tmp_path)), output(model))
    assert (tmp_path / "README.md").read_text() == card.replace("float32", "float16").replace(
        _sizes(card), _sizes((tmp_path / "README.md").read_text())
    )
    entries = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"].values()
    assert {entry["dtype"] for entry in entries} == {"float16"}
    (tmp_path / "README.md").write_text("mine")
    sb.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "README.md was not written by sparsebert" in caplog.text


def _sizes(card):
    return card[card.index("| encoder") : card.index("On a device each")]


def test_save_refuses_a_dense_model_and_a_file(tmp_path):
    with pytest.raises(ValueError, match="BertModel: no layer is packed"):
        sb.save_pretrained(build("bert"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        sb.save_pretrained(pack("bert"), tmp_path / "file")


# Malformed checkpoints: one ValueError each, naming what is wrong


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil, with ``edit_tensors(change)`` and ``edit_config(change)``."""
    copy = tmp_path / "copy"
    shutil.copytree(saved / "bert_classifier" / "stock", copy)
    return copy


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _layers(config):
    return config["quantization_config"]["layers"]


def _swap_positions(tensors):
    # Row 3, group 0: two ascending 2-bit positions, low bits first; put the higher one first.
    tensors[f"{QUERY}.positions"][3, 0] = 0b01_00_00_01


def _set(key, row, column, value):
    def change(tensors):
        tensors[key][row, column] = value

    return change


def _replace(key, make):
    def change(tensors):
        tensors[key] = make(tensors[key]).contiguous()

    return change


TENSOR_CASES = {
    "missing packed tensor": (lambda t: t.pop(f"{QUERY}.positions"), f"{QUERY}: the checkpoint has no tensor"),
    "missing packed bias": (lambda t: t.pop(f"{QUERY}.bias"), f"no tensor {QUERY}.bias"),
    "missing dense tensor": (lambda t: t.pop("classifier.weight"), r"1 missing \(classifier.weight\)"),
    "missing embedding": (
        lambda t: t.pop("bert.embeddings.word_embeddings.weight"),
        r"1 missing \(bert.embeddings.word_embeddings.weight\)",
    ),
    "extra tensor": (lambda t: t.update(stray=torch.ones(2)), r"1 unexpected \(stray\)"),
    "extra dense weight": (
        lambda t: t.update({f"{QUERY}.weight": torch.ones(32, 32)}),
        rf"1 unexpected \({QUERY}.weight\)",
    ),
    "renamed dense tensor": (
        lambda t: t.update({"klassifier.weight": t.pop("classifier.weight")}),
        r"1 missing \(classifier.weight\); 1 unexpected \(klassifier.weight\)",
    ),
    "renamed packed tensor": (
        lambda t: t.update({f"{QUERY}.vals": t.pop(f"{QUERY}.values")}),
        f"{QUERY}: the checkpoint has no tensor {QUERY}.values",
    ),
    "wrong shape, dense": (
        lambda t: t.update({"classifier.weight": torch.ones(3, 32)}),
        r"classifier: weight has shape \(3, 32\) in .*model.safetensors, expected \(2, 32\)",
    ),
    "wrong shape, packed": (
        _replace(f"{QUERY}.values", lambda v: v[:, :-1]),
        rf"{QUERY}: values has shape \(32, 15\) in .*model.safetensors, expected \(32, 16\)",
    ),
    "positions as int64": (
        _replace(f"{QUERY}.positions", torch.Tensor.long),
        f"{QUERY}: positions is I64 in .*, expected torch.uint8",
    ),
    "values as integers": (
        _replace(f"{QUERY}.values", torch.Tensor.int),
        f"{QUERY}: values is I32 in .*, expected one of F64, F32, F16, BF16",
    ),
    "NaN": (_set(f"{QUERY}.values", 3, 5, float("nan")), f"{QUERY}: values holds nan in row 3, expected finite"),
    "infinity": (_set(f"{QUERY}.values", 3, 5, float("inf")), f"{QUERY}: values holds inf in row 3"),
    "positions out of order": (_swap_positions, f"{QUERY}: positions .* of row 3, group .* do not strictly ascend"),
}


@pytest.mark.parametrize("case", list(TENSOR_CASES))
def test_malformed_tensors_are_refused(folder, case, caplog):
    change, message = TENSOR_CASES[case]
    edit_tensors(folder, change)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(ValueError, match=message) as error:
            sb.load_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "\n" not in str(error.value)
    # The error says it all; transformers' own table of it is held back.
    assert "LOAD REPORT" not in caplog.text


CONFIG_CASES = {
    "dense": (lambda c: c.pop("quantization_config"), "the checkpoint is dense .* load it with from_pretrained"),
    "another method": (lambda c: c["quantization_config"].update(quant_method="gptq"), "quant_method is 'gptq'"),
    "no method": (lambda c: c["quantization_config"].pop("quant_method"), "quant_method is None"),
    "newer version": (lambda c: c["quantization_config"].update(format_version=2), "format_version is 2, .* reads 1"),
    "boolean version": (lambda c: c["quantization_config"].update(format_version=True), "format_version is True"),
    "stray field": (lambda c: c["quantization_config"].update(code="x"), r"unknown fields \['code'\]"),
    "map is a list": (lambda c: c["quantization_config"].update(layers=[]), "layers is list"),
    "map is empty": (lambda c: c["quantization_config"].update(layers={}), "layers is empty"),
    "entry is a list": (lambda c: _layers(c).update({QUERY: [2, 4]}), f"{QUERY}: layer map entry is list"),
    "unknown format": (lambda c: _layers(c)[QUERY].update(format="zip"), f"{QUERY}: format is 'zip'"),
    "impossible pattern": (lambda c: _layers(c)[QUERY].update(n=5), f"{QUERY}: .*n is 5"),
    "other pattern": (lambda c: _layers(c)[QUERY].update(n=1), rf"{QUERY}: values has shape \(32, 16\).*\(32, 8\)"),
    "wrong in_features": (
        lambda c: _layers(c)[QUERY].update(in_features=64),
        f"{QUERY}: layer map gives in_features as 64, the model's layer has 32",
    ),
    "wrong out_features": (
        lambda c: _layers(c)[QUERY].update(out_features=16),
        f"{QUERY}: layer map gives out_features as 16, the model's layer has 32",
    ),
    "wrong bias": (lambda c: _layers(c)[QUERY].update(bias=False), f"{QUERY}: layer map gives bias as False"),
    "absurd size": (lambda c: _layers(c)[QUERY].update(in_features=10**12), f"{QUERY}: layer map gives in_features"),
    "role is an object": (lambda c: _layers(c)[QUERY].update(role={}), f"{QUERY}: layer map gives role as"),
    "layer absent in the map": (
        lambda c: _layers(c).pop(QUERY),
        rf"1 missing \({QUERY}.weight\); 2 unexpected \({QUERY}.positions, {QUERY}.values\)",
    ),
    "layer absent in the model": (
        lambda c: _layers(c).update({"bert.encoder.layer.9.output.dense": _layers(c)[QUERY]}),
        "bert.encoder.layer.9.output.dense: .* BertForSequenceClassification has no such module",
    ),
    "layer is no linear": (
        lambda c: _layers(c).update({"bert.embeddings.LayerNorm": _layers(c)[QUERY]}),
        "bert.embeddings.LayerNorm: the layer map names a LayerNorm, expected an nn.Linear",
    ),
    "layer named twice": (
        lambda c: _layers(c).update({QUERY.removeprefix("bert."): _layers(c)[QUERY]}),
        "the layer map names this layer twice",
    ),
    "unknown class": (lambda c: c.update(architectures=["EvilModel"]), "'EvilModel', which is no model class"),
    "class that is no model": (lambda c: c.update(architectures=["pipeline"]), "'pipeline', which is no model class"),
    "no class": (lambda c: c.pop("architectures"), "architectures is None, expected one class name"),
    "class is a path": (lambda c: c.update(architectures=["os.path"]), "expected one class name"),
    "kernel of a repository": (
        lambda c: c.update(attn_implementation="evil/attention"),
        "attn_implementation names code of another repository",
    ),
}


@pytest.mark.parametrize("case", list(CONFIG_CASES))
def test_malformed_config_is_refused(folder, case):
    change, message = CONFIG_CASES[case]
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        sb.load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_stock_loading_refuses_broken_packed_layers_too(folder):
    """A program that knows sparsebert never gets random weights in a packed layer, strict or not."""
    edit_tensors(folder, lambda t: t.pop(f"{QUERY}.values"))
    with pytest.raises(ValueError, match=f"{QUERY}: the checkpoint has no tensor"):
        BertForSequenceClassification.from_pretrained(folder)


def test_malformed_files_are_refused(folder, saved):
    config = (folder / "config.json").read_bytes()
    for content, message in (
        (b"{", "not readable as JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"[" * 100_000, "not readable as JSON"),
        (b" " * (9 << 20), "expected at most"),
    ):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"config.json: .*{message}|config.json: {message}"):
            sb.load_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        sb.load_pretrained(folder)


def test_pickled_weights_are_never_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="no model.safetensors in it, only 'pytorch_model.bin', a pickle, which is never"
    ):
        sb.load_pretrained(folder)
    with pytest.raises(ValueError, match="pytorch_model.bin: a packed checkpoint is read from safetensors files only"):
        BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "../elsewhere.safetensors"},
            "names '../elsewhere.safetensors', expected a safetensors file of the same",
        ),
        ({"a": "shard.bin"}, "names 'shard.bin'"),
        ({"a": "gone.safetensors"}, "names gone.safetensors, which is not there"),
        (["a"], "weight_map is malformed"),
    ],
)
def test_shard_index_stays_in_its_folder(folder, weight_map, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        sb.load_pretrained(folder)


def test_nowhere(tmp_path):
    for path in (tmp_path / "gone", "./gone", "a/b/c"):
        with pytest.raises(ValueError, match="there is no such folder"):
            sb.load_pretrained(path)
    with pytest.raises(ValueError, match="there is no config.json"):
        sb.load_pretrained(tmp_path)


def test_model_class_must_be_one(saved):
    with pytest.raises(TypeError, match="model_class is 'AutoModel'"):
        sb.load_pretrained(saved / "bert" / "stock", "AutoModel")
    # A class that wants a head the checkpoint does not have.
    with pytest.raises(ValueError, match=r"2 missing \(classifier.bias, classifier.weight\)"):
        sb.load_pretrained(saved / "bert" / "stock", BertForSequenceClassification)
