"""``fuse_``: a fused model gives what the model gave, is saved as it was, and can be taken apart again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsebert as sb
from packed_cases import CONFIGS
from sparsebert.hf.fused_encoder import BLOCKS
from sparsebert.nn import Int8Linear, PackedLinear, projection
from sparsebert.nn.fused_encoder_layer import FusedEncoderLayer
from sparsebert.ops import layouts
from sparsebert.roles import find_layers
from tiny_models import FAMILIES, SIZES, tiny_model

KINDS = [name for name, (_, _, sizes) in FAMILIES.items() if name.removesuffix("-bare") in BLOCKS]
MIXED = {
    "query": sb.NMConfig(2, 4),
    "attention_output": sb.Int8Config(),
    "intermediate": sb.LowRankConfig(ratio=0.5),
    "output": sb.Int8Config("static"),
}
# 1 to 9 tokens; padding on the right, on the left, in the middle.
LENGTHS = (9, 5, 1, 6)


def spread(family: str = "bert") -> nn.Module:
    """A tiny model whose biases and norms are no constants, which would hide a mix-up."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch(model: nn.Module, kind: str = "right") -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    if kind == "left":
        mask = mask.flip(1)
    elif kind == "holes":
        mask[0, 3] = mask[1, 1] = 0
    elif kind == "empty":
        mask[2] = 0
    elif kind == "full":
        mask[:] = 1
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}


def real(model: nn.Module, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """The last hidden states of the encoder at real tokens, in float64."""
    with torch.no_grad():
        y = model.base_model(**inputs, **options).last_hidden_state
    return y[inputs["attention_mask"] == 1].double()


def compressed(config: object, family: str = "bert", layout: str = "auto") -> nn.Module:
    model = spread(family)
    sb.compress_(model, config)
    if any(isinstance(m, Int8Linear) and m.spec.activations == "static" for m in model.modules()):
        sb.calibrate(model, [batch(model)])
    return sb.prepare_(model, layout)


@pytest.mark.parametrize("kind", ["right", "left", "holes", "full"])
@pytest.mark.parametrize("family", KINDS)
def test_every_family_gives_what_it_gave(family, kind):
    model = spread(family)
    inputs = batch(model, kind)
    expected, head = real(model, inputs), model(**inputs)
    report = sb.fuse_(model)
    assert report.layers == 2 and not report.separate and "one projection in 2" in str(report)
    assert (real(model, inputs) - expected).abs().max() <= 5e-6
    found = model(**inputs)
    assert type(found) is type(head) and found.keys() == head.keys()
    if kind != "left":
        # There the first position, which heads read, is no token.
        for key, value in head.items():
            if key != "last_hidden_state":
                assert torch.allclose(found[key], value, atol=2e-6)
    with torch.no_grad():
        y = model.base_model(**inputs).last_hidden_state
    assert not y[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_the_error_of_the_dtype(dtype):
    model = spread()
    inputs = batch(model)
    model.to(dtype)
    exact = real(copy.deepcopy(model).double(), inputs)
    theirs = (real(model, inputs) - exact).abs().max()
    sb.fuse_(model)
    assert (real(model, inputs) - exact).abs().max() <= 2 * theirs


@pytest.mark.parametrize("name", [*CONFIGS, "mixed"])
def test_every_format_and_layout(name):
    model = compressed(CONFIGS.get(name, MIXED))
    inputs = batch(model)
    specs = {module.spec.op for module in model.modules() if isinstance(module, PackedLinear)}
    held = [layout for layout in layouts.names(next(iter(specs))) if len(specs) == 1] or ["neutral", "dense"]
    for layout in held:
        try:
            sb.prepare_(model, layout)
        except ValueError:
            continue
        unfused = copy.deepcopy(model)
        expected = real(unfused, inputs)
        report = sb.fuse_(model)
        if name == "2:4@0.5":
            assert "columns" in next(iter(report.separate.values()))
        elif name == "mixed":
            assert "NMLinear, Linear, Linear" in str(report)
        else:
            assert not report.separate, report
        # An integer that lies between two may be rounded the other way.
        assert (real(model, inputs) - expected).abs().max() <= (0.03 if "int8" in name or name == "mixed" else 1e-5)
        assert (real(model, inputs) - expected).abs().mean() <= 1e-4
        sb.unfuse_(model)
        assert same_state(model, unfused)
        for a, b in zip(model.modules(), unfused.modules(), strict=True):
            if isinstance(a, PackedLinear):
                assert (a.layout, a.activation, a.spec) == (b.layout, b.activation, b.spec)
        assert torch.equal(real(model, inputs), expected)


def same_state(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", KINDS)
def test_unfused_as_it_was(family):
    model = spread(family)
    before = copy.deepcopy(model)
    sb.fuse_(model)
    assert str(model) != str(before) and isinstance(model, type(before))
    assert sb.unfuse_(model) is model
    assert type(model) is type(before) and str(model) == str(before) and same_state(model, before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    inputs = batch(model)
    assert torch.equal(real(model, inputs), real(before, inputs))
    model.train()(**inputs)[0].sum().backward()


def test_no_weight_is_held_twice():
    """Not even while the layers after it are still to be fused."""
    model = compressed(sb.NMConfig(2, 4))
    apart = [weakref.ref(layer.attention.self.query) for layer in model.bert.encoder.layer]
    seen = []
    merge = projection.merge

    def watched(parts):
        seen.append([part() is not None for part in apart])
        return merge(parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "merge", watched)
        sb.fuse_(model)
    assert seen == [[True, True], [False, True]]
    one = [weakref.ref(layer.query_key_value) for layer in model.bert.encoder.layer]
    sb.unfuse_(model)
    assert [part() for part in (*apart, *one)] == [None] * 4


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name.removeprefix("sparsebert::")] += 1
        return function(*args, **(kwargs or {}))


def ops_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Counter[str]:
    with _Ops() as ops, torch.no_grad():
        model.base_model(**inputs)
    return ops.counts


def test_a_layer_is_few_ops():
    """Two layers: embeddings once; projection, attention and output, two norms, and a feed-forward net each."""
    model = tiny_model("bert-bare")
    sb.fuse_(model)
    counts = ops_of(model, batch(model))
    assert counts["embed_layer_norm"] == 1 and counts["add_layer_norm"] == 4
    assert counts["varlen_attention"] == 2 and counts["dense_linear"] == 2
    # Three more matrix products a layer, and the pooler's.
    assert counts["aten::addmm"] == 2 * 3 + 1


@pytest.mark.parametrize(("config", "rows"), [(sb.Int8Config(), 1 + 2 + 2), (sb.Int8Config("static"), 1 + 2)])
def test_int8_layers_hand_integers_on(config, rows):
    """Only the embeddings and what attention gives are quantized by themselves; with dynamic scales also GELU's."""
    model = compressed(config, "bert-bare", "neutral")
    sb.fuse_(model)
    counts = ops_of(model, batch(model))
    # The last norm of all has no reader.
    assert counts["add_layer_norm_quantize"] == 3 and counts["add_layer_norm"] == 1
    assert counts["quantize_rows"] == rows
    assert counts["int8_linear"] == 0
    assert counts["int8_linear_to_int8"] == (2 if config.activations == "static" else 0)
    assert counts["int8_linear_from_int8"] + counts["int8_linear_to_int8"] == 8


def test_hidden_states_and_attentions():
    model = tiny_model("bert-bare")
    model.set_attn_implementation("eager")
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True, output_attentions=True)
        sb.fuse_(model)
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
        some = model(**inputs, output_hidden_states=[-1, 0]).hidden_states
        assert model(**inputs).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == 3
    mask = inputs["attention_mask"] == 1
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(ours[mask], theirs[mask], atol=2e-6) and not ours[~mask].any()
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert ours.shape == theirs.shape == (4, 4, 9, 9)
        rows = mask[:, None, :, None].expand_as(ours)
        assert torch.allclose(ours[rows], theirs[rows], atol=1e-6) and not ours[~rows].any()
    assert [state is None for state in some] == [False, True, False]


@pytest.mark.parametrize("family", KINDS)
def test_other_ways_to_call(family):
    model = spread(family)
    inputs = batch(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    base = model.base_model
    width = base.embeddings.word_embeddings.embedding_dim
    calls = {
        "positional": ((ids, mask), {}),
        "tuple": ((), {**inputs, "return_dict": False}),
        "no mask": ((ids,), {}),
        "embeddings": ((), {"inputs_embeds": torch.randn(4, 9, width), "attention_mask": mask}),
        "a mask of bools": ((ids, mask.bool()), {}),
        "int32": ((ids.int(), mask.int()), {}),
        "places": ((ids, mask), {"position_ids": torch.arange(9).flip(0)[None] + 2}),
    }
    if family != "distilbert":
        calls["kinds"] = ((ids, mask), {"token_type_ids": torch.zeros_like(ids)})
    with torch.no_grad():
        expected = {name: base(*args, **kwargs)[0] for name, (args, kwargs) in calls.items()}
        sb.fuse_(model)
        for name, (args, kwargs) in calls.items():
            found = base(*args, **kwargs)
            assert isinstance(found, tuple) == (name == "tuple"), name
            keep = mask.bool() if name != "no mask" else torch.ones_like(mask).bool()
            assert torch.allclose(found[0][keep], expected[name][keep], atol=2e-6), name


def test_token_types():
    model = spread()
    inputs = {**batch(model), "token_type_ids": torch.arange(9).expand(4, 9) % 2}
    expected = real(model, inputs)
    sb.fuse_(model)
    assert (real(model, inputs) - expected).abs().max() <= 5e-6
    assert (real(model, {k: v for k, v in inputs.items() if k != "token_type_ids"}) - expected).abs().max() > 1e-3


def test_a_projection_after_the_embeddings():
    config = transformers.ElectraConfig(**{**SIZES, "embedding_size": 16})
    model = transformers.ElectraModel(config).eval()
    inputs = batch(model)
    expected = real(model, inputs)
    sb.fuse_(model)
    assert (real(model, inputs) - expected).abs().max() <= 5e-6


def test_gelu_and_relu():
    for activation in ("gelu", "gelu_new", "relu"):
        model = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act=activation)).eval()
        inputs = batch(model)
        expected = real(model, inputs)
        sb.fuse_(model)
        assert (real(model, inputs) - expected).abs().max() <= 5e-6


def test_a_sequence_without_a_token_stays_finite():
    model = spread()
    inputs = batch(model, "empty")
    expected = real(model, inputs)
    sb.fuse_(model)
    assert (real(model, inputs) - expected).abs().max() <= 5e-6
    assert torch.isfinite(model(**inputs).logits).all()
    nothing = {"input_ids": torch.zeros(0, 5, dtype=torch.long)}
    assert model.base_model(**nothing).last_hidden_state.shape == (0, 5, 32)


def test_neighbours_do_not_matter():
    """To the bit where the same number of tokens is computed; with more, sums may be taken in another order."""
    model = spread()
    sb.fuse_(model)
    inputs = batch(model)
    first = real(model, inputs)[:9]
    other = {key: value.clone() for key, value in inputs.items()}
    other["attention_mask"][1:] = 0
    for row, length in enumerate((1, 9, 2), 1):
        other["attention_mask"][row, :length] = 1
    other["input_ids"][1:] = 7
    assert other["attention_mask"].sum() == inputs["attention_mask"].sum()
    assert torch.equal(real(model, other)[:9], first)
    alone = {key: value[:1] for key, value in inputs.items()}
    assert (real(model, alone) - first).abs().max() <= 2e-6


def test_gradients_without_no_grad():
    model = spread()
    inputs = batch(model)
    fused = copy.deepcopy(model)
    sb.fuse_(fused)
    for each in (model, fused):
        each(**inputs).logits.square().sum().backward()
    sb.unfuse_(fused)
    assert torch.allclose(
        fused.bert.embeddings.word_embeddings.weight.grad, model.bert.embeddings.word_embeddings.weight.grad, atol=1e-5
    )
    assert torch.allclose(
        fused.bert.encoder.layer[0].output.dense.weight.grad,
        model.bert.encoder.layer[0].output.dense.weight.grad,
        atol=1e-5,
    )


def test_under_autocast():
    model = spread()
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = real(model, inputs)
        sb.fuse_(model)
        found = real(model, inputs)
    assert (found - expected).abs().max() <= 0.05


def test_saved_as_it_was(tmp_path):
    """Stock save_pretrained of a dense and of a packed model, and the package's own."""
    dense, packed = spread(), compressed(MIXED)
    for name, model in (("dense", dense), ("packed", packed)):
        model.save_pretrained(tmp_path / name)
        sb.fuse_(model)
        model.save_pretrained(tmp_path / f"fused {name}")
    sb.save_pretrained(packed, tmp_path / "own")
    assert all(isinstance(layer, FusedEncoderLayer) for layer in packed.bert.encoder.layer)
    for name, other in (("dense", "fused dense"), ("packed", "fused packed"), ("packed", "own")):
        ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        first, second = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in (name, other))
        assert first == second


_FRESH = """
import sys
import torch
import sparsebert as sb
from safetensors.torch import load_file
torch.set_num_threads(1)
folder = sys.argv[1]
kept = load_file(folder + "/expected.safetensors")
expected = kept.pop("out")
model = sb.load_pretrained(folder)
sb.fuse_(model)
with torch.inference_mode(), sb.backend("reference"):
    print(torch.equal(model(**kept).logits, expected))
"""


def test_reloaded_in_a_fresh_process(tmp_path):
    model = compressed(sb.NMConfig(2, 4))
    sb.fuse_(model)
    inputs = batch(model)
    sb.save_pretrained(model, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode(), sb.backend("reference"):
        save_file({**inputs, "out": model(**inputs).logits}, tmp_path / "expected.safetensors")
    torch.set_num_threads(threads)
    done = subprocess.run([sys.executable, "-c", _FRESH, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_copied_cast_and_moved():
    model = compressed(sb.NMConfig(2, 4))
    inputs = batch(model)
    sb.fuse_(model)
    expected = real(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output_norm.weight.zero_()
    assert torch.equal(real(twin, inputs), expected)
    twin.bfloat16()
    assert (real(twin, inputs) - expected).abs().max() <= 0.1
    sb.unfuse_(twin)
    assert all(p.dtype == torch.bfloat16 for p in twin.parameters())


def test_a_replica_computes_with_its_own_weights():
    """As torch.nn.parallel.replicate makes them: modules of the same class with other tensors."""
    model = spread()
    sb.fuse_(model)
    inputs = batch(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    base = model.bert._replicate_for_data_parallel()
    base._modules["embeddings"] = copy.deepcopy(model.bert.embeddings)
    with torch.no_grad():
        base._modules["embeddings"].LayerNorm.weight.zero_()
    assert not torch.equal(base(**inputs)[0], model.bert(**inputs)[0])


def test_reports_see_what_runs():
    model = compressed(sb.NMConfig(2, 4))
    before = sb.size_report(model)
    sb.fuse_(model)
    after = sb.size_report(model)
    assert after.encoder == before.encoder and after.model == before.model
    roles = [layer.role for layer in find_layers(model)]
    assert roles == ["query_key_value", "attention_output", "intermediate", "output"] * 2
    assert {layer.role for layer in sb.explain(model).layers} == set(roles)
    assert find_layers(model)[0].module.out_features == 96
    sb.prepare_(model, "neutral")
    assert model.bert.encoder.layer[0].query_key_value.layout == "neutral"


def test_a_head_compiled_beside_it():
    model = spread()
    inputs = batch(model)
    expected = model(**inputs).logits
    sb.fuse_(model)
    model.classifier = torch.compile(model.classifier, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.allclose(model(**inputs).logits, expected, atol=2e-6)
        whole = torch.compile(model, backend="eager")
        assert torch.allclose(whole(**inputs).logits, expected, atol=2e-6)


def test_two_encoders_in_one_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = tiny_model("bert-bare"), tiny_model("distilbert", seed=1).distilbert

        def forward(self, **inputs):
            return self.left(**inputs)[0] + self.right(**inputs)[0]

    model = Both()
    inputs = batch(model.left)
    mask = inputs["attention_mask"] == 1
    with torch.no_grad():
        expected = model(**inputs)[mask]
        assert sb.fuse_(model).layers == 4
        assert torch.allclose(model(**inputs)[mask], expected, atol=4e-6)


# What cannot be


def test_a_call_that_is_not_inference():
    model = tiny_model()
    inputs = batch(model)
    sb.fuse_(model)
    with pytest.raises(RuntimeError, match="BertModel is fused, which is for inference: call model.eval"):
        model.train()(**inputs)
    model.eval()
    for kwargs, text in (
        ({"use_cache": True}, "takes no use_cache"),
        ({"encoder_hidden_states": torch.zeros(4, 9, 32)}, "takes no encoder_hidden_states"),
    ):
        with pytest.raises(ValueError, match=f"BertModel is fused and {text}"):
            model.bert(**inputs, **kwargs)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 1, 9, 9\), expected \(4, 9\)"):
        model.bert(inputs["input_ids"], torch.zeros(4, 1, 9, 9))
    for kwargs in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": torch.zeros(4, 9, 32)}):
        with pytest.raises(ValueError, match="expected either input_ids or inputs_embeds"):
            model.bert(**kwargs)


def refused(model: nn.Module, text: str) -> None:
    before = str(model)
    state = (
        {name: tensor.clone() for name, tensor in nn.Module.state_dict(model).items()}
        if isinstance(model, nn.Module)
        else {}
    )
    with pytest.raises(ValueError, match=text):
        sb.fuse_(model)
    assert str(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in nn.Module.state_dict(model).items())


def test_models_that_cannot_be_fused():
    refused(nn.Linear(2, 2), r"fuse_: Linear with model_type None has no encoder to fuse, expected one of bert, ")
    refused(tiny_model("mpnet"), "MPNetForSequenceClassification with model_type 'mpnet' has no encoder to fuse")
    for change, text in (
        ({"hidden_act": "silu"}, "hidden_act='silu' in its config, expected one of gelu"),
        ({"is_decoder": True}, "is_decoder=True in its config, expected False"),
    ):
        refused(
            transformers.BertModel(transformers.BertConfig(**SIZES, **change)).eval(), f"fuse_: BertModel has {text}"
        )

    class Own(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    refused(Own(transformers.BertConfig(**SIZES)).eval(), "fuse_: Own has a forward of its own")
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense = nn.Sequential(nn.Linear(64, 32))
    refused(
        model, r"fuse_: bert\.encoder\.layer\.1\.output\.dense is a Sequential, expected a Linear or a packed layer"
    )
    model = tiny_model()
    model.bert.encoder.layer[1].output.LayerNorm = nn.Identity()
    refused(model, r"output\.LayerNorm is a Identity, expected a LayerNorm")
    model = tiny_model()
    sb.compress_(model, {"output": sb.Int8Config("static")})
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense has static activations and no input_scale yet"):
        sb.fuse_(model)


def test_what_a_fused_model_refuses():
    model = compressed(sb.NMConfig(2, 4))
    state = model.state_dict()
    with pytest.raises(ValueError, match="unfuse_: BertForSequenceClassification is not fused"):
        sb.unfuse_(model)
    sb.fuse_(model)
    refused(model, "fuse_: bert is fused already")
    for what, call in (
        ("compress_", lambda: sb.compress_(model, sb.NMConfig(2, 4))),
        ("decompress_", lambda: sb.decompress_(model)),
        ("calibrate", lambda: sb.calibrate(model, [batch(model)])),
        ("selection", lambda: sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(model, total_steps=1)),
    ):
        with pytest.raises(ValueError, match=rf"{what}: .*is fused; call sparsebert\.unfuse_\(model\) first"):
            call()
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0: a fused layer takes no state dict"):
        model.load_state_dict(state)


def test_a_forced_backend_is_that_of_the_linears():
    """Ops between them that it has no kernel for run as ever; a linear that it cannot serve is an error."""
    model = compressed(sb.Int8Config(), layout="neutral")
    inputs = batch(model)
    sb.fuse_(model)
    expected = real(model, inputs)
    with sb.backend("reference"):
        assert (real(model, inputs) - expected).abs().max() <= 1e-5
    with sb.backend("cuda"), pytest.raises(RuntimeError, match=r"^int8_linear: no forced backend serves"):
        real(model, inputs)
