"""What had been changed in the checkout that a training ran from, as a patch, if it may be kept."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

LARGEST_BYTES = 1_000_000
"""A longer diff is data or generated code and not what explains a result."""
_CHECKOUT = Path(__file__).resolve().parents[2]
_SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a token": (
        r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
        r"|\bxox[abprs]-[\w-]{10,}|\bhf_\w{20,}|\bsk-[\w-]{20,}|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
        r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\."
    ),
    "a password": r"(?i)passw(or)?d\w*[\"']?\s*[=:]\s*[^\s=]",
    # Quoted, or long with a digit in it: `token = page.token` is code, `TOKEN=4f...` is none.
    "a named secret": (
        r"(?i)(secret|token|api_?key|credential|access_?key)s?[\"']?\s*[=:]\s*"
        r"([\"'][^\s\"']{8,}[\"']|(?=[\w+/-]*\d)[\w+/-]{16,})"
    ),
    "a URL with a password": r"://[^/@:\s]+:[^/@\s]+@",
}


class CodeDiff(NamedTuple):
    """The changes of tracked files since the commit, or why they are not kept."""

    patch: bytes | None
    """As `git apply` takes it; None if nothing was changed or it is left out."""
    left_out: str | None
    """Why a diff that there is, or may be, is not kept; names no secret."""


def code_diff(checkout: Path = _CHECKOUT) -> CodeDiff:
    """Of the checkout that this code comes from; both None for an installed wheel.

    Left out if it is longer than LARGEST_BYTES or any line of it looks like a secret. Files that
    git does not track are never read, and binary ones are named only.
    """
    if not (checkout / ".git").exists():
        return CodeDiff(None, None)
    command = ["git", "-C", str(checkout), "diff", "HEAD", "--no-color", "--no-ext-diff"]
    try:
        done = subprocess.run(
            [*command, "--no-textconv"], capture_output=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return CodeDiff(None, f"git does not tell it ({type(error).__name__})")
    if len(done.stdout) > LARGEST_BYTES:
        return CodeDiff(
            None, f"its {len(done.stdout):,} bytes are more than the {LARGEST_BYTES:,} kept"
        )
    for number, line in enumerate(done.stdout.decode(errors="replace").splitlines(), start=1):
        for what, pattern in _SECRETS.items():
            if re.search(pattern, line):
                return CodeDiff(None, f"line {number} of it looks like {what}")
    return CodeDiff(done.stdout or None, None)
