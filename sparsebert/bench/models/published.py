"""Times that others have published for the same models. Nothing here was measured by this package: hardware, software
and method differ, so these lines stand beside a table of measurements and never in it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LINES", "PublishedLine"]

_TENSORRT = "https://github.com/NVIDIA/TensorRT/blob/release/10.2/demo/BERT/README.md"
_MLPERF = "https://github.com/mlcommons/inference_results_v3.1"


@dataclass(frozen=True)
class PublishedLine:
    """One published number: ``milliseconds`` of a batch or ``samples_per_s``, the other being None; ``precision``,
    ``batch`` and ``length`` are None where they are not stated with it."""

    label: str
    model: str
    hardware: str
    precision: str | None
    batch: int | None
    length: int | None
    milliseconds: float | None
    samples_per_s: float | None
    source: str


def _tensorrt(batch: int, int8: float, fp16: float) -> tuple[PublishedLine, ...]:
    return tuple(
        PublishedLine(
            "published: TensorRT 10.2 demoBERT", "bert-base", "A100", precision, batch, 128, time, None, _TENSORRT
        )
        for precision, time in (("int8", int8), ("fp16", fp16))
    )


LINES: tuple[PublishedLine, ...] = (
    *_tensorrt(1, int8=0.54, fp16=0.64),
    *_tensorrt(8, int8=0.95, fp16=1.31),
    *_tensorrt(32, int8=2.23, fp16=3.86),
    *_tensorrt(128, int8=8.03, fp16=15.20),
    PublishedLine(
        "published: MLPerf Inference v3.1, SQuAD, offline, 99 % of the accuracy",
        "bert-large",
        "one H100",
        None,
        None,
        None,
        None,
        9102.0,
        _MLPERF,
    ),
)
