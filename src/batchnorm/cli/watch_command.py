"""``batchnorm watch``: a live page of a log that ``batchnorm.watch`` writes."""

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
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: 8421, or the next free]"
)
@click.option("--no-open", is_flag=True, help="Print the address, but open no browser.")
@click.option(
    "--token", envvar="BATCHNORM_TOKEN",
    help="Secret in the address; the same secret after a restart keeps open pages connected. Also read from "
    "BATCHNORM_TOKEN.  [default: a new secret]",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to a file; serve nothing."
)
def watch(folder: Path, port: int, no_open: bool, token: str | None, output: Path | None) -> None:
    """Show a running training as a live page, from its log.

    FOLDER is the folder to which watch(model, log=FOLDER) writes, or a copy of it. The training may also have ended.
    The page is served to this machine only, at an address that contains a secret. Ctrl-C ends the command.
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
        raise ValueError(
            "--token needs 16 to 200 letters, digits, - and _, got another length or other characters. "
            "Leave --token out and unset BATCHNORM_TOKEN for a new secret."
        )
    return token


def _write(feed: Feed, output: Path) -> None:
    from batchnorm.live.page import saved

    check_writable(output)
    try:
        page = saved(feed)
    except OSError as error:
        why = error.strerror or error
        raise OSError(
            f"cannot read the log in {feed.folder}: {why}. Make its files readable, or give another folder."
        ) from error
    write(output, page)
    click.echo(f"wrote {output}")


def _serve(feed: Feed, port: int, token: str, *, opens: bool) -> None:
    from batchnorm.live.server import HOST, listen, serve

    listener = listen(port)
    address = f"http://{HOST}:{listener.getsockname()[1]}/?token={token}"

    def tell() -> None:
        click.echo(address)
        click.echo("Ctrl-C ends the command.", err=True)
        if opens and _has_screen():
            click.launch(address)

    try:
        serve(feed, listener, token, tell)
    except KeyboardInterrupt:
        click.echo("", err=True)  # the terminal has written ^C: start a new line after it


def _has_screen() -> bool:
    """Whether to open a browser: standard output is a terminal and, on Linux, a graphical display is set."""
    if not sys.stdout.isatty():
        return False
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
