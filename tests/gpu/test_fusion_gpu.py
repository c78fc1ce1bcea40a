"""``varlen_attention`` and ``fuse_`` on a GPU: flash against float64, every format against the unfused model, and the
whole way with ``Runner``. Needs a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import sparsebert as sb
from sparsebert import ops
from sparsebert.nn import Int8Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS, SIZE = 4, 64
# Sizes that every kernel takes.
CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "max_position_embeddings": 160,
}
FORMATS = [
    None,
    sb.NMConfig(2, 4),
    sb.BitmapConfig(0.2),
    sb.LowRankConfig(ratio=0.25),
    sb.LowRankSparseConfig(ratio=0.2, sparse=sb.RowsConfig(0.1)),
    sb.LowRankSparseConfig(ratio=0.2, sparse=sb.NMConfig(2, 4)),
    sb.Int8Config(),
    sb.Int8Config("static"),
    sb.Int8Config(weights=sb.NMConfig(2, 4)),
]


def projected(lengths, dtype, *, tail=0):
    """q, k and v as slices of one projection, on the GPU, and the ends."""
    qkv = torch.randn(sum(lengths) + tail, 3 * HEADS * SIZE).to("cuda", dtype)
    return (*qkv.chunk(3, dim=1), torch.tensor((0, *lengths)).cumsum(0).int().cuda())


def one_by_one(q, k, v, ends, dtype):
    """torch's attention of each sequence in ``dtype``."""
    y = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if begin < end:
            parts = [x[begin:end].to(dtype).unflatten(1, (HEADS, SIZE)).transpose(0, 1)[None] for x in (q, k, v)]
            y[begin:end] = torch.nn.functional.scaled_dot_product_attention(*parts)[0].transpose(0, 1).flatten(1)
    return y


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(5,), (1, 128, 33, 0, 7), (150,) * 9, (1,) * 70], ids=lambda x: str(len(x)))
def test_attention(lengths, dtype, backend):
    if backend == "torch" and dtype == torch.float32:
        pytest.skip("flash attention has 16 bits")
    q, k, v, ends = projected(lengths, dtype, tail=3)
    total = sum(lengths)
    exact, theirs = one_by_one(q, k, v, ends, torch.float64)[:total], one_by_one(q, k, v, ends, dtype)[:total]
    with sb.backend(backend):
        y = ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=max(lengths) + 2)
    assert y.shape == q.shape and y.is_contiguous()
    allowed = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y[:total].double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_neighbours_do_not_matter_to_attention(backend):
    q, k, v, _ = projected((200,), torch.float16)
    found = []
    for lengths in ((10, 50, 140), (3, 7, 50, 100, 40), (10, 50)):
        ends = torch.tensor((0, *lengths)).cumsum(0).int().cuda()
        with sb.backend(backend):
            found.append(ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=140)[10:60])
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_attention_in_a_graph(backend):
    """With other ends than it was captured with."""
    q, k, v, ends = projected((30, 40, 26), torch.float16)
    with sb.backend(backend), torch.inference_mode():
        run = lambda: ops.varlen_attention(q, k, v, ends, heads=HEADS, max_length=96)  # noqa: E731
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for lengths in ((30, 40, 26), (96, 0, 0), (1, 2, 50)):
            ends.copy_(torch.tensor((0, *lengths)).cumsum(0).int())
            graph.replay()
            assert torch.equal(y[: sum(lengths)], run()[: sum(lengths)])


def prepared(config, dtype):
    """A model in ``dtype``, and a batch of rows of 1 to 128 tokens with its mask on the CPU."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = model.to("cuda", dtype)
    lengths = torch.tensor([128, 40, 1, 77, 19])
    mask = (torch.arange(128) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(0, 1000, (5, 128)).cuda(), "attention_mask": mask}
    if config is not None:
        sb.compress_(model, config)
        if any(isinstance(m, Int8Linear) and m.spec.activations == "static" for m in model.modules()):
            sb.calibrate(model, [{**inputs, "attention_mask": mask.cuda()}])
    return model, inputs


@torch.inference_mode()
def states(model, inputs, *, masked_on="cuda"):
    mask = inputs["attention_mask"]
    return model(inputs["input_ids"], mask.to(masked_on)).last_hidden_state[mask.bool()].double()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_fused_as_unfused(config, dtype):
    model, inputs = prepared(config, dtype)
    exact = copy.deepcopy(model)
    exact = (exact if config is None else sb.decompress_(exact)).double()
    true, theirs = states(exact, inputs), states(model, inputs)
    report = sb.fuse_(model)
    assert report.layers == 2 and not report.separate
    runner = sb.Runner(model)
    for found in (
        states(model, inputs),
        states(model, inputs, masked_on="cpu"),
        states(runner, inputs, masked_on="cpu"),
        states(runner, inputs, masked_on="cpu"),
    ):
        # Integers between two may be rounded the other way, from layer to layer; on average that is as far off.
        assert (found - true).abs().mean() <= 1.2 * (theirs - true).abs().mean()
        assert (found - true).abs().max() <= 2 * (theirs - true).abs().max()
    graphs = runner.report()
    assert graphs.calls == 2 and not graphs.fallbacks and graphs.graphs[0].tokens == 320


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_graph_for_every_batch(dtype):
    """Batches of other lengths by the same graphs: as without them."""
    model, inputs = prepared(sb.Int8Config(weights=sb.NMConfig(2, 4)), dtype)
    sb.fuse_(model)
    runner = sb.Runner(model, max_graphs=3)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        rows = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(1, 129, (rows,), generator=generator)
        mask = (torch.arange(128) < lengths[:, None]).long()
        batch = {
            "input_ids": torch.randint(0, 1000, (rows, 128), generator=generator).cuda(),
            "attention_mask": mask,
        }
        alone = states(model, batch)
        found = states(runner, batch, masked_on="cpu")
        # Another number of rows may be summed in another order.
        assert (found - alone).abs().mean() <= 2e-2 * alone.abs().mean()
    report = runner.report()
    assert report.calls == 12 and len(report.graphs) == 3 and not report.fallbacks
