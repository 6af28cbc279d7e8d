"""Pictures inside a page, as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.plotting.picture import BLUE, GREEN, GRID, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS: Mapping[str, tuple[str, str, str]] = {
    BLUE: ("--blue", "#1f5fa8", "#7fb2ec"),
    ORANGE: ("--orange", "#d9730d", "#ef9a4c"),
    GREEN: ("--green", "#9ccc82", "#c5e6b4"),
    GRID: ("--grid", "#ebebeb", "#2b2f37"),
    "#595959": ("--mark", "#595959", "#b4bac4"),
    "#000000": ("--ink", "#1b1d21", "#e6e8ec"),
    "#ffffff": ("--paper", "#ffffff", "#16181c"),
}
"""The CSS variable for each colour of a picture, with its values on a light and on a dark page."""


def variables(dark: bool) -> str:
    """The declarations of the variables in `COLORS`."""
    return " ".join(f"{name}: {night if dark else day};" for name, day, night in COLORS.values())


def svg(figure: Figure, label: str, name: str) -> str:
    """Converts a picture to an SVG element without references to other files.

    Args:
      figure: picture with a white background, which is left out.
      label: description for readers who cannot see it.
      name: prefix of the element's ids, different for every picture of a page.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")  # HTML needs no namespaces
    ids = {found: f"{name}{number}" for number, found in enumerate(re.findall(r'id="([^"]+)"', text))}
    text = re.sub(r'id="([^"]+)"', lambda found: f'id="{ids[found[1]]}"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', lambda found: found[1] + ids.get(found[2], found[2]), text)
    for color, (variable, _, _) in COLORS.items():
        text = text.replace(color, f"var({variable})")
    box = re.search(r'viewBox="([^"]+)"', text)
    size = "" if box is None else f' viewBox="{box[1]}"'
    return f'<svg role="img" aria-label="{html.escape(label)}"{size}>{text[text.index(">") + 1 :]}'
