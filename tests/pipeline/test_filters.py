"""What is dropped, and why."""

import hashlib

from pipeline.filters import Scanned, drop_duplicates, scan


def test_a_document_by_itself():
    assert scan([]) == Scanned(0, hashlib.sha256().hexdigest(), "empty")
    assert scan([b"a\0", b"b"]) == Scanned(3, hashlib.sha256(b"a\0b").hexdigest(), "binary")
    assert scan([b"\xef\xbb\xbfa\r\n", b"\xff"]).reason is None  # a BOM, CRLF, invalid UTF-8 stay


def test_the_first_of_equal_documents_stays():
    contents = [b"", b"x", b"\0", b"y", b"x", b"", b"\0", b"x"]
    reasons = [s.reason for s in drop_duplicates([scan([c] if c else []) for c in contents])]
    assert reasons == ["empty", None, "binary", None, "duplicate", "empty", "binary", "duplicate"]
