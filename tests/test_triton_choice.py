"""Which problems the Triton kernels serve, and with which configurations, where no kernel runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsebert as sb
from kernel_cases import DEVICES
from sparsebert.formats import bitmap as bitmap_format
from sparsebert.nn import PackedLinear
from sparsebert.ops import devices, layouts, select
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import BitmapSpec, DenseSpec, Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec
from sparsebert.ops.triton import bitmap, dense, int8, low_rank, nm, support
from sparsebert.ops.triton.configurations import MOST_SPLITS

NM = NMSpec(2, 4, 768, 3072)
H200 = DEVICES[90]
BASE = select.Problem("neutral", H200, torch.float16, NM, 32, "gelu")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.float32}, None),
        ({"device": DEVICES[80]}, None),
        ({"device": DEVICES[120]}, None),
        ({"dtype": torch.float64}, "needs float16, bfloat16, float32, not float64"),
        ({"device": H200._replace(capability=(7, 5))}, "needs compute capability 8.0, found 7.5"),
        ({"device": Device("cpu")}, "needs a CUDA device, not cpu"),
        ({"device": Device("xpu")}, "needs a CUDA device, not xpu"),
    ],
)
def test_what_is_refused_and_why(changed, reason):
    for problem in (BASE, BASE._replace(spec=Int8Spec("dynamic", 2, 4, 768, 3072))):
        problem = problem._replace(**changed)
        assert {c.backend: r for c, r in select.review(problem)}["triton"] == reason
        chosen = "triton" if reason is None else "reference"
        if problem.spec.op == "nm_linear":
            assert select.choose(problem).backend == chosen


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"layout": "dense"}, None),
        ({"dtype": torch.bfloat16, "activation": "relu"}, None),
        ({"activation": "none"}, "nothing to fuse: torch's own linear is as good"),
        (
            {"dtype": torch.float32},
            "needs float16 or bfloat16: in float32 what fusing saves is little beside the product",
        ),
        ({"device": Device("cpu")}, "needs a CUDA device, not cpu"),
        ({"device": H200._replace(capability=(7, 5))}, "needs compute capability 8.0, found 7.5"),
    ],
)
def test_a_dense_product_is_torchs_unless_an_activation_follows_it(changed, reason):
    problem = BASE._replace(spec=DenseSpec(768, 3072), **changed)
    found = dict((c.backend, r) for c, r in select.review(problem) if c.backend != "cuda")
    assert found == {"triton": reason, "reference": None}
    assert select.choose(problem).backend == ("triton" if reason is None else "reference")


@pytest.mark.parametrize(
    ("version", "reason"), [("3.5.1", "needs Triton 3.6, found 3.5.1"), ("3.6.0", None), ("4.0", None)]
)
def test_older_versions_are_refused(monkeypatch, version, reason):
    support._missing.cache_clear()
    monkeypatch.setattr(support.metadata, "version", lambda name: version)
    assert support._missing() == reason
    monkeypatch.undo()
    support._missing.cache_clear()


FORMATS = {
    "2:4": sb.NMConfig(2, 4),
    "bitmap": sb.BitmapConfig(0.1),
    "low rank": sb.LowRankConfig(rank=4),
    "low rank + rows": sb.LowRankSparseConfig(rank=4, sparse=sb.RowsConfig(0.2)),
    "low rank + 2:4": sb.LowRankSparseConfig(rank=4, sparse=sb.NMConfig(2, 4)),
    "low rank + bitmap": sb.LowRankSparseConfig(rank=4, sparse=sb.BitmapConfig(0.1)),
    "int8": sb.Int8Config(),
    "int8 2:4": sb.Int8Config(weights=sb.NMConfig(2, 4)),
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes a model on a CPU look as if it lay on a GPU of the capability given."""

    def pretend(capability):
        found = SimpleNamespace(
            name="a GPU",
            major=capability[0],
            minor=capability[1],
            multi_processor_count=132,
            shared_memory_per_block_optin=227 << 10,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(PackedLinear, "device", torch.device("cuda"))
        monkeypatch.setattr(PackedLinear, "dtype", torch.float16)

    devices.describe.cache_clear()
    yield pretend
    devices.describe.cache_clear()


def test_a_packed_dense_layer_is_explained_by_what_runs_it(on_gpu):
    model = nn.Sequential(nn.Linear(64, 48)).half()
    sb.compress_(model, {"0": sb.DenseConfig()}, layout="neutral")
    on_gpu((9, 0))
    assert sb.explain(model).layers[0].kernel == "reference (torch's linear on the unpacked weight)"
    model[0].activation = "gelu"
    kernel = sb.explain(model).layers[0].kernel
    assert kernel.startswith("triton (Triton: bias and activation as the product is written; block_m")


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS.keys())
def test_explain_lists_triton_on_a_gpu_or_why_not(config, on_gpu):
    """In each layout that a kernel of Triton reads."""
    model = nn.Sequential(nn.Linear(64, 48)).half()
    sb.compress_(model, {"0": config})
    spec = model[0].spec
    read = [
        name for name in layouts.names(spec.op) if any(c.backend == "triton" for c in select.candidates(spec.op, name))
    ]
    assert read
    for capability in ((9, 0), (7, 5)):
        on_gpu(capability)
        devices.describe.cache_clear()
        chosen = 0
        for name in read:
            model[0].layout = name
            (layer,) = sb.explain(model).layers
            if capability == (9, 0):
                chosen += layer.kernel.startswith("triton (Triton: ") and layer.kernel.endswith(": estimated)")
            else:
                assert any("needs compute capability 8.0, found 7.5" in reason for reason in layer.refused)
        assert chosen or capability == (7, 5)


@given(
    st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 4), (1, 8), (5, 8), (1, 16), (15, 16)]),
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.integers(0, 1 << 20),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([*DEVICES.values(), Device("cpu")]),
)
def test_configurations_fit_their_kernel(pattern, in_features, out_features, tokens, dtype, device):
    """Sides that are powers of two, tiles of whole bytes of positions, splits that leave each two steps."""
    n, m = pattern
    problem = select.Problem(
        "neutral", device, dtype, Int8Spec("dynamic", n, m, in_features, out_features), tokens, "none"
    )
    found = int8.configurations(problem)
    if m > 1:
        found = found + nm.configurations(problem._replace(spec=NMSpec(n, m, in_features, out_features)))
    for config in found:
        for side in config[:3]:
            assert side >= 16 and side & (side - 1) == 0
        assert config.block_k % m == 0
        # A power of two of slots is read in whole bytes.
        slots = config.block_k // m * n
        assert n & (n - 1) or slots * (2 if m <= 4 else 4) % 8 == 0
        steps = -(-in_features // config.block_k)
        assert config.split_k == 1 or (config.split_k <= MOST_SPLITS and 2 * config.split_k <= steps)
        assert config.block_n < 2 * max(16, tokens)
    # int8 of these patterns has registers to spare.
    assert len(set(found)) > 3 or nm.slot_by_slot(n, m)


@given(
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.integers(0, 1 << 20),
    st.sampled_from([*DEVICES.values(), Device("cpu")]),
)
def test_dense_configurations_fit_their_kernel(in_features, out_features, tokens, device):
    """Sides that are powers of two, and splits for few tokens alone."""
    spec = DenseSpec(in_features, out_features)
    found = dense.configurations(select.Problem("neutral", device, torch.float16, spec, tokens, "gelu"))
    for config in found:
        for side in config[:3]:
            assert side >= 16 and side & (side - 1) == 0
        steps = -(-in_features // config.block_k)
        assert config.split_k == 1 or (config.split_k <= MOST_SPLITS and 2 * config.split_k <= steps)
        assert config.split_k == 1 or tokens <= 32
        assert config.block_n < 2 * max(16, tokens)
    assert 5 < len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("tokens", "tile", "splits"),
    [
        (1, (64, 16), 2),
        (32, (64, 32), 2),
        (128, (64, 64), 1),
        (512, (64, 128), 1),
        (1024, (128, 128), 1),
        (1 << 20, (128, 128), 1),
    ],
)
def test_dense_tiles_grow_with_what_there_is_to_share_out(tokens, tile, splits):
    """Of BERT-base's feed-forward layer on 132 multiprocessors."""
    problem = BASE._replace(spec=DenseSpec(768, 3072), tokens=tokens)
    estimate = dense.configurations(problem)[0]
    assert (estimate.block_m, estimate.block_n) == tile and estimate.split_k == splits


@given(
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.integers(0, 1 << 20),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([*DEVICES.values(), Device("cpu")]),
)
def test_splits_of_a_bitmap_have_whole_chunks(in_features, out_features, tokens, dtype, device):
    problem = select.Problem("chunked", device, dtype, BitmapSpec(1, in_features, out_features), tokens, "none")
    chunks = -(-in_features // bitmap.CHUNK)
    found = bitmap.configurations(problem)
    for config in found:
        for side in config[:3]:
            assert side >= 16 and side & (side - 1) == 0
        assert bitmap.CHUNK % config.block_k == 0 and 1 <= config.split_k <= min(chunks, MOST_SPLITS)
    whole = bitmap.configurations(problem._replace(layout="neutral"))
    assert {config.split_k for config in whole} == {1}
    assert len(set(found)) == len(found) >= len(whole) >= (1 if dtype == torch.float32 else 2)


@given(
    st.integers(1, 5),
    st.one_of(st.integers(1, 600), st.sampled_from([255, 256, 257, 1024])),
    st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 1 << 32),
)
def test_chunks_give_the_neutral_tensors_back(out_features, in_features, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(out_features, in_features, generator=generator) < density
    dense = torch.randn(out_features, in_features, generator=generator).to(dtype) * kept
    neutral = list(bitmap_format.pack(dense))
    spec = BitmapSpec(len(neutral[0]), in_features, out_features)
    layout = layouts.get(spec.op, "chunked")
    weight = layout.from_neutral(neutral, spec, dtype)
    for tensor, held in zip(weight, layout.tensors(spec).values(), strict=True):
        assert tuple(tensor.shape) == held.shape
        assert tensor.dtype == (dtype if held.dtype == layouts.COMPUTE else held.dtype)
    before = (dense != 0).flatten().cumsum(0) - (dense != 0).flatten().long()
    assert torch.equal(weight[2].long(), before.view(out_features, in_features)[:, :: bitmap.CHUNK])
    for tensor, expected in zip(layout.to_neutral(weight, spec), neutral, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert torch.equal(layout.to_dense(weight, spec, dtype), dense)


def test_chunks_need_a_gpu_and_numbers_that_int32_holds():
    supports = layouts.get("bitmap_linear", "chunked").supports
    assert supports(BitmapSpec(9, 64, 8), torch.float16, torch.device("cpu")) == "needs a CUDA device, not cpu"
    spec = BitmapSpec(1 << 31, 1 << 16, 1 << 16)
    expected = "needs at most 2147483647 non-zeros, not 2147483648"
    assert supports(spec, torch.float16, torch.device("cpu")) == expected


@given(
    st.sampled_from(["none", "rows", "nm", "bitmap"]),
    st.integers(1, 1024),
    st.integers(0, 1 << 20),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([*DEVICES.values(), Device("cpu")]),
    st.sampled_from([1, 3, 32, 1024]),
)
def test_low_rank_configurations_fit_their_kernel(kind, rank, tokens, dtype, device, parts):
    """Sides that are powers of two, and a tile of the whole rank where t is computed inside, of one part's alone."""
    n, m = (2, 4) if kind == "nm" else (1, 1)
    sizes = (768, 3072, parts)
    spec = LowRankSparseSpec(rank, kind, n, m, 9, *sizes) if kind != "none" else LowRankSpec(rank, *sizes)
    found = low_rank.configurations(select.Problem("neutral", device, dtype, spec, tokens, "none"))
    for config in found:
        for side in config[:4]:
            assert side >= 16 and side & (side - 1) == 0
        assert not config.inside or rank <= config.block_r <= 128
        assert not config.inside or parts == 1 or (kind != "rows" and 3072 // parts % config.block_m == 0)
        assert config.block_n < 2 * max(16, tokens)
    mixed = parts > 1 and (kind == "rows" or parts > 3)
    assert found[0].inside is (rank <= 64 and tokens <= 64 and not mixed)
    assert (1 if dtype == torch.float32 else 5) <= len(set(found)) == len(found) <= 16
