"""compress_ and decompress_: all of it or nothing, sizes that are true, reports that say what happened."""

import copy
import math

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm, one_shot
from sparsebert.nn import (
    MODULES,
    BitmapLinear,
    DenseLinear,
    Int8Linear,
    LowRankLinear,
    LowRankSparseLinear,
    NMLinear,
    PackedLinear,
)
from sparsebert.ops import int8
from sparsebert.report import Bytes
from sparsebert.roles import feed_forward_pairs, find_layers
from sparsebert.swap import quantization_config
from tiny_models import FAMILIES, outputs, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = sb.NMConfig(2, 4)


def prune(model, config=CONFIG):
    """The dense twin of what compress_ makes."""
    twin = copy.deepcopy(model)
    for layer in find_layers(twin):
        layer.module.weight.data = nm.project(layer.module.weight.data, config.n, config.m)
    return twin


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["auto", "neutral"])
def test_computes_what_the_pruned_dense_model_does(family, layout):
    model = tiny_model(family)
    twin = prune(model)
    report = sb.compress_(model, CONFIG, layout=layout)
    assert len(report.layers) == (8 if model.config.model_type == "modernbert" else 12)
    assert torch.equal(outputs(model), outputs(twin))
    assert not torch.equal(outputs(model), outputs(tiny_model(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_decompress_leaves_no_trace(family):
    model = tiny_model(family)
    twin = prune(model)
    config_before = model.config.to_dict()
    sb.compress_(model, CONFIG)
    assert "quantization_config" in model.config.to_dict()
    assert sb.decompress_(model) is model
    assert same_state(state(model), state(twin))
    assert model.config.to_dict() == config_before
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


def test_compress_prints_nothing(capsys):
    report = sb.compress_(tiny_model(), CONFIG)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    text = str(report)
    assert "compressed 12 layers" in text and "left dense: classifier: not selected" in text
    assert "encoder linears" in text and "whole model" in text


def test_a_plan_is_packed_as_it_is():
    model = tiny_model()
    path = "bert.encoder.layer.1.intermediate.dense"
    linear = model.get_submodule(path)
    linear.weight.data = nm.project(linear.weight.data, 1, 4)
    expected, before = linear.weight.data.clone(), outputs(model)
    report = sb.compress_(model, sb.CompressionPlan({path: sb.NMConfig(1, 4)}))
    assert [layer.path for layer in report.layers] == [path]
    assert torch.equal(model.get_submodule(path).to_linear().weight, expected)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize(
    ("damage", "spec", "error"),
    [
        (
            lambda layer: layer.weight.data[0, 0].fill_(float("nan")),
            CONFIG,
            "layer.1.output.dense: weight holds nan",
        ),
        (
            lambda layer: None,
            sb.CompressionPlan({"bert.encoder.layer.1.output.dense": CONFIG}),
            "layer.1.output.dense: weight does not obey 2:4",
        ),
    ],
)
def test_a_failure_half_way_leaves_the_model_as_it_was(damage, spec, error):
    model = tiny_model()
    damage(model.bert.encoder.layer[1].output.dense)
    modules, before = list(map(id, model.modules())), state(model)
    with pytest.raises(ValueError, match=error):
        sb.compress_(model, spec)
    assert list(map(id, model.modules())) == modules
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert getattr(model.config, "quantization_config", None) is None


def test_a_layout_that_is_not_possible_leaves_the_model_as_it_was():
    model = tiny_model()
    modules = list(map(id, model.modules()))
    with pytest.raises(ValueError, match="layout 'cusparselt' is not possible"):
        sb.compress_(model, CONFIG, layout="cusparselt")
    assert list(map(id, model.modules())) == modules
    sb.compress_(model, CONFIG, layout="neutral")
    with pytest.raises(
        ValueError, match=r"bert.encoder.layer.0.attention.self.query: layout 'cutlass' is not possible"
    ):
        sb.prepare_(model, "cutlass")
    assert {m.layout for m in model.modules() if isinstance(m, NMLinear)} == {"neutral"}


def test_modules_referred_to_twice_are_swapped_in_both_places():
    model = nn.Module()
    model.first = nn.Linear(8, 8)
    model.again = nn.Sequential(model.first, nn.ReLU())
    sb.compress_(model, {"first": CONFIG})
    assert isinstance(model.first, NMLinear) and model.again[0] is model.first
    sb.decompress_(model)
    assert type(model.first) is nn.Linear and model.again[0] is model.first


def test_training_mode_and_the_bias_parameter_stay():
    model = tiny_model().train()
    bias = model.bert.encoder.layer[0].output.dense.bias
    sb.compress_(model, CONFIG)
    assert model.bert.encoder.layer[0].output.dense.bias is bias
    assert all(module.training for module in model.modules())
    sb.decompress_(model)
    assert model.bert.encoder.layer[0].output.dense.bias is bias


def test_compressing_the_rest_later():
    model = tiny_model()
    sb.compress_(model, {"query": CONFIG})
    sb.compress_(model, {"output": sb.NMConfig(1, 4)})
    layers = quantization_config(model)["layers"]
    assert {(e["role"], e["n"]) for e in layers.values()} == {("query", 2), ("output", 1)}
    assert model.config.quantization_config["layers"] == layers


def test_layer_map_says_where_and_what():
    model = tiny_model()
    sb.compress_(model, {"output": sb.NMConfig(2, 8), "classifier": sb.NMConfig(1, 4)})
    config = quantization_config(model)
    assert (config["quant_method"], config["format_version"]) == ("sparsebert", 1)
    assert config["layers"]["bert.encoder.layer.1.output.dense"] == {
        "role": "output",
        "index": 1,
        "format": "nm",
        "in_features": 64,
        "out_features": 32,
        "dtype": "float32",
        "bias": True,
        "n": 2,
        "m": 8,
    }
    assert config["layers"]["classifier"]["role"] is None


def test_sizes_are_those_of_the_tensors():
    model = tiny_model().half()
    dense_bytes = sum(t.nbytes for t in model.parameters())
    transient = sum(b.nbytes for b in model.buffers())
    weights = sum(p.numel() for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2)
    sb.compress_(model, CONFIG, layout="neutral")
    size = sb.size_report(model)
    saved = sum(t.nbytes for t in model.state_dict().values())
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert size.model.disk == saved
    assert size.model.memory == held
    assert size.model.dense == dense_bytes + transient
    assert size.encoder.dense - size.encoder.disk == 2 * weights - weights * 9 // 8
    sb.prepare_(model, "dense")
    honest = sb.size_report(model)
    assert honest.encoder.memory == honest.encoder.dense > honest.encoder.disk == size.encoder.disk
    assert sum(t.nbytes for t in model.state_dict().values()) == saved


def test_tied_embeddings_are_counted_once():
    import transformers

    from tiny_models import SIZES

    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    distinct = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sb.size_report(model).model.memory == sum(distinct.values())


def test_explain_needs_something_packed():
    for function in (sb.explain, sb.decompress_, quantization_config, sb.prepare_):
        with pytest.raises(ValueError, match="no layer is packed; call compress_ first"):
            function(tiny_model())


def test_explain_names_layout_kernel_refusals_and_basis():
    model = tiny_model()
    sb.compress_(model, CONFIG)
    explanation = sb.explain(model, tokens=64)
    layer = explanation.layers[0]
    assert (layer.layout, layer.basis) == ("dense", "not measured here")
    assert layer.kernel.startswith("reference")
    assert "layout cusparselt: needs a CUDA device, not cpu" in layer.refused
    text = str(explanation)
    assert "at 64 tokens" in text and "not measured here" in text and layer.path in text
    sb.prepare_(model, "neutral")
    assert sb.explain(model).layers[0].basis == "layout asked for: neutral"


INT8_BY_ROLE = {"query": sb.Int8Config(), "key": sb.Int8Config(weights=sb.NMConfig(2, 4)), "value": CONFIG}


@pytest.mark.parametrize("capable", [False, True])
def test_int8_is_held_dense_on_a_cpu_without_int8_instructions(capable, monkeypatch):
    monkeypatch.setattr(int8, "cpu_has_int8", lambda: capable)
    model = tiny_model()
    layers = {layer.role: layer for layer in sb.compress_(model, INT8_BY_ROLE).layers}
    found = {layer.role: layer for layer in sb.explain(model).layers}
    reason = "not measured here"
    if not capable:
        reason += (
            "; this CPU has no int8 instructions, and exact int8 sums take longer there than a dense matmul; "
            "x is then not quantized"
        )
    assert layers["query"].layout == found["query"].layout == ("neutral" if capable else "dense")
    assert layers["key"].layout == found["key"].layout == ("unpacked" if capable else "dense")
    assert found["query"].basis == found["key"].basis == reason
    assert (layers["value"].layout, found["value"].basis) == ("dense", "not measured here")
    with sb.quantizing(model) as paths:
        held = {layer.path: layer.layout for layer in sb.explain(model).layers}
        assert set(paths) == {path for path in held if path.endswith((".query", ".key")) and not capable}
        assert {held[path] for path in paths} == (set() if capable else {"float"})


def test_quantizing_computes_as_int8_devices_do_and_holds_as_before_again():
    model = tiny_model()
    sb.compress_(model, INT8_BY_ROLE, layout="neutral")
    expected = outputs(model)
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    for layer in (first.query, first.key, second.key):
        layer.prepare_("dense")
    dense = outputs(model)
    assert not torch.equal(dense, expected)
    with sb.quantizing(model) as paths:
        assert paths == [
            f"bert.encoder.layer.{path}" for path in ("0.attention.self.query", "0.attention.self.key")
        ] + ["bert.encoder.layer.1.attention.self.key"]
        assert torch.equal(outputs(model), expected)
        assert second.query.layout == first.value.layout == "neutral"
    assert [layer.layout for layer in (first.query, first.key, second.key, second.query)] == ["dense"] * 3 + ["neutral"]
    assert [layer.requested_layout for layer in (first.query, second.query)] == ["dense", "neutral"]
    assert torch.equal(outputs(model), dense)
    with pytest.raises(KeyError), sb.quantizing(model):
        raise KeyError
    assert torch.equal(outputs(model), dense)
    with sb.quantizing(nn.Linear(4, 4)) as paths:
        assert paths == []


def test_tune_measures_records_and_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model = tiny_model()
    sb.compress_(model, CONFIG)
    calls = []
    report = sb.tune(model, [5, 8], budget_s=0.01, progress=lambda *a: calls.append(a))
    assert {row.tokens for row in report.rows} == {8}
    assert {(row.out_features, row.in_features) for row in report.rows} == {(32, 32), (64, 32), (32, 64)}
    assert all(set(row.median_us) == {"neutral", "dense"} for row in report.rows)
    assert all(us > 0 for row in report.rows for us in row.median_us.values())
    assert report.device.startswith("cpu ") and "cpu" in str(report)
    assert [(done, total) for done, total, _ in calls] == [(0, 3), (1, 3), (2, 3)]
    assert (tmp_path / "measurements.json").is_file()
    for path, layout in report.held.items():
        assert model.get_submodule(path).layout == layout
    assert all(layer.basis.startswith("measured at 8 tokens") for layer in sb.explain(model).layers)
    for tokens in ([], [0], [1.5]):
        with pytest.raises(ValueError, match="tune: tokens"):
            sb.tune(model, tokens)


def test_reports_are_json():
    import json

    model = tiny_model()
    report = sb.compress_(model, CONFIG)
    for value in (report.to_dict(), sb.size_report(model).to_dict(), sb.explain(model).to_dict()):
        assert json.loads(json.dumps(value)) == json.loads(json.dumps(value, sort_keys=True))


def test_a_family_with_a_missing_role_can_be_compressed_by_pattern():
    model = tiny_model()
    del model.bert.encoder.layer[1].attention.self.key
    report = sb.compress_(model, {"*.output.dense": CONFIG})
    assert {layer.role for layer in report.layers} == {None}
    assert report.size.encoder.disk < report.size.encoder.dense


def test_a_packed_head_is_no_part_of_the_encoder():
    model = tiny_model()
    dense = sb.size_report(model)
    sb.compress_(model, {"bert.pooler.dense": CONFIG})
    assert sb.size_report(model).encoder == dense.encoder
    assert sb.size_report(model).model.disk < dense.model.disk


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(ValueError, match="bert.encoder.layer.7.output.dense: the plan names this layer, but"):
        sb.compress_(tiny_model(), sb.CompressionPlan({"bert.encoder.layer.7.output.dense": CONFIG}))
    with pytest.raises(ValueError, match="the plan is empty"):
        sb.compress_(tiny_model(), sb.CompressionPlan())
    with pytest.raises(ValueError, match="ignore cannot be combined with a plan"):
        sb.compress_(tiny_model(), sb.CompressionPlan({"classifier": CONFIG}), ignore=["classifier"])


# Every format, one-shot and by plan

CONFIGS = {
    str(config): config
    for config in (
        sb.NMConfig(2, 4),
        sb.NMConfig(1, 4, columns=0.5),
        sb.BitmapConfig(0.2),
        sb.LowRankConfig(rank=4),
        sb.LowRankConfig(ratio=0.5),
        sb.LowRankSparseConfig(ratio=0.3, sparse=sb.RowsConfig(0.1)),
        sb.LowRankSparseConfig(rank=4, sparse=sb.NMConfig(2, 4)),
        sb.LowRankSparseConfig(rank=4, sparse=sb.BitmapConfig(0.1)),
        sb.Int8Config(),
        sb.Int8Config("static"),
        sb.Int8Config("static", sb.NMConfig(2, 4)),
    )
}
FLOAT_CONFIGS = [name for name in CONFIGS if not name.startswith("int8")]
INT8_CONFIGS = [name for name in CONFIGS if name.startswith("int8")]
FFN = "bert.encoder.layer.{}.{}.dense"


def close(actual, expected):
    """The same weights multiplied in another order: some roundings of fp32, through two layers and their norms."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def linears(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | PackedLinear)}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_shot_with_every_format(name):
    config, model = CONFIGS[name], tiny_model()
    before = copy.deepcopy(model)
    report = sb.compress_(model, config)
    assert len(report.layers) == 12 and {type(linears(model)[x.path]) for x in report.layers} == {
        MODULES[config.format]
    }
    assert report.size.encoder.disk < report.size.encoder.dense
    assert all(x.config == name for x in report.layers)
    for layer in report.layers:
        old, new = (
            before.get_submodule(layer.path).weight.detach().double(),
            model.get_submodule(layer.path).to_linear(),
        )
        assert type(new) is nn.Linear and new.weight.shape == old.shape
        kept = 1 - float((old - new.weight.detach().double()).square().sum() / old.square().sum())
        # The sums of squares are in fp32.
        assert layer.kept_energy == pytest.approx(kept, abs=1e-5) and 0 < kept < 1
    if "static" in name:
        with pytest.raises(RuntimeError, match="no input_scale yet"):
            outputs(model)
        sb.calibrate(model, [{"input_ids": torch.randint(3, 100, (2, 7))}])
    dense = sb.decompress_(copy.deepcopy(model))
    assert not any(isinstance(module, PackedLinear) for module in dense.modules())
    layers = [model.get_submodule(x.path) for x in report.layers]
    for layout in ("auto", "neutral", "dense"):
        sb.prepare_(model, layout)
        held = {layer.layout for layer in layers}
        assert held == {layout} or layout == "auto"
        if held == {"dense"} or name in FLOAT_CONFIGS:
            close(outputs(model), outputs(dense))
        else:
            # Rounding x is no rounding of floats; but all layouts round alike.
            assert not torch.equal(outputs(model), outputs(dense))
            sb.prepare_(model, "float")
            expected = outputs(model)
            sb.prepare_(model, layout)
            assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("name", ["2:4", "bitmap:0.2", "low-rank:r4"])
def test_kept_energy_is_that_of_the_nearest_weight(name):
    model = tiny_model()
    weights = {path: linear.weight.detach().double() for path, linear in linears(model).items()}
    for layer in sb.compress_(model, CONFIGS[name]).layers:
        squares = weights[layer.path].square()
        best = {
            "2:4": lambda w: w.reshape(-1, 4).sort(-1).values[:, 2:].sum(),
            "bitmap:0.2": lambda w: w.flatten().sort().values[-round(0.2 * w.numel()) :].sum(),
            "low-rank:r4": lambda w, path=layer.path: torch.linalg.svdvals(weights[path])[:4].square().sum(),
        }[name](squares)
        assert layer.kept_energy == pytest.approx(float(best / squares.sum()), abs=1e-5)


INNER = {
    **{name: CONFIGS[name] for name in FLOAT_CONFIGS if name != "low-rank:0.5"},
    "int8": sb.Int8Config(),
    "dense": sb.DenseConfig(),
    "left dense": None,
}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("inner", INNER)
def test_columns_that_are_dropped_shrink_both_layers(family, inner):
    model = tiny_model(family)
    before = copy.deepcopy(model)
    selection = {"intermediate": INNER[inner], "output": sb.NMConfig(2, 4, columns=0.5)}
    report = sb.compress_(model, selection, layout="dense")
    halves = 2 if family == "modernbert" else 1
    twin = sb.decompress_(copy.deepcopy(model))
    pairs = zip(feed_forward_pairs(model), feed_forward_pairs(twin), feed_forward_pairs(before), strict=True)
    for (first, second), (first_twin, second_twin), (first_old, second_old) in pairs:
        columns = second.module.columns.long()
        assert (second.module.spec.in_features, second.module.dense_in_features) == (32, 64)
        dropped = torch.ones(64, dtype=torch.bool)
        dropped[columns] = False
        assert not second_twin.module.weight[:, dropped].any()
        norms = second_old.module.weight.square().sum(0)
        assert norms[columns].min() >= norms[dropped].max()
        assert second.module.compact_input and second.module.in_features == first.module.out_features // halves == 32
        assert torch.equal(first.module.kept_rows.long(), torch.cat([columns + 64 * half for half in range(halves)]))
        found = quantization_config(model)["layers"]
        assert found[first.path]["kept_rows"] == 32 * halves and found[first.path]["out_features"] == 64 * halves
        assert (found[second.path]["columns"], found[second.path]["compact_input"]) == (32, True)
        # Nobody reads what the dropped rows give: whatever is there, the dense model says the same.
        assert first_twin.module.weight.shape == first_old.module.weight.shape
        with torch.no_grad():
            lost = dropped.repeat(halves)
            assert not first_twin.module.weight[lost].any()
            first_twin.module.weight[lost] = torch.randn(int(lost.sum()), first_twin.module.in_features)
    close(outputs(model), outputs(twin))
    saved = sum(t.nbytes for layer in find_layers(model) for t in layer.module.state_dict().values())
    assert report.size.encoder.disk == saved


OUTPUT_ALONE = {"output": sb.NMConfig(2, 4, columns=0.5)}


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
@pytest.mark.parametrize("how", ["not selected", "left by the selection", "not in the plan"])
def test_a_layer_left_dense_loses_the_rows_that_nobody_reads(family, how):
    """The function is that of the model whose output gathers from a whole intermediate layer."""
    model = tiny_model(family).double()
    gathered = copy.deepcopy(model)
    inner = [first.path for first, _ in feed_forward_pairs(model)]
    ignored = sb.compress_(gathered, OUTPUT_ALONE, ignore=inner)
    assert {path: ignored.skipped[path] for path in inner} == {path: f"ignored by {path!r}" for path in inner}
    for first, second in feed_forward_pairs(gathered):
        assert type(first.module) is nn.Linear and not second.module.compact_input
    selection = OUTPUT_ALONE
    if how == "left by the selection":
        selection = {**OUTPUT_ALONE, "intermediate": None}
    elif how == "not in the plan":
        model = sb.decompress_(copy.deepcopy(gathered))
        selection = sb.CompressionPlan(dict.fromkeys((x.path for x in ignored.layers), OUTPUT_ALONE["output"]))
    weights = {path: model.get_submodule(path).weight.clone() for path in inner}
    report = sb.compress_(model, selection)
    assert not report.skipped.keys() & set(inner)
    assert {x.path: x.config for x in report.layers if x.role == "intermediate"} == dict.fromkeys(inner, "dense")
    halves = 2 if family == "modernbert" else 1
    sizes = {x.path: x.bytes for x in report.size.layers}
    for first, second in feed_forward_pairs(model):
        rows = first.module.kept_rows.long()
        assert type(first.module) is DenseLinear and second.module.compact_input
        assert first.module.description == f"dense, {32 * halves} of {64 * halves} rows"
        assert torch.equal(first.module.neutral()[0], weights[first.path][rows])
        a_row = 32 * 8 + 8 * (first.module.bias is not None)
        assert sizes[first.path] == Bytes(64 * halves * a_row, *[32 * halves * (a_row + 4)] * 2)
    torch.testing.assert_close(outputs(model), outputs(gathered), rtol=1e-12, atol=1e-12)
    assert (
        report.size.encoder.disk < ignored.size.encoder.disk
        and report.size.encoder.memory < ignored.size.encoder.memory
    )
    dense = sb.decompress_(copy.deepcopy(model))
    for path in inner:
        linear, rows = dense.get_submodule(path), model.get_submodule(path).kept_rows.long()
        gone = torch.ones(64 * halves, dtype=torch.bool).index_fill_(0, rows, False)
        assert type(linear) is nn.Linear and linear.weight.shape == weights[path].shape
        assert not linear.weight[gone].any() and (linear.bias is None or not linear.bias[gone].any())
    torch.testing.assert_close(outputs(dense), outputs(gathered), rtol=1e-12, atol=1e-12)


def test_a_layer_left_dense_that_cannot_be_packed_keeps_its_rows():
    class Special(nn.Linear):
        pass

    def of_another_class(model, layer):
        layer.intermediate.dense.__class__ = Special

    def with_a_hook(model, layer):
        layer.intermediate.dense.register_forward_hook(lambda *_: None)

    def with_a_weight_of_two(model, layer):
        model.also = nn.Linear(32, 64)
        model.also.weight = layer.intermediate.dense.weight

    for change in (of_another_class, with_a_hook, with_a_weight_of_two):
        model = tiny_model()
        change(model, model.bert.encoder.layer[0])
        expected = copy.deepcopy(model)
        sb.compress_(expected, OUTPUT_ALONE, ignore=["*.intermediate.dense"])
        report = sb.compress_(model, OUTPUT_ALONE)
        (first, second), (other, _) = feed_forward_pairs(model)
        assert isinstance(first.module, nn.Linear) and not second.module.compact_input
        assert type(other.module) is DenseLinear and report.skipped[first.path] == "not selected"
        close(outputs(model), outputs(expected))


def test_a_layer_left_dense_with_nan_leaves_the_model_as_it_was():
    model = tiny_model()
    path = FFN.format(1, "intermediate")
    model.get_submodule(path).weight.data.fill_(math.nan)
    modules = list(map(id, model.modules()))
    for spec in (OUTPUT_ALONE, sb.CompressionPlan({path: sb.DenseConfig()})):
        with pytest.raises(ValueError, match=f"^{path}: weight holds nan in row 0, expected finite numbers"):
            sb.compress_(model, spec)
        assert list(map(id, model.modules())) == modules and not hasattr(model.config, "quantization_config")


def test_a_weight_of_two_modules_is_in_no_plan():
    model = tiny_model()
    model.also = nn.Linear(32, 32)
    model.also.weight = model.get_submodule(PATHS[0]).weight
    with pytest.raises(ValueError, match=f"^{PATHS[0]}: weight is shared with {PATHS[0]}.weight and also.weight"):
        sb.compress_(model, sb.CompressionPlan({PATHS[0]: sb.Int8Config()}))


def test_a_pruned_model_with_columns_is_packed_as_it_is():
    """A plan: the columns follow from the zeros, and rows of the layer before are dropped though they are no zeros."""
    config = sb.NMConfig(2, 4, columns=0.5)
    inner = sb.LowRankSparseConfig(rank=4, sparse=sb.RowsConfig(0.25))
    model = tiny_model()
    first, second = (model.get_submodule(FFN.format(0, role)) for role in ("intermediate", "output"))
    with torch.no_grad():
        second.weight.copy_(one_shot.approximate(second.weight, config).weight)
        columns = nm.kept_columns(second.weight, 32)
        # All of the sparse rows are among those that stay.
        first.weight[columns.long()[:16]] *= 20
        found = one_shot.approximate(first.weight, inner)
        first.weight.copy_(found.weight)
    assert set(found.factors["sparse"].any(1).nonzero().flatten().tolist()) <= set(columns.tolist())
    expected = outputs(model)
    plan = sb.CompressionPlan(
        {FFN.format(0, "intermediate"): inner, FFN.format(0, "output"): config},
        {FFN.format(0, "intermediate"): found.factors},
    )
    sb.compress_(model, plan)
    first, second = (model.get_submodule(FFN.format(0, role)) for role in ("intermediate", "output"))
    assert torch.equal(first.kept_rows, columns) and torch.equal(second.columns, columns)
    assert first.spec.count == 16
    close(outputs(model), expected)


def test_a_mixed_selection_by_role_pattern_and_path():
    model = tiny_model()
    report = sb.compress_(
        model,
        {
            "query": CONFIGS["2:4"],
            "key": CONFIGS["bitmap:0.2"],
            "value": CONFIGS["low-rank:r4"],
            "attention_output": CONFIGS["low-rank:0.3+rows:0.1"],
            "intermediate": sb.Int8Config(),
            "output": None,
            "*.layer.1.*.value": sb.NMConfig(1, 4),
            "bert.encoder.layer.0.attention.self.query": sb.Int8Config(weights=sb.NMConfig(1, 2)),
            "*.0.attention.self.query": None,
            "classifier": sb.LowRankConfig(rank=1),
        },
        ignore=["*.1.attention.self.key"],
    )
    types = {path.removeprefix("bert.encoder.layer."): type(module) for path, module in linears(model).items()}
    assert {path: kind for path, kind in types.items() if kind is not nn.Linear} == {
        "0.attention.self.query": Int8Linear,
        "0.attention.self.key": BitmapLinear,
        "0.attention.self.value": LowRankLinear,
        "0.attention.output.dense": LowRankSparseLinear,
        "0.intermediate.dense": Int8Linear,
        "1.attention.self.query": NMLinear,
        "1.attention.self.value": NMLinear,
        "1.attention.output.dense": LowRankSparseLinear,
        "1.intermediate.dense": Int8Linear,
        "classifier": LowRankLinear,
    }
    assert report.skipped[FFN.format(0, "output")] == "left dense by the selection"
    assert report.skipped["bert.encoder.layer.1.attention.self.key"] == "ignored by '*.1.attention.self.key'"
    assert report.skipped["bert.pooler.dense"] == "not selected"
    assert {x.path: x.config for x in report.layers}["bert.encoder.layer.0.attention.self.query"] == "int8+1:2"
    sb.prepare_(model, "dense")
    close(outputs(model), outputs(sb.decompress_(copy.deepcopy(model))))
    assert len(quantization_config(model)["layers"]) == 10


def planned(name, model, *paths):
    """Makes the layers obey and returns the plan, as a method's ``finalize`` would."""
    config, factors = CONFIGS[name], {}
    for path in paths:
        linear = model.get_submodule(path)
        found = one_shot.approximate(linear.weight.detach(), config)
        linear.weight.data = found.weight.clone()
        if found.factors:
            factors[path] = found.factors
    return sb.CompressionPlan(dict.fromkeys(paths, config), factors)


PATHS = ("bert.encoder.layer.0.attention.self.query", FFN.format(1, "intermediate"))


@pytest.mark.parametrize("name", CONFIGS)
def test_plans_survive_a_file_and_are_packed_as_they_are(name, tmp_path):
    model = tiny_model()
    plan = planned(name, model, *PATHS)
    plan.verify(model)
    expected, weights = outputs(model), {path: model.get_submodule(path).weight.clone() for path in PATHS}
    (tmp_path / "plan.safetensors").write_bytes(b"of an older plan")
    plan.save(tmp_path)
    assert (tmp_path / "plan.safetensors").exists() == bool(plan.factors) == name.startswith("low-rank")
    loaded = sb.CompressionPlan.load(tmp_path)
    assert loaded.layers == plan.layers and loaded.factors.keys() == plan.factors.keys()
    for path, parts in plan.factors.items():
        assert same_state(loaded.factors[path], parts)
    sb.compress_(model, loaded)
    for path, parts in plan.factors.items():
        module = model.get_submodule(path)
        assert torch.equal(module.neutral()[0], parts["u"]) and torch.equal(module.neutral()[1], parts["v"])
        # What is loaded into the model later must not reach into the plan.
        module.load_state_dict(
            {key: torch.zeros_like(t) if key in "uv" else t for key, t in module.state_dict().items()}
        )
        assert same_state(loaded.factors[path], parts)
        module.load_state_dict(
            sb.nn.MODULES[module.format]
            .from_linear(_linear(weights[path], module.bias), plan.layers[path], factors=parts)
            .state_dict()
        )
    if name in INT8_CONFIGS:
        for path in PATHS:
            largest = weights[path].abs().amax(1, keepdim=True)
            rounded = model.get_submodule(path).to_linear().weight
            assert ((rounded - weights[path]).abs() <= largest / 127 / 2 * 1.0001).all()
    else:
        for path in PATHS:
            close(model.get_submodule(path).to_linear().weight, weights[path])
        close(outputs(model), expected)


def _linear(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data, linear.bias = weight.clone(), bias
    return linear


LOW_RANK, ROWS, NM_SPARSE, BITS = "low-rank:r4", "low-rank:0.3+rows:0.1", "low-rank:r4+2:4", "low-rank:r4+bitmap:0.1"


@pytest.mark.parametrize(
    ("name", "factor", "damage", "message"),
    [
        (LOW_RANK, None, None, "the plan has the factors none, expected u, v for low-rank:r4"),
        (LOW_RANK, "u", None, "the plan has the factors v, expected u, v for low-rank:r4"),
        (LOW_RANK, "sparse", lambda t: torch.zeros(32, 32), "the plan has the factors sparse, u, v, expected u, v for"),
        (ROWS, "sparse", None, r"the plan has the factors u, v, expected sparse, u, v for low-rank:0.3\+rows:0.1"),
        (LOW_RANK, "u", lambda t: t[:, 1:], r"factor u has shape \(32, 3\), expected \(32, 4\) for low-rank:r4"),
        (LOW_RANK, "v", lambda t: t.t(), r"factor v has shape \(32, 4\), expected \(4, 32\)"),
        (ROWS, "sparse", lambda t: t[0], r"factor sparse has shape \(32,\), expected \(32, 32\)"),
        (LOW_RANK, "u", lambda t: t * math.nan, "factor u is torch.float32 or holds NaN or infinities"),
        (
            LOW_RANK,
            "v",
            lambda t: t.long(),
            "factor v is torch.int64 or holds NaN or infinities, expected finite floats",
        ),
        (ROWS, "sparse", lambda t: t / 0, "factor sparse is torch.float32 or holds NaN or infinities"),
        (LOW_RANK, "u", lambda t: t * 1.01, "weight differs from what its factors make by up to .*, expected at most"),
        (BITS, "sparse", lambda t: t * 1.01, "weight differs from what its factors make by up to"),
        (ROWS, "sparse", lambda t: t + 1, "factor sparse has 32 non-zero rows, expected at most 3 at rows:0.1"),
        (
            NM_SPARSE,
            "sparse",
            lambda t: t + 9,
            "factor sparse does not obey 2:4: row 0, columns 0 to 3 hold 4 non-zeros",
        ),
        (BITS, "sparse", lambda t: t + 9, "factor sparse holds 1024 non-zeros, expected at most 102 at bitmap:0.1"),
    ],
)
def test_broken_factors_are_refused(name, factor, damage, message):
    model, path = tiny_model(), PATHS[0]
    plan = planned(name, model, path)
    factors = dict(plan.factors[path])
    if factor is None:
        factors = {}
    elif damage is None:
        del factors[factor]
    else:
        factors[factor] = damage(factors.get(factor, torch.zeros(())))
    modules, before = list(map(id, model.modules())), state(model)
    broken = sb.CompressionPlan(plan.layers, {path: factors})
    for refuse in (broken.verify, lambda model: sb.compress_(model, broken)):
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            refuse(model)
    assert list(map(id, model.modules())) == modules and same_state(state(model), before)
    sb.compress_(model, plan)


def test_factors_of_a_layer_that_is_not_in_the_plan_are_refused():
    model = tiny_model()
    plan = planned(LOW_RANK, model, *PATHS)
    broken = sb.CompressionPlan({PATHS[0]: plan.layers[PATHS[0]]}, plan.factors)
    with pytest.raises(ValueError, match=f"{PATHS[1]}: the plan has factors for this layer, but no config"):
        sb.compress_(model, broken)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(f"{PATHS[0]}.u"), rf"tensor {PATHS[0]}.u is missing"),
        (lambda tensors: tensors.update(x=torch.zeros(1)), "tensor x is not of this plan"),
        (
            lambda tensors: tensors.update({f"{PATHS[0]}.u": torch.zeros(4)}),
            r"is F32 of shape \(4,\), expected a matrix of floats",
        ),
        (None, "not a readable safetensors file"),
    ],
)
def test_a_broken_file_of_factors_is_refused(damage, message, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    planned(ROWS, model, *PATHS).save(tmp_path)
    file = tmp_path / "plan.safetensors"
    if damage is None:
        whole = file.read_bytes()
        for content in (whole[:-10], b"", whole[:20]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"plan\.safetensors: {message}"):
                sb.CompressionPlan.load(tmp_path)
        file.unlink()
        message = "cannot be opened: No such file or directory"
    else:
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"plan\.safetensors: .*{message}"):
        sb.CompressionPlan.load(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_failure_half_way_with_every_format_leaves_the_model_as_it_was(name):
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight.data[2, 3] = math.inf
    modules, before = list(map(id, model.modules())), state(model)
    path = FFN.format(1, "output")
    with pytest.raises(ValueError, match=f"^{path}: weight holds inf in row 2, expected finite numbers"):
        sb.compress_(model, CONFIGS[name])
    assert list(map(id, model.modules())) == modules and same_state(state(model), before)
    assert getattr(model.config, "quantization_config", None) is None
    assert all(not hasattr(module, "layout") for module in model.modules())
    assert model.bert.encoder.layer[0].output.dense.weight.data_ptr() and outputs(model).shape == (2, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sb.LowRankConfig(rank=40), "rank 40 is above the smaller of 32 x 32"),
        (sb.LowRankConfig(rank=20), "rank 20 would store 1280 numbers, more than the 1024 of the dense weight"),
        (sb.LowRankSparseConfig(rank=40, sparse=sb.RowsConfig(0.1)), "rank 40 is above the smaller of 32 x 32"),
    ],
)
def test_ranks_that_compress_nothing_are_left_dense_with_the_reason(config, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"no layer to compress; .*query \\({message}\\)"):
        sb.compress_(model, {"query": config})
    with pytest.raises(ValueError, match=f"{PATHS[0]}: {message}"):
        sb.compress_(model, sb.CompressionPlan({PATHS[0]: config}))


def test_rows_are_not_dropped_where_that_would_cost_the_rank():
    """A rank of 20 fits 64 x 32, but not the 16 rows that would be left: x is gathered instead."""
    config = {"intermediate": sb.LowRankConfig(rank=20), "output": sb.NMConfig(2, 4, columns=0.25)}
    model = tiny_model()
    sb.compress_(model, config)
    inner, outer = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense
    assert inner.kept_rows is None and not outer.compact_input and outer.columns is not None
    twin = copy.deepcopy(model)
    torch.testing.assert_close(outputs(model), outputs(sb.decompress_(twin)))
