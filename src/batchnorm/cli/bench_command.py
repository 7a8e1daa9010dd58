"""``batchnorm bench``: times of our layers and torch.nn's on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from batchnorm.cli import shared_options as options
from batchnorm.cli.output_files import write
from batchnorm.cli.preconditions import check_writable, require
from batchnorm.cli.terminal import progress_bar
from batchnorm.reporting import formats


@click.command()
@click.option("--shape", "shapes", multiple=True, help="Input shape, as 32x64x56x56; repeatable.  [default: four]")
@click.option("--dtype", default="float32", show_default=True, help="Type of the values, such as bfloat16.")
@click.option("--channels-last", is_flag=True, help="Use the memory format channels_last.")
@click.option("--threads", type=int, help="Number of threads of torch.  [default: torch's own]")
@click.option("--rounds", type=int, help="Number of rounds; each layer is timed once in each round.")
@click.option("--tune", is_flag=True, help="First call batchnorm.tune_allocator().")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the table to a file; the suffix decides the format.  [default: JSON]",
)  # fmt: skip
@options.printed_format
def bench(
    shapes: tuple[str, ...], dtype: str, channels_last: bool, threads: int | None, rounds: int | None, tune: bool,
    output: Path | None, output_format: str,
) -> None:  # fmt: skip
    """Compare the times of our layers and torch.nn's on this machine.

    The layers run in turn. A copy of a tensor of the same size is timed too: no layer can be faster than memory.
    """
    require("torch", "numpy", what="bench", extra="torch")
    from batchnorm import allocator
    from batchnorm import bench as measured
    from batchnorm.paired_timing import ROUNDS

    sizes = [measured.parse_shape(shape) for shape in shapes] or None
    if output is not None:
        check_writable(output)
    if tune and not (tuning := allocator.tune_allocator()):
        raise ValueError(f"--tune {tuning.reason}. Leave --tune out.")
    with progress_bar(quiet=False) as bar:
        task = bar.add_task("timing", total=1.0)
        data = measured.short_table(
            sizes, dtype, channels_last=channels_last, threads=threads, rounds=ROUNDS if rounds is None else rounds,
            progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    table = measured.report(data)
    if output is not None:
        write(output, formats.rendered(table, formats.by_suffix(output) or "json", to_file=True).rstrip("\n") + "\n")
    options.emit(table, output_format)
