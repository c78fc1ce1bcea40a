"""``Runner``: a fused model whose encoder is replayed from CUDA graphs, one for each bucket of tokens."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsebert.graphs import CaptureError, Graph, Graphs, Weights
from sparsebert.nn.tokens import Encode, Tokens, encoding_by
from sparsebert.ops import measurements, select
from sparsebert.report import table

_log = logging.getLogger(__name__)

# Up to 256 every multiple of 64, a kernel's tile; from there on four steps a doubling, so that at most a fifth of what
# a graph computes is padding.
BUCKETS = (64, 128, 192, *(step * 2**k for k in range(6, 12) for step in (4, 5, 6, 7)), 16384)


@dataclass(frozen=True)
class GraphReport:
    """One graph: it runs up to ``tokens`` tokens of up to ``sequences`` sequences. ``bytes``: its inputs, and what its
    capture took beyond the memory of earlier ones. ``seconds``: warm-up and capture."""

    encoder: str
    device: str
    tokens: int
    sequences: int
    calls: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class RunnerReport:
    """What a ``Runner`` holds and has done. ``graphs``: those held, the least recently used first. ``fallbacks``: by
    reason how often an encoder ran without a graph. Since the runner was made: ``calls`` of graphs, the ``tokens`` they
    were given, the ``computed`` rows, how many graphs were ``captured``, ``evicted`` for others, and ``outdated``
    because the encoder got other weights."""

    graphs: tuple[GraphReport, ...]
    fallbacks: Mapping[str, int]
    calls: int
    tokens: int
    computed: int
    captured: int
    evicted: int
    outdated: int

    @property
    def padding(self) -> float:
        """The share of the computed rows that belonged to no token."""
        return 1 - self.tokens / self.computed if self.computed else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fallbacks": dict(self.fallbacks), "padding": self.padding}

    def __str__(self) -> str:
        rows = [
            [
                graph.encoder,
                graph.device,
                str(graph.tokens),
                str(graph.sequences),
                str(graph.calls),
                f"{graph.bytes / 1e6:.2f} MB",
                f"{graph.seconds:.2f} s",
            ]
            for graph in self.graphs
        ]
        lines = [
            f"{self.calls} calls of graphs, {100 * self.padding:.1f} % of the rows were padding",
            f"{self.captured} graphs captured, {self.evicted} evicted, {self.outdated} outdated by other weights",
        ]
        if rows:
            lines.append(table(["encoder", "device", "tokens", "sequences", "calls", "memory", "capture"], rows))
        lines += [f"without a graph, {count} times: {reason}" for reason, count in self.fallbacks.items()]
        return "\n".join(lines)

    __repr__ = __str__


class Runner:
    """``runner(**inputs)`` is ``model(**inputs)`` in inference mode, with its fused encoder replayed from CUDA graphs.

    A graph is captured when the first batch of its bucket comes, or by ``warm_up``. ``buckets`` are counts of tokens,
    by default ``BUCKETS``: a batch runs in the smallest that holds all its tokens, and in the power of two that holds
    its sequences. At most ``max_graphs`` are held; the least recently used goes first. Where there can be no graph the
    encoder runs without, and ``report()`` says how often and why.

    Threads and streams may share a runner: they take turns on the device. A graph holds the memory of the weights that
    it was captured with; when the encoder has others it is captured anew. All that an encoder computes with has to be
    among its parameters and buffers. ``ValueError`` where nothing in ``model`` is fused.
    """

    # What captures; tests without a CUDA device put another in its place.
    _graphs: type[Graphs] = Graphs

    def __init__(self, model: nn.Module, *, buckets: Iterable[int] | None = None, max_graphs: int = 32) -> None:
        self._encoders = {
            module: path or type(module).__name__
            for path, module in model.named_modules()
            if getattr(module, "sparsebert_fused", False)
        }
        if not self._encoders:
            raise ValueError(f"Runner: {type(model).__name__} is not fused; call sparsebert.fuse_(model) first")
        self.model = model
        self.buckets = BUCKETS if buckets is None else tuple(sorted({_count("buckets", size) for size in buckets}))
        if not self.buckets:
            raise ValueError("Runner: buckets is empty, expected at least one count of tokens")
        self.max_graphs = _count("max_graphs", max_graphs)
        # Held from where the tokens are copied in until the output is copied out, and for every field below.
        self._lock = threading.Lock()
        self._devices: dict[torch.device, Graphs] = {}
        self._held: OrderedDict[_Key, _Captured] = OrderedDict()
        self._weights: dict[nn.Module, Weights] = {}
        self._failed: dict[_Key, str] = {}
        self._fallbacks: dict[str, int] = {}
        self._calls = self._tokens = self._computed = self._captures = self._evicted = self._outdated = 0

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """What ``model`` returns; ``ValueError`` while it is in training mode."""
        self._refuse_training(self.model)
        with torch.inference_mode(), encoding_by(self._encode):
            return self.model(*args, **inputs)

    def warm_up(self, tokens: Sequence[int], sequences: Sequence[int] = (1,)) -> RunnerReport:
        """Captures the graphs of batches with a count of ``tokens`` in a count of ``sequences``, for each of the two
        and every fused encoder; pairs that no batch can have are left out.

        ``ValueError`` where a count is not positive or above the largest bucket, where no pair is left, and where there
        are more graphs than ``max_graphs``.
        """
        self._refuse_training(self.model)
        largest = self.buckets[-1]
        for count in tokens:
            if _count("tokens", count) > largest:
                raise ValueError(f"Runner: tokens holds {count}, expected at most the largest bucket, {largest}")
        asked = [(count, _count("sequences", s)) for count in tokens for s in sequences]
        # The largest first: what it takes is enough for the others.
        batches = {
            encoder: sorted(
                {
                    (self._bucket(count), _power_of_two(s)): (count, s)
                    for count, s in asked
                    if s <= count <= s * _max_length(encoder, count)
                }.values(),
                reverse=True,
            )
            for encoder in self._encoders
        }
        total = sum(map(len, batches.values()))
        if not total or total > self.max_graphs:
            raise ValueError(
                f"Runner: tokens {list(tokens)} in sequences {list(sequences)} come to {total} graphs, "
                f"expected 1 to {self.max_graphs}, which is max_graphs"
            )
        for encoder, counts in batches.items():
            device = next(encoder.parameters()).device
            ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
            # One token through the encoder shows what it does with tokens.
            with torch.inference_mode(), encoding_by(partial(self._warm_up, counts)):
                encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
        return self.report()

    def report(self) -> RunnerReport:
        """The graphs held, what they were used for, and why others are not there."""
        with self._lock:
            graphs = tuple(
                GraphReport(
                    self._encoders.get(key.encoder, type(key.encoder).__name__),
                    str(key.device),
                    key.tokens,
                    key.sequences,
                    captured.calls,
                    captured.bytes,
                    captured.seconds,
                )
                for key, captured in self._held.items()
            )
            return RunnerReport(
                graphs,
                dict(self._fallbacks),
                self._calls,
                self._tokens,
                self._computed,
                self._captures,
                self._evicted,
                self._outdated,
            )

    def reset(self) -> None:
        """Lets go of every graph and of the weights they hold, and forgets which could not be captured. The counts of
        ``report()`` go on."""
        with self._lock:
            for graphs in self._devices.values():
                graphs.finish()
            self._held.clear()
            self._weights.clear()
            self._failed.clear()

    def _encode(self, encoder: nn.Module, run: Encode, tokens: Tokens, *, count: int = 1) -> Tensor:
        """``run(tokens)``, from a graph where there can be one. ``count``: 0 where no user's call is behind it."""
        if torch.compiler.is_compiling():
            # What is traced runs later, without this object.
            return run(tokens)
        self._refuse_training(encoder)
        reason = self._refusal(encoder, tokens)
        if reason is not None:
            self._note(reason, count)
            return run(tokens)
        key = self._key(encoder, tokens)
        with self._lock:
            reason = self._failed.get(key)
            if reason is None:
                try:
                    return self._replay(key, run, tokens, count)
                except CaptureError as error:
                    reason = f"capture failed at {key.tokens} tokens, {key.sequences} sequences: {error}"
        # Where this raises too, it was not the capture that failed, and the next batch may be a better one.
        output = run(tokens)
        self._note(reason, count, failed=key)
        return output

    def _warm_up(self, counts: list[tuple[int, int]], encoder: nn.Module, run: Encode, tokens: Tokens) -> Tensor:
        """Runs made-up tokens of each of ``counts``, then what was asked for."""
        for total, sequences in counts:
            ids = torch.zeros(total, dtype=torch.int64, device=tokens.input_ids.device)
            ends = torch.arange(sequences + 1, device=ids.device) * total // sequences
            types = None if tokens.token_type_ids is None else ids
            made_up = Tokens(ids, ids, types, ends.to(torch.int32), -(-total // sequences))
            self._encode(encoder, run, made_up, count=0)
        return run(tokens)

    def _refusal(self, encoder: nn.Module, tokens: Tokens) -> str | None:
        """None, or why these tokens run without a graph, whatever was captured before."""
        total = len(tokens.input_ids)
        device = tokens.input_ids.device
        if (reason := self._graphs.refusal(device)) is not None:
            return reason
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if torch.is_autocast_enabled(device.type):
            # A weight that it casts during a capture would stay in its cache, in memory that nothing has filled.
            return "autocast is enabled"
        if total > self.buckets[-1]:
            return f"more tokens than the largest bucket, {self.buckets[-1]}"
        if min(total, tokens.max_length) > _max_length(encoder, self._bucket(total)):
            return "sequences may be longer than config.max_position_embeddings"
        return None

    def _replay(self, key: _Key, run: Encode, tokens: Tokens, count: int) -> Tensor:
        """The output for ``tokens``; ``CaptureError`` where there is no graph and none can be made."""
        total = len(tokens.input_ids)
        while True:
            captured = self._held.get(key) or self._capture(key, run, tokens)
            self._held.move_to_end(key)
            with self._devices[key.device].turn(*captured.arena.tensors):
                captured.arena.fill(tokens)
                captured.graph.replay()
                # The arena and the graph's output belong to the next call.
                output = captured.graph.output[:total].clone()
            # Now, while the device is busy: the weights that the graph reads are held, whether or not they are still
            # the encoder's.
            if not self._weights[key.encoder].changed():
                break
            self._outdate(key.encoder)
        captured.calls += count
        self._calls += count
        self._tokens += count * total
        self._computed += count * key.tokens
        return output

    def _capture(self, key: _Key, run: Encode, tokens: Tokens) -> _Captured:
        """A new graph for ``key``, held in the place of the least recently used."""
        if key.encoder in self._weights and self._weights[key.encoder].changed():
            self._outdate(key.encoder)
        while len(self._held) >= self.max_graphs:
            if not self._evicted:
                _log.info("Runner: batches come in more than max_graphs=%d buckets", self.max_graphs)
            self._held.popitem(last=False)
            self._evicted += 1
        if key.device not in self._devices:
            self._devices[key.device] = self._graphs(key.device)
        graphs = self._devices[key.device]
        started = time.perf_counter()
        arena = _Arena(key, _max_length(key.encoder, key.tokens))
        with graphs.turn(*arena.tensors):
            # Real tokens, so that what is compiled or chosen on the way sees what it is for.
            arena.fill(tokens)
            graph = graphs.capture(partial(run, arena.tokens))
        captured = _Captured(graph, arena, time.perf_counter() - started)
        # After the calls, which may be what made the encoder's weights ready.
        if key.encoder not in self._weights:
            self._weights[key.encoder] = Weights(key.encoder)
        self._held[key] = captured
        self._captures += 1
        return captured

    def _outdate(self, encoder: nn.Module) -> None:
        """Lets go of the graphs of ``encoder``, and of the weights that they read."""
        for graphs in self._devices.values():
            graphs.finish()
        for key in [key for key in self._held if key.encoder is encoder]:
            del self._held[key]
            self._outdated += 1
        for key in [key for key in self._failed if key.encoder is encoder]:
            del self._failed[key]
        del self._weights[encoder]

    def _key(self, encoder: nn.Module, tokens: Tokens) -> _Key:
        return _Key(
            encoder,
            self._bucket(len(tokens.input_ids)),
            _power_of_two(len(tokens.cu_seqlens) - 1),
            tokens.input_ids.device,
            tokens.token_type_ids is not None,
            select.forced_backend(),
            measurements.generation(),
        )

    def _bucket(self, tokens: int) -> int:
        return self.buckets[bisect_left(self.buckets, tokens)]

    def _note(self, reason: str, count: int, *, failed: _Key | None = None) -> None:
        """Counts a call without a graph; the first of a reason is logged. ``failed``: what is not tried again."""
        with self._lock:
            if reason not in self._fallbacks:
                level = logging.INFO if failed is None else logging.WARNING
                _log.log(level, "Runner: the encoder runs without a CUDA graph: %s", reason)
            self._fallbacks[reason] = self._fallbacks.get(reason, 0) + count
            if failed is not None:
                self._failed[failed] = reason

    @staticmethod
    def _refuse_training(module: nn.Module) -> None:
        if module.training:
            raise ValueError(f"Runner: {type(module).__name__} is in training mode, expected model.eval() before")


class _Key(NamedTuple):
    """Calls with the same key are served by one graph. The backend that is forced, and what was measured, decide which
    kernels it holds."""

    encoder: nn.Module
    tokens: int
    sequences: int
    device: torch.device
    has_types: bool
    forced: str | None
    generation: int


class _Arena:
    """The tokens that a graph reads: ``fill`` puts a batch's there. Rows after its end belong to no sequence, with ids
    of 0; sequences that it has not begin and end there."""

    def __init__(self, key: _Key, max_length: int) -> None:
        ids = torch.zeros(3 if key.has_types else 2, key.tokens, dtype=torch.int64, device=key.device)
        ends = torch.zeros(key.sequences + 1, dtype=torch.int32, device=key.device)
        self.tensors = (ids, ends)
        self.tokens = Tokens(ids[0], ids[1], ids[2] if key.has_types else None, ends, max_length)
        self._filled = 0

    def fill(self, tokens: Tokens) -> None:
        ids, ends = self.tensors
        total, given = len(tokens.input_ids), len(tokens.cu_seqlens)
        for mine, theirs in zip(self.tokens[:3], tokens[:3], strict=True):
            if mine is not None and theirs is not None:
                mine[:total].copy_(theirs)
        if total < self._filled:
            ids[:, total : self._filled].zero_()
        self._filled = total
        ends[:given].copy_(tokens.cu_seqlens)
        if given < len(ends):
            ends[given:].copy_(tokens.cu_seqlens[-1])


@dataclass(eq=False)
class _Captured:
    graph: Graph
    arena: _Arena
    seconds: float
    calls: int = 0

    @property
    def bytes(self) -> int:
        return self.graph.bytes + sum(tensor.nbytes for tensor in self.arena.tensors)


def _max_length(encoder: nn.Module, bucket: int) -> int:
    """The longest sequence in a graph of ``bucket`` tokens, for every batch that it serves."""
    positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
    return min(bucket, positions or bucket)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``, and 1."""
    return 1 << max(0, count - 1).bit_length()


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Runner: {name} holds {value!r}, expected positive ints")
    return value
