"""The program as a user meets it: what it prints, what it refuses in one line, and what it leaves on disk."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast
from typer.testing import CliRunner

import sparsebert as sb
from sparsebert.bench import docstrings
from sparsebert.bench.retrieval import Texts, embed, score
from sparsebert.cli import common, evaluate, models
from sparsebert.cli.app import app
from sparsebert.nn import Int8Linear
from sparsebert.ops import int8
from sparsebert.tuning import tune

WORDS = "red green blue good bad fine poor cat dog bird sat ran flew on under the a mat tree house".split()
LENGTH = 24
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=LENGTH,
    # Large enough that a random model does not give one answer to everything.
    initializer_range=0.5,
)
ENCODER_LINEARS = 12


def make_tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ",", "##s"]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=LENGTH)


def save(cls, folder: Path, *, tokenizer: bool = True, edit=lambda model: None, **config) -> Path:
    torch.manual_seed(3)
    words = make_tokenizer()
    model = cls(BertConfig(vocab_size=len(words), **SIZES, **config)).eval()
    edit(model)
    model.save_pretrained(folder)
    if tokenizer:
        words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A dense classifier with labels 0 (no) and 1 (yes), and its tokenizer."""
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    return save(BertForSequenceClassification, tmp_path_factory.mktemp("classifier"), **labels)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save(BertModel, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def packed(classifier, tmp_path_factory) -> Path:
    """``classifier`` as ``sparsebert compress`` packs it at 2:4."""
    out = tmp_path_factory.mktemp("out") / "packed"
    result = run("compress", classifier, out, "--format", "2:4")
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No second is spent on timing that no test looks at, and what is tuned counts for one test."""
    monkeypatch.setattr(evaluate, "TIMING_SECONDS", 0.01)
    monkeypatch.setattr(sb, "tune", functools.partial(tune, budget_s=0.001))
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(*arguments) -> str:
    """What a command that succeeds prints, in one line."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


def result_of(*arguments) -> dict:
    """The JSON of a command that succeeds, which is all that it prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_of(*arguments) -> str:
    """The one line of a command that fails."""
    for more in ((), ("--json",)):
        result = run(*arguments, *more)
        assert (result.exit_code, result.stdout) == (1, ""), result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
    return line.removeprefix("error: ")


def usage_error_of(*arguments) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    return " ".join(result.stderr.replace("│", " ").split())


def configured(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# The program itself


def test_it_runs_as_a_module_and_loads_nothing_before_it_must(packed, run_python):
    code = (
        "import runpy, sys\n"
        "import sparsebert.cli\n"
        "early = [name for name in ('transformers', 'triton', 'typer', 'rich') if name in sys.modules]\n"
        "sys.argv[0] = 'x'\n"
        "try:\n"
        "    runpy.run_module('sparsebert', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    late = [name for name in ('transformers', 'triton', 'sklearn') if name in sys.modules]\n"
        "    print(stop.code, early, late, file=sys.stderr)\n"
    )
    # Reading headers takes none of them either.
    done = run_python(code, "info", str(packed), "--json")
    assert json.loads(done.stdout)["compressed"]
    assert done.stderr == "0 [] []\n"


def test_the_version_is_the_package_s():
    assert text("--version") == f"sparsebert {sb.__version__}"


@pytest.mark.parametrize("command", ["compress", "train", "eval", "info", "tune", "demo"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help_and_json(command, flag):
    assert "--json" in text(command, flag)
    assert command in text(flag)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["prune"], "No such command"),
        (["compress", "m", "o"], "--format"),
        (["compress", "m", "o", "--format", "2-4"], "'2-4' is no format; write one of 2:4"),
        (["compress", "m", "o", "--format", "4:2"], "expected 1 <= n < m = 2"),
        (["compress", "m", "o", "--format", "3:6"], "m is 6, expected one of 2, 4, 8, 16"),
        (["compress", "m", "o", "--layer", "query"], "'query' does not say what for which layer"),
        (["compress", "m", "o", "--layer", "query=low"], "'low' is no format"),
        (["compress", "m", "o", "--format", "bitmap:2"], "density is 2.0, expected above 0 and at most 1"),
        (["compress", "m", "o", "--plan", "p", "--format", "2:4"], "a plan says it all; it does not go with --format"),
        (["compress", "m", "o", "--plan", "p", "--layer", "query=2:4"], "it does not go with --layer"),
        (["compress", "m", "o", "--plan", "p", "--ignore", "x"], "it does not go with --ignore"),
        (["compress", "m", "o", "--format", "int8", "--calibration-method", "mse"], "needs --calibrate FILE or"),
        (["compress", "m", "o", "--format", "int8", "--text-columns", "a"], "needs --calibrate FILE"),
        (["compress", "m", "o", "--format", "int8-static", "--calibrate", "f", "--calibrate-stdlib"], "not both"),
        (
            ["compress", "m", "o", "--format", "int8-static", "--calibrate-stdlib", "--calibration-method", "max"],
            "'max' is not one of minmax, percentile, mse",
        ),
        (["compress", "m", "o", "--format", "2:4", "--dtype", "int8"], "'int8' is not one of float32"),
        (["compress", "m", "o", "--format", "2:4", "--device", "mps"], "'mps' is not a device"),
        (["eval", "m"], "give either --data FILE or --stdlib"),
        (["eval", "m", "--stdlib", "--data", "f.tsv"], "give either --data FILE or --stdlib"),
        (["eval", "m", "--stdlib", "--task", "classification"], "has no labels"),
        (["eval", "m", "--data", "f.tsv", "--task", "ranking"], "'ranking' is not one of classification"),
        (["eval", "m", "--data", "f.tsv", "--device", "tpu"], "'tpu' is not a device"),
        (["eval", "m", "--data", "f.tsv", "--batch-size", "0"], "--batch-size"),
        (["tune", "m"], "--tokens"),
        (["tune", "m", "--tokens", "128,,8"], "'' is not a token count"),
        (["tune", "m", "--tokens", "0"], "'0' is not a token count"),
    ],
)
def test_usage_mistakes_end_with_code_2(arguments, complaint):
    assert complaint in usage_error_of(*arguments)


def test_an_error_is_one_line_and_debug_adds_the_traceback(tmp_path):
    missing = tmp_path / "missing"
    assert error_of("info", missing) == f"{missing}: there is no such folder"
    result = run("--debug", "info", missing)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == f"error: {missing}: there is no such folder"


def test_an_error_that_no_command_foresaw_names_its_type(packed, monkeypatch):
    def fail(name):
        raise KeyError("lost")

    monkeypatch.setattr(models, "find_folder", fail)
    assert error_of("info", packed) == "KeyError: 'lost' (sparsebert --debug shows where)"


def test_errors_of_several_lines_are_folded_and_control_characters_shown():
    assert common.one_line(ValueError("first\n  second \x1b[31m")) == "first second \\x1b[31m"
    assert common.clean("a\nb\u202ec") == "a\\x0ab\\x202ec"
    assert common.one_line(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"


def test_what_libraries_print_does_not_get_into_the_result(packed, monkeypatch):
    find = models.find_folder

    def noisy(name):
        print("noise")
        return find(name)

    monkeypatch.setattr(models, "find_folder", noisy)
    result = run("info", packed, "--json")
    assert json.loads(result.stdout)["compressed"]
    assert "noise" in result.stderr


# compress


def test_compress_saves_what_compress_gives(classifier, packed):
    model = BertForSequenceClassification.from_pretrained(classifier)
    sb.compress_(model, sb.NMConfig(2, 4))
    again = sb.load_pretrained(packed)
    ids = torch.randint(5, 20, (3, 9))
    with torch.inference_mode():
        assert torch.equal(model.eval()(ids).logits, again(ids).logits)
    sentence = "the red cats sat on a mat"
    assert AutoTokenizer.from_pretrained(packed)(sentence) == AutoTokenizer.from_pretrained(classifier)(sentence)
    assert [entry.name for entry in packed.parent.iterdir()] == ["packed"]


def test_compress_reports_what_it_did(classifier, tmp_path):
    done = result_of("compress", classifier, tmp_path / "new" / "out", "--format", "2:4", "--dtype", "float16")
    assert (done["architecture"], done["dtype"], done["accuracy_measured"]) == (
        "BertForSequenceClassification",
        "float16",
        False,
    )
    assert len(done["layers"]) == ENCODER_LINEARS
    assert set(done["skipped"]) == {"bert.pooler.dense", "classifier"}
    # 9 bits a weight, 16 a bias.
    weights, biases = 2 * (4 * 32 * 32 + 2 * 32 * 64), 2 * (5 * 32 + 64)
    assert done["size"]["encoder"]["disk_bytes"] == weights * 9 // 8 + 2 * biases
    assert done["size"]["encoder"]["dense_bytes"] == 2 * (weights + biases)
    assert done["file_bytes"] == (tmp_path / "new" / "out" / "model.safetensors").stat().st_size
    assert all(0.5 < layer["kept_energy"] < 1 for layer in done["layers"])


def test_compress_says_in_words_what_it_did_and_what_it_did_not_measure(classifier, tmp_path):
    said = text("compress", classifier, tmp_path / "out", "--format", "2:4")
    for words in (
        f"packed {ENCODER_LINEARS} of 14 linear layers",
        "Left dense: bert.pooler.dense, classifier: not selected",
        "encoder linears",
        "whole model",
        "costs accuracy, and this command did not measure how much",
    ):
        assert words in said


def test_compress_takes_patterns_by_role_and_path(classifier, tmp_path):
    out = tmp_path / "out"
    options = ["--format", "2:4", "--layer", "output=dense", "--layer", "*.layer.0.*.query=1:4"]
    done = result_of("compress", classifier, out, *options, "--ignore", "*.layer.1.intermediate.dense")
    found = {layer["path"].removeprefix("bert.encoder.layer."): layer["config"] for layer in done["layers"]}
    assert len(found) == ENCODER_LINEARS - 3
    assert found.pop("0.attention.self.query") == "1:4"
    assert set(found.values()) == {"2:4"}
    assert done["skipped"]["bert.encoder.layer.0.output.dense"] == "left dense by the selection"
    assert done["skipped"]["bert.encoder.layer.1.intermediate.dense"].startswith("ignored by")
    formats = {layer["path"]: layer["format"] for layer in result_of("info", out)["layers"]}
    assert formats["bert.encoder.layer.0.attention.self.query"] == "1:4"
    assert formats["bert.encoder.layer.1.output.dense"] == "dense"


# What the program calls each format -> how the two shapes of matrix in the tiny model come out of it.
FORMATS = {
    "2:4": {"2:4"},
    "2:4@0.5": {"2:4 in 16 of 32 columns", "2:4 in 16 of 32 columns, 32 of 64 rows", "2:4 in 32 of 64 columns"},
    "bitmap:0.25": {"bitmap 0.25"},
    "low-rank:0.5": {"rank 8", "rank 10"},
    "low-rank:r4": {"rank 4"},
    "low-rank:0.25+rows:0.125": {"rank 4 + 4 rows", "rank 5 + 8 rows", "rank 5 + 4 rows"},
    "low-rank:0.25+2:4": {"rank 4 + 2:4", "rank 5 + 2:4"},
    "low-rank:0.25+bitmap:0.25": {"rank 4 + bitmap 0.25", "rank 5 + bitmap 0.25"},
    "int8": {"int8 dynamic"},
    "int8-static": {"int8 static"},
    "int8+2:4": {"int8 dynamic 2:4"},
    "dense": {"dense"},
}
METHODS = {
    "2:4": "one-shot: magnitude",
    "2:4@0.5": "one-shot: columns by their norm, then magnitude",
    "low-rank:0.5": "one-shot: truncated SVD",
    "low-rank:0.25+rows:0.125": "one-shot: truncated SVD, then magnitude on what it leaves",
    "int8-static": "one-shot: rounding",
    "int8+2:4": "one-shot: magnitude, then rounding",
    "dense": "one-shot: nothing",
}


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_goes_through_compress_info_eval_and_tune(classifier, labelled, tmp_path, spec):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    options = ["--calibrate", labelled] if "static" in spec else []
    done = result_of("compress", classifier, out, "--format", spec, *options)
    assert done["formats"] == {
        role: {spec: 2} for role in ("query", "key", "value", "attention_output", "intermediate", "output")
    }
    assert {layer["description"] for layer in done["layers"]} == FORMATS[spec]
    assert spec not in METHODS or done["method"] == METHODS[spec]
    assert (done["calibration"] is None) == ("static" not in spec)
    assert all(0 < layer["kept_energy"] <= 1 for layer in done["layers"])

    found = result_of("info", out)
    assert {layer["format"] for layer in found["layers"]} == FORMATS[spec]
    assert sum(found["formats"].values()) == ENCODER_LINEARS
    assert found["size"]["encoder"]["disk_bytes"] == done["size"]["encoder"]["disk_bytes"]
    assert found["size"]["encoder"]["dense_bytes"] == done["size"]["encoder"]["dense_bytes"]
    assert next(iter(FORMATS[spec])) in text("info", out)

    (entry,) = result_of("eval", out, "--data", labelled)["models"]
    assert (entry["compressed"], entry["formats"]) == (True, found["formats"])
    model, tokenizer = sb.load_pretrained(out), AutoTokenizer.from_pretrained(out)
    rows = [line.split("\t") for line in labelled.read_text().splitlines()[1:]]
    with torch.inference_mode(), sb.quantizing(model) as held_dense:
        right = [
            int(model(**tokenizer(*pair, return_tensors="pt")).logits.argmax()) == int(label) for label, *pair in rows
        ]
    assert entry["scores"]["accuracy"] == pytest.approx(sum(right) / len(rows))
    assert entry["quantized_for_scores"] == len(held_dense)
    assert entry["unpacked_layers"] == sum(layer.layout == "dense" for layer in sb.size_report(model).layers)

    said = text("tune", out, "--tokens", "2", "--device", "cpu")
    assert sum(int(count) for count in re.findall(r"(\d+) layers held as", said)) == ENCODER_LINEARS
    assert "only low rank, dropped columns and int8 can be faster" in said


def test_a_layer_left_dense_loses_the_rows_that_nobody_reads(classifier, labelled, tmp_path):
    out, gathered = tmp_path / "out", tmp_path / "gathered"
    done = result_of("compress", classifier, out, "--layer", "output=2:4@0.5", "--layer", "intermediate=dense")
    assert done["formats"] == {"output": {"2:4@0.5": 2}, "intermediate": {"dense": 2}}
    assert done["method"] == "one-shot: columns by their norm, then magnitude"
    found = result_of("info", out)
    assert found["formats"] == {"dense": 8, "dense, 32 of 64 rows": 2, "2:4 in 32 of 64 columns": 2}
    assert found["size"]["encoder"] | {"memory_bytes": 0} == done["size"]["encoder"] | {"memory_bytes": 0}
    assert "`dense` in 32 of 64 rows, float32: 2 intermediate" in (out / "README.md").read_text()
    options = ["--layer", "output=2:4@0.5", "--ignore", "*.intermediate.dense"]
    assert "intermediate" not in result_of("compress", classifier, gathered, *options)["formats"]
    result = result_of("eval", out, "--data", labelled, "--compare", gathered)
    assert result["agreement"] == 1 and result["models"][0]["scores"] == result["models"][1]["scores"]
    # Those of the layers that a CPU holds as the dense weight of a pattern.
    assert result["models"][0]["unpacked_layers"] == 2


def test_eval_scores_int8_as_devices_for_it_compute_and_times_it_as_it_is_held(
    classifier, labelled, tmp_path, monkeypatch
):
    pytest.importorskip("sklearn")
    out, asked = tmp_path / "out", []
    text("compress", classifier, out, "--format", "int8")
    forward = Int8Linear.forward

    def watched(self, x):
        asked.append(self.layout)
        return forward(self, x)

    monkeypatch.setattr(Int8Linear, "forward", watched)
    monkeypatch.setattr(evaluate, "TIMING_SECONDS", 1e-3)
    for capable in (False, True):
        monkeypatch.setattr(int8, "cpu_has_int8", lambda capable=capable: capable)
        asked.clear()
        said = text("eval", out, "--data", labelled)
        assert asked[0] == ("neutral" if capable else "float")
        assert asked[-1] == ("neutral" if capable else "dense")
        assert ("Scores are of int8 layers that quantize their inputs" in said) == (not capable)


def test_compress_says_which_formats_and_methods_it_mixed(classifier, labelled, tmp_path):
    options = ["--format", "2:4", "--layer", "intermediate=low-rank:0.25", "--layer", "output=int8-static",
               "--layer", "*.layer.1.*=dense", "--calibrate", labelled, "--calibration-method", "mse"]  # fmt: skip
    done = result_of("compress", classifier, tmp_path / "out", *options)
    assert done["formats"]["query"] == {"2:4": 1}
    assert done["formats"]["intermediate"] == {"low-rank:0.25": 1}
    assert done["formats"]["output"] == {"int8-static": 1}
    assert done["method"] == "one-shot: magnitude; truncated SVD; rounding"
    calibration = done["calibration"]
    assert (calibration["method"], calibration["rows"], calibration["rows_used"]) == ("mse", 37, 37)
    assert [layer["path"] for layer in calibration["layers"]] == ["bert.encoder.layer.0.output.dense"]
    said = text("compress", classifier, tmp_path / "out2", *options)
    for words in ("Method: one-shot: magnitude; truncated SVD; rounding", "rank 5", "int8 static",
                  "Calibrated 1 layers on 37 of 37 rows, mse"):  # fmt: skip
        assert words in said


def test_calibration_sees_the_texts_as_the_model_would(classifier, labelled, tmp_path):
    out = tmp_path / "out"
    text("compress", classifier, out, "--format", "int8-static", "--calibrate", labelled)
    model, tokenizer = BertForSequenceClassification.from_pretrained(classifier), AutoTokenizer.from_pretrained(out)
    sb.compress_(model, sb.Int8Config("static"))
    pairs = [line.split("\t")[1:] for line in labelled.read_text().splitlines()[1:]]
    sb.calibrate(model, [dict(tokenizer(*pair, return_tensors="pt")) for pair in pairs])
    ours, theirs = (m.state_dict() for m in (sb.load_pretrained(out), model))
    scales = [key for key in ours if key.endswith("input_scale")]
    assert len(scales) == ENCODER_LINEARS
    for key in scales:
        assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-4)


def test_calibration_takes_the_docstrings_that_eval_does_not_measure_on(tmp_path, monkeypatch):
    from sparsebert.cli import calibrate

    folder = save(BertModel, tmp_path / "long")
    texts = sentences(1500, words=12, seed=7)
    pairs = [docstrings.Pair(str(i), *texts[2 * i : 2 * i + 2]) for i in range(750)]
    monkeypatch.setattr(docstrings, "read_pairs", lambda progress: pairs)
    monkeypatch.setattr(calibrate, "MOST_ROWS", 40)
    done = result_of("compress", folder, tmp_path / "out", "--format", "int8-static", "--calibrate-stdlib")
    count = len(docstrings.split_pairs(pairs).training_texts())
    assert (done["calibration"]["rows"], done["calibration"]["rows_used"]) == (count, 40)
    assert done["calibration"]["data"] == "docstrings of the Python standard library"


def test_what_is_too_much_to_calibrate_on_is_thinned_evenly():
    from sparsebert.cli.calibrate import spread

    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread(list(range(3)), 4) == [0, 1, 2]


def test_static_int8_without_text_is_refused_before_any_work(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "find", lambda name: pytest.fail("the model was looked up"))
    plan = tmp_path / "plan.json"
    sb.CompressionPlan({QUERY: sb.Int8Config("static")}).save(tmp_path)
    for options in (["--format", "int8-static"], ["--layer", "output=int8-static+2:4"], ["--plan", plan]):
        said = error_of("compress", classifier, tmp_path / "out", *options)
        assert "static activations have one scale for all inputs" in said
        assert "give --calibrate FILE or --calibrate-stdlib" in said


def test_calibration_is_refused_where_it_cannot_be(classifier, labelled, tmp_path):
    out = tmp_path / "out"
    said = error_of("compress", classifier, out, "--format", "2:4", "--calibrate", labelled)
    assert said == "calibration: is for int8-static, but what was asked for is 2:4"
    static = ["compress", classifier, out, "--format", "int8-static", "--calibrate"]
    assert error_of(*static, tmp_path / "no.tsv") == f"{tmp_path / 'no.tsv'}: there is no such file"
    assert "has no column 'other'" in error_of(*static, labelled, "--text-columns", "other")
    assert "calibration takes one or two" in error_of(*static, labelled, "--text-columns", "a,b,c")
    dumb = save(BertForSequenceClassification, tmp_path / "dumb", tokenizer=False)
    said = error_of("compress", dumb, out, "--format", "int8-static", "--calibrate", labelled)
    assert said == f"{dumb}: has no tokenizer, which calibrating on text needs"
    assert not out.exists()


def pruned(classifier: Path, folder: Path, selection) -> tuple[Path, sb.CompressionPlan]:
    """The classifier as a method would leave it, dense with exact zeros or factors, and its plan."""
    model = BertForSequenceClassification.from_pretrained(classifier)
    sb.compress_(model, selection)
    plan = {}
    factors = {}
    for path, module in model.named_modules():
        if isinstance(module, sb.nn.LowRankLinear):
            plan[path] = sb.LowRankConfig(ratio=0.25)
            factors[path] = dict(zip("uv", module.neutral(), strict=True))
        elif isinstance(module, sb.nn.NMLinear):
            plan[path] = sb.NMConfig(2, 4)
    sb.decompress_(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, sb.CompressionPlan(plan, factors)


def test_a_plan_packs_what_a_method_left(classifier, tmp_path):
    selection = {"query": sb.NMConfig(2, 4), "output": sb.LowRankConfig(ratio=0.25)}
    dense, plan = pruned(classifier, tmp_path / "dense", selection)
    (tmp_path / "plan").mkdir()
    plan.save(tmp_path / "plan")
    # The folder, or the file in it.
    for place in (tmp_path / "plan", tmp_path / "plan" / "plan.json"):
        done = result_of("compress", dense, tmp_path / "out", "--plan", place, "--force")
        assert (done["method"], done["plan"]) == ("as the plan says", str(place))
        assert done["formats"] == {"query": {"2:4": 2}, "output": {"low-rank:0.25": 2}}
        assert all(layer["kept_energy"] == pytest.approx(1) for layer in done["layers"])
    model = BertForSequenceClassification.from_pretrained(dense)
    sb.compress_(model, plan)
    ids = torch.randint(5, 20, (3, 9))
    with torch.inference_mode():
        assert torch.equal(model.eval()(ids).logits, sb.load_pretrained(tmp_path / "out")(ids).logits)
    said = text("compress", dense, tmp_path / "out", "--plan", tmp_path / "plan", "--force")
    assert f"Method: as the plan says ({tmp_path / 'plan'})" in said
    assert "This command did not measure accuracy" in said and "One-shot" not in said


def test_a_selection_is_compressed_in_one_shot(classifier, tmp_path):
    from sparsebert.plan import save_selection

    file = tmp_path / "mixed.json"
    save_selection({"query": sb.NMConfig(2, 4), "output": sb.Int8Config(), "*.layer.1.*": None}, file)
    done = result_of("compress", classifier, tmp_path / "out", "--plan", file)
    assert done["method"] == "one-shot: magnitude; rounding"
    assert done["formats"] == {"query": {"2:4": 1}, "output": {"int8": 1}}
    assert done["skipped"]["bert.encoder.layer.1.output.dense"] == "left dense by the selection"


def test_plans_that_do_not_hold_are_refused_in_one_line(classifier, tmp_path):
    out = tmp_path / "out"

    def refused(content, name="plan.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        said = error_of("compress", classifier, out, "--plan", file)
        file.unlink()
        return said

    def layers(path, config):
        return {"plan_version": 1, "layers": {path: config.to_dict()}}

    assert error_of("compress", classifier, out, "--plan", tmp_path) == (
        f"{tmp_path / 'plan.json'}: there is no such file"
    )
    missing = tmp_path / "missing.json"
    assert error_of("compress", classifier, out, "--plan", missing) == f"{missing}: there is no such file"
    assert refused("{").startswith(f"{tmp_path / 'plan.json'}: not readable as JSON")
    assert "holds a JSON list, expected an object" in refused("[]")
    assert "plan_version is 2, expected 1" in refused({"plan_version": 2, "layers": {}})
    assert "expected an object 'selection'" in refused({"plan_version": 1})
    assert "format is 'zip'" in refused({"plan_version": 1, "layers": {QUERY: {"format": "zip"}}})
    assert "format is 'zip'" in refused({"plan_version": 1, "layers": {QUERY: {"format": "zip"}}}, "other.json")
    assert "does not obey 2:4" in refused(layers(QUERY, sb.NMConfig(2, 4)))
    assert refused(layers("bert.nowhere", sb.NMConfig(2, 4)), "other.json").startswith(
        "bert.nowhere: the plan names this layer, but BertForSequenceClassification has no such module"
    )
    said = refused({"plan_version": 1, "selection": {"*.nowhere": sb.NMConfig(2, 4).to_dict()}})
    assert "selection '*.nowhere' matches no linear layer" in said
    low = layers(QUERY, sb.LowRankConfig(ratio=0.25))
    assert "plan.safetensors" in refused(low)
    assert "give the folder with plan.json and plan.safetensors" in refused(low, "other.json")
    assert not out.exists()


def test_compress_by_path_alone_needs_no_pattern(encoder, tmp_path):
    done = result_of("compress", encoder, tmp_path / "out", "--layer", "pooler.dense=1:2")
    assert [(layer["path"], layer["config"]) for layer in done["layers"]] == [("pooler.dense", "1:2")]


def test_compress_without_a_tokenizer_says_so(tmp_path):
    dense = save(BertModel, tmp_path / "dense", tokenizer=False)
    assert "no tokenizer beside the model" in text("compress", dense, tmp_path / "out", "--format", "2:4")


def test_compress_warns_of_random_and_of_lost_tensors(tmp_path):
    dense = save(BertModel, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["surplus.weight"] = tensors.pop("pooler.dense.weight")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    done = result_of("compress", dense, tmp_path / "out", "--format", "2:4")
    assert (done["untrained"], done["dropped"]) == (["pooler.dense.weight"], ["surplus.weight"])
    said = text("compress", dense, tmp_path / "out2", "--format", "2:4")
    assert "Warning: the checkpoint lacks pooler.dense.weight" in said
    assert "no place for surplus.weight" in said


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--layer", "*.lm_head=2:4"], "'*.lm_head' matches no linear layer"),
        (["--layout", "cusparselt"], "needs a CUDA device"),
        (["--layout", "tiled"], "layout is 'tiled', expected one of"),
        (["--ignore", "nothing"], "'nothing' matches no linear layer"),
    ],
)
def test_compress_refuses_in_the_words_of_the_library(classifier, tmp_path, options, complaint):
    assert complaint in error_of(
        "compress", classifier, tmp_path / "out", "--format", "2:4", "--device", "cpu", *options
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(classifier, tmp_path):
    options = ["--format", "2:4", "--device", "cuda"]
    assert "torch finds no CUDA device here" in error_of("compress", classifier, tmp_path / "out", *options)


def test_compress_refuses_what_is_no_dense_model(packed, classifier, tmp_path):
    out = tmp_path / "out"
    assert "there is no such folder" in error_of("compress", tmp_path / "missing", out, "--format", "2:4")
    assert "there is no config.json" in error_of("compress", tmp_path, out, "--format", "2:4")
    assert "is a file" in error_of("compress", packed / "config.json", out, "--format", "2:4")
    assert "is compressed already" in error_of("compress", packed, out, "--format", "2:4")
    other = copy(classifier, tmp_path / "other")
    configured(other, quantization_config={"quant_method": "gptq"})
    assert "is compressed by 'gptq'" in error_of("compress", other, out, "--format", "2:4")
    assert not out.exists()


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(tmp_path):
    # The tests run without the hub.
    said = error_of("compress", "someone/bert-that-is-not-there", tmp_path / "out", "--format", "2:4")
    assert said.startswith("someone/bert-that-is-not-there: there is no such folder, and the hub did not give it")


def test_code_of_other_repositories_is_refused(classifier, tmp_path):
    dense = copy(classifier, tmp_path / "dense")
    configured(dense, attn_implementation="someone/kernel")
    assert "names code of another repository" in error_of("compress", dense, tmp_path / "out", "--format", "2:4")


def test_pickled_weights_are_not_read(tmp_path):
    dense = save(BertModel, tmp_path / "dense")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    said = error_of("compress", dense, tmp_path / "out", "--format", "2:4")
    assert "holds no safetensors file" in said


def test_compress_spares_what_is_in_the_way(classifier, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty" in error_of("compress", classifier, out, "--format", "2:4")
    assert "which --force does not remove" in error_of("compress", classifier, out, "--format", "2:4", "--force")
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    assert "is a file" in error_of("compress", classifier, out / "notes.txt", "--format", "2:4", "--force")
    before = sorted(file.name for file in classifier.iterdir())
    assert "is the model itself" in error_of("compress", classifier, classifier, "--format", "2:4", "--force")
    assert sorted(file.name for file in classifier.iterdir()) == before


def test_force_replaces_a_saved_model_and_nothing_of_it_stays(classifier, packed, tmp_path):
    out = copy(packed, tmp_path / "out")
    (out / "model.safetensors").rename(out / "model-00001-of-00001.safetensors")
    text("compress", classifier, out, "--format", "1:4", "--force")
    assert not (out / "model-00001-of-00001.safetensors").exists()
    assert result_of("info", out)["formats"] == {"1:4": ENCODER_LINEARS}
    assert list(tmp_path.iterdir()) == [out]
    # A folder with other folders in it may be anything.
    (out / "checkpoint-1").mkdir()
    assert "does not remove" in error_of("compress", classifier, out, "--format", "1:4", "--force")


def test_an_empty_folder_is_as_good_as_none(classifier, tmp_path):
    (tmp_path / "out").mkdir()
    text("compress", classifier, tmp_path / "out", "--format", "2:4")
    assert result_of("info", tmp_path / "out")["compressed"]


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_a_weight_with_nan_is_named_and_leaves_nothing_behind(tmp_path, name):
    def spoil(model):
        model.get_parameter(name).data[1, 2] = math.nan

    dense = save(BertModel, tmp_path / "dense", edit=spoil)
    said = error_of("compress", dense, tmp_path / "new" / "out", "--format", "2:4")
    assert said.startswith(f"{name}: holds NaN")
    assert list(tmp_path.iterdir()) == [dense]


@pytest.mark.parametrize(("failure", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_while_saving_leaves_all_as_it_was(classifier, packed, tmp_path, monkeypatch, failure, code, force):
    out = copy(packed, tmp_path / "out") if force else tmp_path / "new" / "deep" / "out"
    before = {file.name: file.read_bytes() for file in out.iterdir()} if force else {}

    def half(model, folder, *, tokenizer=None):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(sb, "save_pretrained", half)
    result = run("compress", classifier, out, "--format", "1:4", *(["--force"] if force else []))
    assert result.exit_code == code
    assert result.stderr.splitlines() == ["error: disk full" if code == 1 else "interrupted"]
    assert list(tmp_path.iterdir()) == ([out] if force else [])
    assert not force or {file.name: file.read_bytes() for file in out.iterdir()} == before


# info


def test_info_describes_the_machine():
    found = result_of("info")
    assert found["environment"]["torch"] == torch.__version__
    assert set(found["backends"]) == {"cuda", "triton", "torch", "reference"}
    layouts = {(entry["op"], entry["layout"]): entry for entry in found["layouts"]}
    ops = {"nm_linear", "bitmap_linear", "low_rank_linear", "low_rank_sparse_linear", "int8_linear", "dense_linear"}
    assert {op for op, _ in layouts} == ops
    assert all(layouts[op, name]["refused"] is None for op in ops for name in ("neutral", "dense"))
    assert all(entry["kernels"] for entry in found["layouts"])
    if not torch.cuda.is_available():
        assert found["backends"]["reference"]["layouts"]["nm_linear"] == ["neutral", "dense"]
        assert set(found["backends"]["reference"]["layouts"]) == ops
        assert layouts["nm_linear", "cusparselt"]["refused"] == "needs a CUDA device, not cpu"
    said = text("info")
    assert "rank 96 + 76 rows" in said and "int8 dynamic" in said
    assert found["measurements"]["exists"] is False
    assert "none yet" in text("info")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_info_counts_what_size_report_counts(classifier, tmp_path, dtype):
    out = tmp_path / "out"
    text("compress", classifier, out, "--format", "2:4", "--layer", "classifier=1:2", "--layer", "key=dense",
         "--dtype", dtype)  # fmt: skip
    found = result_of("info", out)
    report = sb.size_report(sb.load_pretrained(out))
    assert found["size"]["encoder"] == {"dense_bytes": report.encoder.dense, "disk_bytes": report.encoder.disk}
    # The model in memory also has buffers that are never saved.
    assert found["size"]["model"]["disk_bytes"] == report.model.disk
    assert found["formats"] == {"2:4": ENCODER_LINEARS - 2, "1:2": 1, "dense": 2}
    assert {layer["path"]: layer["role"] for layer in found["layers"]} == {x.path: x.role for x in report.layers}
    assert (found["dtype"], found["format_version"], found["compressed"]) == (dtype, 1, True)
    assert found["files"] == {"model.safetensors": (out / "model.safetensors").stat().st_size}


def test_info_of_a_dense_model_says_that_it_is(classifier):
    found = result_of("info", classifier)
    assert (found["compressed"], found["format_version"]) == (False, None)
    assert found["formats"] == {"dense": ENCODER_LINEARS}
    assert found["size"]["model"]["dense_bytes"] == found["size"]["model"]["disk_bytes"]
    assert "not compressed" in text("info", classifier)


def test_info_reads_shards_and_a_base_model_saved_by_itself(classifier, packed, tmp_path):
    whole = result_of("info", packed)
    model = sb.load_pretrained(packed)
    sb.save_pretrained(model, tmp_path / "sharded", max_shard_size="20KB")
    sharded = result_of("info", tmp_path / "sharded")
    assert len(sharded["files"]) > 1
    assert (sharded["size"], sharded["layers"]) == (whole["size"], whole["layers"])
    dense = BertForSequenceClassification.from_pretrained(classifier)
    sb.compress_(dense, sb.NMConfig(2, 4))
    dense.bert.save_pretrained(tmp_path / "base")
    assert result_of("info", tmp_path / "base")["size"]["encoder"] == whole["size"]["encoder"]


def rewrite_header(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def break_header_length(folder):
    file = folder / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + file.read_bytes()[8:])


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rename_tensor(folder):
    rewrite_header(folder, lambda header: header.update(new=header.pop(f"{QUERY}.values")))


def swap_shape(folder):
    rewrite_header(folder, lambda header: header[f"{QUERY}.values"].update(shape=[16, 32]))


def edit_map(**changes):
    def edit(folder):
        packing = json.loads((folder / "config.json").read_text())["quantization_config"]
        packing["layers"][QUERY].update(changes)
        configured(folder, quantization_config=packing)

    return edit


def edit_packing(**changes):
    def edit(folder):
        packing = json.loads((folder / "config.json").read_text())["quantization_config"]
        configured(folder, quantization_config={**packing, **changes})

    return edit


def shard_outside(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (break_header_length, "its header claims 1099511627776 bytes"),
        (truncate, "not a readable safetensors file"),
        (rename_tensor, f"the files have no tensor {QUERY}.values"),
        (swap_shape, f"{QUERY}.values: has shape (16, 32) in the file, expected (32, 16) by the map"),
        (edit_map(n=3), f"{QUERY}.values: has shape (32, 16) in the file, expected (32, 24) by the map"),
        (edit_map(format="zip"), f"{QUERY}: format is 'zip'"),
        (edit_map(role="\x1b[31mquery"), "role '\\x1b[31mquery'"),
        (edit_map(index="0"), "expected a role and an int"),
        (edit_packing(format_version=2), "format_version is 2, this sparsebert reads 1"),
        (edit_packing(layers=[]), "the layer map is malformed"),
        (edit_packing(quant_method="awq"), "is compressed by 'awq'"),
        (lambda folder: configured(folder, quantization_config=3), "quantization_config is int"),
        (shard_outside, "names '../secret.safetensors', expected a safetensors file of the same folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors in it"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "not readable as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a JSON list"),
        (lambda folder: (folder / "config.json").write_bytes(b" " * (9 << 20)), "expected at most"),
    ],
)
def test_info_takes_a_checkpoint_as_hostile(packed, tmp_path, damage, complaint):
    broken = copy(packed, tmp_path / "broken")
    damage(broken)
    assert complaint in error_of("info", broken)


def test_info_prints_no_control_characters(classifier, tmp_path):
    strange = copy(classifier, tmp_path / "strange")
    configured(strange, architectures=["\x1b]0;owned\x07Bert"], model_type=["list"])
    said = run("info", strange).stdout
    assert "\x1b" not in said and "\\x1b]0;owned\\x07Bert" in said


# eval


def sentences(count: int, words: int = 8, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, words))) for _ in range(count)]


def write(file: Path, header: str, rows: list[list[str]], separator: str = "\t") -> Path:
    file.write_text("\n".join([header, *(separator.join(row) for row in rows)]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def labelled(tmp_path) -> Path:
    labels = random.Random(1).choices("01", k=37)
    rows = [[label, *pair] for label, *pair in zip(labels, sentences(37), sentences(37, seed=2), strict=True)]
    return write(tmp_path / "dev.tsv", "label\tsentence1\tsentence2", rows)


def predictions(folder: Path, file: Path) -> tuple[list[int], list[int]]:
    """Labels and predicted classes, a row at a time without padding."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    with torch.inference_mode():
        found = [int(model(**tokenizer(*row[1:], return_tensors="pt")).logits.argmax()) for row in rows]
    return [int(row[0]) for row in rows], found


def test_eval_scores_the_whole_set(classifier, packed, labelled):
    pytest.importorskip("sklearn")
    result = result_of("eval", packed, "--data", labelled, "--compare", classifier, "--batch-size", "5")
    labels, ours = predictions(packed, labelled)
    _, theirs = predictions(classifier, labelled)
    assert len({*ours}) == 2
    for entry, found in zip(result["models"], (ours, theirs), strict=True):
        pairs = list(zip(labels, found, strict=True))
        tp, fp = pairs.count((1, 1)), pairs.count((0, 1))
        fn, tn = pairs.count((1, 0)), pairs.count((0, 0))
        scores = entry["scores"]
        assert scores["accuracy"] == pytest.approx((tp + tn) / len(pairs))
        assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        assert scores["matthews"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(product))
        assert entry["latency"]["median_us"] > 0
    assert [entry["compressed"] for entry in result["models"]] == [True, False]
    assert result["models"][0]["formats"] == {"2:4": ENCODER_LINEARS}
    assert result["agreement"] == sum(a == b for a, b in zip(ours, theirs, strict=True)) / 37
    assert result["rows"] == 37 and result["device"]


def test_eval_prints_one_table(classifier, packed, labelled, tmp_path):
    pytest.importorskip("sklearn")
    # Brackets are names here, not rich's markup.
    other = copy(classifier, tmp_path / "[bold]")
    said = text("eval", packed, "--data", labelled, "--compare", other, "--limit", "9")
    assert "[bold]" in said
    if not torch.cuda.is_available():
        assert "compute with the unpacked weight" in said
    for words in ("classification on 9 rows", "accuracy", "F1", "Matthews correlation", "latency a batch", "difference",
                  "predict the same class"):  # fmt: skip
        assert words in said


def test_eval_computes_in_the_dtype_asked_for(classifier, tmp_path, labelled):
    pytest.importorskip("sklearn")
    half = tmp_path / "half"
    text("compress", classifier, half, "--format", "2:4", "--dtype", "float16")
    options = ["eval", half, "--data", labelled, "--compare", classifier, "--limit", "4"]
    assert [entry["dtype"] for entry in result_of(*options)["models"]] == ["float16", "float32"]
    assert "The two compute in float16 and float32" in text(*options)
    assert [entry["dtype"] for entry in result_of(*options, "--dtype", "float32")["models"]] == ["float32"] * 2


def test_eval_reads_label_names_other_columns_and_quoted_csv(classifier, tmp_path):
    pytest.importorskip("sklearn")
    rows = [["yes", "red, green", "x"], ["no", 'a ""good"" dog', "y"], ["1", "the\nmat", "z"]]
    quoted = [[label, f'"{words}"', other] for label, words, other in rows]
    file = write(tmp_path / "dev.csv", "verdict,text,other", quoted, ",")
    result = result_of("eval", classifier, "--data", file, "--label-column", "verdict", "--text-columns", "text")
    plain = [["1", "red, green"], ["0", 'a "good" dog'], ["1", "the mat"]]
    tsv = write(tmp_path / "dev.tsv", "label\tsentence1", plain)
    assert result["rows"] == 3
    assert result["models"][0]["scores"] == result_of("eval", classifier, "--data", tsv)["models"][0]["scores"]


def test_eval_counts_what_it_cuts(classifier, tmp_path):
    pytest.importorskip("sklearn")
    # Two special tokens: 22 words just fit.
    rows = [["0", " ".join(["red"] * count)] for count in (3, 22, 23, 40)]
    file = write(tmp_path / "dev.tsv", "label\tsentence1", rows)
    (entry,) = result_of("eval", classifier, "--data", file)["models"]
    assert (entry["max_length"], entry["texts_cut"]) == (LENGTH, 2)
    (entry,) = result_of("eval", classifier, "--data", file, "--max-length", "5")["models"]
    assert (entry["max_length"], entry["texts_cut"]) == (5, 3)
    assert "3 inputs were longer than 5 tokens" in text("eval", classifier, "--data", file, "--max-length", "5")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("dev.tsv", "", ": has no column 'sentence1'; its columns: none"),
        ("dev.tsv", "label\tsentence1\n", ": holds no rows below its header"),
        ("dev.tsv", "label\ttext\n1\tred\n", ": has no column 'sentence1'; its columns: label, text"),
        ("dev.tsv", "gold\tsentence1\n1\tred\n", ": has no column 'label'; its columns: gold, sentence1"),
        ("dev.tsv", "label\tlabel\tsentence1\n1\t1\tred\n", ": has more than one column 'label'"),
        ("dev.tsv", "label\tsentence1\n1\tred\n0\tgreen\tblue\n", ", line 3: has 3 columns, expected 2"),
        ("dev.tsv", "label\tsentence1\n1\tred\n\n0\tgreen\n", ", line 3: has 1 columns, expected 2"),
        ("dev.tsv", "label\tsentence1\n1\tred\n2\tgreen\n", ", line 3: label is '2', expected 0 to 1"),
        ("dev.tsv", b"label\tsentence1\n1\tred\n0\t\xff\n", ", line 3: is not UTF-8"),
        ("dev.csv", 'label,sentence1\n1,"a\nb"\n0\n', ", line 4: has 1 columns, expected 2"),
        ("dev.csv", 'label,sentence1\n1,red\n0,"green\n', ", line 3: unexpected end of data"),
        ("dev.json", "{}", ": expected a file named .tsv, .csv or .jsonl"),
        ("dev.jsonl", "", ": has no column 'sentence1'; its columns: none"),
        (
            "dev.jsonl",
            '{"label": 1, "sentence1": "red"}\n{"label": 1}\n',
            ", line 2: has no 'sentence1'; all lines need",
        ),
        ("dev.jsonl", '{"label": 1, "sentence1": null}\n', ", line 1: 'sentence1' is neither text nor a number"),
        ("dev.jsonl", '{"label": 1,\n', ", line 1: is no JSON"),
    ],
)
def test_eval_names_file_and_line_of_bad_data(classifier, tmp_path, name, content, complaint):
    pytest.importorskip("sklearn")
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_of("eval", classifier, "--data", file).startswith(f"{file}{complaint}")


def test_eval_refuses_what_would_be_meaningless(classifier, encoder, labelled, tmp_path):
    pytest.importorskip("sklearn")
    assert "there is no such file" in error_of("eval", classifier, "--data", tmp_path / "missing.tsv")
    assert "has no classification head" in error_of("eval", encoder, "--data", labelled)
    headless = copy(encoder, tmp_path / "headless")
    configured(headless, architectures=["BertForSequenceClassification"])
    assert "the checkpoint lacks classifier.bias" in error_of("eval", headless, "--data", labelled)
    said = error_of("eval", classifier, "--data", labelled, "--max-length", LENGTH + 1)
    assert f"takes at most {LENGTH} tokens, but --max-length is {LENGTH + 1}" in said
    dumb = save(BertForSequenceClassification, tmp_path / "dumb", tokenizer=False)
    assert "has no tokenizer" in error_of("eval", dumb, "--data", labelled)
    regression = save(BertForSequenceClassification, tmp_path / "regression", num_labels=1)
    assert "which is regression" in error_of("eval", regression, "--data", labelled)

    def spoil(model):
        model.classifier.weight.data[0, 0] = math.nan

    spoilt = save(BertForSequenceClassification, tmp_path / "spoilt", edit=spoil)
    assert "its output holds NaN" in error_of("eval", spoilt, "--data", labelled)


def test_eval_without_scikit_learn_names_the_extra(classifier, labelled, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    said = error_of("eval", classifier, "--data", labelled)
    assert said.endswith("scikit-learn, which is not installed: pip install 'sparsebert[eval]'")


def expected_retrieval(folder: Path, queries: list[str], answers: list[str]) -> dict:
    model, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = score(*(embed(model, Texts(tokenizer, part, max_length=LENGTH)) for part in (queries, answers)))
    return {"mrr_at_10": found.mrr_at_10, "recall_at_1": found.recall_at_1}


def test_eval_measures_retrieval_between_two_columns(encoder, tmp_path):
    answers = sentences(30, seed=5)
    # Queries that are much like their answers, so that not every rank is beyond ten.
    queries = [answer.partition(" ")[2] for answer in answers]
    file = write(tmp_path / "pairs.tsv", "q\ta", [list(pair) for pair in zip(queries, answers, strict=True)])
    options = ["--data", file, "--task", "retrieval", "--text-columns", "q,a"]
    expected = expected_retrieval(encoder, queries, answers)
    assert 0 < expected["mrr_at_10"] < 1
    (entry,) = result_of("eval", encoder, *options)["models"]
    assert entry["scores"] == pytest.approx(expected)
    assert "MRR@10" in text("eval", encoder, *options)
    assert "has no column 'sentence1'" in error_of("eval", encoder, "--data", file, "--task", "retrieval")
    assert "retrieval takes two" in error_of("eval", encoder, *options[:-1], "q")


def test_eval_of_a_head_retrieves_with_its_encoder(classifier, packed, tmp_path):
    rows = [[a, b] for a, b in zip(sentences(6), sentences(6, seed=9), strict=True)]
    file = write(tmp_path / "pairs.tsv", "sentence1\tsentence2", rows)
    result = result_of("eval", packed, "--data", file, "--task", "retrieval", "--compare", classifier)
    assert [set(entry["scores"]) for entry in result["models"]] == [{"mrr_at_10", "recall_at_1"}] * 2


def test_eval_takes_the_docstrings_of_the_standard_library(tmp_path, monkeypatch):
    folder = save(BertModel, tmp_path / "long")
    texts = sentences(1500, words=12, seed=7)
    pairs = [docstrings.Pair(str(i), *texts[2 * i : 2 * i + 2]) for i in range(750)]
    monkeypatch.setattr(docstrings, "read_pairs", lambda progress: pairs)
    monkeypatch.setattr(evaluate, "STDLIB_LENGTH", LENGTH)
    result = result_of("eval", folder, "--stdlib", "--limit", "20")
    held_out = docstrings.split_pairs(pairs).evaluation[:20]
    expected = expected_retrieval(folder, [p.summary for p in held_out], [p.body for p in held_out])
    assert result["models"][0]["scores"] == pytest.approx(expected)
    assert (result["rows"], result["task"]) == (20, "retrieval")


# tune


def test_tune_measures_and_records(packed, tmp_path):
    said = text("tune", packed, "--tokens", "3", "--device", "cpu")
    assert "Median microseconds a call by layout" in said
    assert "These are this CPU's figures" in said
    assert sum(int(count) for count in re.findall(r"(\d+) layers held as", said)) == ENCODER_LINEARS
    table = json.loads((tmp_path / "cache" / "measurements.json").read_text())
    # Three shapes, two layouts that a CPU can hold.
    assert len(table["rows"]) == 6
    result = result_of("tune", packed, "--tokens", "3,16", "--device", "cpu")
    assert {(row["out_features"], row["in_features"], row["tokens"]) for row in result["rows"]} == {
        (out, into, tokens) for out, into in ((32, 32), (64, 32), (32, 64)) for tokens in (4, 16)
    }
    assert len(result["held"]) == ENCODER_LINEARS
    assert result["on_gpu"] is False
    assert result_of("info")["measurements"]["rows"] == 12


def test_tune_measures_a_model_as_it_is_fused(packed):
    result = result_of("tune", packed, "--tokens", "3", "--fuse", "--device", "cpu")
    assert result["fused"]
    # Query, key and value are one.
    assert {(row["out_features"], row["in_features"]) for row in result["rows"]} == {
        (96, 32),
        (32, 32),
        (64, 32),
        (32, 64),
    }


def test_tune_refuses_a_dense_model(classifier):
    assert "nothing in it is packed" in error_of("tune", classifier, "--tokens", "8")


# demo


def test_demo_hands_its_options_over(tmp_path, monkeypatch):
    from sparsebert.cli import demo

    calls = []

    def run_demo(*, out, steps, seed, console, quiet):
        calls.append((out, steps, seed, quiet))
        console.print("the table")
        return {"passed": True, "share": math.nan}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert text("demo", "--out", tmp_path / "d", "--steps", "7", "--seed", "3") == "the table"
    result = run("demo", "--json")
    assert json.loads(result.stdout) == {"passed": True, "share": None}
    assert result.stderr.split("\n")[0] == "the table"
    assert calls == [(tmp_path / "d", 7, 3, False), (demo.DEFAULT_OUT, demo.DEFAULT_STEPS, 0, False)]


def test_a_demo_that_does_not_hold_its_promise_fails(monkeypatch):
    from sparsebert.cli import demo

    def run_demo(**options):
        raise demo.DemoFailed("demo: nothing came back", {})

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert error_of("demo") == "demo: nothing came back"
