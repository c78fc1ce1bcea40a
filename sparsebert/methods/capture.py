"""What a distillation loss needs from a forward, by hooks: hidden states and attention scores before the softmax.

Attention probabilities would be no substitute, and with the attention that is fast (SDPA) a model does not give them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsebert import roles
from sparsebert.methods.maths import distillation

# Their query and key layers are called for relative positions too, whose scores are a large part of the sum.
_MIXED_SCORES = ("deberta-v2",)


class Captured(NamedTuple):
    """``hidden_states``: the embeddings' output, then each layer's, ``(batch, tokens, hidden)``. ``attention_scores``:
    one for each pass through a layer, ``(batch, heads, queries, keys)``. Empty where it was not asked for."""

    hidden_states: tuple[Tensor, ...]
    attention_scores: tuple[Tensor, ...]


class _Forward(NamedTuple):
    """One forward's outputs of the query and the key layers, in the order of the calls."""

    queries: list[Tensor]
    keys: list[Tensor]


class Capture:
    """Hooks on ``model``: after each forward, ``take(outputs)`` gives what was captured of it, once.

    ``hidden`` calls the model with ``output_hidden_states=True``. ``attention`` listens to the query and key layers
    (``roles.find_layers``) and takes q kᵀ / sqrt(head size). What MPNet (a bias) and ModernBERT (a rotation, and the
    window of its local layers) add for positions is left out; ``ValueError`` for DeBERTa, whose query and key layers
    are called for relative positions too. Layers that are called several times (ALBERT) count each time.

    ``training``: take part in forwards in training mode with gradients only, so that evaluation stays as it is. What
    gradient checkpointing computes again in the backward pass is not captured. The model may be wrapped
    (``DistributedDataParallel``) before or after: the hooks are on the one inside. Replicas of ``nn.DataParallel`` are
    not followed.
    """

    def __init__(self, model: nn.Module, *, hidden: bool = True, attention: bool = True, training: bool = True) -> None:
        self.model = model
        self.hidden = hidden
        self.training = training
        self._layers = _attention_layers(model) if attention else []
        self._heads = getattr(getattr(model, "config", None), "num_attention_heads", 0)
        if attention and not self._heads:
            raise ValueError(f"attention scores: the config of {self._name} has no num_attention_heads")
        self._handles: list[Any] = []
        self._open: _Forward | None = None
        self._done: list[_Forward] = []

    def attach(self) -> Capture:
        """Installs the hooks; does nothing where they are."""
        if not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
                self.model.register_forward_hook(self._end),
                *(layer.module.register_forward_hook(partial(self._listen, layer.role)) for layer in self._layers),
            ]
        return self

    def detach(self) -> None:
        """Removes the hooks and drops what was captured."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open, self._done = [], None, []

    def take(self, outputs: Any) -> Captured:
        """What was captured of the forward that gave ``outputs``: of the one forward since the last call.

        ``RuntimeError`` where there was none or more than one, and where hidden states or scores are missing, or
        scores carry no gradient: a loss of them would be nothing.
        """
        done, self._done = self._done, []
        if len(done) != 1:
            raise RuntimeError(
                f"distillation: {self._name} was called {len(done)} times in training mode since the last loss, "
                f"expected once; attach the run, then take its loss after each forward"
            )
        states = self._states(outputs) if self.hidden else ()
        scores = self._scores(done[0]) if self._layers else ()
        return Captured(states, scores)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model takes its hooks along, but not what this one is in the middle of.
        return {**self.__dict__, "_open": None, "_done": []}

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _states(self, outputs: Any) -> tuple[Tensor, ...]:
        states = tuple(getattr(outputs, "hidden_states", None) or ())
        if len(states) < 2:
            raise RuntimeError(
                f"distillation: the hidden states of {self._name} are empty: its outputs ({type(outputs).__name__}) "
                f"hold {len(states)}, expected one more than it has layers"
            )
        return states

    def _scores(self, forward: _Forward) -> tuple[Tensor, ...]:
        queries, keys = forward
        if not queries or len(queries) != len(keys):
            raise RuntimeError(
                f"distillation: the attention scores of {self._name} are empty: its query layers were called "
                f"{len(queries)} times and its key layers {len(keys)} times"
            )
        learns = any(p.requires_grad for layer in self._layers for p in layer.module.parameters())
        if self.training and learns and not any(x.requires_grad for x in (*queries, *keys)):
            raise RuntimeError(
                f"distillation: the attention scores of {self._name} carry no gradient, as under reentrant gradient "
                f"checkpointing; use gradient_checkpointing_kwargs={{'use_reentrant': False}}"
            )
        return tuple(distillation.attention_scores(q, k, self._heads) for q, k in zip(queries, keys, strict=True))

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._open = None
        # A replica or a copy of the model brings these hooks along.
        if module is not self.model or (self.training and not (module.training and torch.is_grad_enabled())):
            return None
        self._open = _Forward([], [])
        return (args, {**kwargs, "output_hidden_states": True}) if self.hidden else None

    def _end(self, module: nn.Module, args: Any, outputs: Any) -> None:
        # Calls of the layers outside of a forward, as checkpointing makes them, find none open.
        if self._open is not None:
            self._done.append(self._open)
            self._open = None

    def _listen(self, role: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._open is None:
            return
        if role == "query_key_value":
            query, key, _ = output.chunk(3, -1)
            self._open.queries.append(query)
            self._open.keys.append(key)
        else:
            (self._open.queries if role == "query" else self._open.keys).append(output)


def _attention_layers(model: nn.Module) -> list[roles.LayerRef]:
    if (kind := roles.model_type(model)) in _MIXED_SCORES:
        raise ValueError(
            f"attention scores: {type(model).__name__}: {kind} adds scores of relative positions, which its query "
            f"and key layers alone do not tell; leave the term 'attention' out"
        )
    try:
        layers = roles.find_layers(model)
    except ValueError as error:
        raise ValueError(f"attention scores: {error}; or leave the term 'attention' out") from error
    return [layer for layer in layers if layer.role in ("query", "key", "query_key_value")]
