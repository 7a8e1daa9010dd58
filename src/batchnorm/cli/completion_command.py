"""``batchnorm completion``: a script with which a shell completes commands, options and rules."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: eval "$(batchnorm completion bash)"."""
    from batchnorm.cli import main

    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"click has no completion for {shell!r}. Use bash, zsh or fish.")
    maker = kind(main, {}, "batchnorm", "_BATCHNORM_COMPLETE")
    click.echo(maker.source_template % maker.source_vars())
