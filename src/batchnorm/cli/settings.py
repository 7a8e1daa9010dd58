"""Settings of a project, from [tool.batchnorm] in pyproject.toml and from the environment; baselines of findings."""

from __future__ import annotations

import json
import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from batchnorm.rules import RULES
from batchnorm.rules.codes import codes, nearest
from batchnorm.rules.finding import Severity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from click import Context, Parameter

    from batchnorm.reporting.json_values import Json
    from batchnorm.rules.finding import Finding

FAIL_ON = ("error", "warning", "info", "never")
_KEYS = ("select", "ignore", "per-layer-ignores", "fail-on", "output-format", "baseline")
_KNOWN = f"Known: {', '.join(_KEYS)}."


@final
@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """The settings of a project."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fail_on: str = "error"
    output_format: str | None = None
    baseline: str | None = None


def settings(folder: Path | None = None) -> ProjectSettings:
    """The settings of the nearest pyproject.toml, in the folder or above it.

    BATCHNORM_FAIL_ON and BATCHNORM_OUTPUT_FORMAT replace the settings of the file.

    Raises:
        ValueError: If the file cannot be read or has an unknown key, or if it or BATCHNORM_FAIL_ON has a wrong value.
    """
    project = _from_file(folder or _here())
    project = replace(
        project,
        fail_on=os.environ.get("BATCHNORM_FAIL_ON") or project.fail_on,
        output_format=os.environ.get("BATCHNORM_OUTPUT_FORMAT") or project.output_format,
    )
    if project.fail_on not in FAIL_ON:
        raise ValueError(
            f"fail-on must be {', '.join(FAIL_ON)}, got {project.fail_on!r}. "
            f"{nearest(project.fail_on, FAIL_ON, 'Set it in pyproject.toml or BATCHNORM_FAIL_ON.')}"
        )
    return project


def _here() -> Path:
    """The current folder; if it was deleted, the root."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/")


def _from_file(folder: Path) -> ProjectSettings:
    for parent in [folder, *folder.parents]:
        path = parent / "pyproject.toml"
        if path.is_file():
            try:
                tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not valid TOML: {error}. Correct that line.") from error
            except RecursionError as error:
                raise ValueError(f"{path} is nested too deeply to be read. Use fewer levels.") from error
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}. Make the file readable.") from error
            table = tools.get("batchnorm", {}) if isinstance(tools, dict) else tools
            if not isinstance(table, dict):
                raise ValueError(
                    f"{path}: tool.batchnorm must be a table, got {table!r}. Begin the table with [tool.batchnorm]."
                )
            return _from_table(table, path)
    return ProjectSettings()


def _from_table(table: Mapping[str, Json], path: Path) -> ProjectSettings:
    for key in table:
        if key not in _KEYS:
            raise ValueError(f"{path} has [tool.batchnorm] {key}, which is no setting. {nearest(key, _KEYS, _KNOWN)}")
    per_layer = table.get("per-layer-ignores", {})
    if not isinstance(per_layer, Mapping):
        message = f"{path}: per-layer-ignores must be a table, got {per_layer!r}. Example: {{'stem.*' = ['BN1']}}."
        raise ValueError(message)  # noqa: TRY004 - the value is from a file, not an argument
    baseline = table.get("baseline")
    if baseline is not None and not (isinstance(baseline, str) and baseline):
        raise ValueError(f"{path}: baseline must be the path of a file, got {baseline!r}. Example: 'known.json'.")
    return ProjectSettings(
        codes(_listed(table, "select", path)),
        codes(_listed(table, "ignore", path)),
        {layer: codes(_listed(per_layer, layer, path)) for layer in per_layer},
        str(table.get("fail-on", "error")),
        _format(table, path),
        None if baseline is None else str(path.parent / baseline),
    )


def _format(table: Mapping[str, Json], path: Path) -> str | None:
    name = table.get("output-format")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{path}: output-format must be a name, got {name!r}. Example: 'json'.")
    return name


def _listed(table: Mapping[str, Json], key: str, path: Path) -> list[str]:
    value = table.get(key, [])
    texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    if texts != value:
        raise ValueError(f"{path}: {key} must be a list of codes, got {value!r}. Example: ['BN101'].")
    return texts


def refuse_empty(given: Mapping[str, str | None]) -> None:
    """Refuse an option with an empty value, as from an unset variable of a shell.

    Raises:
        ValueError: If an option has the value "".
    """
    for name, value in given.items():
        if value == "":
            raise ValueError(f"{name} needs a value, got ''. Give a value, or leave {name} out.")


def complete(ctx: Context, parameter: Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Codes and names of rules that begin with ``incomplete``, for completion in a shell."""
    names = [name for code, rule in RULES.items() for name in (code, rule.slug)]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def limit_of(fail_on: str) -> Severity | None:
    """The lowest severity at which a command fails; None for "never"."""
    return None if fail_on == "never" else Severity[fail_on.upper()]


def fails(findings: Iterable[Finding], limit: Severity | None) -> bool:
    """Whether a finding has the severity ``limit`` or a worse one; False without a limit."""
    return limit is not None and any(finding.severity >= limit for finding in findings)


def read_baseline(path: str) -> set[tuple[str, str]]:
    """Code and layer of every finding in a baseline.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or is not a baseline.
    """
    try:
        baseline = json.loads(Path(path).read_text(encoding="utf-8"))
        return {(entry["code"], entry["layer"]) for entry in baseline["findings"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"no baseline {path}. Write it with --write-baseline {shlex.quote(path)}.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a baseline: {type(error).__name__}. Write a baseline with --write-baseline."
        ) from error


def baseline_of(findings: Iterable[Finding]) -> str:
    """A baseline that silences these findings."""
    entries = [{"code": finding.code, "layer": finding.layer} for finding in findings]
    return json.dumps({"schema_version": 1, "findings": entries}, indent=1) + "\n"
