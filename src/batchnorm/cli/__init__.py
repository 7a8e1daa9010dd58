"""The command line, without torch and altair. A command's module is imported when the command runs or is listed."""

from __future__ import annotations

import difflib
import io
import os
import sys
from importlib import import_module
from importlib.util import find_spec

import click

from batchnorm import __version__

# a command's module is imported when the command is called, and all of them for --help;
# ``rules`` is in the module of ``explain``
_COMMANDS = ("bench", "completion", "doctor", "explain", "fix", "merge", "rules", "shift", "stats", "watch", "why")
_MODULES = {"rules": "explain"}
_INTERRUPTED = 130  # 128 + SIGINT, as in shells: Ctrl-C
_OUTPUT_CLOSED = 141  # 128 + SIGPIPE: the program that reads the output has ended
_DEBUG = "Show the traceback of an error."


class _Commands(click.Group):
    """A group of commands. It prints a ValueError, OSError or ModuleNotFoundError as a message, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names of all commands, without an import."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command with this name. The error for an unknown name offers a similar name."""
        if cmd_name in _COMMANDS:
            home = import_module(f"batchnorm.cli.{_MODULES.get(cmd_name, cmd_name)}_command")
            return _debuggable(getattr(home, cmd_name))
        if close := difflib.get_close_matches(cmd_name, _COMMANDS, n=1):
            ctx.fail(f"no command {cmd_name!r}. Did you mean {close[0]!r}?")
        return None

    def invoke(self, ctx: click.Context) -> None:
        """Run the command; without --debug, ValueError, OSError and ModuleNotFoundError give a message and exit code 2.

        Ctrl-C gives exit code 130; if the reader of the output has ended, the exit code is 141.
        """
        try:
            super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)  # not exit code 1, which means that a command found problems
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the output goes nowhere
            ctx.exit(_OUTPUT_CLOSED)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if ctx.params.get("debug"):
                raise
            raise click.UsageError(_explained(error)) from error


def _debuggable(command: click.Command) -> click.Command:
    """Add --debug to a command, because users write it after the command's name too."""
    if not any(parameter.name == "debug" for parameter in command.params):
        command.params.append(
            click.Option(["--debug"], is_flag=True, is_eager=True, expose_value=False, callback=_debug, help=_DEBUG)
        )
    return command


def _debug(ctx: click.Context, _: click.Parameter, is_given: bool) -> None:
    if is_given:
        ctx.find_root().params["debug"] = True


def _explained(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot write {error.filename}: {error.strerror}. Choose another place with -o FILE."
    return str(error) or type(error).__name__


def _version(ctx: click.Context, _: click.Parameter, is_given: bool) -> None:
    """Print the version and the active kernels, then exit."""
    if not is_given:
        return
    kernels = "reference, built without a compiler"
    if os.environ.get("BATCHNORM_KERNELS") == "reference":
        kernels = "reference, as BATCHNORM_KERNELS says"
    elif find_spec("batchnorm._native"):
        kernels = f"native, {import_module('batchnorm._native').instruction_sets()[0]}"
    click.echo(f"batchnorm {__version__} (CPU kernels: {kernels})")
    ctx.exit()


@click.group(
    "batchnorm", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, help=_DEBUG)
def main(debug: bool) -> None:  # noqa: ARG001 - _Commands reads it
    """Batch normalization for PyTorch: measure why it works, and find and mend its faults."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stream that cannot encode ✓ gets ? in its place
