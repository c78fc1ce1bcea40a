"""Every peer on every shape and token count, the most telling first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from sparsebert.bench import timing
from sparsebert.bench.jobs import Job, first_line
from sparsebert.bench.linear import dense, library, own, shapes, stand_ins
from sparsebert.bench.linear.cases import Built, Call, Case, Peer, relative_error, spoil
from sparsebert.bench.linear.shapes import Shape

# Variants of one peer that are measured in full.
MOST_VARIANTS = 3
# No algorithm is called so.
ANCHOR = "anchor"

# Token counts by what they tell. At many the arithmetic decides, at few the bytes; the answer changes between.
TELLING, FEW, MIDDLE = (2048, 8192, 128), (32,), (512,)
PRIMARY = ("cublas_fp16", "cublas_fp16_fused", "cusparselt_fp16", "torch_fp32")
# What the int8 2:4 kernel is held against.
RIVALS = ("cublas_bf16", "cusparselt_int8_scaled")
CUDA = ("*/cuda/*",)
# The kernels that a GPU holds by default, of the formats that differ most.
LEADING = ("*/neutral/triton/fp16", "*/chunked/triton/fp16", "*/padded/triton/fp16", "*/grouped/triton/fp16")


def every_peer(device: torch.device, *, dry: bool = False) -> tuple[Peer, ...]:
    """All peers of a device; of a GPU for a dry run, which walks them on a CPU."""
    if device.type == "cpu" and not dry:
        return (*dense.peers(torch.float32), *own.peers(torch.float32, on_gpu=False))
    dtypes = (torch.float16, torch.bfloat16)
    return (
        *itertools.chain(*(dense.peers(dtype, dry=dry) for dtype in dtypes)),
        *library.peers(dry=dry),
        *itertools.chain(*(own.peers(dtype, on_gpu=True) for dtype in dtypes)),
        *own.CHAINED,
    )


def jobs(
    device: torch.device,
    *,
    models: Sequence[str] = ("base", "large", "minilm"),
    tokens: Sequence[int] | None = None,
    peers: Sequence[str] | None = None,
    dry: bool = False,
    budget_s: float = 0.12,
    ceilings: Mapping[str, float] | None = None,
) -> list[Job]:
    """The work list of the sweep: each peer whose name matches a glob of ``peers``, at every shape of ``models``, every
    count of ``tokens`` (rows of x) and every activation that the peer has there.

    In the order in which a short run tells most: dense against 2:4 in fp16 on the feed-forward layers at the counts
    where the answer changes; then this package's kernels, first where tokens are few; then what else torch has; then
    the attention shapes and the other counts; what has to be compiled for seconds comes last. ``budget_s`` is the time
    for the samples of one measurement. ``ceilings`` (see ``ceilings.of``) give each row its roofline. ``dry`` walks
    every peer at toy sizes on a CPU; what needs CUDA there is computed by stand-ins and not timed.

    ``ValueError`` where a model is unknown, or nothing matches ``peers``.
    """
    found = _matching(every_peer(device, dry=dry), peers)
    order = _order(_blocks(models, tokens, found, dry))
    runner = _Runner(device, dry, budget_s, dict(ceilings or {}))
    listed = []
    for shape, count, activation, peer in order:
        key = f"linear {shape.role}{'+gelu' * (activation == 'gelu')} T={count} {peer.name}"
        row = {
            "kind": "linear",
            "peer": peer.name,
            "group": peer.group,
            "model": shape.model,
            "role": shape.role,
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "tokens": count,
            "activation": activation,
            "dtype": peer.dtype,
            "epilogue": peer.epilogue,
            "rate": peer.rate,
            "compiled": peer.compiled,
            **peer.row,
        }
        listed.append(Job(key, row, partial(runner.measure, shape, count, activation, peer)))
    return listed


def _matching(every: Iterable[Peer], globs: Sequence[str] | None) -> list[Peer]:
    listed = list(every)
    if globs is None:
        return listed
    found = [peer for peer in listed if any(fnmatchcase(peer.name, glob) for glob in globs)]
    if not found:
        names = ", ".join(sorted({peer.name for peer in listed}))
        raise ValueError(f"bench: no peer matches {', '.join(globs)}; there are {names}")
    return found


Block = tuple[Sequence[Shape], Sequence[int], Sequence[Peer]]
Item = tuple[Shape, int, str, Peer]


def _blocks(models: Sequence[str], tokens: Sequence[int] | None, peers: list[Peer], dry: bool) -> list[Block]:
    def named(*globs: str) -> list[Peer]:
        return [peer for peer in quick if any(fnmatchcase(peer.name, glob) for glob in globs)]

    quick, slow = [peer for peer in peers if not peer.compiled], [peer for peer in peers if peer.compiled]
    counts = shapes.DRY_TOKENS if dry and tokens is None else tuple(tokens or shapes.TOKENS)
    everything = shapes.DRY_SHAPES if dry else shapes.of(*models)
    forward = [shape for shape in everything if shape.place in ("ffn_in", "ffn_out")]
    # The large encoders hold the feed-forward layers that the targets are about.
    telling = [shape for shape in forward if shape.model != "minilm"] or forward

    def among(wanted: Sequence[int]) -> list[int]:
        return [count for count in wanted if count in counts]

    return [
        (telling, among(TELLING), named(*PRIMARY)),
        (telling, among(FEW), named(*PRIMARY, *CUDA, *LEADING)),
        (telling, among(TELLING), named(*CUDA, *RIVALS)),
        (telling, among(MIDDLE), named(*PRIMARY, *CUDA, *RIVALS)),
        (telling, among(TELLING), named(*LEADING)),
        (telling, among(TELLING), [peer for peer in quick if peer.group != "own"]),
        (everything, among(TELLING + FEW), named(*PRIMARY, *CUDA)),
        (telling, counts, named(*PRIMARY, *CUDA, *RIVALS, *LEADING)),
        (telling, among((2048, 128)), slow),
        (everything, counts, named(*PRIMARY, *CUDA, *LEADING)),
        (everything, counts, quick),
        (everything, counts, slow),
    ]


def _order(blocks: Iterable[Block]) -> list[Item]:
    """Each item once, where it comes first."""
    found: dict[tuple[str, int, str, str], Item] = {}
    for layers, counts, peers in blocks:
        for count, shape, peer in itertools.product(counts, layers, peers):
            for activation in peer.activations(shape):
                found.setdefault((shape.role, count, activation, peer.name), (shape, count, activation, peer))
    return list(found.values())


class _Runner:
    """Measures items. Beside every peer, in turns with it, runs the *anchor*: torch's linear on dense weights of the
    same dtype. What a machine does to all that runs on it, a clock that falls or a program beside it, is in both."""

    def __init__(self, device: torch.device, dry: bool, budget_s: float, ceilings: dict[str, float]) -> None:
        self.device, self.dry, self.budget_s, self.ceilings = device, dry, budget_s, ceilings
        self.generator = torch.Generator(device).manual_seed(1)
        self.on_gpu = device.type == "cuda"
        self.cache = shapes.DRY_CACHE if dry else timing.l2_bytes(device)

    @torch.no_grad()
    def measure(self, shape: Shape, tokens: int, activation: str, peer: Peer) -> dict[str, Any]:
        """The row's measured fields; a peer that is wrong is not timed."""
        copies_for = partial(timing.rotation_count, l2_bytes=self.cache)
        case = Case(shape, tokens, self.device, self.generator, copies_for, activation, self.dry)
        if peer.needs_cuda and not self.on_gpu:
            if not self.dry:
                raise RuntimeError("needs CUDA")
            with stand_ins.standing_in():
                result = judge(peer.build(case), case)
            if result["status"] == "ok":
                result["status"] = "skipped"
                result["reason"] = "DRY: needs CUDA; its calls were walked with stand-ins and not timed"
            return result
        built = peer.build(case)
        result = judge(built, case)
        if not built.variants:
            return result
        anchor = self._anchor(case, peer)
        result |= self._clock(built, anchor.build(case).variants[""]) | {"anchor": anchor.name}
        result["tflops"] = result["flops"] / result["median_us"] / 1e6
        result["gbps"] = result["bytes"] / result["median_us"] / 1e3
        # Of a configured kernel the row has the one that was fastest.
        configurations = result.pop("configurations", None)
        if configurations is not None:
            result["configuration"] = configurations[result["algorithm"]]
        return result | roofline(result, peer.rate, self.ceilings)

    def _anchor(self, case: Case, peer: Peer) -> Peer:
        """The dense linear that stands beside a peer: in bfloat16 where that is all it takes or gives."""
        if case.device.type == "cpu" and not case.dry:
            return dense.peers(torch.float32)[0]
        bfloat16 = "bfloat16" in peer.dtype or peer.name.endswith("bf16")
        return dense.peers(torch.bfloat16 if bfloat16 else torch.float16, dry=case.dry)[0]

    def _clock(self, built: Built, anchor: list[Call]) -> dict[str, Any]:
        """Times of what passed, in turns with the anchor's: weights out of the cache, and for comparison one weight
        again and again."""
        result: dict[str, Any] = {}

        def together(calls: dict[str, Any], budget_s: float) -> dict[str, timing.Timing]:
            graph = self.on_gpu and "graph_refused" not in result
            try:
                return timing.measure_together(calls, device=self.device, budget_s=budget_s, graph=graph)
            except RuntimeError as error:
                if not graph:
                    raise
                torch.cuda.synchronize()
                result["graph_refused"] = first_line(error)
                return timing.measure_together(calls, device=self.device, budget_s=budget_s)

        timings: dict[str, timing.Timing] = {}
        chosen = list(built.variants)
        if len(chosen) > MOST_VARIANTS:
            # A first, short round; the fastest of it are measured in full.
            timings = together(built.variants, self.budget_s / 12 * len(chosen))
            chosen = sorted(chosen, key=lambda name: timings[name].median_us)[:MOST_VARIANTS]
        calls: dict[str, Any] = {ANCHOR: anchor}
        for name in chosen:
            rotated = built.variants[name]
            calls[name] = rotated
            if self.cache:
                calls[f"{name} resident"] = [rotated[0]] * len(rotated)
        timings |= together(calls, self.budget_s / 3 * len(calls))
        best = min(chosen, key=lambda name: timings[name].median_us)
        if self.cache:
            result["resident_us"] = timings[f"{best} resident"].median_us
        return {
            **result,
            **timings[best].to_dict(),
            "anchor_us": timings[ANCHOR].median_us,
            "copies": len(built.variants[best]),
            "algorithm": best,
            "variants_us": {name: timings[name].median_us for name in built.variants},
        }


def judge(built: Built, case: Case) -> dict[str, Any]:
    """Errors of every variant against the float64 reference, on memory that was spoilt first; a variant that is wrong
    or refuses is dropped from ``built``. The result's status is ``wrong`` where none is left."""
    reference = built.reference()
    errors: dict[str, float] = {}
    refusals: dict[str, str] = {}
    for name, calls in list(built.variants.items()):
        try:
            spoil(calls[0])
            y = calls[0]()[: case.tokens]
        except RuntimeError as error:
            refusals[name] = first_line(error)
            del built.variants[name]
            if not built.variants and not errors:
                raise
            continue
        errors[name] = relative_error(y, reference)
        del y
        if not errors[name] <= built.limit:
            del built.variants[name]
    worst = max(errors[name] for name in built.variants or errors)
    result: dict[str, Any] = {
        "status": "ok",
        "error": worst,
        "error_limit": built.limit,
        "reference": "float64",
        "flops": case.flops,
        "operations": case.flops if built.operations is None else built.operations,
        "bytes": built.moved_bytes,
        "weight_bytes": built.weight_bytes,
        **built.notes,
    }
    if not built.variants:
        result["status"] = "wrong"
        result["reason"] = f"error {worst:.3g} is over the limit {built.limit:.3g}"
    elif len(built.variants) < len(errors) + len(refusals):
        faults = {name: f"error {error:.3g}" for name, error in errors.items()} | refusals
        result["dropped"] = {name: fault for name, fault in faults.items() if name not in built.variants}
    return result


def roofline(result: Mapping[str, Any], rate: str, ceilings: Mapping[str, float]) -> dict[str, float | None]:
    """Microseconds that a row's bytes take at the measured copy bandwidth and its operations at the measured matrix
    rate, the larger of them, and the part of the time that it is; None where a ceiling is missing.

    ``bytes_us = bytes / GB/s / 1e3``, ``operations_us = operations / TFLOP/s / 1e6``, ``floor_us`` their maximum,
    ``reached = floor_us / median_us``. ``operations`` are those that the format needs: at 2:4 half of the dense ones.
    """
    bandwidth, tflops = ceilings.get("copy"), ceilings.get(rate)
    bytes_us = result["bytes"] / bandwidth / 1e3 if bandwidth else None
    operations_us = result["operations"] / tflops / 1e6 if tflops else None
    floor = max(bytes_us, operations_us) if bytes_us is not None and operations_us is not None else None
    return {
        "bytes_us": bytes_us,
        "operations_us": operations_us,
        "floor_us": floor,
        "reached": None if floor is None else floor / result["median_us"],
    }
