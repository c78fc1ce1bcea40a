"""Which configurations of a kernel a device can run: by what divides, and by the shared memory it has.

Each kernel has an estimate, from the sizes of a problem alone, and others about it for ``sb.tune`` to measure. None is
in the list that needs more shared memory than there is; which spill registers is in ``docs/triton.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from sparsebert.ops.select import Problem

if TYPE_CHECKING:
    from sparsebert.kernels.tiles import Config

# What is assumed of a device that does not say: the multiprocessors of an H100, and of the GPUs from sm_80 on the least
# shared memory of a block.
_SMS = 132
_SHARED_BYTES = 99 << 10
# The narrowest tile of the tensor cores as Triton has it, and the widest number of splits.
LEAST_SIDE = 16
MOST_SPLITS = 16

Configuration = TypeVar("Configuration", bound="Any")


def sms(problem: Problem) -> int:
    return problem.device.sms or _SMS


def columns(tokens: int, most: int) -> int:
    """The fewest columns of a tile that hold all tokens, at most ``most``."""
    return min(most, max(LEAST_SIDE, power_of_two(max(1, tokens))))


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def split_of(tiles: int, steps: int, multiprocessors: int, most: int = 8) -> int:
    """How many programs share the ``steps`` of a tile along the inner dimension, a power of two: as many as fill the
    device and leave each two steps at least."""
    split = 1
    while 2 * split <= most and 2 * split * tiles <= multiprocessors and 4 * split <= steps:
        split *= 2
    return split


def shared_bytes(config: Any, *, weight_bytes: float, dense_bytes: int, x_bytes: int) -> int:
    """An upper bound on a block's shared memory: the tiles in flight, one of W once more as it is multiplied, and in
    their place the sums as they are written. ``weight_bytes`` of an element as it lies in memory, ``dense_bytes`` and
    ``x_bytes`` as they are multiplied.
    """
    tile = config.block_m * config.block_k
    in_flight = config.num_stages * (tile * weight_bytes + config.block_n * config.block_k * x_bytes)
    return int(max(in_flight + tile * dense_bytes, config.block_m * config.block_n * 4))


def fitting(
    problem: Problem, found: Iterator[Configuration], shared: Callable[[Configuration], int]
) -> tuple[Configuration, ...]:
    """Those of ``found`` that the device of ``problem`` has the shared memory for, each once; the first whatever it
    needs."""
    limit = problem.device.shared_bytes or _SHARED_BYTES
    first, *others = dict.fromkeys(found)
    return (first, *(config for config in others if shared(config) <= limit))


def around(
    problem: Problem,
    block_m: int,
    block_n: int,
    block_k: int,
    *,
    itemsize: int,
    wide: bool = False,
    full: bool = False,
    splits: int = MOST_SPLITS,
) -> Iterator[Config]:
    """The estimate, in tiles of these sides, then others: twice the inputs a step, half the features or twice them,
    half the tokens; with fewer and more splits, and fewer and more steps in flight.

    ``itemsize``: of the elements that are multiplied. ``wide``: unpacking takes registers beyond the tile itself;
    ``full``: nearly all, so that only splits are varied, as they are for fp32. ``splits``: how many programs at most
    can share the inputs of a tile.
    """
    from sparsebert.kernels.tiles import Config

    sides, stages = [(block_m, block_n, block_k)], [3]
    if not full and itemsize < 4:
        sides += [(block_m, block_n, 2 * block_k), (192 - block_m, block_n, block_k)]
        sides += [(block_m, block_n // 2, block_k)] if block_n > 32 else []
        stages += [2, 5]
    for m, n, k in sides:
        tiles = -(-problem.out_features // m) * -(-max(1, problem.tokens) // n)
        steps = -(-problem.in_features // k)
        split = split_of(tiles, steps, sms(problem), min(8, splits))
        # Four warps would spill.
        num_warps = 8 if wide or full or m * n > 64 * 64 or m * k * itemsize > 64 * 256 else 4
        for split_k in dict.fromkeys((split, max(1, split // 2), min(MOST_SPLITS, 2 * split))):
            if split_k > 1 and (split_k > splits or 2 * split_k > steps):
                continue
            for num_stages in stages:
                yield Config(m, n, k, split_k, num_warps, num_stages)
