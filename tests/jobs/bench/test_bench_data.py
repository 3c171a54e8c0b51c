"""`tvq bench data`: what it measures, how it counts, what it prints. No time is asserted."""

import json
from pathlib import Path

import pytest

from jobs.bench import data_measurement as measured
from jobs.bench.corpora import Figure, _share
from jobs.bench.data_measurement import Compared, Taken
from jobs.bench.measurement import Spread
from jobs.bench.memory_measurement import Memory, measure_memory, measure_near_duplicates
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode
from pipeline.manifest import Manifest
from pipeline.near_duplicates import NearDuplicateSettings
from pipeline.sources import list_files, standard_library


def test_the_text_is_the_librarys_with_a_first_line_of_each_copys_own(tmp_path):
    library = {file.id: file.open().read() for file in list_files(standard_library())}
    size = sum(map(len, library.values()))
    files = list_files(measured.write_text(tmp_path / "text", 1.5 * size / 1e6))
    texts = [file.open().read() for file in files]
    assert len(files) > len(library)
    assert sum(map(len, texts)) >= 1.5 * size > sum(map(len, texts)) - max(map(len, texts))
    for file, text in zip(files, texts, strict=True):
        copy, _, name = file.id.partition("/")
        assert text == b"# copy %d\n" % int(copy) + library[name]


def test_part_of_the_files_has_as_many_bytes_as_asked_and_not_a_file_more(tmp_path):
    for name, size in (("a", 10), ("b", 20), ("c", 30)):
        (tmp_path / name).write_bytes(bytes(size))
    files = list_files(measured.SourceSettings((str(tmp_path),)))
    for asked, names in ((1, "a"), (10, "a"), (11, "ab"), (30, "ab"), (31, "abc"), (999, "abc")):
        assert "".join(file.id for file in measured.part_of(files, asked)) == names


def test_ratios_are_taken_within_a_round():
    compared = Compared([Taken(10, 1), Taken(30, 2)], [Taken(20, 4), Taken(30, 8)])
    rate, baseline, ratio = compared.spreads("cpu")
    assert rate == Spread(20, 10, 30)
    assert baseline == Spread(25, 20, 30)
    assert ratio == Spread(0.75, 0.5, 1)
    assert compared.spreads("wall")[2] == Spread(0.25, 0.25, 0.25)
    assert Taken(2, 4).rate(8) == Taken(4, 2)
    assert Memory("files", (1, 10), (200, 220)).growth_percent == pytest.approx(10)


def test_the_share_of_an_update_is_of_the_same_tokens():
    """20 Mtok/s of batches beside 1 M tokens trained in a second: 5 % of the time."""
    loader = Figure("", "cpu", Spread(20, 20, 20), "Mtok/s", "", None, None, "", None)
    share = _share(loader, 1e6)
    assert share.value.median == pytest.approx(5)
    assert share.met is False
    assert _share(loader, 1e5).met is True


def test_what_the_two_passes_write_is_the_text(tmp_path):
    import pyarrow as pa

    (tmp_path / "text").mkdir()
    for name in "abcdef":
        (tmp_path / "text" / name).write_text(f"text {name} " * 1000)
    files = list_files(measured.SourceSettings((str(tmp_path / "text"),)))
    found = measured.measure_bytes(tmp_path / "out", files, 2, Console(quiet=True))
    assert len(found.both.rates) == len(found.write.baseline) == 2
    assert (found.documents, found.n_bytes) == (6, sum(file.size for file in files))
    for rate, scan, write in zip(
        found.both.rates, found.scan.rates, found.write.rates, strict=True
    ):
        assert 1 / rate.cpu == pytest.approx(1 / scan.cpu + 1 / write.cpu)
    [shard] = (tmp_path / "out").glob("shards/*/train-*.arrow")
    rows = pa.ipc.open_file(str(shard)).read_all().to_pylist()
    assert {row["doc_id"]: bytes(row["tokens"]) for row in rows} == {
        file.id: file.open().read() for file in files
    }


def test_the_peak_of_a_fresh_process_is_its_own(tmp_path):
    """A large parent: 300 MB that are no part of what the child reports."""
    held = bytearray(b"x") * 300_000_000
    (tmp_path / "text").mkdir()
    for name in "abcdef":
        (tmp_path / "text" / name).write_text(name * 3_000_000)
    files = list_files(measured.SourceSettings((str(tmp_path / "text"),)))
    memories = measure_memory(tmp_path, files, Console(quiet=True))
    assert [memory.form for memory in memories] == ["files", "records"]
    for memory in memories:
        assert 2**25 < memory.peaks[0] <= 2 * memory.peaks[1]
        assert memory.peaks[1] < len(held)
        assert memory.megabytes == (3, 18)
    counts = [Manifest.load(tmp_path / name).splits["train"] for name in ("whole", "whole records")]
    assert counts[0].documents == counts[1].documents == 6
    assert counts[0].tokens == counts[1].tokens  # of the records, which hold the same texts
    signature = 4 * NearDuplicateSettings().permutations
    assert signature < measure_near_duplicates() < 4 * signature


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.slow
def test_all_of_it_on_a_little_text(tmp_path: Path, capsys):
    lines = [f"the line {i} of the text says {i * 7919 % 10007}\n" for i in range(30_000)]
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" + "".join(lines[number::3]))
    command = ["bench", "data", "--corpus", str(tmp_path), "--rounds", "1"]
    assert run_cli([*command, "--train-tokens-per-second", "1000", "--json"]) == ExitCode.OK
    tree = json.loads(capsys.readouterr().out)
    assert (tree["bench"], tree["documents"], tree["rounds"]) == ("data", 12, 1)
    figures = {(each["name"].partition(" ")[0], each["clock"]): each for each in tree["figures"]}
    assert {key for key, _ in figures} == {
        "bytes:",
        "SentencePiece:",
        "memory:",
        "loader",
        "loader:",
    }
    for each in tree["figures"]:
        if each["unit"] != "% more":
            assert (
                0 < each["value"]["least"] <= each["value"]["median"] <= each["value"]["greatest"]
            )
        if each["ratio"] is not None and "cpu" in each["clock"]:
            assert each["ratio"]["median"] == pytest.approx(
                each["value"]["median"] / each["baseline"]
            )
    share, rate = figures["loader:", "cpu"], figures["loader", "cpu"]
    assert share["value"]["median"] == pytest.approx(0.1 / rate["value"]["median"])
    assert any("start-up" in note for note in tree["notes"])


def test_too_little_text_is_one_line(tmp_path, capsys):
    (tmp_path / "a").write_text("short")
    assert run_cli(["bench", "data", "--corpus", str(tmp_path)]) == ExitCode.USER
    assert "are too few" in capsys.readouterr().err
