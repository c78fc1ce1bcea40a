"""A real model in the tools that people use it through: pipelines of transformers, and sentence-transformers."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import pipeline

import sparsebert as sb
from sparsebert.cli.demo import find_model
from sparsebert.nn import NMLinear
from tiny_models import SIZES

CONFIG = sb.NMConfig(2, 4)
TEXTS = ["A cat sat on the mat.", "Where is the nearest railway station, please?"]


@pytest.fixture(scope="module")
def minilm():
    """Folder of all-MiniLM-L6-v2."""
    try:
        return find_model()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def packed(minilm):
    """``(model, tokenizer)``, one-shot pruned and packed."""
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    sb.compress_(model, CONFIG)
    return model, transformers.AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    """The same, saved."""
    path = tmp_path_factory.mktemp("packed")
    sb.save_pretrained(packed[0], path, tokenizer=packed[1])
    return path


def is_packed(model, layers):
    return sum(isinstance(module, NMLinear) for module in model.modules()) == layers


@torch.no_grad()
def hidden(model, tokenizer, text):
    return model(**tokenizer(text, return_tensors="pt"))[0]


def test_feature_extraction_pipeline(packed, folder):
    model, tokenizer = packed
    expected = [hidden(model, tokenizer, text) for text in TEXTS]
    for given in (
        {"model": str(folder)},
        {"model": str(folder), "tokenizer": str(folder), "device": "cpu"},
        {"model": model, "tokenizer": tokenizer},
        {"model": sb.load_pretrained(folder), "tokenizer": tokenizer},
    ):
        pipe = pipeline("feature-extraction", **given)
        assert is_packed(pipe.model, 36)
        for text, want in zip(TEXTS, expected, strict=True):
            assert torch.equal(pipe(text, return_tensors=True), want)
        assert torch.equal(torch.tensor(pipe(TEXTS)[0]), expected[0])


def test_the_packed_model_is_the_pruned_one(minilm, packed):
    from sparsebert.formats import nm
    from sparsebert.roles import find_layers

    twin = transformers.AutoModel.from_pretrained(minilm).eval()
    for layer in find_layers(twin):
        layer.module.weight.data = nm.project(layer.module.weight.data, 2, 4)
    model, tokenizer = packed
    assert torch.equal(hidden(model, tokenizer, TEXTS[1]), hidden(twin, tokenizer, TEXTS[1]))


def test_text_classification_pipeline(packed, tmp_path):
    tokenizer = packed[1]
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer)}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, id2label={0: "bad", 1: "good", 2: "so so"})
    ).eval()
    sb.compress_(model, CONFIG)
    with torch.no_grad():
        scores = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits.softmax(-1)[0]
    order = scores.argsort(descending=True).tolist()
    expected = [{"label": model.config.id2label[i], "score": scores[i].item()} for i in order]
    for i in range(2):
        pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
        [found] = pipe([TEXTS[0]])
        assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
        # The pipeline has a softmax of its own, in numpy.
        numpy.testing.assert_allclose([x["score"] for x in found], [x["score"] for x in expected], rtol=1e-5)
        # A pipeline can save what it runs, and be made from a folder.
        pipe.save_pretrained(tmp_path / str(i))
        again = pipeline("text-classification", model=str(tmp_path / str(i)), top_k=None)
        assert is_packed(again.model, 12)
        assert again([TEXTS[0]]) == [found]
        model = again.model


def test_fused_in_pipelines_and_sentence_transformers(minilm, packed):
    """Of MiniLM the same embeddings, dense and packed, as people call them."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    tokenizer = packed[1]
    for config in (None, CONFIG):
        model = st.SentenceTransformer(str(minilm), device="cpu")
        encoder = model[0].auto_model
        if config is not None:
            sb.compress_(encoder, config)
        expected, alone = model.encode(TEXTS), hidden(encoder, tokenizer, TEXTS[0])
        assert sb.fuse_(encoder).layers == 6
        numpy.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-6)
        pipe = pipeline("feature-extraction", model=encoder, tokenizer=tokenizer)
        torch.testing.assert_close(pipe(TEXTS[0], return_tensors=True), alone, rtol=0, atol=1e-5)


RELOAD = """
import sys
import numpy
import sparsebert
from sentence_transformers import SentenceTransformer
folder, texts, out = sys.argv[1], sys.argv[2:4], sys.argv[4]
model = SentenceTransformer(folder, device="cpu")
numpy.save(out, model.encode(texts))
print(type(model[0].auto_model.encoder.layer[0].output.dense).__name__)
"""


def test_sentence_transformers(minilm, tmp_path, run_python):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = st.SentenceTransformer(str(minilm), device="cpu")
    dense = model.encode(TEXTS)
    report = sb.compress_(model[0].auto_model, CONFIG)
    assert len(report.layers) == 36
    expected = model.encode(TEXTS)
    assert expected.shape == (2, 384) and not numpy.array_equal(expected, dense)
    folder = tmp_path / "saved"
    model.save_pretrained(str(folder))
    # The folder has its modules and their settings, and the packed encoder in it.
    assert [entry["idx"] for entry in json.loads((folder / "modules.json").read_text())] == [0, 1, 2]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "sparsebert"
    assert "encoder.layer.5.output.dense.positions" in load_file(folder / "model.safetensors")
    reloaded = run_python(RELOAD, str(folder), *TEXTS, str(tmp_path / "out.npy"))
    assert reloaded.stdout.strip() == "NMLinear"
    assert numpy.array_equal(numpy.load(tmp_path / "out.npy"), expected)
    # The encoder alone, as a folder of transformers.
    encoder = sb.load_pretrained(folder)
    again = st.SentenceTransformer(str(folder), device="cpu")
    again[0].auto_model.load_state_dict(encoder.state_dict())
    assert numpy.array_equal(again.encode(TEXTS), expected)
    # And back to dense.
    sb.decompress_(again[0].auto_model)
    assert numpy.array_equal(again.encode(TEXTS), expected)
    again.save_pretrained(str(tmp_path / "dense"))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_folder_of_save_pretrained_is_a_sentence_transformer(packed, folder):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = st.SentenceTransformer(str(folder), device="cpu")  # adds mean pooling by itself
    assert is_packed(model[0].auto_model, 36)
    tokens = hidden(packed[0], packed[1], TEXTS[0])
    torch.testing.assert_close(torch.from_numpy(model.encode(TEXTS[0])), tokens.mean(1)[0])
