"""The shell of every HTML page: one file that loads nothing, light or dark like the reader's system, and for print.

The shell and blocks need no further package. Pages with a layout of their own are made from templates and need jinja2.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.reporting.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jinja2 import Environment, Template

    from batchnorm.reporting.json_values import Json

TEMPLATES = Path(__file__).parents[1] / "templates"


def shell(
    title: str, body: str, *, styles: Sequence[str] = (), data: Mapping[str, Json] | None = None, script: str = ""
) -> str:
    """The HTML of a page.

    Args:
        title: The title, as plain text.
        body: The page's content, as HTML.
        styles: Names of style sheets besides "page".
        data: JSON values for the script, each in an element with the id that is its key.
        script: The only script that the page's security policy allows; without it no script may run.
    """
    allowed = f"; script-src '{digest(script)}'" if script else ""
    css = "".join(style(name) for name in ("page", *styles))
    texts = [
        f'<script type="application/json" id="{name}">{embedded(each)}</script>\n'
        for name, each in (data or {}).items()
    ]
    code = "".join([*texts, f"<script>{script}</script>\n"]) if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'img-src data:{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{escape(plain(title))}</title>\n<link rel="icon" href="data:,">\n<style>\n{css}</style>\n</head>\n'
        f"<body>\n<main>\n\n{body}\n\n</main>\n{code}</body>\n</html>\n"
    )


def embedded(value: Json) -> str:
    """JSON text that cannot end the script element around it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def style(name: str) -> str:
    """The text of a style sheet in templates/."""
    return (TEMPLATES / f"{name}.css").read_text(encoding="utf-8")


def digest(text: str) -> str:
    """The hash by which a page's security policy allows a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def template(name: str, **filters: Callable[..., object]) -> Template:
    """A template in the folder templates; ``filters`` are functions that it may use besides the filter ``plain``.

    Raises:
        ModuleNotFoundError: If jinja2 is missing.
    """
    environment = _environment()
    environment.filters.update(filters)
    return environment.get_template(name)


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["plain"] = plain
    return environment
