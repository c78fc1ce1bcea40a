"""Training data from folders, files and the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsebert.cli import data, recipes

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
TSV = 'label\tsentence1\n1\ta "red" cat\n0\ta dog\n'


def folder(tmp_path: Path, **files: str) -> str:
    for name, text in files.items():
        stem, _, kind = name.rpartition("_")
        (tmp_path / f"{stem}.{kind}").write_text(text)
    return str(tmp_path)


def read(source, dev=None, columns=None, label="label", **options):
    return data.read(str(source), dev, columns, label, **options)


def refused(*arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        read(*arguments, **options)
    return str(error.value)


def test_a_folder_of_tsv_is_split_on_tabs_without_quoting(tmp_path):
    found = read(folder(tmp_path, train_tsv=TSV, dev_tsv=TSV))
    assert [row.texts for row in found.train.rows] == [('a "red" cat',), ("a dog",)]
    assert found.classes == ("0", "1")
    assert found.labels(found.train) == [1, 0]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("csv", 'verdict,a,b\nyes,"one, two",x\nno,three,y\n'),
        ("jsonl", '{"verdict": "yes", "a": "one, two", "b": "x"}\n{"b": "y", "verdict": "no", "a": "three"}\n'),
        ("tsv", "verdict\ta\tb\nyes\tone, two\tx\nno\tthree\ty\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, text):
    file = tmp_path / f"rows.{kind}"
    file.write_text(text)
    found = read(file, file, ("a", "b"), "verdict")
    assert [row.texts for row in found.train.rows] == [("one, two", "x"), ("three", "y")]
    # In alphabetical order.
    assert found.classes == ("no", "yes")
    assert found.labels(found.dev) == [1, 0]
    # A model's own head goes before it.
    assert found.labels(found.dev, ("yes", "no")) == [0, 1]


def test_labels_of_json_may_be_numbers(tmp_path):
    rows = '{"label": 1, "sentence1": "a"}\n{"label": 0, "sentence1": "b"}\n'
    assert read(folder(tmp_path, train_jsonl=rows, validation_jsonl=rows)).classes == ("0", "1")


def test_fractions_are_regression_unless_said_otherwise(tmp_path):
    rows = "label\tsentence1\n1.5\ta\n2\tb\n"
    found = read(folder(tmp_path, train_tsv=rows, dev_tsv=rows))
    assert found.classes is None
    assert found.labels(found.train) == [1.5, 2.0]
    assert read(tmp_path, regression=False).classes == ("1.5", "2")
    whole = "label\tsentence1\n1\ta\n0\tb\n"
    assert read(folder(tmp_path, train_tsv=whole, dev_tsv=whole), regression=True).labels(found.train) == [1.5, 2.0]


def test_a_limit_is_for_training_rows_alone(tmp_path):
    found = read(folder(tmp_path, train_tsv=TSV + "1\tmore\n", dev_tsv=TSV + "1\tmore\n"), limit=2)
    assert (len(found.train.rows), len(found.dev.rows)) == (2, 3)


def test_the_fingerprint_is_that_of_texts_and_labels(tmp_path):
    first = read(folder(tmp_path, train_tsv=TSV, dev_tsv=TSV)).fingerprint()
    assert read(tmp_path).fingerprint() == first
    assert read(folder(tmp_path, train_tsv=TSV.replace("cat", "cow"))).fingerprint() != first
    assert read(folder(tmp_path, train_tsv=TSV.replace("1\t", "0\t", 1) + "1\tz\n")).fingerprint() != first


def test_what_is_missing_or_malformed_is_named(tmp_path):
    assert refused(tmp_path / "no.tsv").endswith("there is no such file or folder")
    assert "has no train set; expected one of train.tsv, train.csv, train.jsonl" in refused(tmp_path)
    folder(tmp_path, train_tsv=TSV)
    assert "has no dev set" in refused(tmp_path)
    assert "give the rows to evaluate on too, with --dev FILE" in refused(tmp_path / "train.tsv")
    folder(tmp_path, train_csv="label,sentence1\n", dev_tsv=TSV)
    assert "has both train.tsv and train.csv" in refused(tmp_path)
    assert "a model takes one or two" in refused(tmp_path, None, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("train", "dev", "complaint"),
    [
        ("1\ta\n1\tb\n", "1\ta\n", "train.tsv: has 1 different labels, expected 2 to 1000"),
        ("1\ta\n2\tb\n", "1\ta\n", "train.tsv: labels are the numbers 1, 2, of which 2 is none of 0 to 1"),
        ("1\ta\n0\tb\n", "2\ta\n", "dev.tsv, line 2: label is '2', expected 0 to 1"),
        ("1\ta\n\tb\n", "1\ta\n", "train.tsv, line 3: has no label"),
        ("1.5\ta\n0\tb\n", "x\ta\n", "dev.tsv, line 2: label is 'x', expected a number"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, train, dev, complaint):
    header = "label\tsentence1\n"
    assert complaint in refused(folder(tmp_path, train_tsv=header + train, dev_tsv=header + dev))


class Rows(list):
    """What datasets gives: rows with named columns, labels as numbers of named classes."""

    def __init__(self, rows, names=("no", "yes")):
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {key: SimpleNamespace(**({"names": list(names)} if key == "label" else {})) for key in rows[0]}


@pytest.fixture
def hub(monkeypatch):
    """``hub[name, configuration] = parts`` is what a stand-in for the package datasets loads."""
    known: dict = {}

    def load_dataset(name, configuration=None):
        if (name, configuration) not in known:
            raise FileNotFoundError(f"Couldn't reach {name!r}\nand more")
        return known[name, configuration]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return known


def test_a_data_set_of_the_hub(hub):
    rows = [{"sentence": "a", "label": 1, "idx": 0}, {"sentence": "b", "label": 0, "idx": 1}]
    hub["nyu-mll/glue", "sst2"] = {"train": Rows(rows), "validation": Rows(rows[:1]), "test": Rows(rows)}
    found = read("nyu-mll/glue:sst2")
    assert [row.texts for row in found.train.rows] == [("a",), ("b",)]
    assert (found.classes, found.labels(found.dev)) == (("0", "1"), [1])
    assert "has no column 'x'; its columns: sentence, label, idx" in refused("nyu-mll/glue:sst2", None, ("x",))
    assert "--dev goes with a file" in refused("nyu-mll/glue:sst2", Path("d.tsv"))


def test_what_the_hub_does_not_give_is_one_line(hub):
    assert refused("some/where") == (
        "some/where: there is no such file or folder, and the hub did not give it: Couldn't reach 'some/where'"
    )
    hub["some/where", None] = {"train": Rows([{"text": "a", "label": -1}])}
    assert "some/where, train, row 1: has no label" in refused("some/where")
    hub["some/where", None] = {"test": Rows([{"text": "a", "label": 1}])}
    assert "has no train set; its parts: test" in refused("some/where")


def test_without_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refused("nyu-mll/glue:sst2")
    assert "takes datasets, which is not installed: pip install 'sparsebert[train]'" in said


@pytest.mark.skipif(not GLUE.is_dir(), reason="the data of GLUE is not here")
@pytest.mark.parametrize(("name", "task"), [("CoLA", "cola"), ("MRPC", "mrpc"), ("RTE", "rte"), ("SST-2", "sst2")])
def test_the_tasks_of_the_recipes_are_those_of_glue(name, task):
    found = read(GLUE / name)
    assert len(found.train.rows) == recipes.tasks()[task].train_rows
    assert found.classes == ("0", "1")
    assert {len(row.texts) for row in found.train.rows} == {2 if task in ("mrpc", "rte") else 1}
