"""Train the bundled weights on a machine that takes little at a time and gives it back soon, such as a lent GPU.

    python pipelines/train_compact.py pack ../shared/data/soi_mini .parts
    python pipelines/train_compact.py train .parts runs/gpu --device cuda --minutes 9 --whole --set run.judge=false
    python pipelines/train_compact.py join runs/gpu/pieces runs/here

`pack` puts a folder in SOI-Det's layout into archives under a limit, which may be carried one by one. `train` unpacks
them, trains as `babelrs-geo train` does for so many minutes, and leaves what it has in pieces of 15 MiB as well, in
`pieces`: the checkpoint where the run stopped, the weights alone where it came to its end. With `--whole` it comes to
its end in these minutes: a few steps of each phase tell how many there is time for. The same command goes on from the
run's last checkpoint; `--pieces FOLDER` from one that was carried. `join` makes whole files of pieces. Where a machine
is at hand for as long as it takes, `babelrs-geo train` is all that is needed; what came of it is measured and written
by pipelines/release_compact.py.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from babelrs_geo.datasets.soi import FOLDERS
from babelrs_geo.errors import BabelError, OutputError, ParameterError
from babelrs_geo.training.recipe import Recipe, read
from babelrs_geo.training.run import BEST, FINAL, LAST, RECIPE, Place, Trained, fit

MIB = 1 << 20
PIECE = 15 * MIB
"""Of a file that is to come back where 16 MiB a file are let through."""
KEPT = (RECIPE, "log.csv", BEST, FINAL, LAST)
"""What a run leaves, the last of it to go on from."""
PROBES, SKIPPED = 8, 3
"""Steps that tell how long one takes, the first of them, which take longer, left out."""
SPARE = 0.06
"""Of the minutes, for what steps take longer when a machine has been busy for a while, and for saving."""


def pack(data: Path, parts: Path, limit: int) -> list[Path]:
    """Archives `part1of3.zip`, ... of fewer than `limit` bytes each with all files under SOI-Det's folders of `data`.

    Raises ParameterError where there is nothing or a file exceeds the limit, OutputError where `parts` is not empty.
    """
    files = [p for folder in FOLDERS.values() for p in sorted((data / folder).rglob("*")) if p.is_file()]
    if not files:
        raise ParameterError(f"{data} has none of {', '.join(FOLDERS.values())}; give SOI-Det's layout")
    if parts.is_dir() and any(parts.iterdir()):
        raise OutputError(f"{parts} is not empty; name a new folder")
    parts.mkdir(parents=True, exist_ok=True)
    made, groups = [], list(_groups(data, files, limit))
    for number, group in enumerate(groups, 1):
        path = parts / archive_name(number, len(groups))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for file in group:
                archive.write(file, str(file.relative_to(data)))
        made.append(path)
    return made


def archive_name(number: int, count: int) -> str:
    """Of one of so many, from 1 on."""
    return f"part{number}of{count}.zip"


def _groups(data: Path, files: Sequence[Path], limit: int) -> Iterator[list[Path]]:
    """Files in turn, as many as an archive holds."""
    group: list[Path] = []
    held = 0
    for file in files:
        entry = file.stat().st_size + 2 * len(str(file.relative_to(data)).encode()) + 256  # its two headers
        if entry > limit:
            raise ParameterError(f"{file} exceeds the limit of {limit / MIB:g} MiB; raise --limit")
        if group and held + entry > limit:
            yield group
            group, held = [], 0
        group.append(file)
        held += entry
    yield group


def unpack(parts: Path, folder: Path) -> None:
    """What is in the archives of `parts`, under `folder`. ParameterError where there are none, or not all of them."""
    archives = {path.name: path for path in parts.glob("part[0-9]*of[0-9]*.zip")}
    if not archives:
        raise ParameterError(f"{parts} holds no archive; make them by: {Path(__file__).name} pack")
    counts = {int(name.removesuffix(".zip").rpartition("of")[2]) for name in archives}
    if len(counts) != 1:
        raise ParameterError(f"{parts} holds archives of more than one packing; leave those of one")
    (count,) = counts
    wanted = [archive_name(number, count) for number in range(1, count + 1)]
    if lacking := [name for name in wanted if name not in archives]:
        raise ParameterError(f"{parts} lacks {', '.join(lacking)}; carry all {count} archives")
    for name in wanted:
        with zipfile.ZipFile(archives[name]) as archive:
            archive.extractall(folder)


def split(run: Path, pieces: Path, size: int = PIECE) -> None:
    """What a run leaves as files of at most `size` bytes: `last.ckpt.000`, ... and small files as they are. A run that
    has its last weights is not gone on with: its checkpoint, which is much larger, stays.
    """
    shutil.rmtree(pieces, ignore_errors=True)
    pieces.mkdir(parents=True)
    for name in KEPT:
        if (run / name).is_file() and not (name == LAST and (run / FINAL).is_file()):
            with (run / name).open("rb") as file:
                for number, piece in enumerate(iter(lambda: file.read(size), b"")):
                    (pieces / f"{name}.{number:03d}").write_bytes(piece)


def join(pieces: Path, run: Path) -> list[str]:
    """Whole files in `run` of what `split` wrote, those that are there already left alone. ParameterError for gaps."""
    run.mkdir(parents=True, exist_ok=True)
    joined = []
    for name in KEPT:
        found = sorted(pieces.glob(f"{name}.[0-9][0-9][0-9]"))
        if not found or (run / name).exists():
            continue
        if found[-1].suffix != f".{len(found) - 1:03d}":
            raise ParameterError(
                f"{pieces} lacks a piece of {name} before {found[-1].name}; carry all of them"
            )
        draft = run / f".{name}.part"
        with draft.open("wb") as file:
            for piece in found:
                file.write(piece.read_bytes())
        draft.replace(run / name)
        joined.append(name)
    return joined


def seconds_a_step(recipe: Recipe, data: Path, device: str) -> list[float]:
    """How long a step of each phase takes on this machine: medians, in seconds."""
    run = replace(
        recipe.run, log_every=1, validate_every=0, judge=False, gradients_every=0, tensorboard=False
    )
    ends = range(PROBES, PROBES * (len(recipe.phases) + 1), PROBES)
    short = [replace(p, steps=end, warmup=0, cooldown=0) for p, end in zip(recipe.phases, ends, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        fit(replace(recipe, phases=tuple(short), run=run), [data], Place(folder=Path(folder), device=device))
        with (Path(folder) / "log.csv").open(newline="") as log:
            took = [float(row["seconds_a_step"]) for row in csv.DictReader(log)]
    return [median(took[end - PROBES + SKIPPED : end]) for end in ends]


def fitted(recipe: Recipe, took: Sequence[float], seconds: float) -> Recipe:
    """The recipe with as many steps as there is time for, its phases in proportion, `took` seconds a step in each.

    ParameterError where that is not one step a phase.
    """
    ends = [0, *(phase.steps for phase in recipe.phases)]
    share = seconds / sum((b - a) * t for a, b, t in zip(ends, ends[1:], took, strict=False))
    phases, before = [], 0
    for phase, begin in zip(recipe.phases, ends, strict=False):
        steps = int((phase.steps - begin) * share)
        if steps < 1:
            raise ParameterError(
                f"{seconds:.0f} seconds are less than a step of each phase; give more --minutes"
            )
        before += steps
        cooldown = min(steps, round(phase.cooldown * share)) if phase.cooldown > 1 else phase.cooldown
        phases.append(replace(phase, steps=before, cooldown=cooldown, warmup=min(phase.warmup, before // 4)))
    return replace(recipe, phases=tuple(phases))


def train(args: argparse.Namespace) -> Trained:
    """Unpack, train for as long as there is time, and leave what there is in pieces."""
    end = time.monotonic() + 60 * (args.minutes or 0)
    if args.whole and args.minutes is None:
        raise ParameterError("--whole is told by --minutes how long the run may take; give them")
    recipe = read(args.recipe, args.set)
    if args.pieces is not None:
        join(args.pieces, args.out)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        unpack(args.parts, data)
        minutes = None  # a run that was fitted is not cut short of its cooldown
        if args.whole and (args.out / LAST).is_file():
            recipe = read(str(args.out / RECIPE))  # as it was fitted
        elif args.whole:
            took = seconds_a_step(recipe, data, args.device)
            left = end - time.monotonic()
            recipe = fitted(recipe, took, (1 - SPARE) * left)
            each = ", ".join(f"{t:.2f}" for t in took)
            print(f"{each} seconds a step: {recipe.steps} steps in {left / 60:.1f} minutes", flush=True)
        elif args.minutes is not None:
            minutes = (end - time.monotonic()) / 60
        place = Place(folder=args.out, device=args.device, resume=True, minutes=minutes)
        try:
            done = fit(recipe, [data], place)
        finally:
            if args.out.is_dir():
                split(args.out, args.out / "pieces")
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and do as asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="put training data into archives")
    packing.add_argument("data", type=Path, help="folder in SOI-Det's layout")
    packing.add_argument("parts", type=Path, help="new folder for the archives")
    packing.add_argument("--limit", type=float, default=36.0, help="MiB of an archive (default 36)")
    training = verbs.add_parser("train", help="train from archives, or go on")
    training.add_argument("parts", type=Path, help="folder of archives")
    training.add_argument("out", type=Path, help="folder of the run")
    training.add_argument("--recipe", default="compact", help="name or file (default compact)")
    training.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as babelrs-geo's")
    training.add_argument("--pieces", type=Path, help="go on from these pieces where OUT is new")
    training.add_argument("--device", default="auto", help="auto, cpu or cuda")
    training.add_argument("--minutes", type=float, help="stop, and save, after so many")
    training.add_argument(
        "--whole", action="store_true", help="as many steps as these minutes allow, from start to cooldown"
    )
    joining = verbs.add_parser("join", help="make whole files of pieces")
    joining.add_argument("pieces", type=Path)
    joining.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    try:
        if args.verb == "pack":
            for path in pack(args.data, args.parts, int(args.limit * MIB)):
                print(f"{path} {path.stat().st_size / MIB:.1f} MiB")
        elif args.verb == "join":
            print("joined", ", ".join(join(args.pieces, args.out)) or "nothing")
        else:
            done = train(args)
            print(f"stopped after step {done.step}" if done.stopped else f"ended: {done.judged}")
    except BabelError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")


if __name__ == "__main__":
    main()
