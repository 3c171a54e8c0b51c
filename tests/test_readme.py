"""What the README shows is what the commands print, figures that vary masked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_lines import parse, shown_in

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TVQ = [sys.executable, "-c", "from jobs.cli.main import main; main()"]

_UNSTEADY = re.compile(r"^((read|write|update|token) [\d,]+/|goodput )")
"""Progress lines, and where the time went: they depend on the speed of the machine."""


def code_blocks(language: str = "") -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for found, text in blocks if found == language]


def commands_to_run() -> list[list[str]]:
    """Those that need nothing but somebody's own text, in the order in which they stand there."""
    blocks = re.findall(
        r"^<!-- tests run these -->\n```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE
    )
    return shown_in("\n".join(blocks))


def transcript() -> str:
    [text] = re.findall(
        r"<!-- transcript: begin -->\n```\n(.*?)```\n<!-- transcript: end -->", README, re.DOTALL
    )
    return text


def masked(text: str) -> list[str]:
    """Lines without progress, sampled text, numbers, hashes, paths and the widths of columns."""
    text = re.sub(r"(?s)(== sample.*?\n.*?\n).*?(?=\n== )", r"\1", text)
    lines = []
    for line in text.splitlines():
        if _UNSTEADY.match(line) or not line.strip():
            continue
        line = re.sub(r"(?<!\w)(/|[\w.-]+/)[^,;]*", "PATH", line)
        line = re.sub(r"\b[0-9a-f]{16}\b", "HASH", line)
        line = re.sub(r"[+-]?\d[\d,.]*", "N", line)
        lines.append(re.sub(r"\s+", " ", line).strip())
    return lines


def test_the_transcript_leaves_nothing_to_be_filled_in():
    assert " ?" not in transcript()


def test_every_command_parses():
    shown = shown_in("\n".join(code_blocks()))
    assert len(shown) > 50
    assert len(commands_to_run()) > 20
    for words in shown:
        parse(words)


def test_python_compiles():
    blocks = code_blocks("python")
    assert len(blocks) == 2  # of the registered model, and of the shards: both are run below
    for block in blocks:
        compile(block, "README.md", "exec")


def test_files_that_it_names_are_there():
    targets = re.findall(r"\]\(([^):#]+)\)", README) + re.findall(r"`(\w+/[\w/]+\.py)`", README)
    assert len(targets) > 20
    for target in targets:
        assert (REPOSITORY / target).exists(), target
    # `tests/jobs/test_a.py`, `test_b.py`
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert list((REPOSITORY / "tests").rglob(name)), name


def test_sections_that_it_names_are_there():
    titles = re.findall(r"^## (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w ]", "", title).lower().replace(" ", "-") for title in titles}
    named = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(named) > 5
    assert set(named) <= anchors


def test_masking_keeps_what_it_should():
    assert masked(
        "killed rank-1 (process 12) at update 3\nupdate 3/9  loss 1\n\ntrain  6  0.5"
    ) == [
        "killed rankN (process N) at update N",
        "train N N",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_prints_the_transcript(tmp_path):
    run = subprocess.run(
        [*TVQ, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=True
    )
    assert run.stderr == ""
    assert masked(run.stdout) == masked(transcript())
    assert (tmp_path / "demo" / "loss.png").stat().st_size > 10_000
    shown = subprocess.run(
        [sys.executable, "-c", code_blocks("python")[1]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "doc_id" in shown.stdout

    again = subprocess.run(
        [*TVQ, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=True
    )
    assert "nothing changed: the corpus that was there is used as it is" in again.stdout
    assert again.stdout.count("already finished at update") == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_run(tmp_path):
    """On somebody's own text in their home."""
    books = tmp_path / "books"
    books.mkdir()
    for index, source in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))[:60]):
        (books / f"book {index}.txt").write_bytes(source.read_bytes())
    environment = {**os.environ, "HOME": str(tmp_path)}
    for words in commands_to_run():
        words = [re.sub("^~", str(tmp_path), word) for word in words]
        if words[0] == "ui":
            continue  # tests/jobs/tracking/test_ui.py opens the page
        run = subprocess.run(
            [*TVQ, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, (words, run.stderr)
    shown = subprocess.run(
        [sys.executable, "-c", code_blocks("python")[0]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bits_per_byte" in shown.stdout
