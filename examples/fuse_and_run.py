"""Compress a model, fuse its encoder, and replay it from CUDA graphs; on a CPU it runs without graphs.

python examples/fuse_and_run.py PATH_TO_MODEL
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import sparsebert as sb


def main(path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()

    sb.compress_(model, sb.NMConfig(2, 4))  # smaller layers, or leave it out: dense ones are fused as well
    print(sb.fuse_(model))  # few kernels a layer, and nothing is computed for padding
    runner = sb.Runner(model)  # on a GPU: CUDA graphs by the number of tokens

    texts = ["The model is used as before.", "Sentences of other lengths are not padded."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = runner(**batch).last_hidden_state  # as model(**batch)
    print(hidden.shape)
    print(runner.report())  # graphs, their memory, and where there was none the reason

    alone = runner(**tokenizer(texts[:1], return_tensors="pt")).last_hidden_state
    real = batch["attention_mask"][:1].bool()
    print(f"the same alone: {torch.allclose(hidden[:1][real], alone[0], atol=1e-5)}")


if __name__ == "__main__":
    main(sys.argv[1])
