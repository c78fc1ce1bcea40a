"""The generated README.md: a header the hub reads, sizes that are true, and what must be imported."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

import sparsebert as sb
from sparsebert.hf.model_card import MARKER, model_card


def packed(**config):
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(BertConfig(**sizes, **config))
    sb.compress_(model, {"query": sb.NMConfig(1, 4), "intermediate": sb.NMConfig(2, 4), "classifier": None})
    return model


def header(card):
    start, end = card.index("---\n"), card.index("\n---\n", 4)
    assert start == 0
    return yaml.safe_load(card[4:end])


def test_header_is_what_the_hub_reads():
    assert header(model_card(packed())) == {"library_name": "transformers", "tags": ["sparsebert", "bert"]}


def test_base_model_is_a_hub_id_and_never_a_local_path(tmp_path):
    model = packed()
    model.config._name_or_path = "org/some-bert"
    assert header(model_card(model))["base_model"] == "org/some-bert"
    for path in (str(tmp_path), "./folder/name", "../name", "/gone/model", "C:\\models\\mine"):
        model.config._name_or_path = path
        card = model_card(model)
        assert "base_model" not in header(card) and path not in card


def test_text_says_what_is_packed_how_large_and_how_to_load():
    model = packed()
    card = model_card(model)
    assert MARKER in card
    assert "4 linear layers are stored packed" in card
    assert "- `nm` 1:4, float32: 2 query" in card and "- `nm` 2:4, float32: 2 intermediate" in card
    assert "`import sparsebert` is **required** before `from_pretrained`" in card
    assert "random weights" in card and "`.half()`" in card
    assert "import sparsebert  #" in card and "BertForSequenceClassification.from_pretrained(" in card
    for part in sb.size_report(model).to_dict()["encoder"], sb.size_report(model).to_dict()["model"]:
        row = " | ".join(f"{part[key]:,}" for key in ("dense_bytes", "disk_bytes", "memory_bytes"))
        assert f"| {row} |" in card


def test_disk_bytes_are_those_of_the_file(tmp_path):
    model = packed()
    sb.save_pretrained(model, tmp_path)
    file = (tmp_path / "model.safetensors").read_bytes()
    stored = len(file) - 8 - int.from_bytes(file[:8], "little")
    assert f"| {stored:,} |" in (tmp_path / "README.md").read_text()


def test_load_lines_run(tmp_path):
    model = packed()
    sb.save_pretrained(model, tmp_path)
    blocks = (tmp_path / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block.partition("```")[0].replace("path/of/this/folder", str(tmp_path)), names)
        assert type(names["model"]) is BertForSequenceClassification


def test_dense_model_has_no_card():
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(ValueError, match="no layer is packed"):
        model_card(BertForSequenceClassification(BertConfig(**sizes)))
