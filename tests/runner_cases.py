"""A small model with the fused encoders' contract, for tests of what stands between a model and its encoder."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert.nn.tokens import Tokens, encode

WORDS = 50


class FusedEncoder(nn.Module):
    """Packs by the mask; a token's output depends on its own sequence only. Rows after the end come out as NaN."""

    def __init__(self, positions: int | None = None, *, hidden: int = 16, types: bool = True) -> None:
        super().__init__()
        self.sparsebert_fused = True
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.words = nn.Embedding(WORDS, hidden)
        self.positions = nn.Embedding(positions or 64, hidden)
        self.types = nn.Embedding(2, hidden) if types else None
        self.activation = nn.GELU()
        self.linear = nn.Linear(hidden, hidden)
        self.register_buffer("offset", torch.randn(hidden))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        batch, length = input_ids.shape
        mask = attention_mask.bool()
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        ends = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        places = torch.arange(length, device=mask.device).expand(batch, length)
        types = None if self.types is None else token_type_ids[mask]
        found = encode(self, self.compute, Tokens(input_ids[mask], places[mask], types, ends, length))
        hidden = found.new_zeros(batch, length, found.shape[1])
        hidden[mask] = found
        return hidden

    def compute(self, tokens: Tokens) -> Tensor:
        x = self.words(tokens.input_ids) + self.positions(tokens.position_ids)
        if self.types is not None:
            x = x + self.types(tokens.token_type_ids)
        rows = torch.arange(len(x), device=x.device)
        sequences = torch.arange(len(tokens.cu_seqlens) - 1, device=x.device)
        own = torch.bucketize(rows, tokens.cu_seqlens[1:], right=True)
        member = (own[:, None] == sequences).to(x.dtype)
        # A token's weight in its sequence, so that no sum grows with the length.
        share = member / member.sum(0).clamp(min=1)
        y = self.linear(self.activation(x + member @ (share.T @ x))) + self.offset
        return y.masked_fill((rows >= tokens.cu_seqlens[-1])[:, None], torch.nan)


class WaitingEncoder(FusedEncoder):
    """Waits for the device, which no capture allows."""

    def compute(self, tokens: Tokens) -> Tensor:
        float(tokens.cu_seqlens[-1])
        return super().compute(tokens)


class Classifier(nn.Module):
    """One head over the first tokens of one or more encoders."""

    def __init__(self, *encoders: FusedEncoder) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(sum(encoder.linear.out_features for encoder in encoders), 3)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden = [encoder(**inputs) for encoder in self.encoders]
        return self.head(torch.cat(hidden, -1)[:, 0]), hidden


class Bare(nn.Module):
    """Gives what ``encode`` gives, without a copy of it: the output of the sequences of a batch without padding."""

    def __init__(self, encoder: FusedEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        types = None if self.encoder.types is None else torch.zeros_like(ids)
        tokens = Tokens(ids, torch.zeros_like(ids), types, ends, len(ids))
        return encode(self.encoder, self.encoder.compute, tokens)


def classifier(*, encoders: int = 1, positions: int | None = None, **options) -> Classifier:
    """In float64 and ready to run."""
    torch.manual_seed(0)
    return Classifier(*(FusedEncoder(positions, **options) for _ in range(encoders))).double().eval()


def batch(*lengths: int, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Random sequences of these lengths, padded to the longest, with padding that means something else where read."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    inputs = {
        "input_ids": torch.randint(WORDS, shape, generator=generator),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, shape, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.inference_mode()
def plain(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What the model gives without a runner."""
    return model(**inputs)
