"""A short run of the fuzz of the loader; benchmarks/fuzz_checkpoints.py says what counts as a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def fuzz(root, *arguments, check=True, **environment):
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "fuzz_checkpoints.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_damaged_checkpoints_are_refused_in_one_line_or_loaded_exactly(root, tmp_path):
    fuzz(root, "--count", 300, "--seed", 1, "--out", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["cases"] == 300 and result["failures"] == []
    # Both ways have to be walked, or the fuzz says nothing.
    assert result["outcomes"]["refused"] > 100 and result["outcomes"]["loaded"] > 5
    assert len(result["by_kind"]) > 20


SABOTAGE = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import fuzz_checkpoints as fuzz
import sparsebert as sb

good = sb.load_pretrained
fuzz.SECONDS = 3

def bad(folder, **keywords):
    case = int(os.environ["CASE"])
    if "made" in str(folder):
        return good(folder, **keywords)
    if case == 0:
        raise KeyError("lost")
    if case == 1:
        raise ValueError("two\\nlines")
    if case == 2:
        os.abort()
    if case == 3:
        time.sleep(60)
    if case == 4:
        bytearray(600 << 20)
        raise ValueError("one line")
    # A model that is not what the files say.
    return good({other!r})

sb.load_pretrained = bad
if __name__ == "__main__":
    sys.exit(fuzz.main(["--count", "1", "--seed", "3"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "why"),
    list(
        enumerate(
            ("KeyError: 'lost'", "not one line", "died with exit code -6", "not done after 3 s", "MiB", "loaded, but")
        )
    ),
)
def test_each_kind_of_failure_is_seen(root, tmp_path, case, why):
    from transformers import BertConfig, BertForSequenceClassification

    import sparsebert as sb

    model = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=16)
    )
    sb.compress_(model, sb.NMConfig(2, 4))
    model.save_pretrained(tmp_path / "other")
    script = tmp_path / "sabotage.py"
    script.write_text(SABOTAGE.format(root=str(root), other=str(tmp_path / "other")))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CASE": str(case)},
    )
    assert done.returncode == 1, done.stderr
    assert why in done.stderr
