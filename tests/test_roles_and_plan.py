"""Finding layers by role, selecting them, and the promise a plan makes."""

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.plan import select
from sparsebert.roles import ROLES, find_layers
from tiny_models import FAMILIES, tiny_model

CONFIG = sb.NMConfig(2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_of_every_layer(family):
    model = tiny_model(family)
    fused = model.config.model_type == "modernbert"
    attention = ["query_key_value"] if fused else ["query", "key", "value"]
    roles = [*attention, "attention_output", "intermediate", "output"]
    assert roles == [role for role in ROLES if role in roles]
    layers = find_layers(model)
    assert [(layer.index, layer.role) for layer in layers] == [(i, role) for i in range(2) for role in roles]
    for layer in layers:
        assert type(layer.module) is nn.Linear
        shapes = {"intermediate": (128 if fused else 64, 32), "output": (32, 64), "query_key_value": (96, 32)}
        expected = shapes.get(layer.role, (32, 32))
        assert tuple(layer.module.weight.shape) == expected


def test_packed_layers_keep_their_roles():
    model = tiny_model()
    before = [(x.path, x.role) for x in find_layers(model)]
    sb.compress_(model, CONFIG)
    assert [(x.path, x.role) for x in find_layers(model)] == before


def test_unknown_families_are_told_what_there_is():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no roles known for model_type None .*select layers by name pattern.*: 0"):
        find_layers(model)


def test_a_missing_role_is_an_error():
    model = tiny_model()
    model.bert.encoder.layer[1].attention.self.key = nn.Identity()
    del model.bert.encoder.layer[1].attention.self.key
    with pytest.raises(ValueError, match="lacks key of layer 1; its linear layers: bert.encoder"):
        find_layers(model)


def test_one_config_selects_encoder_linears_only():
    chosen, skipped = select(tiny_model(), CONFIG)
    assert len(chosen) == 12 and set(chosen.values()) == {CONFIG}
    assert skipped == {"bert.pooler.dense": "not selected", "classifier": "not selected"}


def test_path_beats_pattern_beats_role():
    chosen, skipped = select(
        tiny_model(),
        {
            "output": sb.NMConfig(2, 8),
            "*.layer.1.*": sb.NMConfig(1, 4),
            "bert.encoder.layer.1.output.dense": None,
            "*.layer.1.intermediate.*": sb.NMConfig(1, 2),
            "classifier": CONFIG,
        },
    )
    assert chosen["bert.encoder.layer.0.output.dense"] == sb.NMConfig(2, 8)
    assert chosen["bert.encoder.layer.1.attention.self.key"] == sb.NMConfig(1, 4)
    assert chosen["bert.encoder.layer.1.intermediate.dense"] == sb.NMConfig(1, 4)
    assert chosen["classifier"] == CONFIG
    assert skipped["bert.encoder.layer.1.output.dense"] == "left dense by the selection"
    assert skipped["bert.encoder.layer.0.intermediate.dense"] == "not selected"


def test_ignore_wins():
    chosen, skipped = select(tiny_model(), CONFIG, ignore=["*.layer.0.*"])
    assert len(chosen) == 6 and all(".layer.1." in path for path in chosen)
    assert skipped["bert.encoder.layer.0.output.dense"] == "ignored by '*.layer.0.*'"


@pytest.mark.parametrize(
    ("selection", "ignore", "message"),
    [
        ({"*.ffn": CONFIG}, (), r"selection '\*\.ffn' matches no linear layer and is no role \(query, key"),
        (CONFIG, ["pooler"], "ignore 'pooler' matches no linear layer"),
        ({"query": None}, (), "no layer to compress; .*left dense by the selection"),
        (sb.NMConfig(2, 4), ["*"], "no layer to compress"),
        ({}, (), "no layer to compress"),
    ],
)
def test_matching_nothing_is_an_error(selection, ignore, message):
    with pytest.raises(ValueError, match=message):
        select(tiny_model(), selection, ignore=ignore)


@pytest.mark.parametrize("selection", ["2:4", {"query": "2:4"}, None])
def test_selections_of_another_type_are_refused(selection):
    with pytest.raises(TypeError, match="expected NMConfig"):
        select(tiny_model(), selection)


class Special(nn.Linear):
    pass


def test_layers_that_do_not_qualify_are_listed_with_the_reason():
    model = nn.Module()
    model.odd, model.fine, model.special = nn.Linear(6, 4), nn.Linear(8, 4), Special(8, 4)
    model.hooked, model.tied, model.twin = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8)
    model.hooked.register_forward_hook(lambda *_: None)
    model.twin.weight = model.tied.weight
    chosen, skipped = select(model, {"*": CONFIG})
    assert list(chosen) == ["fine"]
    assert skipped == {
        "odd": "in_features is 6, not divisible by 4 as 2:4 needs",
        "special": "is Special, expected torch.nn.Linear",
        "hooked": "has forward hooks, which a swap would lose",
        "tied": "weight is shared with tied.weight and twin.weight",
        "twin": "weight is shared with tied.weight and twin.weight",
    }


def pruned_model():
    model = tiny_model()
    path = "bert.encoder.layer.0.output.dense"
    weight = model.get_submodule(path).weight
    weight.data = nm.project(weight.data, 2, 4)
    return model, path


def test_a_plan_is_verified():
    model, path = pruned_model()
    plan = sb.CompressionPlan({path: CONFIG})
    plan.verify(model)
    model.get_submodule(path).weight.data[5, 8:12] = 1.0
    with pytest.raises(ValueError, match=rf"{path}: weight does not obey 2:4: row 5, columns 8 to 11 hold 4 non-zeros"):
        plan.verify(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bert.nowhere", "no such module; its linear layers: bert"),
        ("bert.embeddings", "is BertEmbeddings, expected"),
    ],
)
def test_a_plan_for_another_model_is_refused(path, message):
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        sb.CompressionPlan({path: CONFIG}).verify(tiny_model())


def test_plans_are_saved_as_json(tmp_path):
    plan = sb.CompressionPlan({"a.b": CONFIG, "c": sb.NMConfig(1, 16)})
    plan.save(tmp_path)
    assert sb.CompressionPlan.load(tmp_path) == plan
    for text in ("[]", '{"layers": {}}', '{"plan_version": 1, "layers": {"a": {"format": "x"}}}', "{"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json: "):
            sb.CompressionPlan.load(tmp_path)


def test_masks_do_not_depend_on_the_device_of_ties():
    weight = torch.ones(4, 16)
    assert torch.equal(nm.magnitude_mask(weight, 2, 4), nm.magnitude_mask(weight.double(), 2, 4))
