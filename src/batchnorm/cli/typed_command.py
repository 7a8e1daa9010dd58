"""The command that the user typed: from it, messages make other commands that keep the user's options."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import click
from click.core import ParameterSource

from batchnorm.reporting.command_line import number_word


def option_words(names: Iterable[str] = (), *, without: Iterable[str] = ()) -> list[str]:
    """The words of the options that the user typed, in the order of ``names``; by default of all except ``without``.

    Options from the environment or from a default are left out: they apply to the next command too.
    """
    context = click.get_current_context()
    left_out = set(without)
    options = {
        param.opts[-1]: param
        for param in context.command.params
        if isinstance(param, click.Option)
        and context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
    }
    chosen = [options[name] for name in (names or options) if name in options and name not in left_out]
    return [word for option in chosen for word in _words(option, context.params[str(option.name)])]


def _words(option: click.Option, value: object) -> list[str]:
    name = option.opts[-1]
    if option.is_flag:
        return [name]
    if option.multiple and isinstance(value, tuple):
        return [word for each in value for word in (name, str(each))]
    return [name, ",".join(map(number_word, value)) if isinstance(value, tuple) else str(value)]


def refuse_with_file(file: str, names: Iterable[str]) -> None:
    """Refuse options that need a model, if the target is a file.

    Raises:
        ValueError: If the user typed one of the options ``names``; the message has the command with a model.
    """
    for name in names:
        if option_words([name]):
            raise ValueError(
                f"{name} needs a model, got the file {file!r}. Give the model that the file belongs to: "
                f"{with_model(file)}"
            )


def with_model(file: str = "") -> str:
    """The user's command with a model as its target. A file becomes --weights, unless the user typed --weights."""
    weights = option_words(["--weights"]) or (["--weights", file] if file else [])
    rest = option_words(without=["--weights"])
    return shlex.join(["batchnorm", str(click.get_current_context().info_name), "model.py:make_model", *weights, *rest])
