"""CUDA graphs of one device, captured in one memory pool and replayed one at a time, and what they read."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The first call compiles kernels and sets up libraries for the stream, which a capture may not; the second meets what
# only a later call does.
WARM_UP_CALLS = 2

# A capture begins by waiting for the device, which breaks any other capture on it.
_capturing = threading.Lock()

_dtype = attrgetter("dtype")


class CaptureError(RuntimeError):
    """A function could not be captured; the text is that of its error."""


class Graph(NamedTuple):
    """``replay()`` computes ``output`` anew, from what lies then in the tensors that the captured function read.
    ``bytes``: how much device memory the capture took beyond what earlier graphs of the pool had."""

    replay: Callable[[], None]
    output: Tensor
    bytes: int


class Graphs:
    """Captures functions on the CUDA device ``device``. The caller holds a lock: two threads are never in here at once.

    **One pool.** All graphs take their memory from one pool, so that together they need little more than the largest
    of them: what one computes in between, and even its output, may lie where another computes. That is safe as long as
    they never run at once, an output is copied before the next replay, and inputs and weights lie elsewhere. A replay
    therefore belongs into a ``turn``, which begins where the last one has ended, whatever stream that was on; inputs
    are allocated by the caller, outside of any capture. Memory of a graph that is let go serves the next captures;
    the device has it back when the last graph of the pool is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        """None, or why nothing can be captured, or replayed, on ``device`` now."""
        if device.type != "cuda":
            return f"the tokens are on {device.type}, and CUDA graphs need a CUDA device"
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        return "a CUDA graph is being captured already" if capturing else None

    @contextmanager
    def turn(self, *inputs: Tensor) -> Iterator[None]:
        """In it work on the current stream comes after all of the last turn. ``inputs`` are read in it: should they be
        let go, their memory waits for this stream."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._done)
        for tensor in inputs:
            tensor.record_stream(stream)
        try:
            yield
        finally:
            self._done.record(stream)

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """The graph of ``run()``, which is called before as well. ``CaptureError`` where it raises or cannot be
        captured. Only this thread's calls count: others may allocate meanwhile, but not wait for the device."""
        current, stream = torch.cuda.current_stream(self.device), self._stream
        cause: Exception | None = None
        if not self._alive:
            # The allocator gives up a pool that no graph uses.
            self._pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(current)
        try:
            # Where a capture fails, torch leaves its stream the current one; this puts the caller's back.
            with _capturing, torch.cuda.device(self.device), torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    run()
                # As the capture does: the difference is then what it took.
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        output = run()
                    except Exception as error:
                        cause = error  # the end of a broken capture raises an error of its own, which says less
                        raise
                taken = max(0, torch.cuda.memory_reserved() - before)
                self._alive.add(graph)
        except Exception as error:
            # The allocator may go on taking this pool for one that is recorded to.
            self._pool = torch.cuda.graph_pool_handle()
            cause = cause or error
            raise CaptureError(f"{type(cause).__name__}: {cause}") from cause
        finally:
            current.wait_stream(stream)
        return Graph(graph.replay, output, taken)

    def finish(self) -> None:
        """Waits for the last turn."""
        self._done.synchronize()


class Weights:
    """The parameters and buffers that ``module`` has now, to tell later whether it computes with others.

    A captured graph knows addresses. Values that change in place are therefore seen by it; a weight that moved, changed
    its dtype or layout, or a module that was replaced, is not. The memory is held for as long as this object is, so
    that a graph never reads what was freed. A check takes less than half a microsecond a tensor or module.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        tensors = [held for m in modules for held in (m._parameters, m._buffers)]
        children = [m._modules for m in modules]
        # Most are empty: whether any of them is so no more is one look, where the values of each would be many.
        self._empty = [held for held in (*tensors, *children) if not held]
        self._tensors = [held for held in tensors if held]
        self._children = [held for held in children if held]
        self._before = self._now()
        self._memory = [tensor.detach() for tensor in self._found()]

    def changed(self) -> bool:
        """Whether any of it is another one, or elsewhere, than when this object was made."""
        if any(self._empty):
            return True
        now = self._now()
        children, before = now[0], self._before[0]
        return len(children) != len(before) or not all(map(is_, children, before)) or now[1:] != self._before[1:]

    def _found(self) -> list[Tensor]:
        return [tensor for held in self._tensors for tensor in held.values() if tensor is not None]

    def _now(self) -> tuple[list[nn.Module | None], list[int], list[torch.dtype]]:
        """The modules within, and the address and the dtype of each tensor."""
        tensors = self._found()
        # Another dtype may lie at the old address: a model that went to fp32 and back to 16 bits often does.
        return (
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(Tensor.data_ptr, tensors)),
            list(map(_dtype, tensors)),
        )
