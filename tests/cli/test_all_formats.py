"""``sparsebert demo --all-formats`` on a tiny stand-in for the real model, with the fresh process for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast
from typer.testing import CliRunner

import sparsebert as sb
from sparsebert.bench.docstrings import Pair, Split
from sparsebert.cli import all_formats, demo
from sparsebert.cli.app import app
from sparsebert.ops.int8 import cpu_has_int8

pytest.importorskip("matplotlib")

WORDS = "red green blue good bad fine poor cat dog bird sat ran flew on under the a mat tree house".split()


def sentence(seed: int, count: int) -> str:
    places = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(place)] for place in places)


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Path:
    """A random model of two layers in the place of the real one, a few texts, and no second spent on timing."""
    folder = tmp_path / "model"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertModel(BertConfig(vocab_size=2000, max_position_embeddings=128, initializer_range=0.5, **sizes))
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary, model_max_length=128).save_pretrained(folder)
    pairs = [Pair(str(i), sentence(2 * i, 4), sentence(2 * i + 1, 9)) for i in range(24)]
    monkeypatch.setattr(all_formats, "find_model", lambda: folder)
    monkeypatch.setattr(all_formats, "read_corpus", lambda progress: Split(tuple(pairs[:16]), tuple(pairs[16:])))
    monkeypatch.setattr(all_formats, "LATENCY_SECONDS", 1e-3)
    monkeypatch.setattr(all_formats, "CALIBRATION_TEXTS", 4)
    return tmp_path / "out"


def test_all_formats_goes_through_every_one_of_them(stub):
    result = CliRunner().invoke(app, ["demo", "--all-formats", "--out", str(stub)])
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    data = json.loads((stub / "all-formats.json").read_text())
    assert (data["passed"], data["failures"], data["task"]["held_out"]) == (True, [], 16)
    assert data["environment"]["torch"] == torch.__version__
    names = [entry["name"] for entry in data["formats"]]
    assert names == ["dense", *all_formats.ALL_FORMATS]
    dense = data["formats"][0]["sizes"]["encoder"]["disk_bytes"]
    for entry in data["formats"][1:]:
        assert entry["bitwise_equal"] and entry["largest_difference"] == 0
        assert entry["sizes"]["encoder"]["disk_bytes"] != dense
        assert [(x["batch"], x["tokens"]) for x in entry["latency"]] == [(1, 32), (8, 64)]
        assert all(x["ratio"] > 0 for x in entry["latency"])
        assert (entry["calibration"] is not None) == ("static" in entry["name"])
        assert entry["name"] in said
        int8_layers = (6 - 4) * (entry["name"] == "mixed") + 12 * entry["name"].startswith("int8")
        assert entry["layers"]["quantized_for_quality"] == (0 if cpu_has_int8() else int8_layers)
    mixed = data["formats"][-1]
    assert mixed["method"] == "one-shot: magnitude; rounding"
    assert (mixed["layers"]["packed"], len(mixed["layers"]["left_dense"])) == (6, 6)
    assert all(".layer.0." in path for path in mixed["layers"]["left_dense"])
    assert mixed["selection"]["*.layer.0.*"] == "dense"
    for words in ("no training", "beyond noise: faster than dense", "No format was trained", "all-formats.png"):
        assert words in said
    assert ("int8: quality of layers that quantize their inputs" in said) == (not cpu_has_int8())
    # The checkpoints are gone.
    assert sorted(file.name for file in stub.iterdir()) == ["all-formats.json", "all-formats.png"]
    assert (stub / "all-formats.png").read_bytes()[:4] == b"\x89PNG"


def test_a_reload_that_differs_fails_after_writing_the_data(stub, monkeypatch):
    monkeypatch.setattr(all_formats, "ALL_FORMATS", {"int8": all_formats.ALL_FORMATS["int8"]})

    def spoilt(folders, split, progress):
        model = sb.load_pretrained(folders["int8"])
        task = demo.Task.of(AutoTokenizer.from_pretrained(folders["int8"]), *demo.held_out_texts(split))
        with sb.quantizing(model):
            queries, documents = task.embed(model, lambda done, total: None)
        queries[0, 0] += 1
        return {"int8": demo.Reloaded(queries, documents, "", sb.size_report(model).to_dict())}

    monkeypatch.setattr(all_formats, "reload_fresh", spoilt)
    result = CliRunner().invoke(app, ["demo", "--all-formats", "--out", str(stub)])
    assert result.exit_code == 1
    assert "error: demo: int8: embeddings of the reloaded model differ from the saved one's by up to 1" in result.stderr
    assert "NO" in result.stdout
    assert json.loads((stub / "all-formats.json").read_text())["passed"] is False


def test_what_all_formats_cannot_do_is_refused(stub, monkeypatch, tmp_path):
    for option in ("--steps", "--seed"):
        result = CliRunner().invoke(app, ["demo", "--all-formats", option, "3"])
        assert result.exit_code == 2
        assert f"trains nothing, so there is no {option}" in " ".join(result.stderr.split())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        all_formats.run_all_formats(out=tmp_path / "file", console=Console(), quiet=True)


def test_verdicts_tell_a_loss_as_a_loss():
    def entry(name, ratio, within_noise=False):
        return {"name": name, "latency": [{"ratio": ratio, "within_noise": within_noise}] * 2}

    lines = all_formats._verdicts([entry("dense", 1.0), entry("a", 2.0), entry("b", 0.5), entry("c", 0.9, True)])
    assert lines[0] == "At 1 x 32 tokens, beyond noise: faster than dense b; slower a."
