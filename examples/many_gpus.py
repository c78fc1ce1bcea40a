"""Classify the lines of a file on many GPUs, one process each, without an engine: every rank has the whole model and
takes every N-th batch.

torchrun --nproc_per_node N examples/many_gpus.py PATH_TO_MODEL FILE_OF_TEXTS OUTPUT_FILE

The model may be dense or packed. Without torchrun one process does it all; without GPUs they run on CPUs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsebert as sb

BATCH = 32


def main(path: str, texts: str, out: str) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).to(device).eval()
    sb.fuse_(model)
    runner = sb.Runner(model)  # CUDA graphs; on a CPU it runs without
    lines = Path(texts).read_text(encoding="utf-8").splitlines()

    # Each row is written by one rank and zero on all others, so that their sum is what a gather would bring.
    logits = torch.zeros(len(lines), model.config.num_labels, device=device)
    with torch.inference_mode():
        for start in range(rank * BATCH, len(lines), ranks * BATCH):
            inputs = tokenizer(lines[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            # The mask stays on the CPU, where looking at it waits for nobody.
            there = {name: ids if name == "attention_mask" else ids.to(device) for name, ids in inputs.items()}
            logits[start : start + BATCH] = runner(**there).logits
    if ranks > 1:
        distributed.reduce(logits, dst=0)
        distributed.destroy_process_group()

    if rank == 0:
        rows = [
            {"text": text, "label": model.config.id2label[int(row.argmax())], "logits": row.tolist()}
            for text, row in zip(lines, logits.cpu(), strict=True)
        ]
        Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} texts on {ranks} processes")


if __name__ == "__main__":
    main(*sys.argv[1:4])
