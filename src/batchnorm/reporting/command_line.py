"""Command lines that can be taken apart again, so that nobody has to read them."""

from __future__ import annotations

from typing import final


@final
class CommandLine(str):
    """A command line as a shell takes it, which is a string; its parts are there to make another command line of.

    Args:
        program: The program with its command, such as "batchnorm shift".
        target: What it is about, quoted, with all that it takes to load it.
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
