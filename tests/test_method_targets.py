"""Every method meets its target in the file that it is exported to: counted in the file's own tensors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import sparsebert as sb
from method_cases import METHODS
from sparsebert.formats import low_rank
from tiny_models import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


def exported(row, folder):
    """Configs by path as they were asked for, and the tensors of the file, after a few steps of training."""
    model = tiny_model()
    run = row.prepare(model, STEPS, tiny_model(seed=5))
    configs = dict(run.configs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    run.attach(optimizer)
    model.train()
    for _ in range(STEPS):
        inputs = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
        optimizer.zero_grad()
        run.total_loss(model(**inputs), inputs).backward()
        optimizer.step()
    sb.compress_(model, run.finalize())
    sb.save_pretrained(model, folder)
    return model, configs, load_file(folder / "model.safetensors")


def bits_set(packed: torch.Tensor) -> int:
    return sum(int(((packed >> bit) & 1).sum()) for bit in range(8))


@pytest.mark.parametrize("name", METHODS)
def test_the_file_holds_what_was_asked_for(name, tmp_path):
    model, configs, tensors = exported(METHODS[name], tmp_path)
    assert len(configs) == 12
    # (numbers that are there, numbers that were asked for) of the layers that may share a threshold.
    entries: list[tuple[int, float]] = []
    in_rows: list[tuple[int, float]] = []
    for path, config in configs.items():
        dense = model.get_submodule(path)
        out_features, in_features = dense.out_features, dense.in_features
        if isinstance(config, sb.NMConfig):
            assert tensors[f"{path}.values"].shape == (out_features, in_features * config.n // config.m)
        elif isinstance(config, sb.Int8Config):
            values = tensors[f"{path}.values"]
            assert values.dtype == torch.int8
            n, m = (config.weights.n, config.weights.m) if config.weights else (1, 1)
            assert values.shape == (out_features, in_features * n // m)
        elif isinstance(config, sb.BitmapConfig):
            found = bits_set(tensors[f"{path}.bitmap"])
            assert found == len(tensors[f"{path}.values"])
            entries.append((found, config.density * out_features * in_features))
        else:
            rank = config.rank or low_rank.rank_for_ratio(config.ratio, out_features, in_features)
            assert tensors[f"{path}.u"].shape == (out_features, rank)
            assert tensors[f"{path}.v"].shape == (rank, in_features)
            sparse = config.sparse if isinstance(config, sb.LowRankSparseConfig) else None
            if isinstance(sparse, sb.RowsConfig):
                found = tensors[f"{path}.sparse.values"].numel()
                assert found == len(tensors[f"{path}.sparse.rows"]) * in_features
                in_rows.append((found, sparse.ratio * out_features * in_features))
            elif isinstance(sparse, sb.NMConfig):
                found = tensors[f"{path}.sparse.values"].shape
                assert found == (out_features, in_features * sparse.n // sparse.m)
            elif isinstance(sparse, sb.BitmapConfig):
                found = bits_set(tensors[f"{path}.sparse.bitmap"])
                entries.append((found, sparse.density * out_features * in_features))
    # A layer rounds its own number, and one threshold the sum: within half an entry a layer, or one row.
    assert abs(sum(found - asked for found, asked in entries)) <= len(entries) / 2
    assert abs(sum(found - asked for found, asked in in_rows)) <= 64
