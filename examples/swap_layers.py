"""Swap the linear layers of existing BERT code for packed 2:4 ones.

python examples/swap_layers.py PATH_TO_MODEL
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import sparsebert as sb


def main(path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()

    report = sb.compress_(model, sb.NMConfig(2, 4))  # in place; one-shot magnitude pruning
    print(report)  # each layer, bytes on disk and in memory, what stayed dense and why

    with torch.no_grad():
        batch = tokenizer(["The model is used as before."], return_tensors="pt")
        print(model(**batch).last_hidden_state.shape)
    print(sb.explain(model))  # which kernel runs each layer here, and whether that was measured


if __name__ == "__main__":
    main(sys.argv[1])
