"""``batchnorm bench``: our layers against torch.nn's on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE
from rich.table import Table

from batchnorm.cli.terminal import Talk, check_writable, progress_bar, require


@click.command()
@click.option("--shape", "shapes", multiple=True, help="Sizes as 32x64x56x56; may be given again.  [default: four]")
@click.option("--dtype", default="float32", show_default=True, help="Type of the values: bfloat16, for example.")
@click.option("--channels-last", is_flag=True, help="Channels last in memory.")
@click.option("--threads", type=int, help="Threads of torch.  [default: as many as torch takes]")
@click.option("--rounds", type=int, help="Times that every contestant runs.")
@click.option("--tune", is_flag=True, help="Tune the allocator first: batchnorm.tune_allocator().")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write it as JSON.")
@click.option("--output-format", type=click.Choice(("rich", "json")), default="rich", show_default=True,
              help="What is printed.")  # fmt: skip
def bench(
    shapes: tuple[str, ...], dtype: str, channels_last: bool, threads: int | None, rounds: int | None, tune: bool,
    output: Path | None, output_format: str,
) -> None:  # fmt: skip
    """Time our layers against torch.nn's on this machine.

    Both run in turn, with copies of tensors of the same size as the limit that memory sets.
    """
    require("torch", "numpy", what="bench", extra="torch")
    from batchnorm import allocator
    from batchnorm import bench as measured
    from batchnorm.paired_timing import BUSY

    sizes = [measured.parse_shape(shape) for shape in shapes] or None
    if output is not None:
        check_writable(output)
    if tune and not (tuning := allocator.tune_allocator()):
        raise ValueError(f"--tune {tuning.reason}. Leave it out.")
    talk = Talk(stderr=output_format == "json", highlight=False)
    with progress_bar(quiet=False) as bar:
        task = bar.add_task("timing", total=1.0)
        options = {} if rounds is None else {"rounds": rounds}
        data = measured.short_table(
            sizes, dtype, channels_last=channels_last, threads=threads,
            progress=lambda done: bar.update(task, completed=done), **options,
        )  # fmt: skip
    if output is not None:
        measured.write(data, output)
    if output_format == "json":
        click.echo(json.dumps(data, indent=1))
    else:
        talk.print(_bench_table(data))
        if (busy := max(row["others"] for row in data["rows"])) > BUSY:
            talk.print(f"Other programs used up to {busy:.0%} of the machine: repeat this when they are done.")
        talk.print("× torch: how many times as fast as torch.nn; × limit: our time over that of copies.", style="dim")


def _bench_table(data: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("shape", "case"):
        table.add_column(name)
    for name in ("ours ms", "torch ms", "× torch", "× limit"):
        table.add_column(name, justify="right")
    for row in data["rows"]:
        figures = (f"{row['ours_ms']:.3g}", f"{row['torch_ms']:.3g}", f"{row['ratio']:.2f}", f"{row['to_limit']:.2f}")
        table.add_row("×".join(map(str, row["shape"])), row["words"], *figures)
    return table
