"""What pretraining with language buys: the arms of pretraining_experiment.yaml, each from labels to a judged detector.

    python pipelines/pretraining_experiment.py ../shared/data/soi_mini runs/experiment
    python pipelines/pretraining_experiment.py ../shared/data/soi_mini runs/experiment --only C.1
    python pipelines/pretraining_experiment.py ../shared/data/soi_mini /tmp/smoke --steps 2 --only A.0,B.0,C.0,D.0

Arm by arm and seed by seed; what is done is left alone and what was stopped goes on, so the same command is run until
nothing is left. Each arm leaves what `babelrs-geo train` leaves, in OUT/C.1; those that have seed and layers in common
start from one encoder, which `babelrs-geo pretrain` left in OUT/pretrain.paper.1. Arms may run side by side (`--only`).
OUT/results.json, results.md and results.png have what came out so far. `--steps` shortens everything, to try it out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from babelrs_geo.datasets.instruct import InstructOptions, write_corpus
from babelrs_geo.errors import BabelError, ParameterError
from babelrs_geo.models import checkpoints
from babelrs_geo.training.pretrain.recipe import read as read_pretraining
from babelrs_geo.training.pretrain.run import ENCODER
from babelrs_geo.training.pretrain.run import fit as pretrain
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.run import FINAL, Place, fit
from babelrs_geo.training.settings import from_plain

PROTOCOL = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Arm:
    """One arm with one seed."""

    name: str
    seed: int
    taps: str | None
    """Layers fused in pretraining; None: no pretraining."""
    sensors: tuple[str, ...]
    """Of the detector."""
    precision: str
    """Of the detector's training."""

    @property
    def folder(self) -> str:
        """Where it is kept: A.0, or D.0.sar."""
        alone = f".{self.sensors[0]}" if len(self.sensors) == 1 else ""
        return f"{self.name}.{self.seed}{alone}"


def arms(protocol: Mapping[str, Any]) -> list[Arm]:
    """All of them, a seed of each before the next seed."""
    sensors = tuple(protocol["train"]["phases"][0]["quota"])
    found = []
    for seed in protocol["seeds"]:
        for name, about in protocol["arms"].items():
            if seed in about.get("seeds", protocol["seeds"]):
                groups = [(sensor,) for sensor in sensors] if about.get("alone") else [sensors]
                precision = about.get("precision", protocol["train"].get("precision", Recipe.precision))
                found += [Arm(name, seed, about.get("taps"), group, precision) for group in groups]
    return found


def run(arm: Arm, protocol: Mapping[str, Any], data: Path, out: Path, steps: int | None) -> bool:
    """Run an arm to its end, or until it is told to stop; True where it came to its end."""
    short, start = [] if steps is None else [f"steps={steps}"], {}
    if arm.taps is not None:
        part = protocol["pretrain"]
        changes = [*part["set"], *short, f"seed={arm.seed}", f"model.taps={arm.taps}"]
        place = Place(folder=out / f"pretrain.{arm.taps}.{arm.seed}", resume=True)
        corpus, held_out = (out / f"{name}.meta.json" for name in ("instruct", "held_out"))
        if pretrain(read_pretraining(part["recipe"], changes), [corpus], place, [held_out]).stopped:
            return False
        start = {"start": str(place.folder / ENCODER)}
    own = protocol["train"]
    plain = {
        **own,
        "seed": arm.seed,
        "precision": arm.precision,
        "data": {**own.get("data", {}), "sensors": list(arm.sensors)},
        "model": {**own["model"], **start},
    }
    recipe = from_plain(Recipe, plain)
    if steps is not None:
        recipe = replace(recipe, phases=(replace(recipe.phases[0], steps=steps, cooldown=1),))
    return not fit(recipe, [data], Place(folder=out / arm.folder, resume=True)).stopped


def outcome(arm: Arm, out: Path) -> dict[str, Any] | None:
    """What came of an arm; None where it has not come to its end."""
    folder = out / arm.folder
    if not (folder / FINAL).is_file():
        return None
    metrics = checkpoints.read_header(folder / FINAL).metrics
    figures = {
        s: {k: metrics[s][k] for k in ("map", "map_interval", "ap50", "ap50_interval")} for s in arm.sensors
    }
    log = rows(folder / "log.csv")
    watched = [
        name
        for name in log[0]
        if name == "gradient" or name.endswith("_gradient") or name.startswith("cosine")
    ]
    means = {name: fmean(float(row[name]) for row in log if row[name]) for name in watched}
    return {
        "arm": arm.name,
        "seed": arm.seed,
        "sensors": figures,
        "h_map": metrics["h_map"],
        "gradients": means,
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """MAP of each sensor and H-mAP as Markdown, mean and range over the seeds."""
    lines = ["| arm | seeds | sar | rgb | ir | H-mAP |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(each["arm"] for each in results):
        own = [each for each in results if each["arm"] == name]
        told = [
            _spread([e["sensors"][sensor]["map"] for e in own if sensor in e["sensors"]])
            for sensor in ("sar", "rgb", "ir")
        ]
        together = [each["h_map"] for each in own if len(each["sensors"]) == 3]
        seeds = len({each["seed"] for each in own})
        lines.append(f"| {name} | {seeds} | {' | '.join(told)} | {_spread(together)} |")
    return "\n".join(lines) + "\n"


def rows(log: Path) -> list[dict[str, str]]:
    """A run's log."""
    with log.open(newline="") as file:
        return list(csv.DictReader(file))


def answers(out: Path) -> str:
    """What the encoders answer on held-out images, beside a grey image's and another's, as Markdown."""
    found = ["| encoder | sensor | right | of a grey image | of another image |", "|---|---|---|---|---|"]
    for log in sorted(out.glob("pretrain.*/log.csv")):
        judged = [row for row in rows(log) if row.get("val_all")]
        for sensor in ("sar", "rgb", "ir") if judged else ():
            told = [float(judged[-1][f"val_{sensor}{kind}"]) for kind in ("", "_blank", "_shuffled")]
            name = log.parent.name.removeprefix("pretrain.")
            found.append(f"| {name} | {sensor} | " + " | ".join(f"{value:.2f}" for value in told) + " |")
    return "\n".join(found) + "\n"


def draw(done: Sequence[Arm], out: Path) -> None:
    """Loss, gradient norm and how the sensors' gradients agree, over the steps of fine-tuning, as results.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    colours = dict(zip("ABC", ("#E69F00", "#56B4E9", "#009E73"), strict=True))
    for arm in done:
        if len(arm.sensors) == 1:
            continue
        log, style = rows(out / arm.folder / "log.csv"), {"color": colours[arm.name[0]], "lw": 1}
        style |= {"ls": "--" if arm.precision == "32" else "-", "alpha": 1.0 if arm.seed == 0 else 0.4}
        label = arm.name if arm.seed == 0 else None
        for panel, column in zip(panels, ("loss", "gradient", "cosine"), strict=True):
            names = [n for n in log[0] if n == column or n.startswith(f"{column}_")]
            here = [row for row in log if all(row[n] for n in names)]
            mean = [fmean(float(row[n]) for n in names) for row in here]
            panel.plot([int(row["step"]) for row in here], mean, label=label, **style)
    for panel, title in zip(
        panels, ("loss", "gradient norm", "cosine of the sensors' gradients"), strict=True
    ):
        panel.set(title=title, xlabel="step")
    panels[0].set_yscale("log")
    panels[1].set_yscale("log")
    panels[2].axhline(0, color="grey", lw=0.5)
    panels[0].legend(title="dashed: fp32")
    figure.savefig(out / "results.png", dpi=110)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def tell(every: Sequence[Arm], out: Path) -> None:
    """Write what came out so far."""
    outcomes = {arm.folder: outcome(arm, out) for arm in every}
    results = [found for found in outcomes.values() if found is not None]
    draw([arm for arm in every if outcomes[arm.folder] is not None], out)
    told = f"{table(results)}\n{answers(out)}"
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", told)):
        draft = out / f".{name}.{os.getpid()}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(out / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and run what is left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout")
    parser.add_argument("out", type=Path, help="folder of all arms")
    parser.add_argument(
        "--protocol", type=Path, default=PROTOCOL, help="another than the one beside this file"
    )
    parser.add_argument("--only", help="some arms, such as A.0,C.1")
    parser.add_argument("--steps", type=int, help="so many in every run, to see that it runs")
    args = parser.parse_args(arguments)
    protocol = yaml.safe_load(args.protocol.read_text(encoding="utf-8"))
    every = arms(protocol)
    wanted = None if args.only is None else args.only.split(",")
    chosen = [arm for arm in every if wanted is None or {f"{arm.name}.{arm.seed}", arm.folder} & set(wanted)]
    try:
        if not chosen:
            raise ParameterError(
                f"--only {args.only} names no arm; expected some of {', '.join(arm.folder for arm in every)}"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("instruct", "held_out"):
            if not (args.out / f"{name}.meta.json").exists():
                write_corpus([args.data], args.out / f"{name}.jsonl", InstructOptions(**protocol[name]))
        for arm in chosen:
            if not (args.out / arm.folder / FINAL).exists() and not run(
                arm, protocol, args.data, args.out, args.steps
            ):
                sys.exit(f"stopped in {arm.folder}: run the same again, and it goes on")
            tell(every, args.out)
            print(f"{arm.folder} is done", flush=True)
    except BabelError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")


if __name__ == "__main__":
    main()
