"""Where the linear layers of an encoder are: query, key, value (or the three in one), attention output and the two of
the feed-forward net.

A table per ``config.model_type`` maps each role to its path under a layer. Paths are matched from the encoder down, so
a bare encoder and one under a task head both work. Knows torch alone; a model is told by its attributes.
"""

from __future__ import annotations

import dis
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import CodeType

from torch import nn

ROLES = ("query", "key", "value", "query_key_value", "attention_output", "intermediate", "output")
# Of a layer whose query, key and value are one.
_MERGED = ROLES[3:]


@dataclass(frozen=True)
class Family:
    """The encoder layers of one kind of model.

    ``stem``: regex of an encoder layer's path; each group is an index. ``roles``: role -> path under the layer, in the
    order of ``ROLES``. ``gated``: ``intermediate`` has 2 * intermediate_size rows, the halves [input | gate], and
    ``output`` takes activation(input) * gate. ``counts``: attributes of the config, one a group of ``stem``; their
    product is the number of layers. ``stored_as``: the names in files, where transformers renames between file and
    model.
    """

    stem: str
    roles: Mapping[str, str]
    gated: bool = False
    counts: tuple[str, ...] = ("num_hidden_layers",)
    stored_as: Family | None = None

    def match(self, path: str, inner: int = 1) -> tuple[str, int] | None:
        """``(role, index)`` of the layer at ``path``, None where it has no role.

        ``inner``: layers a group, for a stem of two indices; layers are then counted through all groups.
        """
        for role, pattern in self._patterns.items():
            if match := pattern.fullmatch(path):
                index, *rest = map(int, match.groups())
                for step in rest:
                    index = index * inner + step
                return role, index
        return None

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {
            role: re.compile(rf"(?:.*\.)?{self.stem}\.{re.escape(path)}", re.ASCII) for role, path in self.roles.items()
        }


_BERT = Family(
    r"encoder\.layer\.(\d+)",
    {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
)
# With share_att_key the query and key layers serve relative positions too; without it these have layers of their own
# (pos_key_proj, pos_query_proj), which see one short sequence whatever the batch, have no role and stay dense.
_DEBERTA = Family(
    r"encoder\.layer\.(\d+)",
    {
        "query": "attention.self.query_proj",
        "key": "attention.self.key_proj",
        "value": "attention.self.value_proj",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
)
_MPNET = Family(
    r"encoder\.layer\.(\d+)",
    {
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_output": "attention.attn.o",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
)
_DISTILBERT = Family(
    r"transformer\.layer\.(\d+)",
    {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
    },
)
# num_hidden_layers is how often the model goes through its layers; these are shared, and there are fewer of them.
_ALBERT = Family(
    r"encoder\.albert_layer_groups\.(\d+)\.albert_layers\.(\d+)",
    {
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "attention_output": "attention.dense",
        "intermediate": "ffn",
        "output": "ffn_output",
    },
    counts=("num_hidden_groups", "inner_group_num"),
)
_VIT = Family(
    r"layers\.(\d+)",
    {
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "attention_output": "attention.o_proj",
        "intermediate": "mlp.fc1",
        "output": "mlp.fc2",
    },
    stored_as=Family(
        r"encoder\.layer\.(\d+)",
        {
            "query": "attention.attention.query",
            "key": "attention.attention.key",
            "value": "attention.attention.value",
            "attention_output": "attention.output.dense",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
        },
    ),
)
_MODERNBERT = Family(
    r"layers\.(\d+)",
    {
        "query_key_value": "attn.Wqkv",
        "attention_output": "attn.Wo",
        "intermediate": "mlp.Wi",
        "output": "mlp.Wo",
    },
    gated=True,
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
    "deberta-v2": _DEBERTA,
    "mpnet": _MPNET,
    "vit": _VIT,
    "modernbert": _MODERNBERT,
}


@dataclass(frozen=True)
class LayerRef:
    """One linear layer of the encoder: its path in the model, its role and the index of its encoder layer."""

    path: str
    role: str
    index: int
    module: nn.Module


def model_type(model: nn.Module) -> str | None:
    """``config.model_type`` of a Hugging Face model, None for any other module."""
    return getattr(getattr(model, "config", None), "model_type", None)


def family_of(model: nn.Module) -> Family:
    """The table of the model's family; ``ValueError`` listing its linear layers where there is none."""
    kind = model_type(model)
    if kind not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__}: no roles known for model_type {kind!r} (known: {', '.join(sorted(FAMILIES))}); "
            f"select layers by name pattern instead. Its linear layers: {summarize(linear_paths(model)) or 'none'}"
        )
    return FAMILIES[kind]


def find_layers(model: nn.Module) -> list[LayerRef]:
    """Every encoder linear, dense or packed, in the order of layers and roles; one that is used often is there once.

    ``ValueError`` naming what was found: for a family without a table, and where one of the family's roles is missing
    in some layer.
    """
    family = family_of(model)
    sizes: list[int | None] = [getattr(model.config, name, None) for name in family.counts]
    found: dict[tuple[int, str], LayerRef] = {}
    for path, module, role, index in _places(model, family, inner=sizes[-1] or 1):
        if (index, role) in found:
            raise ValueError(
                f"{type(model).__name__}: two layers are {role} of encoder layer {index}: "
                f"{found[index, role].path} and {path}"
            )
        found[index, role] = LayerRef(path, role, index, module)
    # A module that borrows a config of its own making may not say how many layers it has.
    highest = max((i for i, _ in found), default=-1)
    count = highest + 1 if None in sizes else math.prod(size or 0 for size in sizes)
    merged = {i: _MERGED for i, role in found if role == _MERGED[0]}
    expected = [(i, role) for i in range(count) for role in merged.get(i, family.roles)]
    missing = [f"{role} of layer {i}" for i, role in expected if (i, role) not in found]
    if missing or not found:
        raise ValueError(
            f"{type(model).__name__}: model_type {model_type(model)!r} lacks {summarize(missing) or 'every role'}; "
            f"its linear layers: {summarize(linear_paths(model)) or 'none'}"
        )
    return [found[place] for place in expected]


def _places(model: nn.Module, family: Family, inner: int) -> Iterator[tuple[str, nn.Module, str, int]]:
    """``(path, module, role, index)`` of every encoder linear; those of a fused layer (``sparsebert.fuse_``) have the
    names of their roles."""
    for path, module in model.named_modules():
        if place := family.match(path, inner):
            yield path, module, *place
        for role in getattr(module, "fused_roles", ()):
            # The layer is where its family's layers are, so any of their linears tells which it is.
            place = family.match(f"{path}.{family.roles['output']}", inner)
            if place is not None:
                yield f"{path}.{role}", module.get_submodule(role), role, place[1]


def refuse_fused(model: nn.Module, what: str) -> None:
    """``ValueError`` where a layer of ``model`` is fused: ``what`` works on the layers as the family has them."""
    if any(hasattr(module, "fused_roles") for module in model.modules()):
        raise ValueError(f"{what}: {type(model).__name__} is fused; call sparsebert.unfuse_(model) first")


def feed_forward_pairs(model: nn.Module) -> list[tuple[LayerRef, LayerRef]]:
    """``(intermediate, output)`` of each encoder layer: a column of ``output`` that is zero makes a row of
    ``intermediate`` useless, and its bias, whatever the activation (``Family.gated``: the same row of both halves).

    Errors as ``find_layers``.
    """
    # This holds because in every family nothing but an elementwise activation (with a gate: times the other half, also
    # elementwise) and dropout lies between the two, and nobody else reads the hidden units: BERT, RoBERTa, ELECTRA,
    # DeBERTa and MPNet dense -> intermediate_act_fn -> dense; DistilBERT lin1 -> activation -> lin2; ALBERT ffn ->
    # activation -> ffn_output; ViT fc1 -> activation_fn -> fc2; ModernBERT input, gate = Wi(x).chunk(2, -1), then
    # Wo(drop(act(input) * gate)). Splitting the sequence (apply_chunking_to_forward) leaves the units alone.
    places = {(layer.index, layer.role): layer for layer in find_layers(model)}
    return [(places[i, "intermediate"], layer) for (i, role), layer in places.items() if role == "output"]


def role_of_path(model_type: object, path: str, *, inner: object = 1) -> tuple[str, int] | None:
    """``(role, index)`` of the layer at ``path`` of a model or a file, None where it has none or the family is unknown.

    ``inner``: the config's ``inner_group_num`` (ALBERT); anything but a positive int is taken as 1.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        return None
    layers = inner if type(inner) is int and inner > 0 else 1
    place = family.match(path, layers)
    if place is None and family.stored_as is not None:
        place = family.stored_as.match(path, layers)
    return place


def weight_use(model: nn.Module, path: str) -> str | None:
    """None, or why the linear layer at ``path`` must stay an ``nn.Linear``: code above it reads its weight.

    A packed layer has no ``weight`` (``deberta`` slices in_proj.weight, ``t5`` asks for the dtype of wo.weight). Found
    in the bytecode of every module above the layer, as ``self.<path from there>.weight``; initialization is left out.
    """
    names = path.split(".")
    for depth in range(len(names)):
        owner = model.get_submodule(".".join(names[:depth]))
        # mypy takes no class of modules for hashable.
        for method, read in _weights_read_by(type(owner)):  # type: ignore[arg-type]
            if read == tuple(names[depth:]):
                return f"{method} reads its weight instead of calling it, and a packed layer has no weight"
    return None


@cache
def _weights_read_by(cls: type) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """``(method, names)`` for every ``self.<names joined by dots>.weight`` in the code of ``cls``."""
    found = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            # Weights are tied and initialized while the layer is an nn.Linear.
            if not inspect.isfunction(function) or name in ("__init__", "_init_weights"):
                continue
            found += [(f"{base.__name__}.{name}", read) for read in _weight_reads(function.__code__)]
    return tuple(found)


def _weight_reads(code: CodeType) -> Iterator[tuple[str, ...]]:
    names: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if names and step.argval == "weight":
                yield tuple(names)
            if names is not None:
                names.append(step.argval)
        else:
            # Newer Pythons do two locals in one step: what lies on top is the last of them.
            loads = "LOAD_FAST" in step.opname or step.opname == "LOAD_DEREF"
            local = step.argval[-1] if loads and isinstance(step.argval, tuple) else step.argval
            names = [] if loads and local == "self" else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _weight_reads(constant)


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of all dense linear layers."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def summarize(names: list[str], limit: int = 12) -> str:
    """A list short enough for an error message."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
