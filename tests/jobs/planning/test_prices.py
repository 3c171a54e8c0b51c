"""Price files of one's own."""

from pathlib import Path

import pytest

from jobs.errors import UserError
from jobs.planning import prices
from jobs.planning.prices import read_prices


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{price: 1.20", "{price: cheap", "devices.v5e: expected {price: NUMBER"),
        ("currency: USD", "curency: USD", "expected currency, devices"),
        ("as_of: 2025-06-01, source: \"Cloud Storage pricing page, Standard", "source: \"x",
         "storage_gb_month"),
    ],
)  # fmt: skip
def test_a_price_file_with_a_mistake_is_refused(tmp_path: Path, old: str, new: str, said: str):
    text = (Path(prices.__file__).parent / "prices.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=said) as refused:
        read_prices(path)
    assert str(path) in str(refused.value)
