"""``batchnorm watch``: the live page over a log that ``batchnorm.watch`` writes."""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm.cli.output_files import write
from batchnorm.cli.preconditions import check_writable, require

if TYPE_CHECKING:
    from batchnorm.live import Feed

_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: 8421 or next]")
@click.option("--no-open", is_flag=True, help="Only print the address; open no browser.")
@click.option("--token", envvar="BATCHNORM_TOKEN", help="The address's secret, for restarts.  [default: a new one]")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to a file instead."
)
def watch(folder: Path, port: int, no_open: bool, token: str | None, output: Path | None) -> None:
    """Show a training while it runs, from the log that it writes.

    FOLDER is what watch(model, log=FOLDER) writes to; a copy, or the log of a finished training, does as well. The page
    is served to this machine alone, under an address with a secret in it. Ctrl-C ends it.
    """
    require("starlette", "uvicorn", "jinja2", what="watch", extra="live")
    from batchnorm.live import Feed

    token = secrets.token_urlsafe(24) if token is None else _checked(token)
    feed = Feed(folder)
    if output is not None:
        _write(feed, output)
        return
    _serve(feed, port, token, opens=not no_open)


def _checked(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ValueError("--token needs 16 to 200 letters, digits, - and _, got something else. Leave it out for one.")
    return token


def _write(feed: Feed, output: Path) -> None:
    from batchnorm.live.page import saved

    check_writable(output)
    write(output, saved(feed))
    click.echo(f"wrote {output}")


def _serve(feed: Feed, port: int, token: str, *, opens: bool) -> None:
    from batchnorm.live.server import HOST, listen, serve

    listener = listen(port)
    address = f"http://{HOST}:{listener.getsockname()[1]}/?token={token}"

    def tell() -> None:
        click.echo(address)
        click.echo("Ctrl-C ends it.", err=True)
        if opens and _has_screen():
            click.launch(address)

    try:
        serve(feed, listener, token, tell)
    except KeyboardInterrupt:
        click.echo("", err=True)  # the terminal shows ^C


def _has_screen() -> bool:
    """Whether a browser would open in a window of its own."""
    if not sys.stdout.isatty():
        return False
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
