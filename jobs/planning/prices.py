"""What devices, storage and traffic cost: from a file that the user can replace."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import UserError
from jobs.recipe_yaml import parse_yaml


class Price(NamedTuple):
    """Of one thing."""

    price: float
    as_of: str
    """The day on which it stood there."""
    source: str


@dataclass(frozen=True)
class Prices:
    """All that a plan needs."""

    currency: str
    devices: dict[str, Price]
    """Of an hour, by the name that `--on` takes."""
    storage_gb_month: Price
    egress_gb: Price


def read_prices(path: Path | None) -> Prices:
    """Those of a file; without one, those that came with tvq.

    Raises UserError for a file that cannot be read or lacks something.
    """
    where = str(path) if path else "tvq's own prices"
    try:
        own = resources.files("jobs.planning") / "prices.yaml"
        text = (path or own).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prices {where}: cannot be read: {error}") from None
    tree = parse_yaml(text, where)
    known = ("currency", "devices", "storage_gb_month", "egress_gb")
    if not isinstance(tree, dict) or set(tree) != set(known):
        raise UserError(f"--prices {where}: expected {', '.join(known)}, and nothing else")
    if not isinstance(tree["devices"], dict):
        raise UserError(f"--prices {where}: devices: expected a price each, got none")
    return Prices(
        str(tree["currency"]),
        {name: _price(item, f"devices.{name}", where) for name, item in tree["devices"].items()},
        _price(tree["storage_gb_month"], "storage_gb_month", where),
        _price(tree["egress_gb"], "egress_gb", where),
    )


def _price(item: Any, name: str, where: str) -> Price:
    fields = item if isinstance(item, dict) else {}
    price = fields.get("price")
    if (
        set(fields) != set(Price._fields)
        or isinstance(price, bool)
        or not (isinstance(price, int | float) and 0 <= price < float("inf"))
    ):
        raise UserError(
            f"--prices {where}: {name}: expected {{price: NUMBER, as_of: DAY, source: TEXT}},"
            f" got {item}"
        )
    return Price(float(price), str(fields["as_of"]), str(fields["source"]))
