"""Small random encoders of every family the package knows by role."""

from __future__ import annotations

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

# name -> (config class, model class)
FAMILIES = {
    "bert": ("BertConfig", "BertForSequenceClassification"),
    "bert-bare": ("BertConfig", "BertModel"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification"),
}


def tiny_model(family: str = "bert", *, seed: int = 0) -> nn.Module:
    config_name, model_name = FAMILIES[family]
    sizes = DISTILBERT_SIZES if family == "distilbert" else SIZES
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes)).eval()


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens())[0]
