"""The timing core and the environment record, on a clock that the calls themselves move."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise

import pytest
import torch

from sparsebert.bench import environment as environments
from sparsebert.bench import timing
from sparsebert.bench.timing import Timing, measure, measure_together, rotation_count


class Clock:
    """Seconds that pass only when a call takes them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def test_statistics_of_known_samples():
    found = Timing.from_samples([5.0, 1.0, 4.0, 2.0, 3.0], "cpu-wall")
    assert found == Timing(median_us=3.0, p20_us=1.8, p80_us=4.2, mad_us=1.0, repeats=5, mode="cpu-wall")
    assert Timing.from_samples([2.0], "cpu-wall") == Timing(2.0, 2.0, 2.0, 0.0, 1, "cpu-wall")
    assert json.loads(json.dumps(found.to_dict()))["p80_us"] == 4.2


def test_tails_are_those_of_single_calls():
    samples = [float(i) for i in range(101)]
    assert Timing.from_samples(samples, "cpu-wall").p99_us is None
    assert "p99_us" not in Timing.from_samples(samples, "cpu-wall").to_dict()
    found = Timing.from_samples(samples, "cpu-wall", single=True)
    assert (found.p95_us, found.p99_us) == (95.0, 99.0) and found.to_dict()["p99_us"] == 99.0


def test_single_calls_are_samples_of_their_own():
    clock = Clock()
    found = measure(clock.call("a", 3e-6), device="cpu", budget_s=0.001, single=True, clock=clock)
    assert len(clock.log) == 4 + found.repeats and found.p99_us == pytest.approx(3.0)
    # Two calls a turn: a sample is their mean, and says nothing of either's tail.
    assert measure([clock.call("a", 1e-3)] * 2, device="cpu", single=True, clock=clock).p99_us is None
    # A call as long as the shortest stretch is a sample by itself.
    assert measure(clock.call("a", 1e-3), device="cpu", clock=clock).p99_us == pytest.approx(1000.0)


def test_one_slow_sample_moves_no_statistic_far():
    found = Timing.from_samples([10.0] * 9 + [10_000.0], "cpu-wall")
    assert (found.median_us, found.p20_us, found.p80_us, found.mad_us) == (10.0, 10.0, 10.0, 0.0)


def test_measure_reports_the_scripted_duration_and_spends_the_budget():
    clock = Clock()
    found = measure(clock.call("a", 1e-3), device="cpu", budget_s=0.02, clock=clock)
    assert found.median_us == pytest.approx(1000.0)
    assert found.mode == "cpu-wall"
    assert found.repeats in (20, 21)  # sums of 1e-3 round either way


def test_a_slow_call_still_gets_its_least_repeats_and_one_warm_up():
    clock = Clock()
    found = measure(clock.call("a", 1.0), device="cpu", budget_s=0.1, min_repeats=5, clock=clock)
    assert found.repeats == 5
    assert len(clock.log) == 1 + 1 + 5  # a warm-up, the rough estimate, the samples


def test_short_calls_share_a_sample_and_are_reported_singly():
    clock = Clock()
    found = measure(clock.call("a", 3e-6), device="cpu", budget_s=0.01, min_repeats=7, clock=clock)
    assert found.median_us == pytest.approx(3.0)
    # 17 calls of 3 us are the first to reach the shortest sample, 50 us; 4 went to warming up and a rough estimate.
    assert len(clock.log) == 4 + 17 * found.repeats


def test_a_sequence_of_calls_is_one_turn_and_its_mean_is_reported():
    clock = Clock()
    found = measure([clock.call("a", 1e-3), clock.call("b", 3e-3)], device="cpu", budget_s=0.02, clock=clock)
    assert found.median_us == pytest.approx(2000.0)
    assert all(left != right for left, right in pairwise(clock.log))


def test_measure_together_takes_turns():
    clock = Clock()
    calls = {"a": clock.call("a", 1e-3), "b": clock.call("b", 2e-3)}
    found = measure_together(calls, device="cpu", budget_s=0.03, clock=clock)
    assert list(found) == ["a", "b"]
    assert found["a"].median_us == pytest.approx(1000.0)
    assert found["b"].median_us == pytest.approx(2000.0)
    assert found["a"].repeats == found["b"].repeats
    assert clock.log == ["a", "b"] * (len(clock.log) // 2)


def test_a_machine_that_slows_down_leaves_the_ratio_alone():
    clock = Clock()

    def drifting(seconds: float):
        def run() -> None:
            clock.now += seconds * (1.0 if clock.now < 0.1 else 3.0)

        return run

    found = measure_together({"a": drifting(1e-3), "b": drifting(2e-3)}, device="cpu", budget_s=0.5, clock=clock)
    assert found["b"].median_us / found["a"].median_us == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("weight", "l2", "count"),
    [
        (1000, 0, 1),  # no cache, nothing to outgrow
        (1000, 1000, 2),
        (3072 * 768 * 2, 60 << 20, 27),  # 4.7 MB among twice 60 MiB
        (1 << 30, 60 << 20, 1),  # outgrows the cache alone
        (1, 1 << 20, 256),
    ],
)
def test_rotation_count(weight: int, l2: int, count: int):
    assert rotation_count(weight, l2) == count
    assert count == 256 or count * weight >= 2 * l2 or l2 == 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="graph=True needs a CUDA device, got cpu"):
        measure(lambda: None, device="cpu", graph=True)
    with pytest.raises(ValueError, match="device is meta, expected cpu or cuda"):
        measure(lambda: None, device="meta")
    with pytest.raises(ValueError, match="min_repeats=0, expected at least 1"):
        measure(lambda: None, device="cpu", min_repeats=0)
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_together({}, device="cpu")
    with pytest.raises(ValueError, match="empty sequence of calls"):
        measure([], device="cpu")
    with pytest.raises(ValueError, match="bytes_per_copy is 0"):
        rotation_count(0, 1)
    with pytest.raises(ValueError, match="capture: device is cpu"):
        timing.capture(lambda: None, "cpu")
    with pytest.raises(ValueError, match="no samples"):
        Timing.from_samples([], "cpu-wall")


class FakeCuda:
    """The few names of ``torch.cuda`` that the timing core uses, on a clock that calls move at replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        self.clock = clock
        self.recording: list | None = None
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list = []

            def replay(self) -> None:
                for name, seconds in self.work:
                    clock.call(name, seconds)()

        @contextlib.contextmanager
        def graph(recorded: CUDAGraph, stream: Stream):
            fake.recording = recorded.work
            yield
            fake.recording = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def call(self, name: str, seconds: float):
        def run() -> None:
            if self.recording is not None:
                self.recording.append((name, seconds))
            else:
                self.clock.call(name, seconds)()

        return run


def test_graph_replay_is_timed_per_rotated_call(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    cuda = FakeCuda(monkeypatch, clock)
    calls = [cuda.call(f"copy {i}", 1e-5) for i in range(10)]
    found = measure(calls, device="cuda", budget_s=0.02, graph=True, clock=clock)
    assert found.mode == "cuda-graph"
    assert found.median_us == pytest.approx(10.0)
    assert clock.log == [f"copy {i % 10}" for i in range(len(clock.log))]


def test_event_timing_keeps_several_calls_apart(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    cuda = FakeCuda(monkeypatch, clock)
    calls = {"a": cuda.call("a", 1e-3), "b": cuda.call("b", 4e-3)}
    found = measure_together(calls, device="cuda", budget_s=0.1, clock=clock)
    assert {timing.mode for timing in found.values()} == {"cuda-events"}
    assert found["a"].median_us == pytest.approx(1000.0)
    assert found["b"].median_us == pytest.approx(4000.0)


def test_real_clock_on_this_cpu():
    found = measure(lambda: sum(range(100)), device="cpu", budget_s=0.01)
    assert 0 < found.p20_us <= found.median_us <= found.p80_us
    assert found.repeats >= 5


def test_environment_names_what_a_reader_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPARSEBERT_COMMIT", raising=False)
    record = environments.environment("cpu")
    wanted = "sparsebert commit date dirty measured triton_sources cuda_sources "
    wanted += "python platform torch triton transformers cpu cpu_count cpu_threads "
    wanted += "gpu sm_count capability l2_bytes gpu_memory_bytes cuda driver cusparselt"
    assert sorted(record) == sorted(wanted.split())
    assert json.loads(json.dumps(record)) == record
    assert record["torch"] == torch.__version__
    assert record["cpu_threads"] == torch.get_num_threads()
    assert record["gpu"] is None and record["driver"] is None


def test_kernel_sources_are_told_apart_by_name_and_text(tmp_path):
    assert environments._digest(tmp_path / "absent", (".cu",)) is None
    (tmp_path / "a.cu").write_text("one")
    first = environments._digest(tmp_path, (".cu",))
    (tmp_path / "notes.md").write_text("not a source")
    assert environments._digest(tmp_path, (".cu",)) == first
    (tmp_path / "a.cu").write_text("two")
    second = environments._digest(tmp_path, (".cu",))
    (tmp_path / "a.cu").rename(tmp_path / "b.cu")
    assert len({first, second, environments._digest(tmp_path, (".cu",))}) == 3
    record = environments.environment("cpu")
    assert record["triton_sources"] != record["cuda_sources"] and len(record["triton_sources"]) == 16


def test_commit_comes_from_the_environment_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSEBERT_COMMIT", "abc123")
    monkeypatch.setenv("SPARSEBERT_DATE", "2026-01-02")
    record = environments.environment("cpu")
    assert (record["commit"], record["date"], record["dirty"]) == ("abc123", "2026-01-02", None)


def test_an_installed_copy_takes_no_commit_from_the_checkout_around_it(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.delenv("SPARSEBERT_COMMIT", raising=False)
    monkeypatch.delenv("SPARSEBERT_DATE", raising=False)
    inside = tmp_path / ".venv" / "site-packages"
    monkeypatch.setattr(environments, "__file__", str(inside / "sparsebert" / "bench" / "environment.py"))
    answers = {"rev-parse --show-toplevel": str(tmp_path), "rev-parse HEAD": "somebody else's"}
    monkeypatch.setattr(environments, "_output", lambda *command: answers.get(" ".join(command[3:])))
    record = environments.environment("cpu")
    assert (record["commit"], record["date"], record["dirty"]) == ("unknown", "unknown", None)


def test_commit_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.delenv("SPARSEBERT_COMMIT", raising=False)
    monkeypatch.delenv("SPARSEBERT_DATE", raising=False)
    monkeypatch.setattr(environments, "__file__", str(tmp_path / "sparsebert" / "bench" / "environment.py"))
    answers = {
        "rev-parse --show-toplevel": str(tmp_path),
        "rev-parse HEAD": "f00d",
        "show -s --format=%cI HEAD": "2026-02-03T04:05:06+00:00",
        "status --porcelain": " M README.md",
    }
    monkeypatch.setattr(environments, "_output", lambda *command: answers.get(" ".join(command[3:])))
    record = environments.environment("cpu")
    assert (record["commit"], record["date"], record["dirty"]) == ("f00d", "2026-02-03T04:05:06+00:00", True)
    answers["status --porcelain"] = ""
    assert environments.environment("cpu")["dirty"] is False


def test_a_program_that_is_not_there_has_no_output():
    assert environments._output("no-such-program-anywhere") is None


def test_device_label_of_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environments, "_cpu_model", lambda: "Some Processor")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert environments.device_label("cpu") == "CPU: Some Processor (2 threads)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert environments.device_label(torch.device("cpu")) == "CPU: Some Processor (1 thread)"
