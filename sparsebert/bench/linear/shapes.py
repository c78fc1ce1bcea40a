"""The linear layers of the encoders that are measured, and the token counts."""

from __future__ import annotations

from dataclasses import dataclass

# Rows of x: batch times length.
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Shape:
    """One linear layer of an encoder: the weight is (out_features, in_features); ``role`` names model and place."""

    role: str
    out_features: int
    in_features: int

    @property
    def model(self) -> str:
        return self.role.partition(".")[0]

    @property
    def place(self) -> str:
        return self.role.partition(".")[2]


def _encoder(model: str, hidden: int) -> dict[str, Shape]:
    """``projection`` is each of query, key, value and attention output alone, ``qkv`` the first three as one weight."""
    sizes = {
        "projection": (hidden, hidden),
        "qkv": (3 * hidden, hidden),
        "ffn_in": (4 * hidden, hidden),
        "ffn_out": (hidden, 4 * hidden),
    }
    return {place: Shape(f"{model}.{place}", *size) for place, size in sizes.items()}


ENCODERS = {name: _encoder(name, hidden) for name, hidden in (("base", 768), ("large", 1024), ("minilm", 384))}
DRY_SHAPES = (Shape("dry.ffn_in", 128, 64), Shape("dry.ffn_out", 64, 128))
DRY_TOKENS = (1, 24)
# Bytes: toy weights against a toy cache, so that a dry run rotates as well.
DRY_CACHE = 20_000


def of(*models: str, places: tuple[str, ...] = ("projection", "qkv", "ffn_in", "ffn_out")) -> tuple[Shape, ...]:
    """The layers of ``models`` at ``places``, place by place; ``ValueError`` for a model that is not in ENCODERS."""
    for model in models:
        if model not in ENCODERS:
            raise ValueError(f"bench: model is {model!r}, expected one of {', '.join(ENCODERS)}")
    return tuple(ENCODERS[model][place] for place in places for model in models)
