"""Compress the encoder inside a SentenceTransformer, save it with its pooling, reload it.

python examples/sentence_transformer.py FOLDER_OF_A_SENTENCE_TRANSFORMER OUTPUT_FOLDER
"""

import sys

import numpy
from sentence_transformers import SentenceTransformer

import sparsebert as sb

SENTENCES = ["The model is used as before.", "The pooling is the model as before."]


def main(path: str, out: str) -> None:
    model = SentenceTransformer(path, device="cpu")
    print(sb.compress_(model[0].auto_model, sb.NMConfig(2, 4)).size)  # the encoder; pooling has no weights
    embeddings = model.encode(SENTENCES)
    model.save_pretrained(out)

    reloaded = SentenceTransformer(out, device="cpu")  # in a process that has imported sparsebert
    print(f"packed as saved: {sb.size_report(reloaded[0].auto_model).layers[0].format}")
    print(f"the same embeddings, bit for bit: {numpy.array_equal(reloaded.encode(SENTENCES), embeddings)}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
