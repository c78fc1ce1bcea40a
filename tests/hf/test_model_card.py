"""The generated README.md: a header the hub reads, sizes that are true, and what must be imported."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

import sparsebert as sb
from sparsebert.hf.model_card import _HELD, MARKER, model_card
from sparsebert.nn import MODULES
from sparsebert.ops import layouts
from sparsebert.ops.specs import SPECS
from sparsebert.report import packed_layers


def packed(**config):
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(BertConfig(**sizes, **config))
    sb.compress_(model, {"query": sb.NMConfig(1, 4), "intermediate": sb.NMConfig(2, 4), "classifier": None})
    return model


def packed_as(selection):
    """BERT of two layers: hidden size 32, 64 hidden units in the feed-forward net, 2 heads."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    sb.compress_(model, selection)
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


# What the card says of layers packed so: (selection, line of what is stored, part of what is approximate)
FORMATS = {
    "nm": ({"query": sb.NMConfig(1, 4)}, "`nm` 1:4, float32: 2 query", "the others are stored as they are"),
    "nm columns": (
        {"query": sb.NMConfig(2, 8, columns=0.75)},
        "`nm` 2:8 in 24 of 32 columns, float32: 2 query",
        "outside the pattern and the kept columns are zero",
    ),
    "nm pair": (
        {"output": sb.NMConfig(2, 4, columns=0.5), "intermediate": sb.NMConfig(2, 4)},
        "`nm` 2:4 in 32 of 64 rows, float32: 2 intermediate",
        "the layer after them reads none of their outputs",
    ),
    "bitmap": (
        {"output": sb.BitmapConfig(0.125)},
        "`bitmap` 12.5 % of the weights, float32: 2 output",
        "the weights that are not stored are zero",
    ),
    "low_rank": (
        {"value": sb.LowRankConfig(rank=5)},
        "`low_rank` rank 5, float32: 2 value",
        "replaced by the product of two factors of the given rank.",
    ),
    "low_rank_sparse rows": (
        {"value": sb.LowRankSparseConfig(rank=4, sparse=sb.RowsConfig(0.25))},
        "`low_rank_sparse` rank 4 + 8 rows, float32: 2 value",
        "plus a sparse part",
    ),
    "low_rank_sparse nm": (
        {"value": sb.LowRankSparseConfig(rank=4, sparse=sb.NMConfig(1, 8))},
        "`low_rank_sparse` rank 4 + 1:8, float32: 2 value",
        "plus a sparse part",
    ),
    "low_rank_sparse bitmap": (
        {"value": sb.LowRankSparseConfig(rank=4, sparse=sb.BitmapConfig(0.25))},
        "`low_rank_sparse` rank 4 + 25 % of the weights, float32: 2 value",
        "plus a sparse part",
    ),
    "int8": (
        {"key": sb.Int8Config()},
        "`int8` dynamic, float32: 2 key",
        "its output channel's scale. dynamic: The inputs are rounded to 8 bits as well, with one scale for each token",
    ),
    "int8 nm": (
        {"key": sb.Int8Config(weights=sb.NMConfig(2, 4))},
        "`int8` dynamic 2:4, float32: 2 key",
        "Where a pattern is given, the weights outside it are zero.",
    ),
    "dense": (
        {"intermediate": sb.DenseConfig(), "query": None},
        "`dense`, float32: 2 intermediate",
        "nothing: the weights are stored as they are.",
    ),
    "int8 static": (
        {"key": sb.Int8Config("static")},
        "`int8` static, float32: 2 key",
        "static: The inputs are rounded to 8 bits as well, with one scale for each layer",
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_is_described(case):
    selection, stored, approximate = FORMATS[case]
    model = packed_as(selection)
    card = model_card(model)
    assert f"\n- {stored}\n" in card
    format_name = case.split()[0]
    section = card.split("## What is approximate\n")[1].split("##")[0]
    assert approximate in section and f"- `{format_name}`: " in section
    # Nothing about formats that are not there.
    assert {line.split("`")[1] for line in section.splitlines() if line.startswith("- `")} == {format_name}


def test_no_format_is_forgotten():
    assert {case.split()[0] for case in FORMATS} == set(MODULES)
    for spec_type in SPECS.values():
        name = spec_type.__name__.removesuffix("Spec")
        op = next(op for op, kind in SPECS.items() if kind is spec_type)
        format_name = next(key for key, module in MODULES.items() if module.__name__ == f"{name}Linear")
        assert {layout for key, layout in _HELD if key == format_name} == set(layouts.names(op))


@pytest.mark.parametrize(
    ("config", "layout", "text"),
    [
        (sb.NMConfig(2, 4), "dense", "as the unpacked weight, the size of a dense layer"),
        (sb.NMConfig(2, 4), "neutral", "as on disk; where no kernel reads that, they are unpacked in every call"),
        (sb.BitmapConfig(0.1), "dense", "as the unpacked weight, the size of a dense layer"),
        (sb.DenseConfig(), "neutral", "as on disk"),
        (sb.LowRankConfig(rank=4), "auto", "as on disk: the factors, which are multiplied with as they are"),
        (sb.LowRankConfig(rank=4), "dense", "as the product of the factors, beside them: more than a dense layer"),
        (
            sb.LowRankSparseConfig(rank=4, sparse=sb.RowsConfig(0.1)),
            "stacked",
            "as factors, the kept rows below the second one: the size on disk",
        ),
        (sb.Int8Config(), "neutral", "as on disk"),
        (sb.Int8Config(), "float", "as integers in fp32 numbers, four bytes a weight"),
        (
            sb.Int8Config(weights=sb.NMConfig(2, 4)),
            "unpacked",
            "as 8-bit integers with their zeros, one byte a weight",
        ),
    ],
)
def test_memory_is_that_of_the_layout(config, layout, text):
    model = packed_as({"query": config})
    sb.prepare_(model, layout)
    card = model_card(model)
    held = {module.layout for _, module in packed_layers(model)}
    assert f"- `{config.format}` in layout `{held.pop()}`, 2 layers: {text}" in card
    # What the words claim.
    module = packed_layers(model)[0][1]
    dense, disk, memory = module.dense_bytes(), module.disk_bytes(), module.memory_bytes()
    if "as on disk" in text or "the size on disk" in text:
        assert memory == disk
    elif "the size of a dense layer" in text:
        assert memory == dense
    elif "more than a dense layer" in text:
        assert memory == dense + disk - 32 * 4  # they share the bias
    else:
        weights = {"one byte": 1, "four bytes": 4}[next(key for key in ("one byte", "four bytes") if key in text)]
        assert 32 * 32 * weights <= memory < 32 * 32 * weights + 300


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
