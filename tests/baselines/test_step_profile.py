"""What the profile of a step counts, and as what."""

from types import SimpleNamespace

import pytest

from tests.baselines.step_profile import kind_of, self_times


@pytest.mark.parametrize(
    ("name", "opcode", "kind"),
    [
        ("dot.86", "dot", "products"),
        ("ynn_fusion.7", "fusion", "products"),
        ("custom-call.2", "custom-call", "products"),
        ("multiply_bitcast_fusion.3", "fusion", "element-wise, sums"),
        ("wrapped_reduce-window", "fusion", "element-wise, sums"),
        ("dynamic-slice_bitcast_fusion.6", "fusion", "copies"),
        ("add_dynamic-update-slice_fusion", "fusion", "copies"),
        ("copy.3", "copy", "copies"),
    ],
)
def test_kinds(name, opcode, kind):
    assert kind_of(name, opcode) == kind


def test_an_event_has_not_what_is_inside_it():
    def event(name, start, end):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start)

    nested = [event("b", 2, 5), event("a", 0, 10), event("c", 3, 4), event("a", 10, 11)]
    other = [event("b", 0, 7)]
    times = self_times(SimpleNamespace(events=events) for events in (nested, other))
    expected = {"a": [7e-9, 1e-9], "b": [2e-9, 7e-9], "c": [1e-9]}
    assert {name: sorted(taken) for name, taken in times.items()} == {
        name: pytest.approx(sorted(taken)) for name, taken in expected.items()
    }
