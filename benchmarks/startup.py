"""How long the command line takes to answer, beside a bare interpreter.

    python benchmarks/startup.py --runs 15 --json runs/startup.json

Each command runs once unmeasured, so that files are in the system's cache and byte code is written ("warm"),
and then `--runs` times, the commands taking turns so that a busy moment hits all alike. Medians are shown.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import babelrs_geo": [sys.executable, "-c", "import babelrs_geo"],
    "babelrs-geo --help": [str(Path(sys.executable).with_name("babelrs-geo")), "--help"],
    "babelrs-geo detect --help": [str(Path(sys.executable).with_name("babelrs-geo")), "detect", "--help"],
}


def seconds(command: Sequence[str]) -> float:
    """Wall-clock seconds of one run; raises CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(runs: int) -> dict[str, list[float]]:
    """Seconds of each command, run in turns after one unmeasured round."""
    for command in COMMANDS.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="Start-up time of the command line.")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    taken = measure(options.runs)
    print("| command | median s | fastest s | slowest s |\n|---|---|---|---|")
    for name, times in taken.items():
        print(f"| `{name}` | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |")
    if options.json:
        about = {"python": platform.python_version(), "machine": platform.machine(), "runs": options.runs}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "seconds": taken}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
