"""What a registered model is called on the command line."""

import pytest

from jobs.errors import UserError
from jobs.registry.registered_model import parse_reference


def test_references():
    assert parse_reference("a") == ("a", None, None)
    assert parse_reference("models:/a/3") == ("a", 3, None)
    assert parse_reference("a@champion") == ("a", None, "champion")
    for odd in ("a/b", "a@", "", "../a", "a/3/4"):
        with pytest.raises(UserError, match="expected NAME"):
            parse_reference(odd)
