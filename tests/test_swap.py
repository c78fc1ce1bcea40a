"""compress_ and decompress_: all of it or nothing, sizes that are true, reports that say what happened."""

import copy

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.nn import NMLinear
from sparsebert.swap import quantization_config
from tiny_models import FAMILIES, outputs, tiny_model

CONFIG = sb.NMConfig(2, 4)


def prune(model, config=CONFIG):
    """The dense twin of what compress_ makes."""
    twin = copy.deepcopy(model)
    from sparsebert.roles import find_layers

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
    assert len(report.layers) == 12
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
