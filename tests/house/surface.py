"""What users can name: public names with their parameters, commands, entry points, operators, rules, settings."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]

# packages whose __all__ is public, and what the documentation imports from modules
MODULES: dict[str, tuple[str, ...]] = {
    "batchnorm": (),
    "batchnorm.adaptation": (),
    "batchnorm.checkpoint": (),
    "batchnorm.doctor": (),
    "batchnorm.instruments": (),
    "batchnorm.kernels": (),
    "batchnorm.live": (),
    "batchnorm.population": (),
    "batchnorm.record": (),
    "batchnorm.rules": (),
    "batchnorm.shift": (),
    "batchnorm.surgery": (),
    "batchnorm.allocator": ("Tuning", "tune_allocator"),
    "batchnorm.inputs": ("InputNorm",),
    "batchnorm.layers": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    "batchnorm.memory": ("saving",),
    "batchnorm.moments": ("Moments",),
    "batchnorm.shift.assumptions": ("check",),
    "batchnorm.shift.verdict": ("judge",),
    "batchnorm.integrations.ignite": ("attach",),
    "batchnorm.integrations.lightning": ("BatchNormMonitor", "FreezeBatchNorm", "Recalibrate"),
    "batchnorm.integrations.mlflow": ("MLflowSink",),
    "batchnorm.integrations.prometheus": ("register",),
    "batchnorm.integrations.pytest": ("assert_batch_invariant", "assert_batchnorm_healthy"),
    "batchnorm.integrations.skorch": ("BatchNormCallback",),
    "batchnorm.integrations.tensorboard": ("TensorBoardSink",),
    "batchnorm.integrations.transformers": ("BatchNormCallback",),
}


def names() -> dict[str, Any]:
    """Every public name with its parameters; of classes, every public method and attribute."""
    return {
        module: {name: _described(import_module(module), name) for name in public_names(module)} for module in MODULES
    }


def public_names(module: str) -> list[str]:
    return list(MODULES[module]) or sorted(import_module(module).__all__)


def _described(module: Any, name: str) -> Any:
    value = getattr(module, name)
    if isinstance(value, type):
        return {"()": _parameters(value), **_members(value)}
    return _parameters(value) if callable(value) else type(value).__name__


def _members(kind: type) -> dict[str, str]:
    """Public members that classes of this package define, and fields of its dataclasses."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] == "batchnorm":
            found |= {name: _member(value) for name, value in vars(base).items() if not name.startswith("_")}
            own = inspect.get_annotations(base)
            found |= {name: "attribute" for name in own if not name.startswith("_") and name not in found}
    return dict(sorted(found.items()))


def _member(value: Any) -> str:
    inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    return _parameters(inner) if inspect.isfunction(inner) else "attribute"


def _parameters(value: Callable[..., Any]) -> str:
    """Names, kinds and defaults, as Python writes them, without types and spaces."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "no signature"
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return _without_places("".join(text.split()))


def _without_places(text: str) -> str:
    """Objects by their names alone: neither addresses nor the modules that they are in."""
    text = re.sub(r" ?at ?0x[0-9a-f]+", "", text)
    return re.sub(r"<(?:class|function) ?'?(?:\w+\.)*(\w+)'?>", r"<\1>", text)


def commands() -> dict[str, Any]:
    """Every command: its options, and the lines of its help at a width of 100 columns."""
    from batchnorm.cli import main

    context = click.Context(main)
    found = {"": _command(main, [])}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        found[name] = _command(command, [name])
        for inner in getattr(command, "commands", {}):
            found[f"{name} {inner}"] = _command(command.commands[inner], [name, inner])
    return found


def _command(command: click.Command, words: list[str]) -> dict[str, Any]:
    from batchnorm.cli import main

    command._help_option = None  # click keeps the one of the first call, which may have been without our -h
    result = CliRunner().invoke(main, [*words, "--help"], prog_name="batchnorm", env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    options = {"|".join([*p.opts, *p.secondary_opts]): _option(p) for p in command.params}
    return {"options": options, "help": result.stdout.splitlines()}


def _option(parameter: click.Parameter) -> dict[str, Any]:
    """What can be given; defaults that are computed are not told."""
    kind = getattr(parameter.type, "choices", None) or "".join(repr(parameter.type).split())
    default = parameter.default if isinstance(parameter.default, (str, int, float, type(None))) else None
    return {
        "name": parameter.name,
        "type": list(map(str, kind)) if isinstance(kind, (list, tuple)) else _without_places(kind),
        "required": parameter.required,
        "arguments": parameter.nargs,
        "repeatable": bool(getattr(parameter, "multiple", False)),
        "flag": bool(getattr(parameter, "is_flag", False)),
        "default": str(default),
    }


def entry_points() -> dict[str, str]:
    """Names that other programs start us by, each with its place, which has to be there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    points = [EntryPoint(name, value, group) for group, each in groups.items() for name, value in each.items()]
    return {f"{point.group} {point.name}": type(point.load()).__name__ for point in points}


def operators() -> list[str]:
    """Schemas of the operators that programs and compilers see."""
    for module in ("batchnorm.kernels", "batchnorm.micro_batches.added_moments"):  # each registers its operators
        import_module(module)
    schemas = map(str, torch._C._jit_get_all_schemas())
    return sorted("".join(schema.split()) for schema in schemas if schema.startswith("batchnorm::"))


def rules() -> dict[str, list[str]]:
    """Every rule of the doctor: name, severity, what it looks at."""
    from batchnorm.rules import FAMILIES, RULES

    found = {code: [rule.slug, str(rule.severity), *rule.needs] for code, rule in RULES.items()}
    return found | {family: [about] for family, about in FAMILIES.items()}


def quantities() -> dict[str, str]:
    """Every quantity of the run log, with its tier."""
    from batchnorm.record import QUANTITIES

    return {name: str(quantity.tier) for name, quantity in QUANTITIES.items()}


def settings() -> dict[str, list[str]]:
    """Environment variables, loggers, JSON schemas and endings of files that the source names."""
    files = sorted((ROOT / "src").rglob("*.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return {
        "environment": sorted(set(re.findall(r"BATCHNORM_[A-Z_]+", source))),
        "loggers": sorted(set(re.findall(r'getLogger\("([^"]+)"\)', source))),
        "schemas": sorted(str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.schema.json")),
        "suffixes": sorted(set(re.findall(r'"(\.bn\w+\.safetensors)"', source))),
    }


PARTS: dict[str, Callable[[], Any]] = {
    "names": names,
    "commands": commands,
    "entry points": entry_points,
    "operators": operators,
    "rules": rules,
    "quantities": quantities,
    "settings": settings,
}


def surface() -> dict[str, Any]:
    """All of it."""
    return {part: make() for part, make in PARTS.items()}
