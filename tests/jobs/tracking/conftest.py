"""A store of MLflow's, and trackers of a test's own experiment in it."""

from collections.abc import Callable

import pytest

from jobs.tracking.store import Store, embedded_store
from jobs.tracking.tracker import Tracker


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all tests: making it takes a second."""
    return embedded_store(tmp_path_factory.mktemp("a root with spaces"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def start(store: Store, said: list[str], request) -> Callable[..., Tracker]:
    """Starts trackers of this test's own experiment and training."""
    name = request.node.name

    def start(run_id: str | None = None, key: str = name, at: Store = store) -> Tracker:
        location = at.artifact_location
        return Tracker.start(
            at.uri, name, "a run", key, run_id, artifact_location=location, say=said.append
        )

    return start
