"""Projections are nearest members: against all members of small sets, by hand, and projected twice."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.configs import BitmapConfig, NMConfig
from sparsebert.formats import int8, nm, one_shot
from sparsebert.formats.common import largest_in_groups
from sparsebert.methods.maths.projections import Block, Dictionary, Int8Grid, Largest, Projection, Scaled, on_grid

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def values(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(projection: Projection, v: Tensor) -> float:
    return float((v.double() - projection(v).double()).square().sum())


def test_n_of_m_keeps_the_largest_of_each_group():
    v = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, -1.0, 1.0, 1.0]])
    assert Largest(NMConfig(2, 4))(v).tolist() == [[0.0, -3.0, 2.0, 0.0, 0.0, -1.0, 1.0, 0.0]]
    assert Largest(BitmapConfig(0.25))(v).tolist() == [[0.0, -3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_blocks_keep_the_largest_of_each_tile_wherever_they_lie():
    v = torch.tensor([[1.0, 5.0, 0.0, 1.0], [2.0, 3.0, 1.0, 1.0]])
    # Tiles: 1 5 2 3 -> 5 and 3; 0 1 1 1 -> three equals, the first two of them.
    assert Block(2, 2, 2)(v).tolist() == [[0.0, 5.0, 0.0, 1.0], [0.0, 3.0, 1.0, 0.0]]


def test_dictionary_takes_the_most_frequent_shapes_and_each_tile_the_best_of_them():
    # Tiles of 1 x 3, k = 1: places 0, 0, 1, 1, 1, 2. Two patterns: place 1 (three times), then place 0 (twice).
    v = torch.tensor([[9.0, 1.0, 2.0, 7.0, 0.0, 1.0, 1.0, 4.0, 2.0], [0.0, 6.0, 1.0, 1.0, 5.0, 0.0, 2.0, 1.0, 8.0]])
    found = Dictionary(1, 3, 1, size=2).fit([v])
    assert found.patterns.tolist() == [[False, True, False], [True, False, False]]
    # The last tile, 2 1 8, has to keep its 2: there is no pattern for the 8.
    assert found(v).tolist() == [
        [9.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 4.0, 0.0],
        [0.0, 6.0, 0.0, 0.0, 5.0, 0.0, 2.0, 0.0, 0.0],
    ]


def test_dictionary_counts_over_all_layers_and_breaks_ties_by_the_pattern():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    assert Dictionary(1, 2, 1, size=1).fit([a, b]).patterns.tolist() == [[True, False]]
    assert Dictionary(1, 2, 1, size=1).fit([a, b, b[:1]]).patterns.tolist() == [[False, True]]


def test_a_full_dictionary_is_block():
    v = values(8, 12)
    full = Dictionary(2, 2, 2, size=6).fit([v])
    assert len(full.patterns) == 6 and torch.equal(full.mask(v), Block(2, 2, 2).mask(v))


def test_the_columns_are_chosen_as_packing_chooses_them():
    config, v = NMConfig(2, 4, columns=0.5), values(3, 16)
    mask = Largest(config).mask(v)
    assert torch.equal(mask, one_shot.magnitude_mask(v, config)) and int(mask.any(0).sum()) <= 8


def all_masks(projection) -> list[Tensor]:
    """Every mask of one 2 x 4 matrix that the set allows."""
    masks = [torch.tensor(bits).view(2, 4) for bits in product((False, True), repeat=8)]
    if isinstance(projection, Largest) and isinstance(projection.config, NMConfig):
        return [m for m in masks if (m.view(-1, projection.config.m).sum(-1) == projection.config.n).all()]
    if isinstance(projection, Largest):
        return [m for m in masks if m.sum() == round(8 * projection.config.density)]
    p, q = projection.p, projection.q
    tiles = lambda m: m.view(2 // p, p, 4 // q, q).transpose(1, 2).reshape(-1, p * q)  # noqa: E731
    allowed = [m for m in masks if (tiles(m).sum(-1) == projection.k).all()]
    if isinstance(projection, Dictionary):
        patterns = {tuple(row) for row in projection.patterns.tolist()}
        allowed = [m for m in allowed if all(tuple(tile) in patterns for tile in tiles(m).tolist())]
    return allowed


PATTERNS = [
    Largest(NMConfig(2, 4)),
    Largest(NMConfig(1, 2)),
    Largest(NMConfig(3, 4)),
    Largest(BitmapConfig(0.375)),
    Block(2, 2, 1),
    Block(2, 4, 3),
    Block(1, 4, 2),
    Dictionary(2, 2, 2, size=3).fit([values(20, 20)]),
    Dictionary(2, 4, 3, size=5).fit([values(20, 20)]),
]


@pytest.mark.parametrize("projection", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_patterns_are_nearest_among_all_masks(projection, seed):
    v = values(2, 4, seed, torch.float64)
    nearest = min(float((v * ~mask).square().sum()) for mask in all_masks(projection))
    assert distance(projection, v) == pytest.approx(nearest, abs=1e-12)
    assert any(torch.equal(projection.mask(v), mask) for mask in all_masks(projection))


@pytest.mark.parametrize("projection", [*PATTERNS, Int8Grid(), Int8Grid(Largest(NMConfig(2, 4)))], ids=str)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_projecting_twice_changes_nothing(projection, data):
    number = st.floats(-100, 100, width=16)
    v = torch.tensor(data.draw(st.lists(st.lists(number, min_size=8, max_size=8), min_size=4, max_size=4)))
    v = v.to(data.draw(st.sampled_from(FLOATS)))
    before, once = v.clone(), projection(v)
    assert torch.equal(v, before) and once.dtype == v.dtype
    assert torch.equal(projection(once), once)


# int8


def packed(weight: Tensor) -> Tensor:
    return int8.dequantize(*int8.quantize_weight(weight), dtype=weight.dtype)


def test_grid_by_hand():
    # a = 1 at first: q = 127, 50, -2, 0 (0.5 rounds to even). <v, q> = 16129 + 2520 + 4 and <q, q> = 16129 + 2500 + 4,
    # so a = 18653 / 18633 = 1.00107: 50.4 / a = 50.35, -2 / a, 0.5 / a and 127 / a = 126.86 give the same q.
    v = torch.tensor([[127.0, 50.4, -2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    found = Int8Grid()(v)
    a = 18653 / 18633
    torch.testing.assert_close(found[0], torch.tensor([127 * a, 50 * a, -2 * a, 0.0]), rtol=1e-6, atol=0)
    assert found[1].tolist() == [0.0] * 4
    assert distance(Int8Grid(), v) < float((v - packed(v)).square().sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_members_of_the_grid_pack_without_a_change(dtype, columns):
    spread = torch.exp(2 * values(1500, 1, seed=1))
    v = (values(1500, columns, seed=2) * spread).to(dtype)
    for member in (Int8Grid()(v), on_grid(v)):
        assert torch.equal(packed(member), member)
        assert not torch.signbit(member[member == 0]).any()
    zeros = torch.zeros(1, columns, dtype=dtype)
    assert torch.equal(Int8Grid()(zeros), zeros)


def test_alternating_is_never_further_than_rounding_and_reaches_127():
    v = values(500, 6, seed=3)
    members = Int8Grid()(v)
    ours, rounded = ((v - w).double().square().sum(-1) for w in (members, packed(v)))
    # A step of the grid is 2**-8 of the row, the rounding of its floats 2**-23: 2**-14 of what is compared, squared.
    assert (ours <= rounded * (1 + 2**-13)).all() and ours.sum() < 0.95 * rounded.sum()
    assert (int8.quantize_weight(members)[0].abs().amax(-1) == 127).all()


def test_grid_is_near_the_best_scale_of_a_search():
    v = values(20, 8, seed=4).double()
    amax = v.abs().amax(-1)
    scales = amax[:, None] / torch.linspace(126.501, 140, 4001, dtype=torch.float64)
    q = (v[:, None] / scales[..., None]).round().clamp(-127, 127)
    best = (v[:, None] - q * scales[..., None]).square().sum(-1).amin(-1)
    found = (v - Int8Grid(iterations=10)(v)).square().sum(-1)
    # A local minimum of a function with many: on the average far nearer to the best than rounding is.
    rounded = (v - packed(v)).square().sum(-1)
    assert (found >= best * (1 - 2**-13)).all() and (found - best).mean() < (rounded - best).mean()


def test_joint_members_obey_both():
    v = values(16, 32, seed=5)
    found = Int8Grid(Largest(NMConfig(2, 4)))(v)
    assert nm.find_violation(found, 2, 4) is None and torch.equal(packed(found), found)
    # Survivors alone are rounded: as good as rounding what n:m left.
    left = Largest(NMConfig(2, 4))(v)
    assert (left - found).square().sum() < (left - packed(left)).square().sum()


@pytest.mark.parametrize("scale", [2.0**-120, 1e-45, 1e38])
def test_extreme_rows(scale):
    member = Int8Grid()(torch.tensor([[1.0, -0.3, 0.7]]) * scale)
    assert torch.isfinite(member).all() and torch.equal(packed(member), member)


# what is refused, and the shared groups


@pytest.mark.parametrize("kind", [Block, Dictionary])
def test_tiles_that_keep_nothing_or_all_are_refused(kind):
    for p, q, k in ((2, 2, 0), (2, 2, 4), (0, 2, 1), (2, -1, 1)):
        with pytest.raises(ValueError, match=f"{kind.__name__}: keeps"):
            kind(p, q, k)
    with pytest.raises(TypeError, match=f"{kind.__name__}: q is 2.0, expected an int"):
        kind(2, 2.0, 1)
    assert kind(2, 4, 2).density == 0.25
    assert "tiles of 2 x 4 do not divide" in kind(2, 4, 2).refusal(6, 6)
    assert kind(2, 4, 2).refusal(6, 8) is None


def test_dictionaries_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="call fit"):
        Dictionary(1, 2, 1).mask(values(2, 2))
    with pytest.raises(ValueError, match="at most 32 weights"):
        Dictionary(8, 8, 4)
    with pytest.raises(ValueError, match="size is 0"):
        Dictionary(1, 2, 1, size=0)
    for patterns in (torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2), "x"):
        with pytest.raises(ValueError, match="Dictionary: the patterns are"):
            Dictionary(1, 2, 1, patterns=patterns)


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (2, 4), (3, 4), (5, 8)])
def test_groups_keep_exactly_n_whatever_is_equal(n, m):
    scores = torch.tensor(list(product((0.0, 1.0, -1.0), repeat=m)) if m < 8 else [[1.0] * m, [0.0, 1.0] * (m // 2)])
    scores = torch.cat([scores, torch.full((1, m), torch.inf), torch.full((1, m), -torch.inf)])
    mask = largest_in_groups(scores, n, m)
    assert (mask.sum(-1) == n).all()
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :n]
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(-1, order, True))


def test_not_a_number_is_the_largest():
    for places in combinations(range(4), 2):
        scores = torch.tensor([[3.0, 2.0, 1.0, 4.0]])
        scores[0, list(places)] = torch.nan
        assert largest_in_groups(scores, 2, 4).nonzero()[:, 1].tolist() == list(places)


def test_a_scaled_pattern_is_nearest_in_its_norm():
    """Against every pair of every group of 4, in float64."""
    torch.manual_seed(0)
    values, scale = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.1
    member = Scaled(Largest(NMConfig(2, 4)), scale)(values)
    assert not torch.equal(member, Largest(NMConfig(2, 4))(values))
    for row, found in zip(values, member, strict=True):
        for start in (0, 4):
            part, weights = row[start : start + 4], scale[start : start + 4]
            distances = {}
            for pair in combinations(range(4), 2):
                kept = torch.zeros(4, dtype=torch.float64)
                kept[list(pair)] = part[list(pair)]
                distances[pair] = float(((part - kept) * weights).norm())
            best = min(distances, key=distances.__getitem__)
            assert found[start : start + 4].nonzero().flatten().tolist() == list(best)
            assert torch.equal(found[start : start + 4][list(best)], part[list(best)])
