"""A Trainer whose loss is the run's: for methods that add a term to the task's loss or replace it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from sparsebert.hf.callback import METRICS, CompressionCallback
from sparsebert.methods import Run

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class CompressionTrainerMixin(_Trainer):
    """Put before any ``Trainer``: ``class MyTrainer(CompressionTrainerMixin, Seq2SeqTrainer): ...``.

    The run is that of the ``CompressionCallback`` among the callbacks, or ``run=``, which puts one there. In training
    the loss is ``run.total_loss``; evaluation, and a method that adds nothing, are the plain Trainer's.

    Under gradient accumulation both parts are means over each micro-batch, and then over the micro-batches. The plain
    Trainer leaves the second mean to the model wherever its forward takes ``**kwargs``, though many heads (BERT's for
    classification) know nothing of it: their loss is then larger by as many times as there are micro-batches, and the
    balance with the method's part would depend on them. Only for losses of tokens that differ in number from one
    micro-batch to the next it is not the same mean as the Trainer's. ``compute_loss_func`` and label smoothing make the
    task's part as always; what the former gives counts as scaled, as in the Trainer. Where a method replaces the task's
    loss neither is called, and the model needs no labels.
    """

    def __init__(self, *args: Any, run: Run | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if run is None:
            return
        if (found := self._compression()) is None:
            self.add_callback(CompressionCallback(run))
        elif found.run is not run:
            raise ValueError(f"{type(self).__name__}: run= is not the run of the CompressionCallback; give one of them")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._compression() is None:
            raise ValueError(
                f"{type(self).__name__}: has no run; pass run=, or callbacks=[sparsebert.hf.CompressionCallback(run)]"
            )
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        callback = self._compression()
        run = None if callback is None else callback.run
        if run is None or not model.training or type(run).added_loss is Run.added_loss:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        # A copy: the Trainer takes the labels out where it smooths them.
        given = dict(inputs)
        # Means over the micro-batches: the Trainer divides by their number, or leaves that to us.
        parts = self.current_gradient_accumulation_steps if self._scales_itself(num_items_in_batch) else 1
        if run.replaces_task_loss:
            outputs = model(**inputs)
            loss = run.loss(outputs, given) / parts
        elif self.compute_loss_func is not None:
            task, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            loss = task + run.loss(outputs, given) / parts
        else:
            task, outputs = super().compute_loss(model, inputs, return_outputs=True)
            loss = (task + run.loss(outputs, given)) / parts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Here, and not in the callback: those that report elsewhere come before it.
        callback = self._compression()
        if callback is not None and not any(name.startswith(METRICS) for name in logs):
            logs.update(callback.metrics())
        super().log(logs, *args, **kwargs)

    def _compression(self) -> CompressionCallback | None:
        callbacks = self.callback_handler.callbacks
        found = [callback for callback in callbacks if isinstance(callback, CompressionCallback)]
        if len(found) > 1:
            raise ValueError(f"{type(self).__name__}: {len(found)} CompressionCallbacks, expected one run at a time")
        return found[0] if found else None

    def _scales_itself(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether ``training_step`` takes the loss for one that is already divided by the number of micro-batches."""
        # Newer versions of transformers let a Trainer say so.
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        if self.compute_loss_func is not None:
            return True
        return self.model_accepts_loss_kwargs and num_items_in_batch is not None


class CompressionTrainer(CompressionTrainerMixin, Trainer):
    """``CompressionTrainer(model, arguments, train_dataset=data, run=run)``: the Trainer with a run's loss."""
