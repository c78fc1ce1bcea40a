"""Configs: a round trip through JSON and through the words of the command line, and one line for every mistake."""

import json
import math

import pytest

import sparsebert as sb
from sparsebert.configs import GROUP_SIZES, config_from_dict, parse_config

# The text is written out, so that a parser and a printer that are wrong together do not pass.
TEXTS = {
    "2:4": sb.NMConfig(2, 4),
    "1:16": sb.NMConfig(1, 16),
    "2:4@0.5": sb.NMConfig(2, 4, columns=0.5),
    "bitmap:0.1": sb.BitmapConfig(0.1),
    "bitmap:1": sb.BitmapConfig(1),
    "low-rank:0.25": sb.LowRankConfig(ratio=0.25),
    "low-rank:r64": sb.LowRankConfig(64),
    "low-rank:0.15+rows:0.1": sb.LowRankSparseConfig(ratio=0.15, sparse=sb.RowsConfig(0.1)),
    "low-rank:r8+2:4": sb.LowRankSparseConfig(8, sparse=sb.NMConfig(2, 4)),
    "low-rank:0.2+bitmap:0.05": sb.LowRankSparseConfig(ratio=0.2, sparse=sb.BitmapConfig(0.05)),
    "int8": sb.Int8Config(),
    "int8-static": sb.Int8Config("static"),
    "int8+2:4": sb.Int8Config(weights=sb.NMConfig(2, 4)),
    "int8-static+1:4": sb.Int8Config("static", sb.NMConfig(1, 4)),
    "dense": sb.DenseConfig(),
}


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(text):
    config = TEXTS[text]
    assert str(config) == text and parse_config(f" {text} ") == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert {config: 1}[parse_config(text)] == 1


def test_every_pattern_round_trips():
    for m in GROUP_SIZES:
        for n in range(1, m):
            assert config_from_dict(sb.NMConfig(n, m).to_dict()) == parse_config(f"{n}:{m}") == sb.NMConfig(n, m)


@pytest.mark.parametrize(
    "text",
    ["2-4", "4", "2:4:8", "-1:4", "2:4@", "bitmap", "bitmap:-1", "rows:0.1", "low-rank", "low-rank:r", "low-rank:0.1+"]
    + [
        "low-rank:0.1+int8",
        "int8+",
        "int8+bitmap:0.1",
        "int8-other",
        "int4",
        "dense:1",
        "",
        "2:4 x",
        "low-rank:0.1+low-rank:0.1",
    ],
)
def test_what_is_no_format(text):
    with pytest.raises(ValueError, match="is no format; write one of 2:4"):
        parse_config(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sb.NMConfig(2.0, 4), TypeError, "NMConfig: n is 2.0, expected an int"),
        (lambda: sb.NMConfig(4, 4), ValueError, "n is 4, expected 1 <= n < m = 4"),
        (lambda: sb.NMConfig(2, 5), ValueError, "m is 5, expected one of 2, 4, 8, 16"),
        (lambda: sb.NMConfig(2, 4, 1.0), ValueError, "NMConfig: columns is 1.0, expected above 0 and below 1"),
        (lambda: sb.NMConfig(2, 4, "half"), TypeError, "NMConfig: columns is 'half', expected a number"),
        (lambda: sb.BitmapConfig(0), ValueError, "BitmapConfig: density is 0, expected above 0 and at most 1"),
        (lambda: sb.BitmapConfig(math.nan), ValueError, "BitmapConfig: density is nan"),
        (lambda: sb.RowsConfig(1.5), ValueError, "RowsConfig: ratio is 1.5"),
        (lambda: sb.LowRankConfig(), ValueError, "rank is None and ratio is None, expected exactly one of them"),
        (lambda: sb.LowRankConfig(3, 0.5), ValueError, "rank is 3 and ratio is 0.5, expected exactly one"),
        (lambda: sb.LowRankConfig(0), ValueError, "LowRankConfig: rank is 0, expected at least 1"),
        (lambda: sb.LowRankConfig(True), TypeError, "LowRankConfig: rank is True, expected an int"),
        (lambda: sb.LowRankSparseConfig(3), TypeError, "sparse is NoneType, expected RowsConfig, NMConfig or"),
        (
            lambda: sb.LowRankSparseConfig(3, sparse=sb.NMConfig(2, 4, 0.5)),
            ValueError,
            "sparse has columns, expected an NMConfig without",
        ),
        (lambda: sb.Int8Config("sometimes"), ValueError, "activations is 'sometimes', expected one of dynamic, static"),
        (lambda: sb.Int8Config(weights=sb.BitmapConfig(0.5)), TypeError, "weights is BitmapConfig, expected NMConfig"),
        (lambda: sb.Int8Config(weights=sb.NMConfig(2, 4, 0.5)), ValueError, "weights has columns"),
    ],
)
def test_values_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "data",
    [
        {"format": "nope"},
        {"format": ["nm"]},
        {"format": "nm", "n": 2},
        {"format": "nm", "n": 2, "m": 4, "x": 1},
        {"format": "rows", "ratio": 0.5},
        {"format": "dense", "rows": 0.5},
        {"format": "low_rank_sparse", "rank": 2, "sparse": {"format": "nope"}},
        {},
    ],
)
def test_entries_that_are_no_config(data):
    with pytest.raises(ValueError, match="config: "):
        config_from_dict(data)
    with pytest.raises(TypeError, match="config: got list, expected a JSON object"):
        config_from_dict([data])
