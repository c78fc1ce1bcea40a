"""The quantizer plug-in: what stock ``save_pretrained`` and ``from_pretrained`` need to know about packed layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsebert.nn import module_from_entry
from sparsebert.swap import FORMAT_VERSION, QUANT_METHOD, decompress_, quantization_config, swap_in_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIELDS = ("quant_method", "format_version", "layers")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}


class SparsebertConfig(QuantizationConfigMixin):
    """``quantization_config`` in a checkpoint's config.json: ``{quant_method, format_version, layers: {path: entry}}``.

    ``to_dict()`` gives back exactly that map. ``ValueError`` for another method or version, or a map that is no map;
    an entry itself is checked where its layer is built.
    """

    def __init__(
        self,
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        layers: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quantization_config: quant_method is {quant_method!r}, expected {QUANT_METHOD!r}")
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version is {format_version!r}, this sparsebert reads {FORMAT_VERSION}"
            )
        if unknown:
            raise ValueError(
                f"quantization_config: unknown fields {sorted(unknown)}, expected {', '.join(_FIELDS)} only"
            )
        if not isinstance(layers, dict) or not layers:
            shown = "empty" if layers == {} else type(layers).__name__
            raise ValueError(f"quantization_config: layers is {shown}, expected an object of layer path: entry")
        for path, entry in layers.items():
            if not isinstance(path, str) or not all(path.split(".")):
                raise ValueError(f"quantization_config: {path!r} is not a module path")
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: layer map entry is {type(entry).__name__}, expected a JSON object")
            for key, kind in (("role", str), ("index", int)):
                if entry.get(key) is not None and type(entry[key]) is not kind:
                    raise ValueError(
                        f"{path}: layer map gives {key} as {entry[key]!r}, expected {kind.__name__} or null"
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
        stored = None if checkpoint_files is None else _read_headers(checkpoint_files)
        modules: dict[str, nn.Module] = {}
        layers: dict[str, dict[str, Any]] = {}
        for path, own, linear in _resolve(model, self.quantization_config.layers):
            entry = self.quantization_config.layers[path]
            if own in layers:
                raise ValueError(f"{path}: the layer map names this layer twice")
            wanted = linear.weight.dtype
            packed = module_from_entry(entry, name=path, device="meta", dtype=wanted)
            for what, actual, expected in (
                ("in_features", linear.in_features, packed.in_features),
                ("out_features", linear.out_features, packed.out_features),
                ("bias", linear.bias is not None, packed.bias is not None),
            ):
                if actual != expected:
                    raise ValueError(f"{path}: layer map gives {what} as {expected}, the model's layer has {actual}")
            if stored is not None:
                # A part saved by itself has the map of the whole, and tensors under its own paths.
                _check_stored(packed, own if f"{own}.values" in stored else path, stored)
            modules[own], layers[own], self._wanted[own] = packed, entry, wanted
        swap_in_(model, modules)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
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
            module = model.get_submodule(path)
            module.finish_loading(path)  # type: ignore[operator]
            try:
                module.to(wanted)
            except ValueError as error:
                raise ValueError(f"{path}: cannot be held in {wanted}: {error}") from error
            entry = self.quantization_config.layers[path]
            place = {"role": entry.get("role"), "index": entry.get("index")}
            self.quantization_config.layers[path] = {**place, **module.layer_entry()}  # type: ignore[operator]
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


def _resolve(model: PreTrainedModel, layers: dict[str, Any]) -> list[tuple[str, str, nn.Linear]]:
    """``(path in the map, path in this model, its nn.Linear)`` for every layer that this model has.

    A bare model loads a checkpoint saved with a head, and the other way round, so the base model's prefix may have to
    be stripped or added. Layers of a head that a bare model does not have are left out, as stock loading does.
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
            if from_head and not path.startswith(prefix):
                continue
            raise ValueError(f"{path}: the layer map names this layer, but {type(model).__name__} has no such module")
        module = modules[own]
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{path}: the layer map names a {type(module).__name__}, expected an nn.Linear")
        found.append((path, own, module))
    if not found:
        raise ValueError(f"quantization_config: {type(model).__name__} has none of the {len(layers)} layers of the map")
    return found


def _read_headers(files: list[str]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Tensor name -> ``(file, dtype as safetensors writes it, shape)``, without reading any tensor."""
    headers: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: a packed checkpoint is read from safetensors files only")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    headers[name] = (str(file), part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    return headers


def _check_stored(packed: nn.Module, path: str, stored: dict[str, tuple[str, str, tuple[int, ...]]]) -> None:
    """Holds the stored tensors of one layer against its module, and gives float buffers their stored dtype.

    Loaded uncast, the tensors can be validated as they were written; a cast may round a weight to zero.
    """
    for name, tensor in packed.state_dict().items():
        key = f"{path}.{name}"
        if key not in stored:
            raise ValueError(f"{path}: the checkpoint has no tensor {key}")
        file, kind, shape = stored[key]
        if shape != tuple(tensor.shape):
            raise ValueError(f"{path}: {name} has shape {shape} in {file}, expected {tuple(tensor.shape)}")
        if tensor.is_floating_point():
            if kind not in _FLOATS:
                raise ValueError(f"{path}: {name} is {kind} in {file}, expected one of {', '.join(_FLOATS)}")
            if name in packed._buffers:
                packed._buffers[name] = torch.empty_like(tensor, dtype=_FLOATS[kind])
        elif _INTEGERS.get(kind) != tensor.dtype:
            raise ValueError(f"{path}: {name} is {kind} in {file}, expected {tensor.dtype}")


register()
