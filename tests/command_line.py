"""Commands as their users type them, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from batchnorm.cli import main


def call(*words: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="batchnorm", env=env)


def told(*words: object) -> tuple[int, str]:
    """The exit code, and the output on one line."""
    result = call(*words)
    return result.exit_code, " ".join(result.output.split())
