"""Static int8: measure the scale of every layer's inputs on your data, save, load.

python examples/int8_calibrated.py PATH_TO_MODEL OUTPUT_FOLDER
"""

import sys

import torch
from transformers import AutoModel

import sparsebert as sb


def main(path: str, out: str) -> None:
    model = AutoModel.from_pretrained(path).eval()

    sb.compress_(model, sb.Int8Config("static"))
    print(sb.calibrate(model, batches(16)))  # the largest |x|; or method="percentile", method="mse"
    sb.save_pretrained(model, out)  # refused where a layer was not calibrated

    reloaded = sb.load_pretrained(out)
    tokens = next(batches(1))
    dense = AutoModel.from_pretrained(path).eval()
    # A CPU without int8 instructions holds int8 layers as dense ones, which round no inputs. What others compute:
    with torch.no_grad(), sb.quantizing(model), sb.quantizing(reloaded):
        print(f"the same numbers: {torch.equal(model(**tokens)[0], reloaded(**tokens)[0])}")
        want = dense(**tokens)[0]
        print(f"relative error of the hidden states: {float((reloaded(**tokens)[0] - want).norm() / want.norm()):.4f}")


def batches(steps: int):
    """Stands in for your data: random token ids. Some hundred real sequences are enough."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield {"input_ids": torch.randint(3, 90, (8, 16), generator=generator)}


if __name__ == "__main__":
    main(*sys.argv[1:3])
