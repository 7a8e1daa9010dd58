"""``batchnorm shift``: whether a data set is what a model was trained with, judged offline."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import click

from batchnorm import __version__, addresses
from batchnorm.cli.coloring import show
from batchnorm.cli.output_files import write
from batchnorm.cli.settings import refuse_empty, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.shift import ShiftMonitor
    from batchnorm.shift.verdict import Verdict

_FORMATS = ("full", "concise", "json", "github", "sarif", "junit", "html", "md")
_SUFFIXES = {".json": "json", ".sarif": "sarif", ".xml": "junit", ".html": "html", ".md": "md"}
_ASSUMED = ("full", "concise", "json")
_REFERENCE = ".bncal.safetensors"
# sentences are hard to read in wider lines
_WIDEST = 100


@click.command()
@click.argument("model")
@click.option("--data", metavar="ADDRESS", help="Batches to judge: data.py:loader.")
@click.option(
    "--check-assumptions", "clean", metavar="ADDRESS",
    help="In place of --data: clean batches to measure what the alarm assumes on.",
)  # fmt: skip
@click.option("--weights", metavar="FILE", help="Checkpoint to load into the model.")
@click.option("--state", default="", metavar="PATH", help="This state of it.  [default: the first that fits]")
@click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help="Argument of the model's function; repeatable."
)
@click.option("--reference", metavar="FILE", help="A calibrated reference, *.bncal.safetensors.  [default: checkpoint]")
@click.option("--calibrate", metavar="ADDRESS", help="Batches of clean data to calibrate a reference on first.")
@click.option("--write-reference", metavar="FILE", help="Write that reference.")
@click.option(
    "--alpha", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.01, show_default=True,
    help="Largest probability of a false alarm.",
)  # fmt: skip
@click.option(
    "--unit", type=click.Choice(["example", "batch"]), default="example", show_default=True,
    help="What one observation is; batch where neighbouring examples are alike.",
)  # fmt: skip
@click.option("--max-examples", type=click.IntRange(min=1), help="Of the data, and to calibrate on.  [default: all]")
@click.option("--images", type=click.IntRange(1, 12), help="Put so many examples near the alarm into the HTML page.")
@click.option("--output-format", type=click.Choice(_FORMATS), help="What is printed.  [default: full]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write it to a file; the suffix tells the format."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code tells.")
def shift(
    model: str, data: str | None, clean: str | None, output_format: str | None, output: Path | None, quiet: bool,
    **asked: Any,
) -> None:  # fmt: skip
    """Judge whether data are distributed as those that MODEL was trained with.

    MODEL is code: model.py:make_model, package.module:factory. Compared are the statistics that its batch norm layers
    store with those that the data give, or a reference calibrated on clean data. The model is not changed. Labels are
    not needed, and nothing is said about accuracy.

    --check-assumptions measures on clean data whether the promise about false alarms can be relied on.

    Exit codes: 0 no shift found, or all assumptions hold; 1 shift, or one is doubtful or broken; 2 it could not run.
    """
    chosen = _chosen_format(output_format, output)
    if clean is not None:
        refuse_empty({"--check-assumptions": clean})
        chosen = _format_of_assumptions(chosen, output_format, output, data)
    elif data is None:
        raise ValueError(
            "shift needs data to judge. Give --data data.py:loader, or --check-assumptions clean.py:loader."
        )
    source = clean or data or ""
    _check(model, source, chosen, **asked)
    _require(chosen)
    if output is not None:
        _check_place(output)
    if clean is not None:
        text, good = _assumed(model, clean, chosen, **asked)
    else:
        verdict = _judged(model, source, **asked)
        text, good = _text(verdict, chosen, to_file=output is not None), verdict.rang is None
    if output is not None:
        write(output, text.rstrip("\n") + "\n")
    elif not quiet and text:
        show(text)
    sys.exit(0 if good else 1)


# -- what was asked for -------------------------------------------------------------------------------------------


def _chosen_format(asked: str | None, output: Path | None) -> str:
    """By the option, then the file's suffix, then the project's settings; GitHub's own where its workflow runs."""
    if asked:
        return asked
    if output is not None and output.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[output.suffix.lower()]
    if (settled := settings().output_format) in _FORMATS:
        return settled
    return "github" if os.environ.get("GITHUB_ACTIONS") == "true" else "full"


def _check(model: str, data: str, chosen: str, **asked: Any) -> None:
    """Everything that can be refused before the model is made."""
    names = ("weights", "reference", "calibrate", "write_reference")
    options = {f"--{name.replace('_', '-')}": asked[name] for name in names}
    refuse_empty({"--data": data, **options})
    if not addresses.is_address(model):
        addresses.refuse_code(model)
        raise ValueError(f"shift runs a model, got {model!r}. Give its address: model.py:make_model --weights {model}")
    addresses.refuse_state(model, asked["weights"], asked["state"])
    if asked["reference"] and asked["calibrate"]:
        raise ValueError("--reference and --calibrate are two references, expected one. Leave one of them out.")
    if asked["images"] and chosen != "html":
        raise ValueError(f"--images needs the HTML page, got format {chosen}. Write one: -o shift.html")
    _check_files(asked["reference"], asked["calibrate"], asked["write_reference"])


def _check_files(reference: str | None, calibrate: str | None, made: str | None) -> None:
    if reference and not Path(reference).is_file():
        raise FileNotFoundError(
            f"no reference {reference}. Make one: --calibrate clean.py:loader --write-reference model{_REFERENCE}"
        )
    if made and not calibrate:
        raise ValueError("--write-reference needs clean data to measure. Give them: --calibrate clean.py:loader")
    if made and not made.endswith(_REFERENCE):
        raise ValueError(f"--write-reference needs a file that ends in {_REFERENCE}, got {made!r}. Name it so.")
    if made:
        _check_place(Path(made))


def _check_place(path: Path) -> None:
    from batchnorm.cli.terminal import check_writable

    if not path.is_dir():  # write() has the words for a folder
        check_writable(path)


def _require(chosen: str) -> None:
    from batchnorm.cli.terminal import require

    require("torch", "numpy", "safetensors", what="shift", extra="torch")
    if chosen == "html":
        require("jinja2", what="the HTML page", extra="report")


# -- the verdict --------------------------------------------------------------------------------------------------


def _judged(
    model: str, data: str, *, weights: str | None, state: str, given: tuple[str, ...], images: int | None,
    max_examples: int | None, **asked: Any,
) -> Verdict:  # fmt: skip
    from batchnorm.shift.verdict import judge

    # what the user's code prints must not get into JSON, and what it raises must not end in a traceback
    with contextlib.redirect_stdout(sys.stderr), addresses.told(model), _unlogged():
        network, state = _loaded(model, weights, state, given)
        monitor = _monitor(network, max_examples=max_examples, **asked)
        return judge(
            monitor, addresses.data(data), max_examples=max_examples, pictures=images or 0, target=model, data=data,
            command=_command(model, data, weights=weights, state=state, given=given, **asked),
        )  # fmt: skip


def _loaded(model: str, weights: str | None, state: str, given: tuple[str, ...]) -> tuple[Any, str]:
    """The model, and the state that it has if the file has several, which is said."""
    network = addresses.model(model, addresses.parsed(given), weights, state)
    name, told = addresses.choice(network, weights, state) if weights else ("", "")
    if told:
        click.echo(told, err=True)
    return network, name


# -- what is assumed ----------------------------------------------------------------------------------------------


def _format_of_assumptions(chosen: str, asked: str | None, output: Path | None, data: str | None) -> str:
    """Text or JSON, the latter of settings and environments that have no other words for it."""
    if data is not None:
        raise ValueError("--check-assumptions takes the place of --data, got both. Leave one of them out.")
    told = asked or (chosen if output is not None and output.suffix.lower() in _SUFFIXES else None)
    if told is not None and told not in _ASSUMED:
        raise ValueError(f"assumptions are told in {', '.join(_ASSUMED)}, got {told}. Choose one: --output-format json")
    return chosen if chosen in _ASSUMED else "full"


def _assumed(
    model: str, data: str, chosen: str, *, weights: str | None, state: str, given: tuple[str, ...],
    images: int | None,  # noqa: ARG001
    max_examples: int | None, **asked: Any,
) -> tuple[str, bool]:  # fmt: skip
    """What is told of the assumptions, and whether all hold."""
    from batchnorm.shift.assumptions import check, concise, full

    with contextlib.redirect_stdout(sys.stderr), addresses.told(model), _unlogged():
        monitor = _monitor(_loaded(model, weights, state, given)[0], max_examples=max_examples, **asked)
        found = check(monitor, addresses.data(data), max_examples=max_examples, target=model, data=data)
    if chosen == "json":
        return found.to_json(), found.hold
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, _WIDEST))
    return full(found, width=width) if chosen == "full" else concise(found), found.hold


def _monitor(
    network: Any, *, reference: str | None, calibrate: str | None, write_reference: str | None, alpha: float,
    unit: str, max_examples: int | None,
) -> ShiftMonitor:  # fmt: skip
    from batchnorm.shift import ShiftMonitor

    known = _read(reference) if reference else None
    monitor = ShiftMonitor(network, alpha, unit, reference=known, examples=None)
    if calibrate:
        made = monitor.calibrate(addresses.data(calibrate), max_examples)
        if write_reference:
            made.save(write_reference)
    return monitor


def _read(path: str) -> Any:
    from batchnorm.shift import Reference

    try:
        return Reference.load(path)
    except OSError as error:
        raise ValueError(f"{path} is no reference: {error!r}. Make one with --calibrate.") from error


def _command(
    model: str, data: str, *, weights: str | None, state: str, given: tuple[str, ...], reference: str | None,
    calibrate: str | None, alpha: float, unit: str, **_: Any,
) -> str:  # fmt: skip
    """How to repeat it, without what it writes."""
    words = ["batchnorm", "shift", model, *(["--weights", weights] if weights else [])]
    words += ["--state", state] if state else []
    words += [word for setting in given for word in ("--set", setting)] + ["--data", data]
    words += ["--reference", reference] if reference else ["--calibrate", calibrate] if calibrate else []
    words += ([] if alpha == 0.01 else ["--alpha", f"{alpha:g}"]) + ([] if unit == "example" else ["--unit", unit])
    return shlex.join(words)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """A block in which the alarm is not logged: it is what the verdict says."""
    logger = logging.getLogger("batchnorm.shift")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# -- formats ------------------------------------------------------------------------------------------------------


def _text(verdict: Verdict, chosen: str, *, to_file: bool) -> str:
    from batchnorm.shift.page import concise, full, page

    if chosen == "full":
        columns = 80 if to_file else min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)
        return full(verdict, width=max(columns, 60))
    if chosen == "html":
        from batchnorm.lecture.painted_cats import png

        return page(verdict, png)
    formats = {"concise": concise, "md": markdown, "github": github, "sarif": sarif, "junit": junit}
    return verdict.to_json() if chosen == "json" else formats[chosen](verdict)


def markdown(verdict: Verdict) -> str:
    """Tables, for a pull request."""
    from batchnorm.doctor.formats import cell, row
    from batchnorm.shift.page import cells, facts, follows, headline, sentence, unseen

    lines = [f"**{cell(headline(verdict))}**: {cell(sentence(verdict))}", "", "| | |", "|---|---|"]
    lines += [row(fact) for fact in facts(verdict)]
    lines += ["", "| layer | evidence | kind | channels moved | W2 | KL |", "|---|---|---|---|---|---|"]
    lines += [row(cells(layer)) for layer in verdict.layers]
    lines += ["", "Not seen:", "", *(f"- {cell(text)}" for text in unseen(verdict)), ""]
    return "\n".join([*lines, *map(cell, follows(verdict))])


def _findings(verdict: Verdict) -> Iterator[tuple[str, str, str, str]]:
    """What programs are told: rule, level, layer, and one sentence."""
    from batchnorm.shift.page import concise, facts, plain

    about = dict(facts(verdict))
    if verdict.rang is not None:
        text = f"{concise(verdict)}. {about.get('hint', '')}".rstrip(". ") + ". Labels tell whether accuracy fell."
        yield "covariate-shift", "error", plain(verdict.first or ""), text
    if verdict.dependent:
        yield "dependent-observations", "warning", "", f"{plain(verdict.target)}: {about['neighbours']}."


_RULES = {
    "covariate-shift": "Data are not distributed as those that the model was trained with.",
    "dependent-observations": "Neighbouring observations are alike, so that false alarms are not bounded.",
}


def github(verdict: Verdict) -> str:
    """Workflow commands; nothing if nothing was found."""
    from batchnorm.doctor.formats import message, property_value
    from batchnorm.shift.page import plain

    file = f"file={property_value(plain(_file_of(verdict)))},line=1,"
    return "\n".join(f"::{level} {file}title={rule}::{message(text)}" for rule, level, _, text in _findings(verdict))


def sarif(verdict: Verdict) -> str:
    """A SARIF 2.1.0 log of one run. Both rules are declared, so that a shift that is gone closes its alert."""
    rules = [{"id": rule, "shortDescription": {"text": text}} for rule, text in _RULES.items()]
    driver = {"name": "batchnorm shift", "version": __version__, "semanticVersion": __version__, "rules": rules}
    results = [_result(verdict, *finding) for finding in _findings(verdict)]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1)


def _result(verdict: Verdict, rule: str, level: str, layer: str, text: str) -> dict[str, Any]:
    print_ = hashlib.sha256(f"{verdict.target}\0{verdict.data}\0{rule}".encode(errors="surrogatepass")).hexdigest()
    uri = quote(_file_of(verdict).replace(os.sep, "/"), errors="surrogatepass")
    return {
        "ruleId": rule,
        "ruleIndex": list(_RULES).index(rule),
        "level": level,
        "message": {"text": text},
        "locations": [{
            "physicalLocation": {"artifactLocation": {"uri": uri}},
            "logicalLocations": [{"fullyQualifiedName": layer or "model", "kind": "module"}],
        }],
        "partialFingerprints": {"modelAndData/v1": print_},
    }  # fmt: skip


def _file_of(verdict: Verdict) -> str:
    """The file of an address, or what a package's path would be."""
    where, _, _ = verdict.target.rpartition(":")
    return where if where.endswith(".py") else where.replace(".", "/") + ".py"


def junit(verdict: Verdict) -> str:
    """A suite of a case for all layers together, one for each layer, and one for neighbours, which never fails."""
    cases = list(_cases(verdict))
    failures = sum(bool(failed) for _, failed in cases)
    counts = {"tests": str(len(cases) + 1), "failures": str(failures)}
    root = Element("testsuites", name="batchnorm shift", **counts, time=f"{verdict.seconds:.3f}")
    suite = SubElement(root, "testsuite", name="shift", **counts, errors="0", skipped="0", time=root.attrib["time"])
    for name, failed in cases:
        element = _case(suite, verdict, name)
        if failed:
            SubElement(element, "failure", type="error", message="covariate-shift").text = failed
    neighbours = _case(suite, verdict, "neighbouring observations")
    if alike := [text for rule, _, _, text in _findings(verdict) if rule == "dependent-observations"]:
        SubElement(neighbours, "system-out").text = alike[0]
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode")


def _cases(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """What was looked at, and how it failed."""
    from batchnorm.shift.page import concise, odds, plain

    yield "all layers together", "" if verdict.rang is None else concise(verdict)
    for layer in verdict.layers:
        found = f"evidence {odds(layer.log_evidence)} by {layer.kind}, limit {odds(verdict.log_limit)}"
        yield plain(layer.name) or "model", found if layer.moved else ""


def _case(suite: Element, verdict: Verdict, name: str) -> Element:
    from batchnorm.shift.page import plain

    place = plain(f"{verdict.target} {verdict.data}").strip() or "model"
    return SubElement(suite, "testcase", classname=place, name=name, time="0")
