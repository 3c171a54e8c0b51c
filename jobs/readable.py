"""Stored text as a console can show it."""

import re
import textwrap

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def readable(text: bytes) -> str:
    """As text, with lines and tabs; other control characters are escaped: they could move the
    cursor, and what is not UTF-8 becomes U+FFFD."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text.decode("utf-8", "replace"))


def in_one_line(text: bytes, characters: int) -> str:
    """The beginning, with line breaks and tabs escaped."""
    whole = readable(text)
    line = whole[:characters].replace("\n", "\\n").replace("\t", "\\t")
    return line + ("..." if len(whole) > characters else "")


def indented(text: bytes, characters: int) -> str:
    """The beginning with its lines set in, and of empty ones that follow each other the first."""
    whole = readable(text)
    shown = whole[:characters] + ("..." if len(whole) > characters else "")
    return textwrap.indent(re.sub(r"\n\s*\n", "\n\n", shown.strip("\n")), "    ")
