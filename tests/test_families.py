"""Every family of encoders: which layers have which role, and that a packed model is the pruned dense one."""

import copy

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparsebert as sb
from sparsebert.cli import info
from sparsebert.formats import nm
from sparsebert.nn import NMLinear
from sparsebert.plan import select
from sparsebert.roles import FAMILIES as TABLES
from sparsebert.roles import ROLES, feed_forward_pairs, find_layers, role_of_path, weight_use
from tiny_models import FAMILIES, SIZES, inputs, outputs, tiny_model

CONFIG = sb.NMConfig(2, 4)
SPLIT = ("query", "key", "value", "attention_output", "intermediate", "output")
FUSED = ("query_key_value", "attention_output", "intermediate", "output")

# Written out, so that a table that is wrong cannot agree with itself: the layers of encoder layer 1, in that order.
LAYERS = {
    "bert": (
        "bert.encoder.layer.1",
        "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
        "output.dense",
    ),
    "distilbert": (
        "distilbert.transformer.layer.1",
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2",
    ),
    "albert": (
        "albert.encoder.albert_layer_groups.1.albert_layers.0",
        "attention.query attention.key attention.value attention.dense ffn ffn_output",
    ),
    "albert-inner": (
        "encoder.albert_layer_groups.0.albert_layers.1",
        "attention.query attention.key attention.value attention.dense ffn ffn_output",
    ),
    "deberta-v3": (
        "deberta.encoder.layer.1",
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense "
        "intermediate.dense output.dense",
    ),
    "mpnet": (
        "mpnet.encoder.layer.1",
        "attention.attn.q attention.attn.k attention.attn.v attention.attn.o intermediate.dense output.dense",
    ),
    "vit": (
        "vit.layers.1",
        "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
    ),
    "modernbert": ("model.layers.1", "attn.Wqkv attn.Wo mlp.Wi mlp.Wo"),
}


def roles_of(family):
    return FUSED if family.startswith("modernbert") else SPLIT


def packed(family, selection=CONFIG):
    model = tiny_model(family)
    sb.compress_(model, selection)
    return model


@pytest.mark.parametrize("family", LAYERS)
def test_layers_by_name(family):
    stem, names = LAYERS[family]
    found = [(layer.path, layer.role) for layer in find_layers(tiny_model(family)) if layer.index == 1]
    assert found == [(f"{stem}.{name}", role) for name, role in zip(names.split(), roles_of(family), strict=True)]


def test_tables_have_roles_in_their_order():
    for family in TABLES.values():
        for names in (family, family.stored_as or family):
            assert list(names.roles) == [role for role in ROLES if role in names.roles]
        assert family.stored_as is None or set(family.stored_as.roles) == set(family.roles)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_reloads_bit_for_bit(family, tmp_path):
    model = packed(family)
    sb.save_pretrained(model, tmp_path)
    for loaded in (sb.load_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(outputs(loaded.eval()), outputs(model))
        # What stood in for a weight while it was loaded is gone.
        assert not any(hasattr(module, "weight") for module in loaded.modules() if isinstance(module, NMLinear))
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(outputs(sb.load_pretrained(tmp_path / "again")), outputs(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_decompressed_it_is_saved_and_loaded_as_any_dense_model(family, tmp_path):
    model = packed(family)
    sb.save_pretrained(model, tmp_path / "packed")
    model = sb.decompress_(sb.load_pretrained(tmp_path / "packed"))
    model.save_pretrained(tmp_path / "dense")
    tiny_model(family).save_pretrained(tmp_path / "reference")
    names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("dense", "reference")]
    assert names[0] == names[1]
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    assert getattr(dense.config, "quantization_config", None) is None
    assert torch.equal(outputs(dense), outputs(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_info_reads_roles_off_the_files(family, tmp_path):
    model = tiny_model(family)
    expected = sorted((layer.role, layer.index) for layer in find_layers(model))
    model.save_pretrained(tmp_path / "dense")
    sb.compress_(model, CONFIG)
    model.save_pretrained(tmp_path / "packed")
    for name, kind in (("dense", "dense"), ("packed", "2:4")):
        found = info.inspect(str(tmp_path / name))
        assert sorted((layer["role"], layer["index"]) for layer in found["layers"]) == expected
        assert set(found["formats"]) == {kind}
    size = sb.size_report(model).encoder
    assert found["size"]["encoder"] == {"dense_bytes": size.dense, "disk_bytes": size.disk}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_pruned_dense_model(family):
    # In float64, where gradients of a model this small are no rounding errors.
    model = tiny_model(family).double()
    twin = copy.deepcopy(model)
    for layer in find_layers(twin):
        layer.module.weight.data = nm.project(layer.module.weight.data, 2, 4)
    sb.compress_(model, CONFIG)
    direction = torch.randn_like(outputs(model))
    gradients = []
    for each in (model, twin):
        (each(**inputs(each))[0] * direction).sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    packed_weights = {f"{layer.path}.weight" for layer in find_layers(model)}
    assert gradients[1].keys() - gradients[0].keys() == packed_weights
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-12, msg=name)
    # A step of training changes what is dense, and nothing else.
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= gradients[0].keys()
    assert any(name.endswith(".bias") for name in changed) or not any(".bias" in name for name in before)


@pytest.mark.parametrize("family", ["albert", "albert-inner"])
def test_shared_layers_are_swapped_once(family):
    model = tiny_model(family)
    assert len({layer.path for layer in find_layers(model)}) == 12
    calls = []
    layer = find_layers(model)[0].module
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    outputs(model)
    handle.remove()
    assert len(calls) == (2 if family == "albert" else 1)
    report = sb.compress_(model, CONFIG)
    assert len(report.layers) == sum(isinstance(module, NMLinear) for module in model.modules()) == 12
    assert sb.size_report(model).encoder.dense == sum(
        4 * (weight.numel() + weight.shape[0])
        for name, weight in tiny_model(family).named_parameters()
        if "albert_layers" in name and weight.dim() == 2
    )


def test_relative_positions_of_deberta():
    model = tiny_model("deberta-v2")
    skipped = sb.compress_(model, CONFIG).skipped
    assert sorted(path.rpartition(".")[2] for path in skipped) == ["pos_key_proj"] * 2 + ["pos_query_proj"] * 2
    attention = model.encoder.layer[0].attention.self
    assert type(attention.pos_key_proj) is nn.Linear and isinstance(attention.key_proj, NMLinear)
    # Content and position go through one packed layer.
    model = packed("deberta-v3")
    assert not hasattr(model.deberta.encoder.layer[0].attention.self, "pos_key_proj")
    lengths = []
    layer = model.deberta.encoder.layer[0].attention.self.key_proj
    layer.register_forward_pre_hook(lambda _, x: lengths.append(tuple(x[0].shape)))
    outputs(model)
    assert lengths == [(2, 7, 32), (1, 16, 32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_unit_that_output_does_not_read_is_a_row_that_nobody_needs(family):
    model = tiny_model(family)
    pairs = feed_forward_pairs(model)
    assert [(a.role, a.index, b.role, b.index) for a, b in pairs] == [
        ("intermediate", i, "output", i) for i in range(2)
    ]
    gated = TABLES[model.config.model_type].gated
    for first, second in pairs:
        hidden = second.module.in_features
        assert first.module.out_features == (2 if gated else 1) * hidden
        unused = torch.arange(0, hidden, 3)
        second.module.weight.data[:, unused] = 0
        rows = torch.cat([unused, unused + hidden]) if gated else unused
        # Near the hidden unit, each of the pruned rows would be seen in the output.
        near = outputs(model)
        first.module.weight.data[rows] = 3.0
        if first.module.bias is not None:
            first.module.bias.data[rows] = -2.0
        assert torch.equal(outputs(model), near)
        first.module.weight.data[rows[0] + 1] = 3.0
        assert not torch.equal(outputs(model), near)


def test_one_config_and_every_role_by_itself():
    for family in ("modernbert", "vit", "albert"):
        assert {x.role for x in sb.compress_(tiny_model(family), CONFIG).layers} == set(roles_of(family))
        for role in roles_of(family):
            report = sb.compress_(tiny_model(family), {role: CONFIG})
            assert [(x.role, x.index) for x in report.layers] == [(role, 0), (role, 1)]


@pytest.mark.parametrize(
    ("family", "role", "there"), [("modernbert-bare", "query", FUSED), ("bert-bare", "query_key_value", SPLIT)]
)
def test_a_role_that_the_family_has_not(family, role, there):
    model = tiny_model(family)
    message = f"{type(model).__name__} has no role {role!r}; it has {', '.join(there)}"
    for selection in ({role: CONFIG}, {"output": CONFIG, role: None}):
        with pytest.raises(ValueError) as error:
            select(model, selection)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (transformers.DebertaConfig(**SIZES), "DebertaModel"),
        (transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100), "T5Model"),
        (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=40), "GPT2Model"),
        (
            transformers.BartConfig(
                vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40,
            ),
            "BartModel",
        ),
        (transformers.LongformerConfig(**SIZES, attention_window=4), "LongformerModel"),
        (
            transformers.FunnelConfig(
                vocab_size=100, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=64, num_decoder_layers=1
            ),
            "FunnelModel",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_families_are_refused_in_one_line(config, cls):
    model = getattr(transformers, cls)(config)
    with pytest.raises(ValueError) as error:
        sb.compress_(model, CONFIG)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    assert message.startswith(f"{cls}: no roles known for model_type {config.model_type!r} (known: albert, bert, ")
    assert "select layers by name pattern instead. Its linear layers: " in message
    if cls == "GPT2Model":  # its Conv1D has its weight transposed
        assert message.endswith("Its linear layers: none")
    else:
        first = next(path for path, module in model.named_modules() if type(module) is nn.Linear)
        assert first in message
        assert sb.compress_(model, {"*": CONFIG}).layers


def test_a_family_refused_by_role_is_packed_by_pattern(tmp_path):
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    twin = copy.deepcopy(model)
    report = sb.compress_(model, {"*.fc?": CONFIG, "*_proj": sb.NMConfig(1, 4)})
    assert len(report.layers) == 16 and not report.skipped
    for layer in report.layers:
        linear = twin.get_submodule(layer.path)
        linear.weight.data = nm.project(linear.weight.data, 2 if ".fc" in layer.path else 1, 4)
    assert torch.equal(outputs(model), outputs(twin))
    sb.save_pretrained(model, tmp_path)
    assert torch.equal(outputs(sb.load_pretrained(tmp_path)), outputs(model))


def test_a_layer_whose_weight_is_read_by_other_code_stays_dense():
    model = transformers.DebertaModel(transformers.DebertaConfig(**SIZES)).eval()
    report = sb.compress_(model, {"*": CONFIG})
    reason = (
        "DisentangledSelfAttention.forward reads its weight instead of calling it, and a packed layer has no weight"
    )
    assert report.skipped == {f"encoder.layer.{i}.attention.self.in_proj": reason for i in range(2)}
    assert outputs(model).isfinite().all()
    path = "encoder.layer.0.attention.self.in_proj"
    linear = model.get_submodule(path)
    linear.weight.data = nm.project(linear.weight.data, 2, 4)
    with pytest.raises(ValueError, match=rf"{path}: DisentangledSelfAttention\.forward reads its weight"):
        sb.compress_(model, sb.CompressionPlan({path: CONFIG}))


def test_t5_is_packed_but_for_what_it_asks_the_dtype_of(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100)
    model = transformers.T5EncoderModel(config).eval()
    report = sb.compress_(model, {"*": CONFIG})
    assert [layer.path.rpartition(".")[2] for layer in report.layers] == ["q", "k", "v", "o", "wi"]
    assert list(report.skipped) == ["encoder.block.0.layer.1.DenseReluDense.wo"]
    # T5 initializes its layers from above, by name: it can be loaded all the same.
    sb.save_pretrained(model, tmp_path)
    assert torch.equal(outputs(sb.load_pretrained(tmp_path)), outputs(model))


class Reader(nn.Module):
    """Reads weights in ways that are easily missed."""

    def __init__(self):
        super().__init__()
        self.called, self.scaled, self.nested = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential()
        self.nested.inner = nn.Linear(8, 8)
        self.called.weight.data.mul_(2)

    def forward(self, x):
        norms = [w.norm() for w in (lambda: (self.scaled.weight,))()]
        return self.called(x) + norms[0] + self.nested.inner.weight.sum()


def test_weights_read_in_closures_and_from_further_above_are_seen():
    model = nn.Sequential(Reader(), nn.TransformerEncoderLayer(8, 2, 16))
    found = {path for path, module in model.named_modules() if type(module) is nn.Linear and weight_use(model, path)}
    # The fused path of torch's own layer takes the weights.
    assert found == {"0.scaled", "0.nested.inner", "1.linear1", "1.linear2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_with_a_role_is_read_otherwise(family):
    model = tiny_model(family)
    assert [layer.path for layer in find_layers(model) if weight_use(model, layer.path)] == []


def test_roles_of_paths():
    assert role_of_path("bert", "bert.encoder.layer.11.output.dense") == ("output", 11)
    assert role_of_path("bert", "bert.encoder.layer.11.attention.output.dense") == ("attention_output", 11)
    assert role_of_path("modernbert", "model.layers.3.attn.Wqkv") == ("query_key_value", 3)
    assert role_of_path("vit", "vit.encoder.layer.3.attention.attention.query") == ("query", 3)
    assert role_of_path("vit", "layers.3.attention.q_proj") == ("query", 3)
    albert = "albert.encoder.albert_layer_groups.2.albert_layers.1.ffn"
    assert role_of_path("albert", albert, inner=3) == ("intermediate", 7)
    for inner in (1, 0, "x", None, True):
        assert role_of_path("albert", albert.replace("s.1.", "s.0."), inner=inner) == ("intermediate", 2)
    for kind, path in (
        ("bert", "bert.pooler.dense"),
        ("bert", "bert.encoder.layer.1.output.dense.weight"),
        ("vit", "vit.encoder.layer.1.output"),
        ("gpt2", "bert.encoder.layer.1.output.dense"),
        (None, "bert.encoder.layer.1.output.dense"),
        (["bert"], "bert.encoder.layer.1.output.dense"),
    ):
        assert role_of_path(kind, path) is None


def test_vit_is_saved_under_its_older_names_and_loads_from_both(tmp_path):
    model = packed("vit")
    model.save_pretrained(tmp_path / "older")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    with safe_open(tmp_path / "older" / "model.safetensors", "pt") as file:
        assert "vit.encoder.layer.0.attention.attention.query.values" in file.keys()
    with safe_open(tmp_path / "own" / "model.safetensors", "pt") as file:
        assert "vit.layers.0.attention.q_proj.values" in file.keys()
    for name in ("older", "own"):
        assert torch.equal(outputs(sb.load_pretrained(tmp_path / name)), outputs(model))
        bare = transformers.ViTModel.from_pretrained(tmp_path / name, add_pooling_layer=False).eval()
        assert torch.equal(outputs(bare), outputs(model.vit))


def test_two_tensors_for_one_place_are_refused(tmp_path):
    packed("vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "vit.encoder.layer.0.attention.attention.query.values"
    save_file(
        {**tensors, "vit.layers.0.attention.q_proj.values": tensors[name].clone()}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="q_proj.values are both vit.layers.0.attention.q_proj.values of the model"):
        sb.load_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["bert", "vit", "modernbert"])
def test_a_part_saved_by_itself_loads_into_the_whole(family, tmp_path):
    model = packed(family)
    part = getattr(model, model.base_model_prefix)
    part.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(getattr(loaded, model.base_model_prefix)), outputs(part))
