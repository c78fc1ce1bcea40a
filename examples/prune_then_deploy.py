"""The whole way of a model: train it while it is pruned, pack it, save it, and use it in another process.

python examples/prune_then_deploy.py PATH_TO_MODEL OUTPUT_FOLDER [STEPS]
"""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import sparsebert as sb


def main(path: str, out: str, steps: int = 30) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(path)

    method = sb.methods.Magnitude(sb.NMConfig(2, 4))  # or another of sb.methods
    run = method.prepare(model, total_steps=steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.attach(optimizer)
    model.train()
    for step, inputs in enumerate(batches(steps), 1):
        outputs = model(**inputs)
        loss = run.total_loss(outputs, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, sparsity {run.metrics()['sparsity']:.3f}")

    plan = run.finalize()  # exact zeros, a plain dense model, and what was promised of it
    print(sb.compress_(model, plan).size)  # proves the promise, then packs
    sb.save_pretrained(model, out)
    check(model.eval(), out)


def check(model: torch.nn.Module, out: str) -> None:
    """Another process loads the checkpoint and predicts; here the model predicts too."""
    inputs = next(batches(1, seed=1))
    asked, answered = (Path(out).with_name(f"{Path(out).name}-{name}.safetensors") for name in ("asked", "answered"))
    save_file({"input_ids": inputs["input_ids"]}, asked)
    subprocess.run([sys.executable, __file__, "--predict", out, str(asked), str(answered)], check=True)
    with torch.no_grad():
        want = model(input_ids=inputs["input_ids"]).logits
    found = load_file(answered)["logits"]
    print(f"the same predictions in a fresh process: {torch.equal(want.argmax(-1), found.argmax(-1))}")
    print(f"largest difference of a logit: {float((want - found).abs().max()):.1e}")


def predict(folder: str, asked: str, answered: str) -> None:
    model = sb.load_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=load_file(asked)["input_ids"]).logits
    save_file({"logits": logits}, answered)


def batches(steps: int, seed: int = 0):
    """Stands in for your data: does the first word have an even number?"""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(3, 90, (16, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids[:, 0] % 2}


if __name__ == "__main__":
    if sys.argv[1] == "--predict":
        predict(*sys.argv[2:5])
    else:
        main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
