"""Two processes under torchrun: masks equal on both ranks, and equal to those of one process with the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from method_cases import METHODS
from tiny_models import FAMILIES, tiny_model

STEPS, RANKS = 6, 2


def bert(seed: int) -> torch.nn.Module:
    """Without noise, and in float64: sums in another order then decide no comparison."""
    model = tiny_model("bert", seed=seed).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train(name: str, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Masks, or whatever else of the run is bool, and the weights after training on this rank's part of the batches
    (None: on all of them)."""
    model = bert(0)
    run = METHODS[name].prepare(model, STEPS, bert(1))
    trained = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    run.attach(optimizer)
    trained.train()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, FAMILIES["bert"][2]["vocab_size"], (2 * RANKS, 6), generator=generator)
        batch = {"input_ids": ids, "labels": ids[:, 0] % 2}
        if rank is not None:
            batch = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
        optimizer.zero_grad()
        run.total_loss(trained(**batch), batch).backward()
        optimizer.step()
    found = {f"state.{kind}.{path}": tensor for kind, held in run.state.items() for path, tensor in held.items()}
    run.finalize().verify(model)
    return {**found, **{f"weight.{path}": run.weight(path).detach() for path in run.configs}}


def main(folder: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name in METHODS:
        found = {key: tensor.clone() for key, tensor in train(name, rank).items()}
        save_file(found, Path(folder, f"{name}-{rank}.safetensors"))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    result = subprocess.run(
        [*command, str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests"))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    if result.returncode:
        pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_those_of_one_process(name, folder):
    ranks = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(RANKS)]
    alone = train(name)
    assert ranks[0].keys() == ranks[1].keys() == alone.keys()
    for key, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][key]), key
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, alone[key], rtol=1e-7, atol=1e-9, msg=key)
        else:
            assert torch.equal(tensor, alone[key]), key
    # The training was one, and what is out took no part.
    start, moved = bert(0), 0
    for path in (key.removeprefix("weight.") for key in alone if key.startswith("weight.")):
        kept = alone[f"weight.{path}"] != 0
        moved += int((alone[f"weight.{path}"][kept] != start.get_submodule(path).weight[kept]).sum())
    assert moved > 1000


if __name__ == "__main__":
    main(sys.argv[1])
