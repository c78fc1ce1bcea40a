"""The corpus of retrieval pairs: what makes a pair, what is refused, and that the split never changes."""

from __future__ import annotations

import pytest

from sparsebert.bench.docstrings import (
    MINIMUM_PAIRS,
    Pair,
    Split,
    docstrings_of,
    read_pairs,
    split_docstring,
    split_pairs,
)

BODY = "The body has more than a dozen plain words, so that it is long enough to be found by its summary."


def make_pairs(count: int) -> list[Pair]:
    return [Pair(f"m.py:f{i}", f"Do the thing number {i}.", f"Body number {i}. {BODY}") for i in range(count)]


def test_a_conventional_docstring_gives_summary_and_body_with_white_space_folded():
    text = f"Return the   answer\nof it all.\n\n  {BODY}\n\n  - and   a list\n"
    assert split_docstring(text) == ("Return the answer of it all.", f"{BODY} - and a list")


@pytest.mark.parametrize(
    "text",
    [
        "Return the answer of it all.",
        f"Too short.\n\n{BODY}",
        "Return the answer of it all.\n\nOnly a few words here.",
        f"One two\nthree\nfour\nfive lines\n\n{BODY}",
        f"Return the answer of it.\n\n{BODY} Return THE answer: of it!",
        "",
        "   \n\n  ",
    ],
    ids=["no body", "short summary", "short body", "long summary", "summary repeated", "empty", "blank"],
)
def test_what_makes_no_fair_pair_is_refused(text):
    assert split_docstring(text) is None


def test_docstrings_of_nested_definitions_come_in_source_order():
    source = '''
"""module"""
class A:
    """class"""
    def f(self):
        """method"""
        def g():
            """inner"""
if True:
    async def h():
        """conditional"""
try:
    pass
except ValueError:
    def k():
        """in a handler"""
def no_docstring():
    return "string"
'''
    assert list(docstrings_of(source, "m.py")) == [
        ("m.py:", "module"),
        ("m.py:A", "class"),
        ("m.py:A.f", "method"),
        ("m.py:A.f.g", "inner"),
        ("m.py:h", "conditional"),
        ("m.py:k", "in a handler"),
    ]


def write(path, *docstrings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings)]
    path.write_text("\n".join(functions), encoding="utf-8")


def test_read_pairs_is_ordered_deduplicated_and_skips_tests_and_installed_packages(tmp_path):
    def doc(name: str, body: str = "") -> str:
        return f"Summary of the {name}.\n\n    {body or BODY + ' This is ' + name}"

    write(tmp_path / "b.py", doc("second"), doc("first", BODY + " another body"))
    write(tmp_path / "a.py", doc("first"))
    write(tmp_path / "sub" / "c.py", doc("third"), doc("fourth", BODY + " This is second"))
    for skipped in ("test", "tests", "site-packages", "idlelib/idle_test", "__pycache__"):
        write(tmp_path / skipped / "d.py", doc(skipped.replace("/", " ")))
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    (tmp_path / "null.py").write_bytes(b'"""a"""\0')
    ticks = []
    pairs = read_pairs(tmp_path, progress=lambda done, total: ticks.append((done, total)))
    # Left out: b.py:f1 repeats the summary of a.py:f0, sub/c.py:f1 the body of b.py:f0.
    assert [pair.name for pair in pairs] == ["a.py:f0", "b.py:f0", "sub/c.py:f0"]
    assert pairs[0].summary == "Summary of the first."
    assert pairs == read_pairs(tmp_path)
    assert ticks == [(i, 6) for i in range(6)]


def test_a_folder_without_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no \.py file under"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        read_pairs(tmp_path / "absent")


def test_the_split_is_disjoint_complete_and_independent_of_order():
    pairs = make_pairs(900)
    split = split_pairs(pairs)
    assert isinstance(split, Split)
    assert len(split.evaluation) == 500 and len(split.training) == 400
    assert set(split.evaluation) | set(split.training) == set(pairs)
    assert split == split_pairs(pairs[::-1])


def test_a_pair_stays_on_its_side_when_others_come_or_go():
    # Python versions differ by some pairs: those in both must not wander from training into evaluation by the dozen.
    small, large = split_pairs(make_pairs(1000)), split_pairs(make_pairs(1020))
    assert len(set(small.evaluation) - set(large.evaluation)) <= 20
    assert len(set(large.evaluation) - set(small.evaluation)) <= 20


def test_the_split_is_by_the_text_alone_and_fixed():
    pairs = make_pairs(8)
    renamed = [Pair("elsewhere", pair.summary, pair.body) for pair in pairs]
    chosen = [pair.summary for pair in split_pairs(pairs, held_out=3, minimum=8).evaluation]
    assert chosen == [pair.summary for pair in split_pairs(renamed, held_out=3, minimum=8).evaluation]
    # sha256 of the text, so the same on every machine; hash() would differ from run to run.
    assert chosen == ["Do the thing number 4.", "Do the thing number 1.", "Do the thing number 5."]


def test_too_few_pairs_are_a_clear_error():
    with pytest.raises(ValueError, match=f"found {MINIMUM_PAIRS - 1} pairs .* expected at least {MINIMUM_PAIRS}"):
        split_pairs(make_pairs(MINIMUM_PAIRS - 1))
    assert len(split_pairs(make_pairs(MINIMUM_PAIRS)).training) == MINIMUM_PAIRS - 500


@pytest.mark.parametrize("held_out", [0, -1, 800])
def test_a_held_out_count_that_leaves_nothing_is_an_error(held_out):
    with pytest.raises(ValueError, match=f"held_out is {held_out}, expected 1 to 799"):
        split_pairs(make_pairs(800), held_out=held_out)


def test_training_texts_are_both_halves_of_the_training_pairs_each_once():
    pair, other = Pair("a", "the summary", "the body"), Pair("b", "the body", "another")
    split = Split(evaluation=(Pair("c", "held out", "never seen"),), training=(pair, other))
    assert split.training_texts() == ["the summary", "the body", "another"]


@pytest.fixture(scope="module")
def library() -> list[Pair]:
    return read_pairs()


def test_the_standard_library_of_this_interpreter_gives_enough_pairs(library):
    # 2,386 to 2,421 on full builds of 3.11 to 3.13; distributions that leave out idlelib or tkinter have fewer.
    assert MINIMUM_PAIRS + 500 < len(library) < 4000
    assert not [pair for pair in library if "site-packages" in pair.name or pair.name.startswith("test/")]
    assert all(pair.summary and pair.body and "\n" not in pair.summary + pair.body for pair in library)


def test_no_text_of_the_library_is_on_both_sides(library):
    split = split_pairs(library)
    held_out = {text for pair in split.evaluation for text in (pair.summary, pair.body)}
    assert len(split.evaluation) == 500
    assert not held_out & set(split.training_texts())
    assert len({pair.summary for pair in split.evaluation}) == len({pair.body for pair in split.evaluation}) == 500
