"""The documentation says what is so: its code runs, its figures are computed, its links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import sparsebert as sb
from sparsebert.configs import config_from_dict, parse_config
from sparsebert.formats import one_shot
from sparsebert.nn import MODULES
from sparsebert.ops import layouts
from sparsebert.plan import CompressionPlan, load_selection
from sparsebert.roles import FAMILIES, ROLES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(file.relative_to(ROOT).as_posix() for file in (*DOCS.glob("*.md"), *ROOT.glob("*.md")))

# Format -> its page, and configs that together have every tensor it can have.
FORMATS = {
    "nm": ("nm.md", ["2:4@0.5"]),
    "bitmap": ("bitmap.md", ["bitmap:0.1"]),
    "low_rank": ("low_rank.md", ["low-rank:r4"]),
    "low_rank_sparse": ("low_rank.md", ["low-rank:r4+rows:0.1", "low-rank:r4+2:4", "low-rank:r4+bitmap:0.1"]),
    "int8": ("int8.md", ["int8-static", "int8+2:4"]),
    "dense": ("dense.md", ["dense"]),
}


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def table_rows(text):
    """Rows of all tables as lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@cache
def approximation(config):
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    return one_shot.approximate(weight, config)


@cache
def packed(text, dtype):
    """A 768 x 768 weight without bias, compressed as ``text`` says and packed in ``dtype``."""
    config, linear = parse_config(text), nn.Linear(768, 768, bias=False)
    found = approximation(config)
    linear.weight = nn.Parameter(found.weight.to(dtype))
    factors = {name: factor.to(dtype) for name, factor in found.factors.items()}
    return MODULES[config.format].from_linear(linear, config, factors=factors)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, link


@pytest.mark.parametrize("name", [file.name for file in sorted(DOCS.glob("*.md"))])
def test_examples_in_the_pages_give_what_they_show(name):
    failed, tried = doctest.testfile(str(DOCS / name), module_relative=False, encoding="utf-8")
    assert not failed
    assert tried or name == "checkpoint.md"


@pytest.mark.parametrize("kind", MODULES)
def test_every_format_has_a_page_with_its_tensors_and_layouts(kind):
    name, configs = FORMATS[kind]
    text = page(name)
    for module in (packed(config, torch.float32) for config in configs):
        assert module.format == kind
        for tensor in layouts.tensors(module.spec, layouts.NEUTRAL):
            assert f"`{tensor}`" in text
        for layout in layouts.names(module.spec.op):
            assert re.search(rf"^\|.*`{layout}`.*\|", text, flags=re.MULTILINE), layout
        assert f"`{module.spec.op}`" in text.splitlines()[0]
    assert f"]({name})" in page("checkpoint.md")


def figures():
    """``(page, config, figures as text)`` of the tables of bits a weight."""
    found = []
    for name in sorted({name for name, _ in FORMATS.values()}):
        for cells in table_rows(page(name)):
            if len(cells) == 5 and cells[2].endswith(" %"):
                found.append((name, cells[0].strip("`"), cells[1:]))
    return found


def test_every_page_has_figures():
    assert {name for name, _, _ in figures()} == {name for name, _ in FORMATS.values()}


@pytest.mark.parametrize(("name", "config", "shown"), figures())
def test_bits_a_weight_are_computed(name, config, shown):
    bits = [packed(config, dtype).disk_bytes() * 8 / 768**2 for dtype in (torch.float16, torch.float32)]
    actual = [bits[0], 100 * bits[0] / 16, bits[1], 100 * bits[1] / 32]
    for text, value in zip(shown, actual, strict=True):
        number = text.removesuffix(" %")
        decimals = len(number.partition(".")[2])
        # Half a unit of the last place shown, whichever way a tie went.
        assert abs(float(number) - value) <= 0.5 * 10**-decimals + 1e-9, (text, value)


def test_bits_in_the_readme_are_computed():
    rows = [
        cells for cells in table_rows((ROOT / "README.md").read_text(encoding="utf-8")) if cells[0].startswith("`sb.")
    ]
    configs = [eval(cells[0].strip("`"), {"sb": sb}) for cells in rows]
    assert {config.format for config in configs} == set(MODULES)
    for config, cells in zip(configs, rows, strict=True):
        assert cells[2] == f"{packed(str(config), torch.float16).disk_bytes() * 8 / 768**2:.4g}"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The folder that the code at the top of checkpoint.md writes."""
    (code,) = blocks(page("checkpoint.md"), "python")
    out = tmp_path_factory.mktemp("checkpoint")
    exec(code, {"out": out})
    return out


def test_the_layer_map_shown_is_that_of_the_example(example):
    shown, *_ = (json.loads(block) for block in blocks(page("checkpoint.md"), "json"))
    assert shown == json.loads((example / "config.json").read_text())["quantization_config"]
    assert {entry["format"] for entry in shown["layers"].values()} == set(MODULES)
    fields = {field for entry in shown["layers"].values() for field in entry} | {"nnz", "rows"}
    described = {name for cells in table_rows(page("checkpoint.md")) for name in re.findall(r"`(\w+)`", cells[0])}
    assert fields <= described


def test_the_tensors_shown_are_those_of_the_example(example):
    prefix = "encoder.layer.0."
    with safe_open(example / "model.safetensors", "pt") as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    stored = {
        key.removeprefix(prefix): (found.get_dtype(), tuple(found.get_shape()))
        for key, found in slices.items()
        if key.startswith(prefix) and "LayerNorm" not in key
    }
    shown = {
        cells[0].strip("`"): (cells[1], ast.literal_eval(cells[2]))
        for cells in table_rows(page("checkpoint.md"))
        if len(cells) == 3 and cells[1] in ("F32", "U8", "I8", "I32", "I64")
    }
    assert shown == stored


def test_plans_and_selections_shown_are_read(example, tmp_path):
    _, plan, selection = (json.loads(block) for block in blocks(page("checkpoint.md"), "json"))
    found = CompressionPlan.from_dict(plan)
    assert found.to_dict() == plan
    # By the same configs the example was made.
    (code,) = blocks(page("checkpoint.md"), "python")
    names: dict = {"out": example}
    exec(code.partition("sb.compress_")[0], names)
    layers = json.loads((example / "config.json").read_text())["quantization_config"]["layers"]
    by_role = {entry["role"]: found.layers[path] for path, entry in layers.items()}
    assert by_role == names["selection"]
    (tmp_path / "selection.json").write_text(json.dumps(selection))
    read = load_selection(tmp_path / "selection.json")
    assert read["*.layer.0.*"] is None
    assert read["query"] == config_from_dict(selection["selection"]["query"]) == sb.NMConfig(2, 4)


def test_every_family_is_listed_with_its_layers():
    rows = {
        kind: cells
        for cells in table_rows(page("checkpoint.md"))
        if len(cells) == 5
        for kind in re.findall(r"`([^`]+)`", cells[0])
        if kind != "model_type"
    }
    assert set(rows) == set(FAMILIES)
    for kind, family in FAMILIES.items():
        paths = [name for cell in rows[kind][2:] for name in re.findall(r"`([^`]+)`", cell) if name not in ROLES]
        assert paths == list(family.roles.values())
        stem = rows[kind][1].strip("`")
        assert re.fullmatch(family.stem, stem.replace("N", "1").replace("M", "2"))


def test_lines_are_not_too_long():
    long = [
        f"{file.name}: {number}"
        for file in DOCS.glob("*.md")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert not long
