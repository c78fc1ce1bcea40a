"""Save a packed model and reload it in one line, as a fresh process would.

python examples/save_and_load.py PATH_TO_MODEL OUTPUT_FOLDER
"""

import sys

import torch
from transformers import AutoModel

import sparsebert as sb


def main(path: str, out: str) -> None:
    model = AutoModel.from_pretrained(path).eval()
    sb.compress_(model, sb.NMConfig(2, 4))
    sb.save_pretrained(model, out)  # model.save_pretrained(out) and a model card

    reloaded = sb.load_pretrained(out)  # strict: a missing or foreign tensor is an error
    print(sb.size_report(reloaded))

    tokens = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        same = torch.equal(model(tokens)[0], reloaded(tokens)[0])
    print(f"the same numbers, bit for bit: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
