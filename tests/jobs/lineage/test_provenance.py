"""What a training ran on, against what there is now."""

from jobs.lineage.provenance import Provenance


def test_another_commit_version_or_machine_is_named():
    then = Provenance("a" * 40, False, "3.11.7", {"jax": "0.10.2"}, {"cores": "2"})
    now = Provenance("b" * 40, True, "3.11.8", {"jax": "0.10.3", "ray": "2"}, {"cores": "2"})
    assert then.differences(then) == []
    assert then.differences(now) == [
        f"commit {'a' * 12}, now {'b' * 12}",
        "files of this checkout have been changed since its commit",
        "Python 3.11.7, now 3.11.8",
        "jax 0.10.2, now 0.10.3",
        "ray none, now 2",
    ]
