"""``Runner`` with real CUDA graphs: dtypes, streams, threads, what it holds, and what it cannot capture. Needs a CUDA
device."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sparsebert as sb
from runner_cases import Bare, WaitingEncoder, batch, classifier, plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def model_of(dtype, **options):
    return classifier(hidden=64, **options).to("cuda", dtype)


def some(count, seed=0):
    """Batches of up to 6 sequences of up to 40 tokens."""
    choose = random.Random(seed)
    lengths = [[choose.randint(1, 40) for _ in range(choose.randint(1, 6))] for _ in range(count)]
    return [batch(*each, seed=1000 * seed + i, device="cuda") for i, each in enumerate(lengths)]


def check(found, model, inputs):
    """At most twice the error of the model without a runner, both against float64."""
    theirs, exact = plain(model, inputs), plain(copy.deepcopy(model).double(), inputs)
    pairs = [(found[0], theirs[0], exact[0]), *zip(found[1], theirs[1], exact[1], strict=True)]
    for y, other, true in pairs:
        assert y.shape == other.shape and y.dtype == other.dtype
        unit = torch.finfo(y.dtype).eps * true.abs().max()
        assert (y.double() - true).abs().max() <= 2 * (other.double() - true).abs().max() + unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_stay_as_they_are(dtype):
    model = model_of(dtype, encoders=2)
    runner, jobs = sb.Runner(model, max_graphs=64), some(12)
    found = [runner(**inputs) for inputs in jobs for _ in range(2)]
    for i, output in enumerate(found):
        check(output, model, jobs[i // 2])
    report = runner.report()
    assert report.calls == 48 and not report.fallbacks and report.captured == len(report.graphs)
    assert all(graph.device == "cuda:0" and graph.bytes > 0 and graph.seconds > 0 for graph in report.graphs)


def test_the_least_recently_used_goes():
    model = model_of(torch.float16)
    runner = sb.Runner(model, buckets=[16, 64, 256], max_graphs=2)
    for inputs in some(20):
        check(runner(**inputs), model, inputs)
        assert len(runner.report().graphs) <= 2
    assert runner.report().evicted > 0 and runner.report().calls == 20


def test_two_streams():
    model = model_of(torch.float16)
    runner, jobs = sb.Runner(model, buckets=[64, 256]), some(40)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    # Keeps a stream busy, so that a turn which did not wait for the last one would overtake it.
    load = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    found = []
    for i, inputs in enumerate(jobs):
        with torch.cuda.stream(streams[i % 2]):
            if i % 3 == 0:
                load @ load
            found.append(runner(**inputs))
    torch.cuda.synchronize()
    for inputs, output in zip(jobs, found, strict=True):
        check(output, model, inputs)
    assert runner.report().calls == 40


def test_threads():
    model = model_of(torch.float16)
    runner = sb.Runner(model, buckets=[64, 256], max_graphs=32)
    # Ahead, as docs/runner.md says: a capture stands no other thread that waits for the device.
    runner.warm_up(tokens=[6, 64, 240], sequences=[1, 2, 4, 8])
    jobs = [some(12, seed) for seed in range(4)]
    torch.cuda.synchronize()

    def work(mine):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [runner(**inputs) for inputs in mine]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, jobs))
    for inputs, output in zip(sum(jobs, []), sum(found, []), strict=True):
        check(output, model, inputs)
    assert runner.report().calls == 48 and not runner.report().fallbacks


def test_smaller_graphs_share_the_memory_of_the_largest():
    runner = sb.Runner(model_of(torch.float16))
    largest, *others = runner.warm_up(tokens=[512, 1024, 4096], sequences=[64]).graphs
    assert largest.tokens == 4096 and sum(graph.bytes for graph in others) < largest.bytes


def test_reset_gives_the_memory_back():
    model = model_of(torch.float16)
    runner = sb.Runner(model)
    (inputs,) = some(1)
    left = []
    for _ in range(3):
        check(runner(**inputs), model, inputs)
        runner.warm_up(tokens=[16384], sequences=[256])
        held = torch.cuda.memory_reserved()
        runner.reset()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_reserved())
        assert held > left[-1] + (8 << 20)
    # What libraries took for themselves stays after the first.
    assert left[2] == left[1]
    check(runner(**inputs), model, inputs)


def test_weights_that_moved():
    model = model_of(torch.float16)
    runner = sb.Runner(model)
    (inputs,) = some(1)
    check(runner(**inputs), model, inputs)
    model.to("cpu")
    torch.cuda.empty_cache()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    model.to("cuda")
    check(runner(**inputs), model, inputs)
    model.bfloat16()
    check(runner(**inputs), model, inputs)
    assert runner.report().outdated == 2 and len(runner.report().graphs) == 1


def test_what_cannot_be_captured():
    model = model_of(torch.float16, encoders=2)
    model.encoders[0].__class__ = WaitingEncoder
    runner = sb.Runner(model)
    for _ in range(2):
        # The other encoder is captured after the failure, and on the caller's stream nothing has changed.
        for inputs in some(6):
            check(runner(**inputs), model, inputs)
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
    report = runner.report()
    assert {graph.encoder for graph in report.graphs} == {"encoders.1"}
    assert report.calls == sum(report.fallbacks.values()) == 12
    assert all(reason.startswith("capture failed at ") and "captur" in reason for reason in report.fallbacks)


def test_within_the_callers_own_graph():
    model = Bare(model_of(torch.float16).encoders[0]).eval()
    runner = sb.Runner(model)
    ids, ends = torch.randint(50, (40,), device="cuda"), torch.tensor([0, 11, 40], dtype=torch.int32, device="cuda")
    with torch.inference_mode():
        expected = model(ids, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = runner(ids, ends)
    with torch.inference_mode():
        output.fill_(torch.nan)
    graph.replay()
    assert torch.equal(output, expected)
    assert runner.report().fallbacks == {"a CUDA graph is being captured already": 1}


def test_under_autocast():
    model = model_of(torch.float32)
    runner = sb.Runner(model)
    (inputs,) = some(1)
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(runner(**inputs)[0], plain(model, inputs)[0])
    assert runner.report().fallbacks == {"autocast is enabled": 1}


def test_beside_a_compiled_head():
    model = model_of(torch.float16)
    runner, jobs = sb.Runner(model), some(4)
    expected = [runner(**inputs)[0] for inputs in jobs]
    model.head = torch.compile(model.head)
    for inputs, logits in zip(jobs, expected, strict=True):
        torch.testing.assert_close(runner(**inputs)[0], logits, rtol=2e-3, atol=2e-3)
    assert runner.report().calls == 8
