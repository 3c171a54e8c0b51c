"""The diff of a checkout: whole as `git apply` takes it, or left out with the reason."""

import subprocess
from pathlib import Path

import pytest

from jobs.lineage.code_diff import LARGEST_BYTES, code_diff


def git(checkout: Path, *arguments: str, given: bytes = b"") -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.invalid"]
    subprocess.run(
        ["git", "-C", str(checkout), *who, *arguments], input=given, capture_output=True, check=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "code.py").write_bytes(b"one = 1\ntwo = '\xe9'\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_patch_makes_the_same_files_again(checkout: Path):
    assert code_diff(checkout) == (None, None)
    changed = b"one = 2\ntwo = '\xe8'\r\nthree = token\n"
    (checkout / "code.py").write_bytes(changed)
    (checkout / "untracked").write_text("password=hunter2")
    patch, left_out = code_diff(checkout)
    assert patch
    assert left_out is None
    git(checkout, "checkout", "code.py")
    git(checkout, "apply", given=patch)
    assert (checkout / "code.py").read_bytes() == changed


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("x = 'ghp_" + "a" * 36 + "'", "a token"),
        ("AKIA" + "A1" * 8, "a token"),
        ("password=hunter2", "a password"),
        ('"db_password": "hunter2"', "a password"),
        ("export SERVICE_TOKEN=4f1c8be2a9d7e6b3", "a named secret"),
        ("api_key = 'abcdefghij'", "a named secret"),
        ("https://user:pass@server.invalid/x", "a URL with a password"),
    ],
)
def test_a_secret_leaves_the_whole_of_it_out_and_is_not_repeated(checkout, line, what):
    (checkout / "code.py").write_text(f"fine = 1\n{line}\n")
    patch, left_out = code_diff(checkout)
    assert patch is None
    assert left_out
    assert what in left_out
    assert line not in left_out


@pytest.mark.parametrize(
    "line",
    [
        "token = page.token",
        "tokens=recorder.tokens",
        "if password == other",
        "keys: 12345678901234",
    ],
)
def test_plain_code_is_no_secret(checkout, line):
    (checkout / "code.py").write_text(f"{line}\n")
    assert code_diff(checkout).patch


def test_a_removed_secret_is_found_as_well(checkout: Path):
    (checkout / "code.py").write_text("password=hunter2\n")
    git(checkout, "commit", "-am", "second")
    (checkout / "code.py").write_text("nothing\n")
    assert code_diff(checkout).patch is None


def test_what_is_too_long_and_what_is_no_checkout_have_none(checkout: Path, tmp_path: Path):
    (checkout / "code.py").write_text("x\n" * (LARGEST_BYTES // 2))
    patch, left_out = code_diff(checkout)
    assert patch is None
    assert left_out
    assert "more than the 1,000,000 kept" in left_out
    (tmp_path / "wheel").mkdir()
    assert code_diff(tmp_path / "wheel") == (None, None)
