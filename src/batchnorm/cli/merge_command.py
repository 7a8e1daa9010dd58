"""``batchnorm merge``: write one checkpoint from several, with the batch norm statistics of all their data.

Or one run log from those of replicas. Both make one thing from what replicas of one network left, so they are one
command; the inputs say which it is.
"""

from __future__ import annotations

from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm import addresses
from batchnorm.cli.coloring import show
from batchnorm.cli.model_address import require_torch
from batchnorm.cli.output_files import free
from batchnorm.cli.preconditions import check_writable
from batchnorm.files.remote import is_remote
from batchnorm.reporting.command_line import file_word
from batchnorm.reporting.text import columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.averaging.merged_files import FileState

_AGREE = "the weights are equal: the statistics are those of all data together"
_DIFFER = (
    "the weights differ: the statistics are those of a mixture of networks, not of the merged one. Measure them on "
    "training data: batchnorm.recalibrate(model, loader)"
)
_COUNTS = "numbers with commas between them, one for each file: --counts 50000,20000"


@click.command()
@click.argument("files", nargs=-1, metavar="FILE FILE [FILE]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File or folder to write.")
@click.option("--counts", metavar="N,N,...", help="Values per channel behind each file.  [default: files count alike]")
@click.option(
    "--local", multiple=True, metavar="WHAT",
    help="Leave out: statistics, batch_norm, or all tensors below a path; repeatable.",
)  # fmt: skip
@click.option("--keep-weights", is_flag=True, help="Keep the first file's weights; merge the statistics alone.")
@click.option("--biased", is_flag=True, help="The stored variances are biased, unlike those of torch's layers.")
@click.option("--state", default="", metavar="PATH", help="This state of each file.  [default: the model's own]")
@click.option("--force", is_flag=True, help="Write over an existing file.")
def merge(
    files: tuple[str, ...], output: Path, counts: str | None, local: tuple[str, ...], keep_weights: bool, biased: bool,
    state: str, force: bool,
) -> None:  # fmt: skip
    """Merge checkpoints of one network: statistics of all their data, and averages of the other tensors.

    FILEs are checkpoints (.pt, .pth, .ckpt, .safetensors). The output is a state dict alone, in the format of its
    suffix. The merged variance has the variance between the files, which a mean of variances loses. A file with count 0
    is left out.

    If FILEs are run logs, they are merged into one log, a folder: folders that watch(model, log=FOLDER) wrote, patterns
    such as "runs/*", or addresses such as "s3://bucket/runs/*". Only -o applies to logs. Logs of other models are
    refused; each replica and step counts once. batchnorm watch shows the merged log.

    Exit codes: 0 the file was written, 2 the command could not run.
    """
    if files and all(map(_is_log, files)):
        _refuse_for_logs(counts=counts, local=local, keep_weights=keep_weights, biased=biased, state=state, force=force)
        _merge_logs(files, output)
        return
    numbers = _numbers(counts)
    place = _checked(files, output, force=force)
    require_torch("batchnorm merge")
    from batchnorm.averaging import merged_files

    states = [merged_files.read(path, state) for path in files]
    result, agree = merged_files.merge(
        states, numbers, local=local, others="keep" if keep_weights else "average",
        correction=0 if biased else 1,
    )  # fmt: skip
    merged_files.write(result, place)
    show(_told(states, counts, place, size=len(result), agree=agree))


def _is_log(name: str) -> bool:
    """Whether an input is a place of run logs: a remote address, a folder, its stream, or a pattern of them."""
    if is_remote(name) or Path(name).is_dir() or Path(name).name == "record.jsonl":
        return True
    return not Path(name).exists() and has_magic(name)


def _refuse_for_logs(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be used with run logs. Leave out {' and '.join(given)}.")


def _merge_logs(addresses: Sequence[str], output: Path) -> None:
    from batchnorm.record import merge_logs
    from batchnorm.reporting.text import many, wrapped

    merged = merge_logs(addresses, output)
    words = f"merged the logs of {many(len(merged.replicas), 'replica')}: {many(merged.looks, 'look')}"
    lines = [words, *merged.notes, f"wrote {output}", f"next: batchnorm watch {file_word(str(output))}"]
    show("\n".join(line for each in lines for line in wrapped(each, columns(), 2)))


def _numbers(counts: str | None) -> list[float] | None:
    if counts is None:
        return None
    try:
        return [float(number) for number in counts.split(",")]
    except ValueError:
        raise ValueError(f"--counts needs {_COUNTS}, got {counts!r}.") from None


def _checked(files: tuple[str, ...], output: Path, *, force: bool) -> Path:
    if len(files) < 2:
        raise ValueError(
            f"merge needs at least two files, got {len(files)}. Name them: batchnorm merge A.pt B.pt -o C.pt"
        )
    for path in files:
        addresses.refuse_code(path)
        if output.exists() and Path(path).exists() and output.samefile(path):
            raise ValueError(f"{output} is one of the files that are merged. Choose another place with -o FILE.")
    place = free(output, force=force)
    check_writable(place)
    return place


def _told(states: Sequence[FileState], counts: str | None, place: Path, *, size: int, agree: bool) -> str:
    """The lines that say what was merged."""
    from batchnorm.doctor.mending.outcome import wrapped

    layers = states[0].layers
    lines = [f"merged {len(states)} files: {layers} batch norm layer{'s' * (layers != 1)}, {size} tensors"]
    lines += [f"{each.path}: used {each.name!r}, not {', '.join(each.unused)}" for each in states if each.unused]
    if counts is None:
        lines.append("without --counts, the files count alike")
    if layers:
        lines.append(_AGREE if agree else _DIFFER)
    return wrapped([*lines, f"wrote {place}", f"next: batchnorm doctor {file_word(str(place))}"], columns())
