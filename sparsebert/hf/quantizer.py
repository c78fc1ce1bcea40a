"""The quantizer plug-in: what stock ``save_pretrained`` and ``from_pretrained`` need to know about packed layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsebert import storage
from sparsebert.nn import PackedLinear, module_from_entry
from sparsebert.storage import Stored
from sparsebert.swap import (
    FORMAT_VERSION,
    QUANT_METHOD,
    check_compaction,
    decompress_,
    quantization_config,
    swap_in_,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIELDS = ("quant_method", "format_version", "layers")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
# What a checkpoint leaves out is made by transformers: a new head, positions. More than this is no such thing.
_SPARE_BYTES = 64 << 20
_SPARE_FACTOR = 4
_SHOWN = 5

# What sb.load_pretrained calls the checkpoint that it is loading; None within a plain from_pretrained.
_strict: ContextVar[str | None] = ContextVar("sparsebert_strict", default=None)


@contextmanager
def strict(checkpoint: str) -> Iterator[None]:
    """Inside, a model has to fit the files of ``checkpoint`` exactly, or it is refused before any tensor is loaded."""
    token = _strict.set(checkpoint)
    try:
        yield
    finally:
        _strict.reset(token)


class SparsebertConfig(QuantizationConfigMixin):
    """``quantization_config`` in a checkpoint's config.json: ``{quant_method, format_version, layers: {path: entry}}``.

    ``to_dict()`` gives back exactly that map. ``ValueError`` for another method or version, or a map that is no map;
    an entry itself is checked where its layer is built.
    """

    def __init__(
        self,
        # Any key of the file is to be refused below, "self" too.
        /,
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        layers: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(
                f"quantization_config: quant_method is {storage.short(repr(quant_method))}, expected {QUANT_METHOD!r}"
            )
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version is {storage.short(repr(format_version))}, "
                f"this sparsebert reads {FORMAT_VERSION}"
            )
        if unknown:
            raise ValueError(
                f"quantization_config: unknown fields {storage.short(str(sorted(unknown)))}, expected "
                f"{', '.join(_FIELDS)} only"
            )
        if not isinstance(layers, dict) or not layers:
            shown = "empty" if layers == {} else type(layers).__name__
            raise ValueError(f"quantization_config: layers is {shown}, expected an object of layer path: entry")
        for path, entry in layers.items():
            if not storage.is_name(path) or not all(path.split(".")):
                raise ValueError(f"quantization_config: {storage.short(repr(path))} is not a module path")
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: layer map entry is {type(entry).__name__}, expected a JSON object")
            for key, kind in (("role", str), ("index", int), ("format", str)):
                if entry.get(key) is not None and type(entry[key]) is not kind:
                    raise ValueError(
                        f"{path}: layer map gives {key} as {storage.short(repr(entry[key]))}, expected "
                        f"{kind.__name__} or null"
                    )
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers takes any string of a plug-in
        self.format_version = format_version
        self.layers = layers


class SparsebertHfQuantizer(HfQuantizer):
    """Replaces ``nn.Linear`` by unfilled packed modules before a checkpoint is loaded, and finishes them afterwards."""

    quantization_config: SparsebertConfig

    def __init__(self, quantization_config: SparsebertConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "sparsebert: quantization_config= cannot compress a dense checkpoint while it loads; load it without "
                "and call sparsebert.compress_(model, ...)"
            )
        # Own path -> the dtype the model wants; tensors are loaded in the dtype they are stored in.
        self._wanted: dict[str, torch.dtype] = {}
        self._shapes: dict[str, torch.Size] = {}
        # Own path -> a file that holds tensors of it.
        self._files: dict[str, Path] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = (
            {str(place).partition(":")[0] for place in device_map.values()} if isinstance(device_map, dict) else set()
        )
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "sparsebert: this device_map offloads layers to the CPU or disk, expected all layers to stay on devices"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        checkpoint = _strict.get()
        modules: dict[str, PackedLinear] = {}
        layers: dict[str, dict[str, Any]] = {}
        for path, own, linear in _resolve(model, self.quantization_config.layers, whole=checkpoint is not None):
            entry = self.quantization_config.layers[path]
            if own in layers:
                raise ValueError(f"{path}: the layer map names this layer twice")
            wanted = linear.weight.dtype
            packed = unfilled(entry, path, dtype=wanted)
            for what, actual, expected in (
                ("in_features", linear.in_features, packed.dense_in_features),
                ("out_features", linear.out_features, packed.dense_out_features),
                ("bias", linear.bias is not None, packed.bias is not None),
            ):
                if actual != expected:
                    raise ValueError(f"{path}: layer map gives {what} as {expected}, the model's layer has {actual}")
            modules[own], layers[own], self._wanted[own] = packed, entry, wanted
        swap_in_(model, modules)
        for module in modules.values():
            # Some models initialize their layers from above, by name and weight (ModernBERT: module.Wqkv.weight), and
            # transformers runs that over every loaded model. So there is a weight to run it on until loading is done.
            stand_in = torch.empty(module.out_features, module.in_features, device="meta")
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            vars(module)["weight"] = stand_in
        expected_tensors = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in expected_tensors.items()}
        if checkpoint_files is not None:
            found = _Found(model, expected_tensors, _read_headers(checkpoint_files), self)
            for own, packed in modules.items():
                self._files[own] = _check_packed(packed, own, layers[own], found)
            if checkpoint is not None:
                _check_whole(model, expected_tensors, found, checkpoint)
            _check_rest(model, expected_tensors, found)
        # Saved again from here, the map has to name this model's own paths.
        self.quantization_config = SparsebertConfig(layers=layers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # transformers 5.17 takes tensors of any shape into a quantized model.
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes[name]:
                raise ValueError(
                    f"{name}: of another shape in the checkpoint, {tuple(tensor.shape)}, "
                    f"expected {tuple(self._shapes[name])}"
                )
        for path, wanted in self._wanted.items():
            module: Any = model.get_submodule(path)
            vars(module).pop("weight", None)
            where = f"{self._files[path]}: " if path in self._files else ""
            try:
                module.finish_loading(path)
            except ValueError as error:
                raise ValueError(f"{where}{error}") from error
            try:
                module.to(wanted)
            except ValueError as error:
                raise ValueError(f"{where}{path}: cannot be held in {wanted}: {error}") from error
            entry = self.quantization_config.layers[path]
            place = {"role": entry.get("role"), "index": entry.get("index")}
            self.quantization_config.layers[path] = {**place, **module.layer_entry()}
        check_compaction(model)
        if not (getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)):
            # transformers 5.17 leaves every tensor of a quantized model whose name gained or lost the base
            # model's prefix in its stored dtype.
            main = next(iter(self._wanted.values()))
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.dtype != main:
                    parameter.data = parameter.data.to(main)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """No state dict of its own; brings the layer map up to date with the modules that are about to be saved."""
        self.quantization_config = model.config.quantization_config = SparsebertConfig(**quantization_config(model))
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        decompress_(model)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        return model if dtype is None or dtype == model.dtype else model.to(dtype)  # type: ignore[arg-type]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # Without this the Trainer refuses to train heads, norms and biases beside packed weights.
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Enters both classes into the tables of transformers; harmless when they are there."""
    for table, method, cls in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.register_quantization_config, SparsebertConfig),
        (auto.AUTO_QUANTIZER_MAPPING, auto.register_quantizer, SparsebertHfQuantizer),
    ):
        known = table.get(QUANT_METHOD)
        if known is not None and known.__module__ == __name__:
            # Ours, from before this module was imported anew: transformers refuses a second registration.
            del table[QUANT_METHOD]
        method(QUANT_METHOD)(cls)


def _resolve(model: PreTrainedModel, layers: dict[str, Any], *, whole: bool) -> list[tuple[str, str, nn.Linear]]:
    """``(path in the map, path in this model, its nn.Linear)`` for every layer that this model has.

    A bare model loads a checkpoint saved with a head, and the other way round, so the base model's prefix may have to
    be stripped or added. Layers of a head that a bare model does not have are left out, as stock loading does, unless
    the map has to fit as a ``whole``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    is_base = not prefix or prefix[:-1] not in modules
    from_head = is_base and bool(prefix) and any(path.startswith(prefix) for path in layers)
    found = []
    for path in layers:
        candidates = [path, prefix + path, path.removeprefix(prefix)]
        own = next((name for name in candidates if name in modules), None)
        if own is None:
            if from_head and not whole and not path.startswith(prefix):
                continue
            raise ValueError(f"{path}: the layer map names this layer, but {type(model).__name__} has no such module")
        module = modules[own]
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{path}: the layer map names a {type(module).__name__}, expected an nn.Linear")
        found.append((path, own, module))
    if not found:
        raise ValueError(f"quantization_config: {type(model).__name__} has none of the {len(layers)} layers of the map")
    return found


def unfilled(entry: dict[str, Any], path: str, *, dtype: torch.dtype | None = None) -> PackedLinear:
    """The module on meta that an entry of the layer map describes; ``ValueError`` naming the layer where it describes
    none, or more: what a module does not know of, it would not do, and a map must not be half obeyed."""
    packed = module_from_entry(entry, name=path, device="meta", dtype=dtype)
    known = {"role", "index", *packed.layer_entry()}
    strange = sorted(key for key, value in entry.items() if key not in known and value is not None)
    if strange:
        raise ValueError(f"{path}: layer map has unknown fields {storage.short(str(strange))}")
    return packed


def _read_headers(files: Iterable[str]) -> dict[str, Stored]:
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: a packed checkpoint is read from safetensors files only")
    return storage.read_headers(files)


class _Found:
    """Which stored tensor becomes which tensor of ``model``, by transformers' own rules for names."""

    def __init__(
        self,
        model: PreTrainedModel,
        expected: dict[str, torch.Tensor],
        stored: dict[str, Stored],
        plugin: SparsebertHfQuantizer,
    ) -> None:
        self.files = sorted({str(tensor.file) for tensor in stored.values()})
        self.bytes = sum(tensor.bytes for tensor in stored.values())
        # Own name -> the stored tensor that is loaded there as it is.
        self.plain: dict[str, Stored] = {}
        # Own names that transformers computes from stored tensors, by splitting or merging them.
        self.made: set[str] = set()
        self.unexpected: list[str] = []
        rules = get_model_conversion_mapping(model, None, plugin)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        targets = {source: rule.target_patterns for rule in converters for source in rule.source_patterns}
        names: dict[str, str] = {}
        # Some renamings depend on what was renamed before, so the order is that of transformers too.
        for name in sorted(stored, key=dot_natural_key):
            base = model.base_model_prefix
            own, source = rename_source_key(name, renamings, converters, base, expected)
            if own not in expected and name in expected:
                own, source = rename_source_key(name, [], [], base, expected)
            if own not in expected:
                self.unexpected.append(own)
            elif source is not None:
                self.made.update(own.replace(targets[source][0], target) for target in targets[source])
            elif own in names:
                raise ValueError(f"{stored[name].file}: {names[own]} and {name} are both {own} of the model")
            else:
                names[own] = name
                self.plain[own] = stored[name]

    def __contains__(self, own: str) -> bool:
        return own in self.plain or own in self.made


def _check_packed(packed: nn.Module, own: str, entry: dict[str, Any], found: _Found) -> Path:
    """Holds the stored tensors of one layer against its module, and gives float buffers their stored dtype.

    Loaded uncast, the tensors can be validated as they were written; a cast may round a weight to zero. Returns a file
    that they lie in.
    """
    files = []
    other: dict[str, torch.Tensor] | None = None
    for name, tensor in packed.state_dict().items():
        key = f"{own}.{name}"
        if key not in found.plain:
            where = ", ".join(found.files[:_SHOWN])
            raise ValueError(f"{own}: the checkpoint has no tensor {key} ({where})")
        stored = found.plain[key]
        files.append(stored.file)
        if stored.shape != tuple(tensor.shape):
            raise ValueError(f"{own}: {name} has shape {stored.shape} in {stored.file}, expected {tuple(tensor.shape)}")
        _check_dtype(own, name, stored, tensor)
        if not tensor.is_floating_point():
            continue
        place, _, leaf = name.rpartition(".")
        buffers = packed.get_submodule(place)._buffers
        if leaf in buffers and _FLOATS[stored.dtype] != tensor.dtype:
            if other is None:
                dtype = torch.float64 if tensor.dtype != torch.float64 else torch.float32
                other = module_from_entry(entry, name=own, device="meta", dtype=dtype).state_dict()
            # What stays as it is in a module of another dtype, as scales do, is the module's own to choose.
            if other[name].dtype != tensor.dtype:
                buffers[leaf] = torch.empty_like(tensor, dtype=_FLOATS[stored.dtype])
    return files[0]


def _check_dtype(layer: str, name: str, stored: Stored, tensor: torch.Tensor) -> None:
    """A float takes any float; transformers would take integers as well, and the model fail when it runs."""
    if tensor.is_floating_point():
        if stored.dtype not in _FLOATS:
            raise ValueError(
                f"{layer}: {name} is {stored.dtype} in {stored.file}, expected one of {', '.join(_FLOATS)}"
            )
    elif _INTEGERS.get(stored.dtype) != tensor.dtype:
        raise ValueError(f"{layer}: {name} is {stored.dtype} in {stored.file}, expected {tensor.dtype}")


def _check_whole(model: PreTrainedModel, expected: dict[str, torch.Tensor], found: _Found, checkpoint: str) -> None:
    """Refuses a model that the files do not fill exactly, while nothing is allocated yet."""
    for name, stored in found.plain.items():
        shape = tuple(expected[name].shape)
        if stored.shape != shape:
            layer, _, tensor = name.rpartition(".")
            raise ValueError(f"{layer}: {tensor} has shape {stored.shape} in {stored.file}, expected {shape}")
    refuse_misfit(
        checkpoint,
        model,
        missing=_without(_missing(model, expected, found), model._keys_to_ignore_on_load_missing),
        unexpected=_without(found.unexpected, _ignored_leftovers(model)),
    )


def refuse_misfit(checkpoint: str, model: PreTrainedModel, **kinds: Iterable[str]) -> None:
    """One ``ValueError`` for all tensors that are ``missing``, ``unexpected`` ...; none where there are none."""
    faults = []
    for kind, names in kinds.items():
        if names := sorted(names):
            more = ", ..." if len(names) > _SHOWN else ""
            faults.append(f"{len(names)} {kind.replace('_', ' ')} ({', '.join(names[:_SHOWN])}{more})")
    if faults:
        raise ValueError(f"{checkpoint}: the tensors do not fit {type(model).__name__}: {'; '.join(faults)}")


def _check_rest(model: PreTrainedModel, expected: dict[str, torch.Tensor], found: _Found) -> None:
    """Holds dtypes, and bounds what is allocated beyond what is stored: missing tensors, buffers never stored."""
    for name, stored in found.plain.items():
        layer, _, tensor = name.rpartition(".")
        _check_dtype(layer, tensor, stored, expected[name])
    absent = {name: expected[name] for name in _missing(model, expected, found)}
    absent.update({name: expected[name] for name, x in found.plain.items() if x.shape != tuple(expected[name].shape)})
    absent.update({name: buffer for name, buffer in model.named_buffers() if name not in expected})
    size = sum(tensor.nbytes for tensor in absent.values())
    if size > (bound := _SPARE_FACTOR * found.bytes + _SPARE_BYTES):
        largest = max(absent, key=lambda name: absent[name].nbytes)
        raise ValueError(
            f"{', '.join(found.files[:_SHOWN])}: holds {found.bytes} bytes, but by config.json the model has "
            f"{size} more that it does not hold, expected at most {bound}; the largest is {largest} of shape "
            f"{tuple(absent[largest].shape)}"
        )


def _missing(model: PreTrainedModel, expected: dict[str, torch.Tensor], found: _Found) -> list[str]:
    present = {name for name in expected if name in found}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    # A chain of ties may be written in any order.
    for _ in range(2):
        for one, other in ties.items():
            if one in present or other in present:
                present |= {one, other}
    return [name for name in expected if name not in present]


def _ignored_leftovers(model: PreTrainedModel) -> set[str]:
    """Patterns of stored tensors that transformers drops without a word: buffers that older versions stored."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    for name, _ in model.named_buffers():
        if name.endswith("rotary_emb.inv_freq"):
            patterns.add(r"rotary_emb\.inv_freq")
        if name.endswith("position_ids"):
            patterns.add(r"(^|\.)position_ids$")
    return patterns


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


register()
