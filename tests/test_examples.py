"""The examples run, and the README shows nothing else than what they run."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "model", "is", "used", "as", "before"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_folder(model_folder, tmp_path_factory):
    """A bare encoder with mean pooling, as sentence-transformers saves it."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("sentence")
    encoder = Transformer(str(model_folder), max_seq_length=16)
    st.SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture
def run(root, tmp_path, monkeypatch, capsys):
    """``run(script, *arguments)``: what it printed. In this process, which has its imports already."""

    def call(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(root / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("swap_layers.py", ["compressed 12 layers", "torch.Size([1, 7, 32])", "not measured here"]),
        (
            "fuse_and_run.py",
            [
                "query, key and value are one projection in 2 of them",
                "torch.Size([2, 8, 32])",
                "without a graph, 1 times: the tokens are on cpu, and CUDA graphs need a CUDA device",
                "the same alone: True",
            ],
        ),
        ("save_and_load.py", ["whole model", "the same numbers, bit for bit: True"]),
        ("prune_then_train.py", ["encoder linears"]),
        (
            "prune_then_deploy.py",
            ["step 30: loss ", "sparsity 0.500", "encoder linears", "the same predictions in a fresh process: True"],
        ),
        (
            "mixed_plan.py",
            [
                "compressed 4 layers",
                "left dense: encoder.layer.0.attention.self.query: left dense by the selection",
                "2:4 in 32 of 64 columns",
                "32 of 64 rows",
                "compressed 1 layers",
                "rank 10",
            ],
        ),
        ("int8_calibrated.py", ["calibrated 12 layers on 16 batches, minmax", "the same numbers: True"]),
        (
            "share_on_hub.py",
            [
                "README.md: text, ",
                "config.json: JSON, ",
                "model.safetensors: safetensors, ",
                "tokenizer.json: JSON, ",
            ],
        ),
    ],
)
def test_example_runs(script, expected, run, model_folder, tmp_path):
    printed = run(
        script, model_folder, *([] if script in ("swap_layers.py", "fuse_and_run.py") else [tmp_path / "out"])
    )
    for text in expected:
        assert text in printed


def test_sentence_transformer(run, sentence_folder, tmp_path):
    printed = run("sentence_transformer.py", sentence_folder, tmp_path / "out")
    assert "packed as saved: 2:4" in printed
    assert "the same embeddings, bit for bit: True" in printed


def test_many_gpus_give_what_one_process_gives(root, model_folder, tmp_path):
    """On CPUs, by torchrun, with a last batch that is not full."""
    words = "the model is used as before".split()
    texts = [" ".join(words[i % 5 :] + words[: i % 7]) for i in range(75)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    script, found = root / "examples" / "many_gpus.py", []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        out = tmp_path / f"{ranks}.jsonl"
        done = subprocess.run(
            [sys.executable, *launcher, script, model_folder, tmp_path / "texts.txt", out],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert f"75 texts on {ranks} processes" in done.stdout
        found.append([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()])
    assert found[0] == found[1]
    assert [row["text"] for row in found[0]] == texts
    # Rows that nobody wrote would be equal.
    assert len({tuple(row["logits"]) for row in found[0]}) >= len(set(texts)) == 35


def test_an_example_runs_as_the_readme_says(root, model_folder, tmp_path):
    """In a process of its own, from another folder."""
    command = [sys.executable, root / "examples" / "save_and_load.py", model_folder, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the same numbers, bit for bit: True" in done.stdout


def test_every_example_is_run(root):
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in (root / "examples").glob("*.py") if f'"{path.name}"' not in text] == []


def test_what_is_shared_is_safetensors_json_and_text(root, tmp_path):
    """Where a file of another kind lies in the folder, the example stops before it uploads anything."""
    kind_of = runpy.run_path(str(root / "examples" / "share_on_hub.py"))["kind_of"]
    for name, content in (("weights.bin", b"\x80\x02"), ("config.json", b"{"), ("README.md", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError):
            kind_of(tmp_path / name)


def test_readme_shows_lines_of_the_examples(root):
    """Every Python line in the README stands in an example, so that what is shown is what is tested."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = {line.strip() for path in (root / "examples").glob("*.py") for line in path.read_text().splitlines()}
    assert blocks
    strangers = [line for block in blocks for line in block.splitlines() if line.strip() and line.strip() not in lines]
    assert not strangers
