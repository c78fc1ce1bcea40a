"""Prune a model to 2:4, train it with the mask held, pack it.

python examples/prune_then_train.py PATH_TO_MODEL OUTPUT_FOLDER
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification

import sparsebert as sb


def main(path: str, out: str, steps: int = 4) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    run = sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(model, total_steps=steps)
    run.attach(optimizer)
    model.train()
    for inputs in batches(steps):
        outputs = model(**inputs)
        run.total_loss(outputs, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    sb.compress_(model, run.finalize())  # proves the pattern, then packs
    model.save_pretrained(out)
    print(sb.size_report(sb.load_pretrained(out)))


def batches(steps: int):
    """Stands in for your data: random token ids and labels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 90, (8, 16), generator=generator)
        yield {"input_ids": ids, "labels": ids[:, 0] % 2}


if __name__ == "__main__":
    main(*sys.argv[1:3])
