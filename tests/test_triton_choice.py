"""Which problems the Triton kernels serve, and with which configurations, where no kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_cases import DEVICES
from sparsebert.ops import select
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec
from sparsebert.ops.triton import int8, low_rank, nm, support
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
    ("version", "reason"), [("3.5.1", "needs Triton 3.6, found 3.5.1"), ("3.6.0", None), ("4.0", None)]
)
def test_older_versions_are_refused(monkeypatch, version, reason):
    support._missing.cache_clear()
    monkeypatch.setattr(support.metadata, "version", lambda name: version)
    assert support._missing() == reason
    monkeypatch.undo()
    support._missing.cache_clear()


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
        found += nm.configurations(problem._replace(spec=NMSpec(n, m, in_features, out_features)))
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
    assert len(set(found)) > 3


@given(
    st.sampled_from(["none", "rows", "nm", "bitmap"]),
    st.integers(1, 1024),
    st.integers(0, 1 << 20),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([*DEVICES.values(), Device("cpu")]),
)
def test_low_rank_configurations_fit_their_kernel(kind, rank, tokens, dtype, device):
    """Sides that are powers of two, and a tile of the whole rank where t is computed inside."""
    n, m = (2, 4) if kind == "nm" else (1, 1)
    spec = LowRankSparseSpec(rank, kind, n, m, 9, 768, 3072) if kind != "none" else LowRankSpec(rank, 768, 3072)
    found = low_rank.configurations(select.Problem("neutral", device, dtype, spec, tokens, "none"))
    for config in found:
        for side in config[:4]:
            assert side >= 16 and side & (side - 1) == 0
        assert not config.inside or rank <= config.block_r <= 128
        assert config.block_n < 2 * max(16, tokens)
    assert found[0].inside is (rank <= 64 and tokens <= 64)
    assert 5 <= len(set(found)) == len(found) <= 16
