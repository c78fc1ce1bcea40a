"""``Teacher``: what a fine-tuned model makes of its student's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsebert.methods.capture import Capture, Captured

# What the teacher is not called with: it needs no loss, and says itself what it returns.
_STUDENT_ONLY = ("labels", "num_items_in_batch", "output_hidden_states", "output_attentions", "return_dict")


class Teacher:
    """``model``, asked in evaluation mode and without gradients; its weights and its mode stay as they are.

    ``hidden`` and ``attention``: what of a forward is captured, as in ``Capture``.
    """

    def __init__(self, model: nn.Module, *, hidden: bool = False, attention: bool = False) -> None:
        self.model = model
        self._capture = Capture(model, hidden=hidden, attention=attention, training=False)

    def ask(self, inputs: Mapping[str, Any]) -> tuple[Captured, Any]:
        """What was captured, and the outputs, for the inputs that the student was called with."""
        given = {name: value for name, value in inputs.items() if name not in _STUDENT_ONLY}
        self._capture.attach()
        try:
            with torch.no_grad(), _evaluating(self.model):
                answer = self.model(**given)
            return self._capture.take(answer), answer
        finally:
            self._capture.detach()

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.model.to(device)


def check_teacher(method: str, student: nn.Module, teacher: nn.Module, names: Sequence[str] = ()) -> None:
    """``ValueError`` where the teacher is the student, or their configs differ in one of ``names``."""
    if teacher is student:
        raise ValueError(f"{method}: the teacher is the student itself; pass another model")
    for name in names:
        ours, theirs = (getattr(getattr(model, "config", None), name, None) for model in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"{method}: {name} is {ours} in the student ({type(student).__name__}) and {theirs} in the teacher "
                f"({type(teacher).__name__}), expected the same"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for this long."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
