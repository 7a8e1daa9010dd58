"""Command lines that keep their parts, so that no code has to parse them."""

from __future__ import annotations

import shlex
from typing import final


@final
class CommandLine(str):
    """A command line for a shell: a string that also has its parts, from which code makes other command lines.

    Args:
        program: The program with its command, such as "batchnorm shift".
        target: The target with the options that are needed to load it, quoted.
        options: Further options, quoted.
    """

    __slots__ = ("options", "program", "target")
    program: str
    target: str
    options: str

    def __new__(cls, program: str, target: str = "", options: str = "") -> CommandLine:
        """The line, with its parts."""
        line = super().__new__(cls, " ".join(filter(None, (program, target, options))))
        line.program, line.target, line.options = program, target, options
        return line


def file_word(path: str) -> str:
    """A file's path as a word of a command line: quoted, and "./" before a name that would read as an option."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def number_word(value: float) -> str:
    """A number as a word of a command line: as short as possible, and read back as exactly this number."""
    return short if float(short := f"{value:g}") == value else repr(value)
