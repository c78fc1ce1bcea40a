"""Small random encoders of every family the package knows by role."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
DISTILBERT_SIZES = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
# Four passes through two layers, so that each is used twice.
ALBERT_SIZES = {**SIZES, "num_hidden_layers": 4, "embedding_size": 16, "num_hidden_groups": 2}
DEBERTA_SIZES = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
VIT_SIZES = {"image_size": 8, "patch_size": 4, **SIZES}
del VIT_SIZES["vocab_size"], VIT_SIZES["max_position_embeddings"]
MODERNBERT_SIZES = {
    **SIZES,
    **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
    # One layer of each kind.
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
}

# name -> (config class, model class, sizes)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SIZES),
    "bert-bare": ("BertConfig", "BertModel", SIZES),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SIZES),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", SIZES),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", DISTILBERT_SIZES),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", SIZES),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", ALBERT_SIZES),
    "albert-inner": (
        "AlbertConfig",
        "AlbertModel",
        {**ALBERT_SIZES, "num_hidden_layers": 1, "num_hidden_groups": 1, "inner_group_num": 2},
    ),
    # Version 3 has one projection for content and positions, version 2 may have two.
    "deberta-v3": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {**DEBERTA_SIZES, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    ),
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", {**DEBERTA_SIZES, "share_att_key": False}),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification", SIZES),
    "vit": ("ViTConfig", "ViTForImageClassification", VIT_SIZES),
    "vit-bare": ("ViTConfig", "ViTModel", VIT_SIZES),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", MODERNBERT_SIZES),
    "modernbert-bare": ("ModernBertConfig", "ModernBertModel", MODERNBERT_SIZES),
}


def tiny_model(family: str = "bert", *, seed: int = 0) -> nn.Module:
    config_name, model_name, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes)).eval()


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model's forward takes: token ids, or an image."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": tokens()}


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(**inputs(model))[0]
