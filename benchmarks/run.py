"""Every benchmark, and from their results the page docs/speed.md: python benchmarks/run.py [--quick].

The full run takes under 15 minutes on two cores; --quick takes about two, leaves most cases and the compiler out,
writes benchmarks/results/*-quick.json and no page.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

PARTS = ("speed", "accuracy", "overhead", "memory")


def main() -> None:
    start, here = time.perf_counter(), Path(__file__).parent
    arguments = [argument for argument in sys.argv[1:] if argument == "--quick"]
    scripts = [f"bench_{part}.py" for part in PARTS] + ([] if arguments else ["speed_page.py"])
    for script in scripts:
        print(f"\n== {script}", flush=True)
        subprocess.run([sys.executable, str(here / script), *arguments], check=True)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
