"""Write a folder that can go to the hub: weights, tokenizer and model card. Uploads only with --push.

python examples/share_on_hub.py PATH_TO_MODEL OUTPUT_FOLDER [--push ORGANISATION/NAME]
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

import sparsebert as sb


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("out", type=Path)
    parser.add_argument("--push", metavar="REPO_ID", help="upload the folder; needs a login to the hub")
    options = parser.parse_args()

    model = AutoModel.from_pretrained(options.path).eval()
    sb.compress_(model, sb.NMConfig(2, 4))
    sb.save_pretrained(model, options.out, tokenizer=AutoTokenizer.from_pretrained(options.path))

    for file in sorted(options.out.iterdir()):
        print(f"{file.name}: {kind_of(file)}, {file.stat().st_size:,} bytes")
    if options.push is not None:
        upload(options.out, options.push)


def kind_of(file: Path) -> str:
    """``ValueError`` for anything but safetensors, JSON and text: nothing in the folder may run code when loaded."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            return f"safetensors, {len(tensors.keys())} tensors"
    if file.suffix not in (".json", ".md", ".txt"):
        raise ValueError(f"{file}: expected safetensors, JSON or text")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        json.loads(text)
    return "JSON" if file.suffix == ".json" else "text"


def upload(folder: Path, repo_id: str) -> None:
    sb.load_pretrained(folder)  # strict: what does not load is not uploaded
    create_repo(repo_id, exist_ok=True)
    # The very files listed above. model.push_to_hub(repo_id) works too, but writes a card of its own.
    upload_folder(repo_id=repo_id, folder_path=folder)


if __name__ == "__main__":
    main()
