"""calibrate: the scales are those of the numbers that really flow in, and a failure changes nothing."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.nn import Int8Linear
from tiny_models import inputs, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

BINS = 2048


def static(in_features=12, out_features=8, seed=0, pattern=None, activation="none"):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features)
    if pattern is not None:
        from sparsebert.formats import nm

        linear.weight.data = nm.project(linear.weight.data, pattern.n, pattern.m)
    layer = Int8Linear.from_linear(linear, sb.Int8Config("static", pattern), name="layer").prepare_("auto")
    layer.activation = activation
    return layer


def batches(count=5, features=12, *, seed=1):
    """Of growing range, so that the histogram has to."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 7, features, generator=generator) * (0.3 * 3**i) for i in range(count)]


def seen_by(model, data, paths):
    """What flows into each layer when static layers quantize as dynamic ones do: by modules that are dynamic."""
    twin = copy.deepcopy(model)
    numbers = {path: [] for path in paths}
    for path in paths:
        layer = twin.get_submodule(path)
        dense = layer.to_linear()
        config = sb.Int8Config("dynamic", None if layer.spec.m == 1 else sb.NMConfig(layer.spec.n, layer.spec.m))
        dynamic = Int8Linear.from_linear(dense, config).prepare_("neutral")
        # The very integers: quantizing what they stand for again may round them otherwise.
        for name, tensor in zip(("values", "positions", "scales"), layer.neutral(), strict=False):
            if name in dynamic._buffers and len(layer.neutral()) == (4 if layer.spec.m > 1 else 3):
                dynamic._buffers[name] = tensor
        if layer.spec.m == 1:
            dynamic._buffers["values"], dynamic._buffers["scales"] = layer.neutral()[:2]
        dynamic.activation = layer.activation
        parent, _, name = path.rpartition(".")
        twin.get_submodule(parent)._modules[name] = dynamic
        dynamic.register_forward_pre_hook(
            lambda module, args, path=path: numbers[path].append(args[0].detach().abs().float().flatten())
        )
    with torch.no_grad():
        for batch in data:
            twin(**batch) if isinstance(batch, dict) else twin(batch)
    return {path: torch.cat(found).double().numpy() for path, found in numbers.items()}


def ranges(numbers_by_batch):
    """Width of a bin when the range starts at the first batch's largest and doubles."""
    width = 0.0
    for numbers in numbers_by_batch:
        top = float(numbers.max())
        width = width or top
        while top > width > 0:
            width *= 2
    return width / BINS


def chain(activation="relu"):
    return nn.Sequential(static(activation=activation), static(8, 6, 2, sb.NMConfig(2, 4)), nn.Linear(6, 2))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_minmax_is_the_largest_number_of_all_batches(activation):
    model, data = chain(activation), batches()
    seen = seen_by(model, data, ["0", "1"])
    report = sb.calibrate(model, iter(data))
    assert [layer.path for layer in report.layers] == ["0", "1"] and report.batches == 5
    for layer in report.layers:
        numbers = seen[layer.path]
        assert layer.count == len(numbers) and layer.largest == layer.clipped_at == numbers.max()
        assert layer.input_scale == numbers.max() / 127
        held = model.get_submodule(layer.path).state_dict()["input_scale"]
        assert held.dtype == torch.float32 and held == torch.tensor(layer.input_scale)
        assert model.get_submodule(layer.path).has_input_scale
    assert torch.isfinite(model(data[0])).all()


@pytest.mark.parametrize("percent", [50, 90, 99.5, 99.99, 100])
def test_percentile_is_that_of_all_numbers_to_one_bin(percent):
    model, data = chain(), batches()
    seen = seen_by(model, data, ["0", "1"])
    report = sb.calibrate(model, data, "percentile", percentile=percent)
    sizes = {"0": 2 * 7 * 12, "1": 2 * 7 * 8}
    for layer in report.layers:
        numbers = seen[layer.path]
        bin_width = ranges(np.split(numbers, len(numbers) // sizes[layer.path]))
        exact = np.sort(numbers)[max(0, math.ceil(percent / 100 * len(numbers)) - 1)]
        assert 0 <= layer.clipped_at - exact <= bin_width * (1 + 1e-5) or layer.clipped_at == numbers.max() == exact
        assert layer.clipped_at <= layer.largest == numbers.max()
        assert layer.input_scale == layer.clipped_at / 127


def squared_error(numbers, clip):
    scale = clip / 127
    return float(np.square(np.clip(np.rint(numbers / scale), -127, 127) * scale - numbers).sum())


@pytest.mark.parametrize("tail", [0, 6, 60])
def test_mse_finds_the_least_squared_error(tail):
    """Against every candidate on the numbers themselves; the histogram moves each of them by half a bin at most."""
    layer = static()
    data = batches(3)
    for batch in data:
        batch[0, 0, 0] = tail * batch.abs().max() if tail else batch[0, 0, 0]
    numbers = torch.cat([batch.abs().flatten() for batch in data]).double().numpy()
    (found,) = sb.calibrate(nn.Sequential(layer), data, "mse").layers
    clips = numbers.max() * np.arange(1, 129) / 128
    errors = np.array([squared_error(numbers, clip) for clip in clips])
    best = errors.min()
    width = ranges([batch.abs() for batch in data])
    # |error of a number| moves by half a bin at most, so the root of the sum by half a bin times root n (Minkowski);
    # once for the candidate that was taken and once for the best.
    slack = 2 * (width / 2) * math.sqrt(len(numbers))
    assert math.sqrt(squared_error(numbers, found.clipped_at)) <= math.sqrt(best) + slack
    assert any(math.isclose(found.clipped_at, clip, rel_tol=1e-6) for clip in clips)
    if tail == 0:
        assert found.clipped_at > 0.5 * numbers.max()


def test_a_module_that_is_used_twice_sees_both():
    layer = static(8, 8)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = layer
            self.again = layer

        def forward(self, x):
            return self.again(self.first(x) * 50)

    data = batches(2, 8)
    (found,) = sb.calibrate(Twice(), data).layers
    assert found.path == "first" and found.count == 2 * sum(batch.numel() for batch in data)
    assert found.largest > max(float(batch.abs().max()) for batch in data) * 2


def test_batches_may_be_mappings_tuples_lists_or_tensors():
    model = tiny_model()
    sb.compress_(model, sb.Int8Config("static"))
    twins = [copy.deepcopy(model) for _ in range(4)]
    mask = torch.ones(2, 7, dtype=torch.long)
    forms = [
        [{"input_ids": tokens(), "attention_mask": mask, "return_dict": True}],
        [(tokens(), mask)],
        [[tokens(), mask]],
        (tokens() for _ in range(1)),
    ]
    reports = [sb.calibrate(twin, form) for twin, form in zip(twins, forms, strict=True)]
    assert len(reports[0].layers) == 12
    assert all(report.layers == reports[0].layers for report in reports)


def test_a_real_model_sees_its_own_numbers():
    model = tiny_model()
    sb.compress_(model, {"intermediate": sb.Int8Config("static"), "output": sb.Int8Config("static", sb.NMConfig(2, 4))})
    paths = [path for path, module in model.named_modules() if isinstance(module, Int8Linear)]
    data = [{"input_ids": torch.randint(3, 100, (2, length))} for length in (7, 12)]
    seen = seen_by(model, data, paths)
    report = sb.calibrate(model, data)
    for layer in report.layers:
        assert layer.largest == seen[layer.path].max() and layer.count == len(seen[layer.path])
    assert torch.isfinite(model(**inputs(model))[0]).all()


def held(model):
    return {
        path: (
            next(t for name, t in module.named_buffers() if name.endswith("input_scale")).item(),
            module.has_input_scale,
            module.layout,
            module.requested_layout,
        )
        for path, module in model.named_modules()
        if isinstance(module, Int8Linear)
    }


class Skips(nn.Module):
    """Never calls its second layer."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = static(), static()

    def forward(self, x):
        return self.used(x)


class Breaks(Skips):
    def forward(self, x):
        self.used(x)
        raise RuntimeError("in the middle")


def with_number(value):
    bad = batches(2)
    bad[1][1, 2, 3] = value
    return bad


@pytest.mark.parametrize(
    ("make_model", "data", "options", "error", "message"),
    [
        (chain, [], {}, ValueError, "calibrate: batches is empty, expected at least one"),
        (chain, with_number(math.nan), {}, ValueError, "0: x holds NaN or infinities while calibrating"),
        (chain, with_number(math.inf), {}, ValueError, "0: x holds NaN or infinities while calibrating"),
        (chain, [torch.zeros(0, 12)], {}, ValueError, "0: no number flowed into this layer while calibrating"),
        (Skips, batches(), {}, ValueError, "unused: no number flowed into this layer while calibrating"),
        (Breaks, batches(), {}, RuntimeError, "in the middle"),
        (chain, batches(), {"method": "max"}, ValueError, "method is 'max', expected one of minmax, percentile, mse"),
        (chain, batches(), {"percentile": 0}, ValueError, "percentile is 0, expected above 0 and at most 100"),
        (chain, batches(), {"percentile": 101}, ValueError, "percentile is 101"),
        (chain, batches(), {"percentile": math.nan}, ValueError, "percentile is nan"),
    ],
)
def test_a_failure_changes_nothing(make_model, data, options, error, message):
    model = make_model().train()
    layer = next(module for module in model.modules() if isinstance(module, Int8Linear))
    layer.set_input_scale_(0.5)
    layer.prepare_("dense")
    before, hooks = held(model), [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(error, match=message):
        sb.calibrate(model, data, **options)
    assert held(model) == before and all(module.training for module in model.modules())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(module.calibrating for module in model.modules() if isinstance(module, Int8Linear))


@pytest.mark.parametrize("config", [sb.Int8Config(), sb.NMConfig(2, 4)])
def test_a_model_without_static_layers_is_refused(config):
    model = tiny_model()
    sb.compress_(model, config)
    with pytest.raises(ValueError, match="BertForSequenceClassification: no layer has static int8 activations; comp"):
        sb.calibrate(model, [inputs(model)])
    with pytest.raises(ValueError, match="no layer is packed; call compress_ first"):
        sb.calibrate(tiny_model(), [inputs(model)])


@pytest.mark.parametrize("layout", ["neutral", "dense", "float", "auto"])
def test_modes_layouts_and_gradients_come_back(layout):
    model = chain().train()
    model[2].eval()
    model.add_module("drop", nn.Dropout(0.5))
    for layer in model[:2]:
        layer.prepare_(layout)
    before = [module.training for module in model.modules()]
    layouts_before = [(layer.layout, layer.requested_layout) for layer in model[:2]]
    data = batches()
    sb.calibrate(model, data)
    assert [module.training for module in model.modules()] == before
    assert [(layer.layout, layer.requested_layout) for layer in model[:2]] == layouts_before
    model(data[0]).sum().backward()
    assert model[0].bias.grad is not None


def test_dynamic_layers_beside_them_quantize_too():
    """Scales are for every device, and must not depend on what holds the layers before them here."""
    largest = {}
    for layout in ("neutral", "dense"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        sb.compress_(model, {"0": sb.Int8Config(), "1": sb.Int8Config("static")}, layout=layout)
        largest[layout] = sb.calibrate(model, [torch.randn(20, 12, generator=torch.Generator().manual_seed(1))]).layers
        assert model[0].layout == layout
    assert largest["neutral"] == largest["dense"]


def test_a_second_calibration_replaces_the_first():
    """And does not see through the scales of the first."""
    model, fresh = chain(), chain()
    sb.calibrate(model, [batch * 1e-3 for batch in batches()])
    again, expected = sb.calibrate(model, batches()), sb.calibrate(fresh, batches())
    assert again.layers == expected.layers
    assert torch.equal(model(batches()[0]), fresh(batches()[0]))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 3e38])
def test_ranges_at_the_ends_of_fp32_have_a_scale(method, size):
    """Nothing but zeros, or numbers too small for a step of their own, round to zero with any step."""
    model = nn.Sequential(static())
    x = torch.full((2, 12), size)
    (layer,) = sb.calibrate(model, [x], method).layers
    assert math.isfinite(layer.input_scale) and 2.0**-125 <= layer.input_scale <= 2.0**125
    assert layer.input_scale == (1.0 if size < 1e-36 else pytest.approx(layer.clipped_at / 127))
    assert layer.largest == torch.tensor(size).item()


def test_zeros_before_the_first_number_are_counted():
    model = nn.Sequential(static())
    data = [torch.zeros(2, 12), torch.ones(1, 12)]
    (layer,) = sb.calibrate(model, data, "percentile", percentile=60).layers
    assert layer.count == 36 and layer.clipped_at <= 1 / BINS
    (layer,) = sb.calibrate(model, data, "percentile", percentile=70).layers
    assert layer.clipped_at == 1


def test_counts_beyond_what_fp32_counts():
    """A histogram in fp32 stops counting at 2**24, which one batch of a large model reaches."""
    from sparsebert.calibration import _Observer

    observer = _Observer()
    x = torch.zeros(1 << 24)
    x[0] = 1.0
    for _ in range(2):
        observer.add(torch.cat((x, x[1:5])))
    assert observer.count == 2 * ((1 << 24) + 4) == int(observer._bins.sum())


def test_the_report_is_json_and_text():
    model = chain()
    report = sb.calibrate(model, batches(), "percentile", percentile=99)
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["method"], data["batches"]) == ("percentile", 5)
    assert set(data["layers"][0]) == {"path", "count", "largest", "clipped_at", "input_scale"}
    text = str(report)
    assert text == repr(report) and text.startswith("calibrated 2 layers on 5 batches, percentile\n")
    assert "numbers seen" in text and f"{report.layers[0].count:,}" in text and "clipped at" in text
