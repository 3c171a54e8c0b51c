"""Which files are found, under which ids, on this machine and by patterns."""

import os
import pickle
from pathlib import Path

import pytest

from pipeline.errors import CorpusError
from pipeline.sources import Listing, SourceFile, SourceSettings, list_files, standard_library


def plant(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def ids(*paths: Path, **settings: tuple[str, ...]) -> list[str]:
    found = list_files(SourceSettings(tuple(map(str, paths)), **settings))
    return [document.id for document in found]


def test_ids_are_relative_and_sorted(tmp_path):
    plant(tmp_path, "b.txt", "a/z.txt", "a.txt", "Ärger und Öl.txt", "a b/c.txt")
    assert ids(tmp_path) == sorted(["b.txt", "a/z.txt", "a.txt", "Ärger und Öl.txt", "a b/c.txt"])


def test_what_is_always_left_out(tmp_path):
    plant(
        tmp_path,
        "kept.txt",
        ".hidden.txt",
        ".git/config",
        "x/__pycache__/m.pyc",
        "corpus/.tvq-corpus",
        "corpus/manifest.json",
        "corpus/shards/x.arrow",
    )
    os.mkfifo(tmp_path / "pipe")
    plant(tmp_path.parent / "elsewhere", "linked.txt")
    (tmp_path / "folder").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path / "link.txt").symlink_to(tmp_path.parent / "elsewhere" / "linked.txt")
    assert ids(tmp_path) == ["kept.txt", "link.txt"]


def test_a_named_file_is_taken_as_it_is(tmp_path):
    plant(tmp_path, ".hidden.bin", "d/x.txt")
    assert ids(tmp_path / ".hidden.bin", tmp_path / "d", include=("*.txt",)) == [
        ".hidden.bin",
        "x.txt",
    ]


TREE = ("a.txt", "b.md", "d/a.txt", "d/e/a.txt", "d/e/f.py", "test/a.txt", "d/test/b.txt", "[x].md")


@pytest.mark.parametrize(
    "pattern",
    [
        "**/*",
        "*",
        "*.txt",
        "**/*.txt",
        "d/*",
        "d/**/*.txt",
        "**/test/*",
        "?.md",
        "[ab].*",
        "[!a].*",
    ],
)
def test_patterns_match_as_pathlib_does(tmp_path, pattern):
    plant(tmp_path, *TREE)
    expected = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern) if path.is_file()
    }
    assert set(ids(tmp_path, include=(pattern,))) == expected
    assert (
        set(ids(tmp_path / ".", exclude=(pattern,), include=("**/*", "*")))
        == (set(TREE) - expected)
        if expected != set(TREE)
        else True
    )


def test_an_excluded_folder(tmp_path):
    plant(tmp_path, *TREE)
    assert ids(tmp_path, exclude=("**/test/**", "d/e/**")) == ["[x].md", "a.txt", "b.md", "d/a.txt"]


def test_mistakes_are_named(tmp_path):
    plant(tmp_path, "one/a.txt", "two/a.txt")
    with pytest.raises(CorpusError, match="nowhere: no such file"):
        ids(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"no file matches in .*one: include is \*\.md"):
        ids(tmp_path / "one", include=("*.md",))
    with pytest.raises(CorpusError, match=r"two/a.txt and .*one/a.txt would both be .*'a.txt'"):
        ids(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one" / "broken").symlink_to("nothing")
    with pytest.raises(CorpusError, match="broken: a link to nothing"):
        ids(tmp_path / "one")
    assert ids(tmp_path / "one", exclude=("broken",)) == ["a.txt"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    os.close(os.open(os.fsencode(tmp_path) + b"/bad\xff.txt", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(CorpusError, match=r"bad\\udcff.txt': the name is not valid UTF-8"):
        ids(tmp_path)


def test_the_standard_library_is_real_text():
    found = list_files(standard_library())
    assert {"json/decoder.py", "os.py"} <= {document.id for document in found}
    assert not any("/test/" in f"/{d.id}" or "site-packages" in d.id for d in found)
    assert len(found) > 300


def test_a_path_may_be_a_pattern(tmp_path):
    plant(tmp_path, *TREE)
    found = list_files(SourceSettings((f"{tmp_path}/d/**/*.txt", f"{tmp_path}/[[]x].md")))
    expected = {path.relative_to(tmp_path / "d").as_posix() for path in tmp_path.glob("d/**/*.txt")}
    assert expected
    assert {file.id for file in found} == expected | {"[x].md"}
    assert ids(tmp_path / "[x].md") == ["[x].md"]  # a file of that very name is no pattern
    with pytest.raises(CorpusError, match=r"no file matches in .*/\*\.nothing"):
        ids(tmp_path / "*.nothing")


def test_a_file_that_was_touched_has_another_version(tmp_path):
    plant(tmp_path, "a.txt", "b.txt")
    before = {file.id: file.version for file in list_files(SourceSettings((str(tmp_path),)))}
    (tmp_path / "a.txt").write_bytes(b"A.txt")
    after = {file.id: file.version for file in list_files(SourceSettings((str(tmp_path),)))}
    assert before["a.txt"] != after["a.txt"]
    assert before["b.txt"] == after["b.txt"]


def test_a_listing_gives_back_what_it_holds_and_a_part_travels_alone():
    files = [
        SourceFile("a", "/x", 0, "1-2-3"),
        SourceFile("ü/\0b#1", "gs://y/z", 2**40, "7"),
        SourceFile("c", "/x", 5, ""),
    ]
    listing = Listing.of(iter(files))
    assert list(listing) == files
    assert listing[-1] == files[-1]
    assert list(listing.take([2, 0])) == [files[2], files[0]]
    assert list(Listing.of(reversed(files)).by_id()) == [files[0], files[2], files[1]]
    part = pickle.dumps(Listing.of(files * 100)[1:3])
    assert list(pickle.loads(part)) == files[1:3]
    assert len(part) < 300
