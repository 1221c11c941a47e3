"""The figures as pictures, for ``bench/README.md``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from figures import MEASURES, SCALE, STEP, THROUGHPUT, text
from matplotlib.figure import Figure as Picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from figures import Curve
    from history import Session

FOLDER = Path(__file__).parent / "plots"
OURS, THEIRS = "#c2410c", "#94a3b8"
# The same figures give the same bytes, and text stays text.
mpl.rcParams |= {"svg.hashsalt": "durably", "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True}


def draw(session: Session) -> list[str]:
    """Draws what the session has figures for; the names of the pictures."""
    FOLDER.mkdir(exist_ok=True)
    pictures: dict[str, tuple[bool, Callable[[Picture], None]]] = {
        "systems": (bool(session.systems), lambda picture: _systems(picture, session)),
        "length": (
            any(curve.x_unit == "events" for curve in session.curves),
            lambda picture: _length(picture, session),
        ),
        "scale": (any(curve.group == SCALE for curve in session.curves), lambda picture: _scale(picture, session)),
    }
    drawn = [name for name, (wanted, _) in pictures.items() if wanted]
    for name in drawn:
        picture = Picture(figsize=(8, 3.2), layout="constrained")
        pictures[name][1](picture)
        picture.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    return drawn


def _systems(picture: Picture, session: Session) -> None:
    groups = list(reversed(session.systems))
    left, right = picture.subplots(1, 2, sharey=True)
    for axes, measure, unit in ((left, STEP, "ms, less is better"), (right, THROUGHPUT, "steps/s, more is better")):
        values = [session.value(group, measure) or 0 for group in groups]
        colours = [OURS if session.systems[group].title.startswith("durably") else THEIRS for group in groups]
        bars = axes.barh([session.systems[group].title.replace("`", "") for group in groups], values, color=colours)
        axes.bar_label(bars, [text(value, "") for value in values], padding=3)
        axes.set_title(MEASURES[measure])
        axes.set_xlabel(unit)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)


def _length(picture: Picture, session: Session) -> None:
    axes = picture.subplots()
    for curve in session.curves:
        if curve.x_unit == "events":
            _line(axes, curve, session.systems[curve.group].title)
    axes.legend()


def _scale(picture: Picture, session: Session) -> None:
    axes = picture.subplots()
    for curve in session.curves:
        if curve.group == SCALE:
            _line(axes, curve, curve.what)
            axes.set_xticks(curve.x)
    axes.legend()


def _line(axes: mpl.axes.Axes, curve: Curve, label: str) -> None:
    axes.plot(curve.x, curve.y, marker="o", markersize=3, label=label)
    axes.set(xlabel=curve.x_unit, ylabel=curve.y_unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
