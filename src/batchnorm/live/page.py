"""The page as one HTML text: style and scripts are inline and allowed by their hashes; nothing else is loaded.

The live page requests data from its server; the saved page contains the data, and is otherwise the same.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from batchnorm.files.whole import replacing
from batchnorm.live.log_feed import Feed
from batchnorm.live.page_data import TIERS
from batchnorm.record import QUANTITIES
from batchnorm.record.log_entry import JsonValue
from batchnorm.reporting.page_shell import TEMPLATES, digest, embedded, style, template
from batchnorm.rules import RULES

_SCRIPTS = ("live-words", "live-store", "live-scale", "live-heat", "live-chart", "live-layer", "live-source", "live")
# Most lines of each kind, and most percentiles of a layer, in a saved page: about 2 MB for 53 layers.
_SAVED_LOOKS, _SAVED_PERCENTILES = 300, 100


def render(name: str, data: dict[str, JsonValue] | None = None) -> str:
    """The live page's HTML; with ``data`` that of a saved page, which needs no server."""
    return template("live.html").render(
        name=name,
        style=style("live"),
        script=_script(),
        policy=_policy(connects=data is None),
        words=embedded(_words()),
        data=embedded(data) if data is not None else None,
    )


def saved(feed: Feed) -> str:
    """The page with all its data, for a file.

    Raises:
        OSError: If the log has vanished or cannot be opened.
        ValueError: If its contents cannot be read.
    """
    data = feed.whole(most=_SAVED_LOOKS)
    layers = range(len(data["layers"]))
    try:
        data["percentiles"] = [feed.layer(i, most=_SAVED_PERCENTILES) for i in layers]
    except ModuleNotFoundError as error:
        data["percentiles"] = [{"problem": f"Percentiles needed {error.name}, which was not installed."}] * len(layers)
    return render(feed.name, data)


def write(feed: Feed, path: str | os.PathLike[str]) -> None:
    """Write the page as a file; a failed write leaves no part of it.

    Raises:
        OSError: If the log has vanished or cannot be opened, or the file cannot be written.
        ValueError: If the log's contents cannot be read.
    """
    html = saved(feed)
    with replacing(Path(path).resolve()) as file:
        file.write(html.encode())


def policy() -> str:
    """The Content-Security-Policy header of the live page."""
    return f"{_policy(connects=True)}; frame-ancestors 'none'"


def _policy(*, connects: bool) -> str:
    rules = (
        "default-src 'none'",
        f"script-src '{digest(_script())}'",
        f"style-src '{digest(style('live'))}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        *(["connect-src 'self'"] if connects else []),
    )
    return "; ".join(rules)


@cache
def _script() -> str:
    """All scripts as one script with its own scope."""
    parts = [(TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def _words() -> dict[str, JsonValue]:
    """The page's texts about quantities and rules, and the names of the tiers."""
    fields = ("title", "unit", "reads", "misleads", "floor", "formula", "source")
    quantities = {name: {field: getattr(q, field) for field in fields} for name, q in QUANTITIES.items()}
    return {"quantities": quantities, "rules": {code: rule.slug for code, rule in RULES.items()}, "tiers": TIERS}
