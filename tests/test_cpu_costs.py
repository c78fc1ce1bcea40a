"""benchmarks/cpu_costs: it is collected as a whole, and one small benchmark of it runs and is judged."""

import json
import subprocess
import sys


def suite(root, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/cpu_costs", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
    )


def test_it_is_collected_and_a_small_one_runs(root, tmp_path):
    file = tmp_path / "ratios.jsonl"
    done = suite(root, "--benchmark-disable", "-k", "test_every_class_is_here or DenseLinear-neutral", "--ratios", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    deselected = int(done.stdout.split(" deselected")[0].split()[-1])
    assert deselected > 80, done.stdout
    # Nothing was measured, so nothing is judged.
    (record,) = map(json.loads, file.read_text().splitlines())
    assert record["environment"]["torch"]
