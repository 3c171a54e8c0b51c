"""A store that is not well: tried again within a limit, told once; all else is raised at once."""

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import CorpusError, PassingFaultError
from pipeline.patient_store import PatientStore, open_patient_store
from pipeline.storage import LocalStore, Store
from tests.logged import logged
from tests.services import ObjectStoreServer


class Unwell(LocalStore):
    """A folder whose next calls fail."""

    faults: list[CorpusError] = []  # noqa: RUF012 (shared with children on purpose)

    def read(self, name: str) -> bytes:
        if self.faults:
            raise self.faults.pop()
        return super().read(name)


@pytest.fixture
def said() -> Iterator[list[str]]:
    with logged("tvq.storage", logging.WARNING) as messages:
        yield messages


def test_an_outage_is_waited_for_with_growing_pauses_and_told_once(tmp_path: Path, said: list[str]):
    (tmp_path / "a").write_bytes(b"whole")
    now, pauses = 0.0, []

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds
        pauses.append(seconds)

    store = PatientStore(Unwell(tmp_path), 100, pause, lambda: now)
    Unwell.faults = [PassingFaultError("gs://b: not well")] * 6
    assert store.read("a") == b"whole"
    assert pauses == [1, 2, 4, 8, 15, 15]
    assert said == ["gs://b: not well; tried again for 100 s", f"{tmp_path} answers again"]

    Unwell.faults = [PassingFaultError("gs://b: not well")] * 99
    now, begun = 1000.0, len(pauses)
    with pytest.raises(PassingFaultError):
        store.read("a")
    assert 80 < sum(pauses[begun:]) <= 100

    Unwell.faults = [CorpusError("gs://b: forbidden")]
    begun = len(pauses)
    with pytest.raises(CorpusError, match="forbidden"):
        store.read("a")
    with pytest.raises(FileNotFoundError):
        store.read("b")
    assert len(pauses) == begun


def test_it_is_the_store_that_it_wraps(tmp_path: Path):
    inner: Store = LocalStore(tmp_path)
    store = pickle.loads(pickle.dumps(PatientStore(inner)))
    assert store.create("child/a", b"1")
    assert not store.create("child/a", b"2")
    child = store.child("child")
    assert child.location == str(tmp_path / "child")
    assert (child.read("a"), child.size("a"), child.exists("b")) == (b"1", 1, False)
    child.write("b", b"22")
    scratch = child.scratch("c")
    scratch.write_bytes(b"333")
    child.place(scratch, "c")
    assert [(entry.name, entry.size) for entry in store.list()] == [
        ("child/a", 1),
        ("child/b", 2),
        ("child/c", 3),
    ]
    child.remove("a")
    with child.open("b") as file:
        assert file.read() == b"22"
    store.remove_tree("child")
    assert [*inner.list()] == []
    assert isinstance(open_patient_store(tmp_path), LocalStore)


@pytest.mark.parametrize(
    ("action", "passes"), [("429", True), ("503", True), ("lose-reply", True), ("403", False)]
)
@pytest.mark.slow  # gcsfs tries for half a minute first
def test_what_passes_is_told_from_what_does_not(
    bucket: str, object_store: ObjectStoreServer, action: Callable, passes: bool
):
    store = open_patient_store(f"{bucket}/run")
    assert isinstance(store, PatientStore)
    store.write("a", b"1")
    object_store.fault(action, "GET")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CorpusError) as caught:
        store._store.read("a")
    assert isinstance(caught.value, PassingFaultError) == passes
