"""Time calls on a CPU or a CUDA device so that two numbers can be compared.

A *sample* is the mean time of one call over a stretch long enough for the clock to resolve; a :class:`Timing`
is the median and spread of many samples. Three ways of taking one, named in ``Timing.mode``:

- ``cpu-wall``: a host clock around the call;
- ``cuda-events``: device events around the call as Python issues it, so that a call too short for Python
  shows what Python costs: this is "eager" time;
- ``cuda-graph``: device events around the replay of a CUDA graph that holds the calls, so that launch costs
  are mostly gone.

Where a function takes "a call" it also takes a *sequence* of calls that differ only in the memory they read:
one turn runs them all, one after the other, and the time reported is that of one call. With enough copies of
a weight (:func:`rotation_count`) every call then finds its weight outside the L2 cache, as a layer of a real
model does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

__all__ = ["Timing", "capture", "l2_bytes", "measure", "measure_together", "rotation_count"]

Call = Callable[[], object]
Clock = Callable[[], float]

# The shortest stretch worth one sample, in seconds: a host clock resolves tens of nanoseconds, a device event
# about half a microsecond, and both cost something to read.
_SHORTEST_SAMPLE_S = {"cpu-wall": 50e-6, "cuda-events": 500e-6, "cuda-graph": 500e-6}
# Samples queued on a device before the host waits for them: enough that the device never runs dry in between.
_MOST_QUEUED_ROUNDS = 16
_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median of ``repeats`` samples, their 20th and 80th percentile, and
    ``mad_us``, the median distance from the median. ``mode`` is ``cpu-wall``, ``cuda-events`` or
    ``cuda-graph``. The 95th and 99th percentile are those of calls, so they are None where a sample was the
    mean of several."""

    median_us: float
    p20_us: float
    p80_us: float
    mad_us: float
    repeats: int
    mode: str
    p95_us: float | None = None
    p99_us: float | None = None

    @classmethod
    def from_samples(cls, samples_us: Sequence[float], mode: str, *, single: bool = False) -> Timing:
        """Summarise samples (microseconds); ``single`` says that each was one call. Percentiles interpolate
        linearly between neighbours."""
        if not samples_us:
            raise ValueError("Timing: no samples to summarise, expected at least one")
        ordered = sorted(samples_us)
        median = statistics.median(ordered)
        return cls(
            median_us=median,
            p20_us=_quantile(ordered, 0.2),
            p80_us=_quantile(ordered, 0.8),
            mad_us=statistics.median(abs(sample - median) for sample in ordered),
            repeats=len(ordered),
            mode=mode,
            p95_us=_quantile(ordered, 0.95) if single else None,
            p99_us=_quantile(ordered, 0.99) if single else None,
        )

    def to_dict(self) -> dict[str, float | int | str]:
        """The fields that are known by name, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _quantile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def l2_bytes(device: torch.device | str) -> int:
    """Bytes of the device's L2 cache as its driver reports them; 0 for a device that is not a GPU."""
    device = torch.device(device)
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def rotation_count(bytes_per_copy: int, l2_bytes: int, *, cover: float = 2.0, most: int = 256) -> int:
    """How many copies of a weight to rotate among so that each is out of the cache when its turn comes again.

    ``ceil(cover * l2_bytes / bytes_per_copy)``, at least 1 and at most ``most``. ``cover`` is above 1 because
    a replacement policy that is not strictly least-recently-used keeps some lines longer than one pass.
    """
    if bytes_per_copy <= 0:
        raise ValueError(f"rotation_count: bytes_per_copy is {bytes_per_copy}, expected a positive size")
    if l2_bytes < 0 or cover <= 0 or most < 1:
        raise ValueError(
            f"rotation_count: l2_bytes={l2_bytes}, cover={cover}, most={most}, "
            "expected l2_bytes >= 0, cover > 0 and most >= 1"
        )
    return max(1, min(most, math.ceil(cover * l2_bytes / bytes_per_copy)))


def capture(calls: Call | Sequence[Call], device: torch.device | str) -> Call:
    """Record ``calls``, in order, in one CUDA graph and return the function that replays it.

    What the calls return is dropped and its memory reused by the next, as in a model that runs layer after
    layer. Raises what the capture raises when a call cannot be captured (one that synchronises, say).
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"capture: device is {device}, expected a CUDA device")
    queue = _as_calls(calls)
    with torch.cuda.device(device):
        # Libraries set up handles and workspaces on first use, per stream, and may not do so inside a
        # capture: run everything once on the stream that captures.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in queue:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in queue:
                call()
    return graph.replay


def measure(
    fn: Call | Sequence[Call],
    *,
    device: torch.device | str,
    budget_s: float = 0.5,
    warmup: int = 3,
    min_repeats: int = 5,
    graph: bool = False,
    single: bool = False,
    clock: Clock | None = None,
) -> Timing:
    """Time one call; see :func:`measure_together` for the arguments."""
    timings = measure_together(
        {"call": fn},
        device=device,
        budget_s=budget_s,
        warmup=warmup,
        min_repeats=min_repeats,
        graph=graph,
        single=single,
        clock=clock,
    )
    return timings["call"]


def measure_together(
    fns: Mapping[str, Call | Sequence[Call]],
    *,
    device: torch.device | str,
    budget_s: float = 1.0,
    warmup: int = 3,
    min_repeats: int = 5,
    graph: bool = False,
    single: bool = False,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time several calls in turns, A B A B ..., so that a drift of the machine touches all of them alike.

    ``budget_s`` is the wall time for the samples of all of them together; ``min_repeats`` samples each are
    taken even if that needs longer. ``warmup`` turns run first (fewer where they alone outlast the budget,
    but one at least), outside the budget. ``graph`` replays CUDA graphs instead of calling. ``single`` has each
    sample be one call however short, so that the 95th and 99th percentile of calls are known. ``clock``
    (seconds) stands in for ``time.perf_counter``: it decides when the budget is spent, and on a CPU it is
    also what times the samples.
    """
    device = torch.device(device)
    if not fns:
        raise ValueError("measure_together: nothing to measure, expected at least one call")
    if warmup < 1 or min_repeats < 1:
        raise ValueError(f"measure: warmup={warmup}, min_repeats={min_repeats}, expected at least 1 each")
    if graph and device.type != "cuda":
        raise ValueError(f"measure: graph=True needs a CUDA device, got {device}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"measure: device is {device}, expected cpu or cuda")
    clock = clock or time.perf_counter
    mode = "cpu-wall" if device.type == "cpu" else "cuda-graph" if graph else "cuda-events"
    turns = [_Turn.of(calls, device, graph) for calls in fns.values()]
    timer: _HostTimer | _EventTimer = _HostTimer(clock) if device.type == "cpu" else _EventTimer(device)

    started = clock()
    for done in range(warmup):
        if done and clock() - started >= budget_s:
            break
        for turn in turns:
            turn.run()
    timer.wait()
    rough = next(iter(timer.rounds(turns, 1)))
    if not single:
        for turn, seconds in zip(turns, rough, strict=True):
            turn.repeat = max(1, math.ceil(_SHORTEST_SAMPLE_S[mode] / max(seconds, 1e-9)))
    round_s = sum(turn.repeat * max(seconds, 1e-9) for turn, seconds in zip(turns, rough, strict=True))

    samples: list[list[float]] = [[] for _ in turns]
    queued = 1 if device.type == "cpu" else max(1, min(_MOST_QUEUED_ROUNDS, int(budget_s / 4 / round_s)))
    started = clock()
    while len(samples[0]) < min_repeats or (clock() - started < budget_s and len(samples[0]) < _MOST_REPEATS):
        for round_seconds in timer.rounds(turns, queued):
            for kept, turn, seconds in zip(samples, turns, round_seconds, strict=True):
                kept.append(seconds / (turn.repeat * turn.calls) * 1e6)
    return {
        name: Timing.from_samples(kept, mode, single=turn.repeat * turn.calls == 1)
        for name, kept, turn in zip(fns, samples, turns, strict=True)
    }


def _as_calls(calls: Call | Sequence[Call]) -> list[Call]:
    queue = [calls] if callable(calls) else list(calls)
    if not queue:
        raise ValueError("measure: an empty sequence of calls, expected at least one")
    return queue


class _Turn:
    """What one sample runs: ``run`` performs ``calls`` calls, and a sample repeats it ``repeat`` times."""

    def __init__(self, run: Call, calls: int) -> None:
        self.run = run
        self.calls = calls
        self.repeat = 1

    @classmethod
    def of(cls, calls: Call | Sequence[Call], device: torch.device, graph: bool) -> _Turn:
        queue = _as_calls(calls)
        if graph:
            return cls(capture(queue, device), len(queue))
        if len(queue) == 1:
            return cls(queue[0], 1)

        def run_all() -> None:
            for call in queue:
                call()

        return cls(run_all, len(queue))


class _HostTimer:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def wait(self) -> None:
        pass

    def rounds(self, turns: Sequence[_Turn], count: int) -> Iterator[list[float]]:
        """Yield, ``count`` times, the seconds of each turn's sample."""
        for _ in range(count):
            seconds = []
            for turn in turns:
                run, repeat = turn.run, range(turn.repeat)
                started = self.clock()
                for _ in repeat:
                    run()
                seconds.append(self.clock() - started)
            yield seconds


class _EventTimer:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def rounds(self, turns: Sequence[_Turn], count: int) -> Iterator[list[float]]:
        """Yield, ``count`` times, the seconds of each turn's sample; all of them are queued before the first
        wait."""
        with torch.cuda.device(self.device):
            # An idle device would start its first sample before the work behind it has been launched, and
            # count that launch: one turn unmeasured keeps it busy meanwhile.
            turns[0].run()
            marks = []
            for _ in range(count):
                row = []
                for turn in turns:
                    begin = torch.cuda.Event(enable_timing=True)
                    end = torch.cuda.Event(enable_timing=True)
                    begin.record()
                    for _ in range(turn.repeat):
                        turn.run()
                    end.record()
                    row.append((begin, end))
                marks.append(row)
            self.wait()
        for row in marks:
            yield [begin.elapsed_time(end) / 1e3 for begin, end in row]
