"""SVG: a drawing as a small element of a page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

_TAG = re.compile(r"<[^>]+>")
_INVISIBLE = re.compile(r'<path[^>]*(?:display="none"|class="background")[^>]*/>')
_UNUSED = re.compile(
    r' (?:(?:class|role|pointer-events|version|xmlns|xmlns:xlink|font-family|stroke-miterlimit|aria-[a-z]+)="[^"]*"'
    r'|opacity="1"|stroke-width="1"|transform="translate\(0,0\)"|[xy]2="-?0"|font-size="11px")(?=[ />])'
)
_LONG_NUMBER = re.compile(r"-?\d+\.\d+")
_EMPTY = re.compile(r"<g(?: [^>]*)?></g>|<g(?: [^>]*)?/>")


def to_svg(drawing: alt.LayerChart, prefix: str) -> str:
    """The drawing as an SVG element for a page; the same drawing always gives the same text.

    It is hidden from screen readers, because the page has a description of the chart.

    Args:
        drawing: The drawing of a panel.
        prefix: Beginning of the names inside the element. No other drawing of the page may have the same prefix.
    """
    import vl_convert

    svg = vl_convert.vegalite_to_svg(drawing.to_dict(validate=False))
    svg = _TAG.sub(lambda tag: _slim(tag[0]), _INVISIBLE.sub("", svg))
    svg = _EMPTY.sub("", _EMPTY.sub("", svg))
    # the library numbers clip paths through a whole process, but the same drawing must give the same names
    for number, name in enumerate(dict.fromkeys(re.findall(r'id="([^"]+)"', svg))):
        svg = re.sub(rf'(id="|url\(#){name}(?=["\)])', rf"\g<1>{prefix}-{number}", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def to_specification(drawing: alt.LayerChart, *, zoom: bool) -> dict[str, Any]:
    """The drawing as a Vega-Lite specification for an interactive page, as wide as its container.

    Args:
        drawing: The drawing of a panel.
        zoom: Whether dragging moves the drawing, and Shift with the wheel zooms; without Shift the wheel scrolls the
            page. Both scales must be numeric.
    """
    specification: dict[str, Any] = {**drawing.to_dict(validate=False), "width": "container"}
    if zoom:
        select = {"type": "interval", "zoom": "wheel![event.shiftKey]"}
        specification["layer"][0]["params"] = [{"name": "zoom", "select": select, "bind": "scales"}]
    return specification


def _slim(tag: str) -> str:
    """A tag without attributes that the page does not need, and with numbers rounded to a tenth of a pixel."""
    return _UNUSED.sub("", _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), tag))
