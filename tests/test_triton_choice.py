"""Which problems the Triton kernels serve, and with which configurations, where no kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.ops import select, triton
from sparsebert.ops.specs import Int8Spec, NMSpec

NM = NMSpec(2, 4, 768, 3072)
BASE = select.Problem("neutral", "cuda", (9, 0), torch.float16, NM, 32, "gelu")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.float32}, None),
        ({"capability": (8, 0)}, None),
        ({"capability": (12, 0)}, None),
        ({"dtype": torch.float64}, "needs float16, bfloat16, float32, not float64"),
        ({"capability": (7, 5)}, "needs compute capability 8.0, found 7.5"),
        ({"device_type": "cpu", "capability": None}, "needs a CUDA device, not cpu"),
        ({"device_type": "xpu", "capability": None}, "needs a CUDA device, not xpu"),
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
    triton._missing.cache_clear()
    monkeypatch.setattr(triton.metadata, "version", lambda name: version)
    assert triton._missing() == reason
    monkeypatch.undo()
    triton._missing.cache_clear()


@given(
    st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 8), (5, 8), (1, 16), (15, 16)]),
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.integers(1, 1 << 20),
    st.sampled_from([2, 4]),
    st.integers(1, 256),
)
def test_estimates_fit_their_kernel(pattern, in_features, out_features, tokens, itemsize, sms):
    """Sides that are powers of two, tiles of whole bytes of positions, splits that leave each a step."""
    n, m = pattern
    found = [(m, triton.nm_config(n, m, in_features, out_features, tokens, itemsize, sms))]
    found += [(m, triton.int8_config(in_features, out_features, tokens, sms))]
    for group, config in found:
        for side in config[:3]:
            assert side >= 16 and side & (side - 1) == 0
        assert config.block_k % group == 0
        # A power of two of slots is read in whole bytes.
        slots = config.block_k // group * n
        assert n & (n - 1) or slots * (2 if group <= 4 else 4) % 8 == 0
        tiles = -(-out_features // config.block_m) * -(-tokens // config.block_n)
        steps = -(-in_features // config.block_k)
        assert config.split_k == 1 or (config.split_k * tiles <= sms and 2 * config.split_k <= steps)
        assert config.block_n < 2 * max(16, tokens)
