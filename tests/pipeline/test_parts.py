"""How long documents are cut, and their words counted."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipeline.parts import WordCounter, cut_parts


def cut(data: bytes, limit: int, block: int) -> list[bytes]:
    return list(cut_parts((data[at : at + block] for at in range(0, len(data), block)), limit))


@given(st.text("ab\né漢😀 ", max_size=60), st.integers(4, 20), st.integers(1, 70))
def test_parts_of_text(text, limit, block):
    parts = cut(text.encode(), limit, block)
    assert b"".join(parts) == text.encode()
    for part, following in itertools.pairwise(parts):
        part.decode()  # a part ends between two characters
        assert len(part) <= limit
        if not part.endswith(b"\n"):  # only where no newline would fit, and then as late as it can
            assert b"\n" not in part
            assert len(part) + len(following.decode()[0].encode()) > limit
        elif len(following) < limit:  # the last newline that fits
            fits = (part + following)[:limit]
            assert fits.rfind(b"\n") + 1 == len(part)


@given(st.binary(max_size=60), st.integers(1, 20), st.integers(1, 70))
def test_parts_of_any_bytes(data, limit, block):
    parts = cut(data, limit, block)
    assert b"".join(parts) == data
    assert all(0 < len(part) <= limit for part in parts)


@given(st.lists(st.text("a \n\té", max_size=5)))
def test_words_are_counted_once_across_parts(parts):
    counter = WordCounter()
    for _ in range(2):  # the next document begins anew
        counts = [counter.count(part.encode(), goes_on=n > 0) for n, part in enumerate(parts)]
        assert sum(counts) == len("".join(parts).split())
