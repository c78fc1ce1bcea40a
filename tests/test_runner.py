"""``Runner`` on a CPU: what it keeps, copies and counts, with graphs that behave as CUDA's do."""

from __future__ import annotations

import gc
import json
import logging
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import sparsebert as sb
from runner_cases import Bare, FusedEncoder, WaitingEncoder, batch, classifier, plain
from sparsebert.graphs import CaptureError, Graph, Graphs, Weights
from sparsebert.ops import measurements
from sparsebert.runner import BUCKETS
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


# They bring values to the host.
WAITING = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Recorder(TorchDispatchMode):
    """Records calls of torch's ops with the memory that they read and wrote, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls, self.own = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        # Aliases: a parameter that gets other memory later does not change what was recorded.
        given, out = tree_map(_alias, (args, kwargs or {})), tree_map(_alias, result)
        self.calls.append((func, *given, out))
        read = {tensor.untyped_storage().data_ptr() for tensor in _tensors(given)}
        self.own += [tensor for tensor in _tensors(out) if tensor.untyped_storage().data_ptr() not in read]
        return result

    def poison(self):
        """What a replay of another graph of the same pool may do."""
        for tensor in self.own:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for mine, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)


def _alias(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class Recorded:
    """In the place of ``Graphs``, with the same rules: a capture computes nothing, and every replay may spoil the
    memory of all other graphs."""

    def __init__(self, device):
        self.live = weakref.WeakSet()
        self.turns = threading.Lock()

    @staticmethod
    def refusal(device):
        return None

    @contextmanager
    def turn(self, *inputs):
        if not self.turns.acquire(blocking=False):
            raise RuntimeError("two turns at once")
        try:
            yield
        finally:
            self.turns.release()

    def capture(self, run):
        recorder = Recorder()
        try:
            run()
            with recorder:
                output = run()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        recorder.poison()
        self.live.add(recorder)

        def replay():
            for other in list(self.live):
                other.poison()
            recorder.replay()

        return Graph(replay, output, 1000)

    def finish(self):
        if self.turns.locked():
            raise RuntimeError("waits within a turn")


class Runner(sb.Runner):
    _graphs = Recorded

    def shapes(self):
        """Tokens and sequences of the graphs held."""
        return [(graph.tokens, graph.sequences) for graph in self.report().graphs]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def check(runner, *lengths, seed=0):
    """One batch as it should be, and what came of it."""
    inputs = batch(*lengths, seed=seed)
    found = runner(**inputs)
    assert_same(found, plain(runner.model, inputs))
    return inputs, found


def test_buckets_waste_a_fifth_at_most():
    assert BUCKETS[0] == 64 and BUCKETS[-1] == 16384
    assert all(bucket % 64 == 0 for bucket in BUCKETS)
    assert list(BUCKETS) == sorted(set(BUCKETS))
    for tokens in range(257, 16385):
        bucket = min(size for size in BUCKETS if size >= tokens)
        assert 1 - tokens / bucket <= 0.2


def test_results_across_buckets_stay_as_they_are():
    runner = Runner(classifier(), buckets=[8, 20, 33, 64])
    choose, kept = random.Random(0), []
    for seed in range(40):
        lengths = [choose.randint(1, 12) for _ in range(choose.randint(1, 5))]
        kept.append(check(runner, *lengths, seed=seed))
    # The later calls left the earlier results alone.
    for inputs, found in kept:
        assert_same(found, plain(runner.model, inputs))
    report = runner.report()
    totals = [int(inputs["attention_mask"].sum()) for inputs, _ in kept]
    assert report.calls == 40 and report.tokens == sum(totals) and not report.fallbacks
    assert report.computed == sum(min(b for b in (8, 20, 33, 64) if b >= total) for total in totals)
    assert report.padding == 1 - report.tokens / report.computed
    assert report.captured == len(report.graphs) == len(set(runner.shapes()))
    assert sum(graph.calls for graph in report.graphs) == 40


def test_outputs_are_the_callers_own():
    """Also where the model hands on what the encoder gave."""
    model = Bare(classifier().encoders[0]).eval()
    runner = Runner(model, buckets=[8, 16])
    jobs = [(torch.randint(50, (n,)), torch.tensor([0, 2, n], dtype=torch.int32)) for n in (5, 8, 11, 3)]
    found = [runner(*job) for job in jobs]
    for job, output in zip(jobs, found, strict=True):
        assert output.shape == (len(job[0]), 16)
        with torch.inference_mode():
            assert_same(output, model(*job))
    assert runner.report().captured == 2


@pytest.mark.parametrize("types", [True, False])
def test_what_a_graph_reads(types, monkeypatch):
    """Rows after the end have ids of 0, absent sequences are empty, and what shapes a grid is constant."""
    model = classifier(positions=12, types=types)
    static, compute = {}, model.encoders[0].compute

    def seen(tokens):
        static[len(tokens.input_ids), len(tokens.cu_seqlens) - 1] = tokens
        return compute(tokens)

    monkeypatch.setattr(model.encoders[0], "compute", seen)
    runner = Runner(model, buckets=[8, 32])
    for lengths in ((9, 7, 3), (1, 1, 1), (12, 12, 8), (5, 6, 7, 2), (2,)):
        inputs = batch(*lengths)
        runner(**inputs)
        total, mask = sum(lengths), inputs["attention_mask"].bool()
        bucket, slots = 32 if total > 8 else 8, 4 if len(lengths) > 1 else 1
        tokens = static[bucket, slots]
        places = torch.cat([torch.arange(length) for length in lengths])
        given = [inputs["input_ids"][mask], places, inputs["token_type_ids"][mask] if types else None]
        for ids, expected in zip(tokens[:3], given, strict=True):
            if expected is None:
                assert ids is None
            else:
                assert ids.shape == (bucket,) and ids.dtype == torch.int64
                assert torch.equal(ids[:total], expected) and not ids[total:].any()
        ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert tokens.cu_seqlens.dtype == torch.int32
        assert tokens.cu_seqlens.tolist() == ends + [total] * (slots + 1 - len(ends))
        assert tokens.max_length == min(bucket, 12)
    assert runner.shapes() == [(8, 4), (32, 4), (8, 1)]


def test_an_empty_batch():
    model = classifier()
    inputs = batch(3, 2)
    inputs["attention_mask"][:] = 0
    runner = Runner(model)
    assert_same(runner(**inputs), plain(model, inputs))
    assert runner.report().padding == 1


def test_the_least_recently_used_goes():
    runner = Runner(classifier(), buckets=[4, 8, 16], max_graphs=2)
    for lengths, held in (
        ((3,), [(4, 1)]),
        ((6,), [(4, 1), (8, 1)]),
        ((4,), [(8, 1), (4, 1)]),
        ((3, 3), [(4, 1), (8, 2)]),
        ((2,), [(8, 2), (4, 1)]),
        ((5,), [(4, 1), (8, 1)]),
    ):
        check(runner, *lengths)
        assert runner.shapes() == held
        (graphs,) = runner._devices.values()
        gc.collect()
        # Nothing holds on to what was evicted.
        assert len(graphs.live) == len(held)
    report = runner.report()
    assert (report.captured, report.evicted, report.calls) == (4, 2, 6)
    assert [graph.calls for graph in report.graphs] == [3, 1]


def test_threads_take_turns():
    model = classifier()
    runner = Runner(model, buckets=[8, 16, 40], max_graphs=4)
    choose = random.Random(0)
    jobs = [
        [batch(*(choose.randint(1, 9) for _ in range(choose.randint(1, 4))), seed=100 * t + i) for i in range(12)]
        for t in range(8)
    ]

    def work(inputs):
        return [runner(**each) for each in inputs]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, jobs))
    for each, output in zip(sum(jobs, []), sum(found, []), strict=True):
        assert_same(output, plain(model, each))
    assert runner.report().calls == 96 and runner.report().evicted > 0


def test_two_encoders():
    model = classifier(encoders=2)
    runner = Runner(model, buckets=[8])
    for seed in range(3):
        check(runner, 3, 2, seed=seed)
    assert [(graph.encoder, graph.calls) for graph in runner.report().graphs] == [("encoders.0", 3), ("encoders.1", 3)]
    # What happens to one leaves the other's graphs alone.
    model.encoders[0].linear = nn.Linear(16, 16).double()
    check(runner, 3, 2)
    assert runner.report().outdated == 1
    assert [(graph.encoder, graph.calls) for graph in runner.report().graphs] == [("encoders.0", 1), ("encoders.1", 4)]


def moved(encoder):
    encoder.linear.weight.data = -encoder.linear.weight.data


def cast(encoder):
    encoder.float().double()


def another_module(encoder):
    encoder.linear = nn.Linear(16, 16).double()


def another_kind_of_module(encoder):
    encoder.activation = nn.ReLU()


def another_buffer(encoder):
    encoder.offset = encoder.offset + 1


def a_tensor_less(encoder):
    encoder.linear.bias = None


def an_adapter(encoder):
    # In a module that held nothing.
    encoder.activation.add_module("scaled", nn.Linear(1, 1).double())
    encoder.linear.weight.data.mul_(2)


@pytest.mark.parametrize(
    "change", [moved, cast, another_module, another_kind_of_module, another_buffer, a_tensor_less, an_adapter]
)
def test_other_weights_are_captured_anew(change):
    model = classifier()
    runner = Runner(model, buckets=[8, 16])
    for lengths in ((3, 2), (9,)):
        check(runner, *lengths)
    change(model.encoders[0])
    for lengths in ((3, 2), (9,), (3, 2)):
        check(runner, *lengths)
    report = runner.report()
    assert (report.outdated, report.captured, report.calls) == (2, 4, 5)


def test_other_weights_are_seen_where_the_bucket_is_new():
    model = classifier()
    runner = Runner(model, buckets=[8, 16])
    check(runner, 3, 2)
    moved(model.encoders[0])
    check(runner, 9)
    assert runner.shapes() == [(16, 1)] and runner.report().outdated == 1


def test_another_dtype_at_the_same_address():
    """As an allocator gives it to a model that goes to another dtype and back to the first one's size."""
    linear = nn.Linear(4, 4, bias=False).half()
    weights = Weights(linear)
    assert not weights.changed()
    linear.weight.data = linear.weight.data.view(torch.bfloat16)
    assert weights.changed()


def test_values_that_change_in_place_need_no_other_graph():
    model = classifier()
    runner = Runner(model)
    check(runner, 3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    check(runner, 3, 2)
    model.load_state_dict(classifier().state_dict())
    check(runner, 3, 2)
    assert (runner.report().captured, runner.report().outdated) == (1, 0)


def test_weights_that_a_graph_reads_are_not_freed_before_it():
    model = classifier()
    runner = Runner(model)
    check(runner, 3, 2)
    address = model.encoders[0].linear.weight.data_ptr()
    moved(model.encoders[0])
    held = [tensor.data_ptr() for weights in runner._weights.values() for tensor in weights._memory]
    assert address in held
    check(runner, 3, 2)
    held = [tensor.data_ptr() for weights in runner._weights.values() for tensor in weights._memory]
    assert address not in held


def test_reset():
    runner = Runner(classifier(), buckets=[8])
    check(runner, 3, 2)
    (graphs,) = runner._devices.values()
    runner.reset()
    gc.collect()
    assert not graphs.live and not runner._weights and runner.report().graphs == ()
    check(runner, 3, 2)
    assert (runner.report().captured, runner.report().calls) == (2, 2)


def test_what_chooses_kernels_has_graphs_of_its_own(monkeypatch):
    runner = Runner(classifier(), buckets=[8])
    for forced in (False, True, False, True):
        if forced:
            with sb.backend("reference"):
                check(runner, 3, 2)
        else:
            check(runner, 3, 2)
    assert runner.report().captured == 2
    monkeypatch.setattr(measurements, "generation", lambda: -1)
    check(runner, 3, 2)
    assert runner.report().captured == 3


def test_without_a_cuda_device():
    model = classifier()
    runner = sb.Runner(model)
    for _ in range(2):
        check(runner, 3, 2)
    reason = "the tokens are on cpu, and CUDA graphs need a CUDA device"
    assert runner.report().fallbacks == {reason: 2} and runner.report().captured == 0
    assert runner.warm_up(tokens=[64]).fallbacks == {reason: 2}


def test_more_tokens_than_any_bucket(caplog):
    caplog.set_level(logging.INFO, "sparsebert.runner")
    runner = Runner(classifier(), buckets=[8])
    for lengths in ((8,), (9,), (5, 5)):
        check(runner, *lengths)
    assert runner.report().fallbacks == {"more tokens than the largest bucket, 8": 2}
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "more tokens than the largest bucket, 8" in record.getMessage()


def test_longer_than_the_positions_of_the_encoder():
    """A grid for ``max_position_embeddings`` would leave out the rest of such a sequence."""
    model = classifier(positions=40)
    model.encoders[0].config.max_position_embeddings = 5
    runner = Runner(model, buckets=[8, 32])
    for lengths, reasons in (((5, 2), 0), ((5, 5), 0), ((6, 2), 1), ((7,), 2)):
        check(runner, *lengths)
        assert sum(runner.report().fallbacks.values()) == reasons
    assert list(runner.report().fallbacks) == ["sequences may be longer than config.max_position_embeddings"]


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (torch.enable_grad, "gradients are enabled"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is enabled"),
    ],
)
def test_where_a_graph_would_not_do_the_same(context, reason, monkeypatch):
    model = classifier()
    runner = Runner(model)
    forward = model.encoders[0].forward

    def within(**inputs):
        with context():
            return forward(**inputs)

    monkeypatch.setattr(model.encoders[0], "forward", within)
    check(runner, 3, 2)
    assert runner.report().fallbacks == {reason: 1}


@pytest.fixture
def compile_eagerly():
    """``torch.compile`` without a compiler behind it: what it traces, and where it gives up, stays."""
    torch.compiler.reset()
    yield lambda module: torch.compile(module, backend="eager")
    torch.compiler.reset()


def test_a_compiled_model_runs_what_was_compiled(compile_eagerly):
    model = classifier()
    runner = Runner(compile_eagerly(model))
    for seed in range(2):
        assert_same(runner(**batch(3, 2, seed=seed)), plain(model, batch(3, 2, seed=seed)))
    assert runner.report().calls == 0 and not runner.report().fallbacks


def test_beside_a_compiled_head(compile_eagerly):
    model = classifier()
    model.head = compile_eagerly(model.head)
    runner = Runner(model)
    for seed in range(2):
        check(runner, 3, 2, seed=seed)
    assert runner.report().calls == 2


def test_a_failed_capture_is_not_tried_again(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sparsebert.runner")
    model = classifier()
    model.encoders[0].__class__ = WaitingEncoder
    runner, calls, compute = Runner(model, buckets=[8, 16]), [], model.encoders[0].compute
    monkeypatch.setattr(model.encoders[0], "compute", lambda tokens: (calls.append(0), compute(tokens))[1])
    found = runner(**batch(3, 2))
    attempt = len(calls)
    assert attempt > 1
    runner(**batch(2, 4))
    assert len(calls) == attempt + 1
    assert_same(found, plain(model, batch(3, 2)))
    text = "tokens, 2 sequences: RuntimeError: operation not permitted when stream is capturing"
    assert runner.report().fallbacks == {f"capture failed at 8 {text}": 2}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and text in record.getMessage()
    # Another bucket, and a reset, are another chance.
    runner(**batch(9, 2))
    assert runner.report().fallbacks == {f"capture failed at 8 {text}": 2, f"capture failed at 16 {text}": 1}
    monkeypatch.undo()
    model.encoders[0].__class__ = FusedEncoder
    runner(**batch(3, 2))
    assert runner.report().captured == 0
    runner.reset()
    check(runner, 3, 2)
    assert runner.report().captured == 1


def test_an_error_of_the_encoder_is_no_failed_capture():
    runner = Runner(classifier())
    wrong = batch(3, 2)
    wrong["input_ids"][0, 0] = 1000
    with pytest.raises(IndexError):
        runner(**wrong)
    assert not runner.report().fallbacks
    check(runner, 3, 2)
    assert runner.report().captured == 1


def test_warm_up():
    runner = Runner(classifier(positions=16, encoders=2), buckets=[8, 16, 32, 64], max_graphs=12)
    report = runner.warm_up(tokens=[5, 8, 30, 60], sequences=[1, 2, 4])
    # The largest first; no single sequence has 30 tokens, and 60 need four.
    shapes = [(64, 4), (32, 4), (32, 2), (8, 4), (8, 2), (8, 1)]
    assert runner.shapes() == shapes * 2
    assert report.calls == report.tokens == 0 and report.captured == 12
    assert all(graph.seconds > 0 for graph in report.graphs)
    for lengths in ((8,), (15, 16), (16, 14, 16, 13), (2, 3, 2)):
        check(runner, *lengths)
    report = runner.report()
    assert report.captured == 12 and report.calls == 8 and not report.fallbacks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [65]}, "tokens holds 65, expected at most the largest bucket, 64"),
        ({"tokens": [0]}, "tokens holds 0, expected positive ints"),
        ({"tokens": [8], "sequences": [2.0]}, "sequences holds 2.0, expected positive ints"),
        ({"tokens": [30]}, "come to 0 graphs, expected 1 to 2, which is max_graphs"),
        ({"tokens": []}, "come to 0 graphs"),
        ({"tokens": [8, 60], "sequences": [1, 2, 4]}, "come to 4 graphs"),
    ],
)
def test_warm_up_refuses(options, message):
    runner = Runner(classifier(positions=16), buckets=[8, 64], max_graphs=2)
    with pytest.raises(ValueError, match=message):
        runner.warm_up(**options)
    assert runner.report().captured == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": []}, "buckets is empty"),
        ({"buckets": [64, 0]}, "buckets holds 0, expected positive ints"),
        ({"buckets": [True]}, "buckets holds True"),
        ({"buckets": [64.0]}, "buckets holds 64.0"),
        ({"max_graphs": 0}, "max_graphs holds 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=f"Runner: {message}"):
        Runner(classifier(), **options)


def test_buckets_are_put_in_order():
    assert Runner(classifier(), buckets=(96, 32, 96)).buckets == (32, 96)


def test_only_fused_models_that_do_not_train():
    with pytest.raises(ValueError, match=r"Runner: Linear is not fused; call sparsebert.fuse_\(model\) first"):
        Runner(nn.Linear(2, 2))
    model = classifier()
    runner = Runner(model)
    with pytest.raises(ValueError, match="Runner: Classifier is in training mode"):
        model.train()
        runner(**batch(3))
    model.eval().encoders[0].train()
    with pytest.raises(ValueError, match="Runner: FusedEncoder is in training mode"):
        runner(**batch(3))
    with pytest.raises(ValueError, match="Runner: FusedEncoder is in training mode"):
        runner.warm_up(tokens=[3])


def test_the_bare_encoder_is_a_model():
    encoder = classifier().encoders[0]
    runner = Runner(encoder)
    inputs = batch(3, 2)
    assert_same(runner(**inputs), plain(encoder, inputs))
    assert_same(runner(*inputs.values()), plain(encoder, inputs))
    assert runner.report().graphs[0].encoder == "FusedEncoder"
    # Outside of the runner nothing is replayed.
    plain(encoder, inputs)
    assert runner.report().calls == 2


def test_the_report_as_text_and_json():
    runner = Runner(classifier(), buckets=[8, 16])
    for lengths in ((3, 2), (4, 4), (9,), (20,)):
        check(runner, *lengths)
    report = runner.report()
    text = str(report).splitlines()
    assert text[0] == f"3 calls of graphs, {100 * (1 - 22 / 32):.1f} % of the rows were padding"
    assert text[1] == "2 graphs captured, 0 evicted, 0 outdated by other weights"
    assert text[3].split()[:5] == ["encoders.0", "cpu", "8", "2", "2"]
    assert text[-1] == "without a graph, 1 times: more tokens than the largest bucket, 16"
    found = json.loads(json.dumps(report.to_dict()))
    assert found["padding"] == 1 - 22 / 32 and found["fallbacks"] == {"more tokens than the largest bucket, 16": 1}
    # Three rows of ids and the ends, and what the capture took.
    assert found["graphs"][0]["bytes"] == 1000 + 3 * 8 * 8 + 3 * 4


def test_the_one_for_cuda_has_what_the_stand_in_has():
    public = {name for name in vars(Graphs) if not name.startswith("_")}
    assert public == {name for name in vars(Recorded) if not name.startswith("_")}


class Driver:
    """What ``Graphs`` asks of ``torch.cuda``, written down in order."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.reserved = [], "callers", iter((100, 164, *[164] * 9))
        driver = self

        class Stream:
            def __init__(self, device):
                self.name = "side"

            def wait_stream(self, other):
                driver.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                driver.log.append(f"{self.name} waits for the last turn")

        class Event:
            def record(self, stream):
                driver.log.append(f"turn ends on {stream.name}")

        class CUDAGraph:
            def replay(self):
                driver.log.append("replay")

        callers = Stream(None)
        callers.name = "callers"

        @contextmanager
        def stream(side):
            before, self.current = self.current, side.name
            try:
                yield
            finally:
                self.current = before

        @contextmanager
        def graph(recorded, *, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local" and stream.name == self.current == "side"
            self.log.append(f"capture into {pool}")
            try:
                yield
            except RuntimeError:
                # As torch does it: the stream stays, and the error is one about the capture.
                raise MemoryError("capture was invalidated") from None

        pools = iter("abcdef")
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "graph": graph,
            "current_stream": lambda device: callers,
            "device": lambda device: nullcontext(),
            "graph_pool_handle": lambda: f"pool {next(pools)}",
            "empty_cache": lambda: None,
            "memory_reserved": lambda: next(self.reserved),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def took(self):
        found, self.log = self.log, []
        return found


def test_the_order_on_the_device(monkeypatch):
    driver = Driver(monkeypatch)
    graphs = Graphs(torch.device("cuda", 0))

    def run():
        driver.log.append(f"run on {driver.current}")
        return torch.zeros(2)

    def fails():
        run()
        if any(line.startswith("capture") for line in driver.log):
            raise RuntimeError("not permitted")
        return torch.zeros(2)

    def captured(pool):
        work = ["run on side", "run on side", f"capture into pool {pool}", "run on side"]
        return ["side waits for callers", *work, "callers waits for side"]

    with graphs.turn():
        first = graphs.capture(run)
        first.replay()
    whole = ["callers waits for the last turn", *captured("a"), "replay", "turn ends on callers"]
    assert driver.took() == whole
    assert torch.equal(first.output, torch.zeros(2))
    # One pool; the second found room in it.
    second = graphs.capture(run)
    assert driver.took() == captured("a") and (first.bytes, second.bytes) == (64, 0)
    with pytest.raises(CaptureError, match="^RuntimeError: not permitted$"), graphs.turn():
        graphs.capture(fails)
    assert driver.took() == ["callers waits for the last turn", *captured("a"), "turn ends on callers"]
    assert driver.current == "callers"
    # What a broken capture recorded to is left alone, and so is what the last graph has let go.
    third = graphs.capture(run)
    assert driver.took() == captured("b")
    del first, second, third
    gc.collect()
    graphs.capture(run)
    assert driver.took() == captured("c")


@pytest.mark.parametrize("config", [None, sb.NMConfig(2, 4), sb.Int8Config()], ids=str)
def test_a_fused_bert(config):
    """The real thing: batches of other lengths in a few graphs, each as it is without a graph."""
    model = tiny_model("bert")
    if config is not None:
        sb.compress_(model, config, layout="neutral")
    sb.fuse_(model)
    runner = Runner(model, buckets=[16, 32])
    choose = random.Random(0)
    jobs = []
    for seed in range(8):
        lengths = torch.tensor([choose.randint(1, 10) for _ in range(choose.randint(1, 3))])
        mask = (torch.arange(10) < lengths[:, None]).long()
        ids = torch.randint(3, 100, mask.shape, generator=torch.Generator().manual_seed(seed))
        jobs.append({"input_ids": ids, "attention_mask": mask})
    found = [runner(**inputs).logits for inputs in jobs]
    for logits, inputs in zip(found, jobs, strict=True):
        with torch.inference_mode():
            # Other numbers of rows may be summed in another order, and integers that lie between two rounded so.
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-6 if config is None else 1e-3)
    report = runner.report()
    assert report.calls == 8 and not report.fallbacks and {graph.tokens for graph in report.graphs} <= {16, 32}
    # What needs more than the last hidden states runs without, and says nothing of graphs.
    assert len(runner(**jobs[0], output_hidden_states=True).hidden_states) == 3
