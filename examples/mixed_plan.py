"""A format for each kind of layer, as a file; then factors of your own for one layer, as a plan.

python examples/mixed_plan.py PATH_TO_MODEL OUTPUT_FOLDER
"""

import sys
from pathlib import Path

from transformers import AutoModel

import sparsebert as sb
from sparsebert.formats import one_shot
from sparsebert.plan import load_selection, save_selection


def main(path: str, out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_pretrained(path).eval()

    selection = {
        "query": sb.NMConfig(2, 4),
        "value": sb.BitmapConfig(0.5),
        "intermediate": sb.LowRankSparseConfig(ratio=0.25, sparse=sb.RowsConfig(0.1)),
        "output": sb.NMConfig(2, 4, columns=0.5),
        "*.layer.0.*": None,  # a pattern wins over a role: the first layer stays dense
    }
    save_selection(selection, folder / "selection.json")
    print(sb.compress_(model, load_selection(folder / "selection.json")))

    # A plan packs what is already compressed, by whatever made the factors (here the truncated SVD).
    model = AutoModel.from_pretrained(path).eval()
    name, config = "encoder.layer.0.output.dense", sb.LowRankConfig(ratio=0.5)
    layer = model.get_submodule(name)
    found = one_shot.approximate(layer.weight.detach(), config)
    layer.weight.data = found.weight
    sb.CompressionPlan({name: config}, {name: found.factors}).save(folder)
    print(sb.compress_(model, sb.CompressionPlan.load(folder)))  # proves that the weight is what the factors make


if __name__ == "__main__":
    main(*sys.argv[1:3])
