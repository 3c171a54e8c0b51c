"""Patterns of paths: what `*`, `?`, `[abc]` and `**/` match."""

import re


def matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression that matches what any of the patterns matches (nothing for none)."""
    return re.compile("|".join(_expression(p) for p in patterns) or r"(?!)", re.DOTALL)


def split_glob(path: str) -> tuple[str, str]:
    """The folders of a path before its first wildcard, and the pattern from there on.

    Without a wildcard the path and "".
    """
    wildcard = re.search(r"[*?[]", path)
    if wildcard is None:
        return path, ""
    cut = path.rfind("/", 0, wildcard.start()) + 1
    return path[:cut].rstrip("/") or ("/" if cut else "."), path[cut:]


def _expression(pattern: str) -> str:
    out, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            out, at = out + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            inside = "^" + inside[1:] if inside[0] == "!" else inside.replace("^", r"\^")
            out, at = out + f"[{inside}]", end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return f"(?:{out})"
