"""What is dropped, and why."""

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.filters import ExactDuplicates, FilterSettings, Scanned, scan
from pipeline.near_duplicates import NearDuplicateSettings, Signer
from pipeline.quality import Quality


def run(*blocks: bytes, needs_utf8: bool = False, near: NearDuplicateSettings | None = None, **kw):
    return scan(blocks, FilterSettings(**kw), needs_utf8=needs_utf8, near=near)


def test_a_document_by_itself():
    assert run() == Scanned(0, hashlib.sha256().hexdigest(), "empty")
    assert run(b"a\0", b"b") == Scanned(3, hashlib.sha256(b"a\0b").hexdigest(), "binary")
    assert run(b"a\0", b"b", keep_binary=True).reason is None
    assert run(b"\xef\xbb\xbfa\r\n", b"\xff").reason is None  # a BOM, CRLF, invalid UTF-8 stay


def test_limits_of_length_are_kept_exactly():
    for size, reason in ((1, "too short"), (2, None), (4, None), (5, "too long")):
        assert run(*[b"x"] * size, min_bytes=2, max_bytes=4).reason == reason
    assert run(min_bytes=0).reason == "empty"


def test_the_first_of_several_reasons_is_given_and_everything_is_hashed():
    found = run(b"\xff" * 9, b"\0", needs_utf8=True, max_bytes=3, quality=True)
    assert found == Scanned(10, hashlib.sha256(b"\xff" * 9 + b"\0").hexdigest(), "binary")
    assert run(b"\xff" * 9, needs_utf8=True, max_bytes=3).reason == "too long"
    assert run(b"\xff" * 9, needs_utf8=True, quality=True).reason == "not UTF-8"
    assert run(b"\xff" * 9, needs_utf8=True, min_bytes=10).reason == "too short"


parts = st.sampled_from(
    [b"a", "é".encode(), "中".encode(), "😀".encode(), b"\xed\xa0\x80", b"\xf4"]
)


@given(st.lists(parts | st.binary(max_size=2)).map(b"".join), st.integers(1, 5))
def test_utf8_is_judged_as_if_at_once(content, size):
    blocks = [content[at : at + size] for at in range(0, len(content), size)]
    try:
        content.decode()
        expected = None
    except UnicodeDecodeError:
        expected = "not UTF-8"
    if content:
        assert run(*blocks, needs_utf8=True, keep_binary=True).reason == expected


def test_a_character_is_not_completed_past_a_block_of_ascii():
    assert run(b"\xc3", b"a", b"\xa9", needs_utf8=True).reason == "not UTF-8"
    assert run(b"\xc3", b"\xa9", b"a", needs_utf8=True).reason is None


def test_the_signature_comes_with_a_document_that_is_kept():
    near = NearDuplicateSettings()
    signer = Signer(near)
    signer.update(b"Some words, in blocks.")
    expected = signer.signature()
    found = run(b"Some wo", b"rds, in blocks.", near=near)
    assert expected is not None
    assert found.signature is not None
    assert found.signature.tolist() == expected.tolist()
    assert run(b"Some wo", b"rds\0", near=near).signature is None
    assert run(b"Some words").signature is None


def test_the_first_of_equal_contents_stays():
    duplicates = ExactDuplicates()
    contents = [b"x", b"y", b"x", b"", b"y", b"z"]
    answers = [duplicates.is_duplicate(hashlib.sha256(content).digest()) for content in contents]
    assert answers == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_bytes": -1}, "min_bytes: must be at least 0, got -1"),
        ({"max_bytes": 0}, "max_bytes: must be at least 1 and at least min_bytes"),
        ({"min_bytes": 9, "max_bytes": 8}, r"at least min_bytes \(9\), got 8"),
    ],
)
def test_settings_that_keep_nothing_are_refused(settings, message):
    with pytest.raises(CorpusError, match=message):
        FilterSettings(**settings)


# ---------------------------------------------------------------- quality

PROSE = "It was a bright cold day in April, and the clocks were striking thirteen; line {}.\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("".join(PROSE.format(i) for i in range(50)), None),
        ("今天天气很好，我们去公园散步。明天也许会下雨。\n", None),
        ("Была холодная ясная погода, и часы пробили тринадцать.\n", None),
        ("def f(x):\n    # twice\n    return 2 * x\n", None),
        ("12 34.5 67\n" * 3, "few letters"),
        ("ab1 cd2 ef3 456", None),
        ("ab1 cd2 e43 456", "few letters"),
        ("QUJD" * 100, "long words"),
        ("a" * 20 + " " + "b" * 20, None),
        ("a" * 20 + " " + "b" * 21, "long words"),
        ("one #two three four", None),
        ("one #two three #four words", "hash signs"),
        ("one. . .\ntwo\nthree...\nfour\n", None),
        ("one...\r\ntwo\n\nthree\u2026", "cut lines"),
        ("buy it now\nhere\n" + "buy it now\n", None),
        ("buy it now\n" * 3, "repeated lines"),
        ("\n" * 50 + "\r\n" * 50 + "once\n", None),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_signs_of_low_quality(text, fault, size):
    content, quality = text.encode(), Quality()
    for at in range(0, len(content), size):
        quality.update(content[at : at + size])
    assert quality.fault() == fault
    reason = run(content, quality=True).reason
    assert reason == (fault and f"low quality: {fault}")
    assert run(content).reason is None


@given(
    st.lists(st.sampled_from(["a", "\n", "...", "…", "\r\n", "same line\n", "#", " "])).map(
        "".join
    ),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_signs_do_not_depend_on_the_blocks(text, cuts):
    content, whole, parted = text.encode(), Quality(), Quality()
    whole.update(content)
    borders = sorted({min(cut, len(content)) for cut in cuts} | {0, len(content)})
    for start, stop in pairwise(borders):
        parted.update(content[start:stop])
    assert whole.fault() == parted.fault()
    assert {**vars(whole), "_bytes": whole._bytes.tolist()} == {
        **vars(parted),
        "_bytes": parted._bytes.tolist(),
    }


def test_lines_past_those_remembered_are_judged_by_a_sample(monkeypatch):
    monkeypatch.setattr("pipeline.quality._MOST_LINES", 500)
    lines = [f"the line with number {i}\n" for i in range(5000)]
    for text, fault in (
        (lines, None),
        (lines + lines[:4000], None),
        (lines * 2 + lines[:1000], "repeated lines"),
        (lines + lines[:1000] * 7, "repeated lines"),
    ):
        content, whole, parted = "".join(text).encode(), Quality(), Quality()
        whole.update(content)
        for at in range(0, len(content), 10_000):
            parted.update(content[at : at + 10_000])
        assert whole._times == parted._times
        assert 200 < len(whole._times) <= 500
        assert whole.fault() == parted.fault() == fault
