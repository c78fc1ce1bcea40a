"""The examples run, and the README shows nothing else than what they run."""

import re
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("swap_layers.py", ["compressed 12 layers", "torch.Size([1, 7, 32])", "not measured here"]),
        ("save_and_load.py", ["whole model", "the same numbers, bit for bit: True"]),
        ("prune_then_train.py", ["encoder linears"]),
    ],
)
def test_example_runs(script, expected, root, model_folder, tmp_path):
    arguments = [str(model_folder), *([] if script == "swap_layers.py" else [str(tmp_path / "out")])]
    done = subprocess.run(
        [sys.executable, str(root / "examples" / script), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout


def test_readme_shows_lines_of_the_examples(root):
    """Every Python line in the README stands in an example, so that what is shown is what is tested."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = {line.strip() for path in (root / "examples").glob("*.py") for line in path.read_text().splitlines()}
    assert blocks
    strangers = [line for block in blocks for line in block.splitlines() if line.strip() and line.strip() not in lines]
    assert not strangers
