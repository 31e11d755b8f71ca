"""How every picture looks, is signed, written to a file and put into a page. Nothing here needs matplotlib until
something is drawn."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.machine import signature

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

# What is drawn in this colour takes the page's own colour of text, which dark mode changes; in a file it passes
# for black.
INK = "#010203"
# Told apart with any colour vision (after Okabe and Ito), and by at least 3:1 from white as from a dark page.
PLAIN, PLAIN_TOO, OURS, OTHER, THIRD = "#c8641b", "#d99a00", "#2f86c9", "#8a8a8a", "#1f9e77"
# Inches: on a phone, where a page makes a picture as narrow as it can, its letters are still to be read.
WIDTH = 5.4
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Picture:
    """``draw(figure)`` fills a figure of ``size`` inches, and is called when the picture is needed."""

    name: str  # of its file, without the ending
    title: str
    alt: str  # what it shows, for who can't see it
    machine: dict[str, Any]  # what it is signed with
    size: tuple[float, float]
    draw: Callable[[FigureBase], None]


def missing() -> str | None:
    """Why nothing can be drawn here, as a sentence; None where it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"no pictures: matplotlib can't be imported ({error}); pip install matplotlib"
    return None


def save(picture: Picture, path: Path, source: str | None = None) -> None:
    """On white, titled and signed, as PNG or SVG by the ending of ``path``; ``source`` is kept inside the file.

    Raises:
        OSError: it can't be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    width, height = picture.size
    title = textwrap.fill(picture.title, int(11 * width))  # characters of this size in a line
    signed = textwrap.fill(signature(picture.machine), int(19 * width))
    above, below = 0.25 * (1 + title.count("\n")), 0.2 + 0.12 * signed.count("\n")
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": picture.name}):
        figure = Figure(figsize=(width, above + height + below), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(above + height, below))
        picture.draw(upper)
        upper.suptitle(title, fontsize=11)
        lower.text(0.5, 0.5, signed, ha="center", va="center", fontsize=7)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        metadata |= {"Source": source} if source else {}
        figure.savefig(path, dpi=130, metadata=metadata, facecolor="white")


def inline(picture: Picture) -> str:
    """As an ``<svg>`` for a page, which has title and signature itself: on nothing, and in its text's colour."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": picture.name}):
        figure = Figure(figsize=picture.size, layout="constrained")
        picture.draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(INK, "currentColor")
    # One page holds many pictures: what they refer to by name must be their own.
    own = re.sub(r"[^A-Za-z0-9]+", "-", picture.name)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", text)
    width = picture.size[0] * 72  # points
    sizes = f'style="min-width:{width * 0.85:.0f}px;max-width:{width * 1.6:.0f}px"'
    return re.sub(
        r'<svg .*?viewBox="([^"]*)".*?>', rf'<svg viewBox="\1" {sizes} aria-hidden="true">', text, count=1
    )


def grid(axis: Axes, which: str = "both") -> None:
    axis.grid(axis=which, color=INK, alpha=0.15, linewidth=0.7)


def plain_numbers(axis: Any) -> None:
    """On a logarithmic axis (``axes.xaxis`` or ``axes.yaxis``): 1, 2, 5, 10, ... and no powers."""
    for ticks in (axis.set_major_formatter, axis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
