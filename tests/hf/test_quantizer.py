"""The plug-in's own parts; what it does to whole checkpoints is in test_checkpoint.py."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments
from transformers.quantizers import auto

import sparsebert as sb
from sparsebert.hf import quantizer
from sparsebert.hf.quantizer import SparsebertConfig, SparsebertHfQuantizer
from sparsebert.swap import quantization_config

_SIZES = dict(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


def packed(cls=BertForSequenceClassification):
    torch.manual_seed(0)
    model = cls(BertConfig(**_SIZES)).eval()
    sb.compress_(model, sb.NMConfig(2, 4))
    return model


@pytest.fixture
def loaded(tmp_path):
    packed().save_pretrained(tmp_path)
    return BertForSequenceClassification.from_pretrained(tmp_path)


def test_config_round_trip_is_exactly_the_map():
    described = json.loads(json.dumps(quantization_config(packed())))
    config = SparsebertConfig.from_dict(copy.deepcopy(described))
    assert config.to_dict() == described
    assert list(described) == ["quant_method", "format_version", "layers"]
    assert json.loads(config.to_json_string()) == described
    # to_dict is a copy: editing it must not reach the config.
    config.to_dict()["layers"].clear()
    assert config.to_dict() == described


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', expected 'sparsebert'"),
        ({"format_version": 0}, "format_version is 0, this sparsebert reads 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": 1.0}, "format_version is 1.0"),
        ({"layers": None}, "layers is NoneType"),
        ({"layers": {"a..b": {}}}, "'a..b' is not a module path"),
        ({"layers": {"": {}}}, "'' is not a module path"),
        ({"layers": {"a": None}}, "a: layer map entry is NoneType"),
        ({"layers": {"a": {"index": True}}}, "a: layer map gives index as True, expected int or null"),
        ({"extra": 1}, r"unknown fields \['extra'\]"),
    ],
)
def test_malformed_map_is_refused_in_one_line(change, message):
    described = {**quantization_config(packed()), **change}
    with pytest.raises(ValueError, match=message) as error:
        SparsebertConfig.from_dict(described)
    assert "\n" not in str(error.value)


def test_dense_checkpoint_cannot_be_compressed_while_it_loads(tmp_path):
    BertModel(BertConfig(**_SIZES)).save_pretrained(tmp_path)
    wanted = SparsebertConfig(layers=quantization_config(packed(BertModel))["layers"])
    with pytest.raises(ValueError, match=r"cannot compress a dense checkpoint .* sparsebert.compress_\(model"):
        BertModel.from_pretrained(tmp_path, quantization_config=wanted)


def test_flags(loaded):
    plugin = loaded.hf_quantizer
    assert isinstance(plugin, SparsebertHfQuantizer)
    assert plugin.is_serializable() and plugin.is_trainable and plugin.is_compileable
    assert loaded.is_quantized and loaded.quantization_method == "sparsebert"


def test_positions_are_bytes_in_every_dtype(tmp_path):
    model = packed()
    model.save_pretrained(tmp_path)
    want = model.state_dict()["bert.encoder.layer.0.output.dense.positions"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cast = BertForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        held = cast.state_dict()["bert.encoder.layer.0.output.dense.positions"]
        assert held.dtype == torch.uint8 and torch.equal(held, want)


def test_half_is_refused_by_transformers_and_to_is_not(loaded):
    with pytest.raises(ValueError, match="half"):
        loaded.half()
    assert loaded.to(torch.float64).dtype == torch.float64


def test_decompress_clears_every_trace(loaded, tmp_path):
    # Not one row, whose product with a matrix depends on where that lies in memory on some CPUs.
    ids = torch.arange(32).view(4, 8)
    want = loaded(ids).logits
    sb.decompress_(loaded)
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded, "hf_quantizer")
    assert "quantization_config" not in loaded.config.to_dict()
    assert torch.equal(loaded(ids).logits, want)
    loaded.save_pretrained(tmp_path / "dense")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    ours, theirs = loaded.state_dict(), dense.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(dense(ids).logits, want)
    assert loaded.half().dtype == torch.float16


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dequantize_of_transformers_is_decompress(loaded, tmp_path, dtype):
    # save_pretrained leaves the dtype in the config as a string.
    loaded.save_pretrained(tmp_path / "again")
    ids = torch.arange(8)[None]
    want = loaded(ids).logits
    dense = loaded.dequantize(dtype=dtype)
    assert type(dense.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert dense.dtype == (dtype or torch.float32)
    torch.testing.assert_close(dense(ids).logits.float(), want)
    assert "quantization_config" not in dense.config.to_dict() and not dense.is_quantized


def test_layers_packed_after_loading_are_saved_too(loaded, tmp_path):
    sb.compress_(loaded, {"bert.pooler.dense": sb.NMConfig(1, 4)})
    loaded.save_pretrained(tmp_path / "more")
    again = sb.load_pretrained(tmp_path / "more")
    assert len(again.config.quantization_config.layers) == 7
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_loaded_model_trains_its_dense_parts(loaded):
    loaded.train()
    loss = loaded(torch.arange(8)[None], labels=torch.tensor([1])).loss
    loss.backward()
    assert loaded.classifier.weight.grad.abs().sum() > 0
    assert loaded.bert.encoder.layer[0].output.dense.bias.grad.abs().sum() > 0


def test_trainer_takes_a_loaded_model_and_resumes_it(loaded, tmp_path):
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": i % 2} for i in range(16)]

    def trainer(model):
        arguments = TrainingArguments(
            str(tmp_path / "training"),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows)

    start = loaded.classifier.weight.detach().clone()
    trainer(loaded).train()
    assert not torch.equal(loaded.classifier.weight, start)
    resumed = sb.load_pretrained(tmp_path / "training" / "checkpoint-2")
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("places", [{"": "disk"}, {"bert": 0, "classifier": "cpu"}])
def test_offloading_is_refused(places):
    plugin = SparsebertHfQuantizer(SparsebertConfig(**quantization_config(packed())))
    with pytest.raises(ValueError, match="offloads layers"):
        plugin.validate_environment(device_map=places)


@pytest.mark.parametrize("places", [None, "auto", {"": "cpu"}, {"a": 0, "b": "cuda:1"}])
def test_other_device_maps_pass(places):
    plugin = SparsebertHfQuantizer(SparsebertConfig(**quantization_config(packed())))
    assert plugin.validate_environment(device_map=places) is None


def test_register_again_is_harmless_and_spares_others(monkeypatch):
    quantizer.register()
    quantizer.register()
    assert auto.AUTO_QUANTIZER_MAPPING["sparsebert"] is SparsebertHfQuantizer

    class Foreign(SparsebertHfQuantizer):
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "sparsebert", Foreign)
    with pytest.raises(ValueError, match="already registered"):
        quantizer.register()
