"""What a figure has to reach, and whether it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """`at_most`: the value must not be more than the bar; else it must not be less. A value of None was not measured: missed."""

    name: str
    value: float | None
    bar: float
    unit: str = ""
    at_most: bool = True

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def table(bars: list[dict[str, Any]]) -> Table:
    """Show what `as_dict` said."""
    shown = Table(title="bars")
    for heading in ("", "measured", "bar", ""):
        shown.add_column(heading, justify="left" if not heading else "right")
    for each in bars:
        value = "-" if each["value"] is None else f"{each['value']:,g} {each['unit']}"
        limit = f"{'at most' if each['at_most'] else 'at least'} {each['bar']:,g} {each['unit']}"
        shown.add_row(each["name"], value, limit, "met" if each["met"] else "MISSED")
    return shown
