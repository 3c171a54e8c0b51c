"""Normalising block by block, against normalising the whole text."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import normalization
from pipeline.errors import CorpusError
from pipeline.normalization import Normalization, normalize

# Pairs that compose over a border, compatibility characters, Korean, marks in the wrong order.
NASTY = "a\u0301\u0316e\u0327\u1100\u1161\u11a8가각ﬁ①\uff76\uff9e\u09c7\u09be"
NASTY += "\u0344\u212b\u1e9b\u0323中\n"
texts = st.text(alphabet=st.sampled_from(NASTY) | st.characters(codec="utf-8"), max_size=30)
sizes = st.integers(1, 7)


def blocks(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def run(content: bytes, size: int = 5, **settings) -> bytes:
    return b"".join(normalize(blocks(content, size), Normalization(**settings)))


@given(st.binary(max_size=40), sizes)
def test_every_byte_stays_by_default(content, size):
    assert run(content, size) == content


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@given(texts, sizes)
@example("\u0915\u093c" * 3, 1)
def test_text_is_brought_to_the_form(form, text, size):
    assert run(text.encode(), size, unicode_form=form) == unicodedata.normalize(form, text).encode()


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_text_can_be_cut_before_any_character_that_is_said_to_begin(form):
    begins = normalization._beginnings(form)
    known = [c for c in map(chr, range(0x80, 0x30000)) if unicodedata.category(c)[0] in "LMNPSZ"]
    cut = [c for c in known if begins(c)]
    assert len(cut) > 130_000
    assert {"\u0301", "\u1161", "\u09be", "\u0344"} <= set(known) - set(cut)
    # In turn after each kind of character that composes with many.
    for before in ("a", "e\u0327", "\u1100", "가", "\u09c7", "\u0915", "\u3046", "A\u030a"):
        alone = unicodedata.normalize(form, before)
        # One call for all: each pair is apart from the others by a space.
        together = unicodedata.normalize(form, " ".join(before + c for c in cut))
        apart = " ".join(alone + unicodedata.normalize(form, c) for c in cut)
        assert together == apart


@given(st.lists(st.binary(max_size=3) | texts.map(str.encode), max_size=8), sizes)
def test_bytes_that_are_not_utf8_stay_and_the_rest_is_brought_to_the_form(parts, size):
    content = b"".join(parts)
    text = content.decode("utf-8", "surrogateescape")
    expected = unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
    assert run(content, size, unicode_form="NFC") == expected


def test_latin_1_is_left_alone():
    assert run("café à la crème\n".encode("latin-1"), unicode_form="NFC") == (
        "café à la crème\n".encode("latin-1")
    )


def test_a_run_of_marks_without_end_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(normalization, "_MOST_WAITING", 10)
    given_ = ("\u0301" * 40).encode()
    settings = Normalization(unicode_form="NFC")
    produced = [len(block) for block in normalize(blocks(given_, 8), settings)]
    assert sum(produced) == len(given_)
    assert max(produced) <= 28


@given(st.lists(st.sampled_from([b"\r", b"\n", b"a", b"\xff"])).map(b"".join), sizes)
def test_newlines(content, size):
    # As universal newlines read it.
    text = content.decode("latin-1")
    expected = "".join(line + "\n" for line in text.splitlines()).encode("latin-1")
    expected = expected if content.endswith((b"\r", b"\n")) or not content else expected[:-1]
    assert run(content, size, newlines=True) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_byte_order_mark_goes_only_at_the_beginning_and_only_once(size):
    mark = b"\xef\xbb\xbf"
    for content, expected in (
        (mark + b"a" + mark, b"a" + mark),
        (mark + mark, mark),
        (mark, b""),
        (mark[:2], mark[:2]),
        (b"a", b"a"),
        (b"", b""),
    ):
        assert run(content, size, byte_order_mark=True) == expected


def test_all_at_once():
    assert (
        run(
            "\ufeffe\u0301\r\nﬁ\r".encode(),
            byte_order_mark=True,
            newlines=True,
            unicode_form="NFKC",
        )
        == "é\nfi\n".encode()
    )


def test_an_unknown_form_is_refused():
    with pytest.raises(CorpusError, match="unicode_form: must be NFC, NFKC or none, got NFD"):
        Normalization(unicode_form="NFD")  # pyright: ignore[reportArgumentType]
