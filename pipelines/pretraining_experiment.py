"""What pretraining with language buys: the arms of pretraining_experiment.yaml, each from labels to a judged detector.

    python pipelines/pretraining_experiment.py ../shared/data/soi_mini runs/experiment
    python pipelines/pretraining_experiment.py ../shared/data/soi_mini runs/experiment --only C.1
    python pipelines/pretraining_experiment.py ../shared/data/soi_mini /tmp/smoke --steps 2 --only A.0,B.0,C.0,D.0

Arm by arm and seed by seed; what is done is left alone and what was stopped goes on, so the same command is run until
nothing is left. Each arm leaves what `babelrs-geo train` leaves, in OUT/C.1; those that have seed and layers in common
start from one encoder, which `babelrs-geo pretrain` left in OUT/pretrain.paper.1. Arms may run side by side (`--only`).

What came of an arm is written to a small file in `--records` (docs/pretraining_experiment; OUT/records where `--steps`
or another protocol is given): figures, curves, minutes and machine, and a hash of the protocol. An arm that has one is
done, wherever it ran, so that machines may take turns. What a tile costs is measured of all architectures in one run,
by `--time` instead of training, and kept in costs.json. results.md and results.png beside these files are made of them
alone. `--steps` shortens everything, to try it out.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from babelrs_geo.datasets.instruct import Corpus, InstructOptions, write_corpus
from babelrs_geo.drafts import draft
from babelrs_geo.errors import BabelError, ParameterError
from babelrs_geo.models import checkpoints
from babelrs_geo.models.detector import Detector
from babelrs_geo.models.plain import from_plain
from babelrs_geo.training.pretrain.recipe import read as read_pretraining
from babelrs_geo.training.pretrain.run import ENCODER
from babelrs_geo.training.pretrain.run import fit as pretrain
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.run import FINAL, Place, configuration, fit
from babelrs_geo.training.validation import harmonic

PROTOCOL = Path(__file__).with_suffix(".yaml")
RECORDS = Path(__file__).parents[1] / "docs" / "pretraining_experiment"
TOKENIZER = "tokenizer"
"""Folder of it, where the protocol has one made."""
ASKED = "asked.json"
"""Which questions are there."""
POINTS = 100
"""Of a curve in a record."""
COSTS = "costs.json"
"""What a tile costs, by arm."""
ROUNDS = 5


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
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """What differs from that of the other arms."""
    frozen: bool = False
    """The encoder is kept as it starts."""
    steps: int | None = None
    """Of fine-tuning where it ends early, for its curves alone: nothing is told of what it finds."""
    every: int = 1
    """The detector learns from every so many-th image."""

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
                rest = {
                    key: about[key] for key in ("architecture", "frozen", "steps", "every") if key in about
                }
                found += [Arm(name, seed, about.get("taps"), group, precision, **rest) for group in groups]
    return found


def prepare(protocol: Mapping[str, Any], data: Path, out: Path) -> None:
    """What is asked and the tokenizer, for all arms. ParameterError where the folder has those of another protocol."""
    note, asked = out / ASKED, {name: protocol.get(name) for name in ("instruct", "held_out", "tokenizer")}
    if (json.loads(note.read_text(encoding="utf-8")) if note.exists() else asked) != asked:
        raise ParameterError(
            f"{out} has questions of another protocol ({note.name}); name another folder, or remove them and the "
            "encoders that learnt from them"
        )
    write(note, json.dumps(asked) + "\n")
    for name in ("instruct", "held_out"):
        if not (out / f"{name}.meta.json").exists():
            write_corpus([data], out / f"{name}.jsonl", InstructOptions(**protocol[name]))
    if "tokenizer" in protocol and not (out / TOKENIZER).exists():
        write_tokenizer(out / "instruct.meta.json", out / TOKENIZER, **protocol["tokenizer"])


def run(arm: Arm, protocol: Mapping[str, Any], data: Path, out: Path, steps: int | None) -> bool:
    """Run an arm to its end, or until it is told to stop; True where it came to its end."""
    short, start = [] if steps is None else [f"steps={steps}"], {}
    if arm.taps is not None:
        part = protocol["pretrain"]
        changes = [*part["set"], *short, f"seed={arm.seed}", f"model.taps={arm.taps}"]
        if "tokenizer" in protocol:
            changes.append(f"model.language.tokenizer={out / TOKENIZER}")
        place = Place(folder=encoder(arm, out), resume=True)
        corpus, held_out = (out / f"{name}.meta.json" for name in ("instruct", "held_out"))
        if pretrain(read_pretraining(part["recipe"], changes), [corpus], place, [held_out]).stopped:
            return False
        start = {"start": str(place.folder / ENCODER)}
    recipe = fine_tuning(arm, protocol, start)
    last = arm.steps if steps is None else steps
    if last is not None:
        recipe = replace(recipe, phases=(replace(recipe.phases[0], steps=last, cooldown=1),))
    return not fit(recipe, [data], Place(folder=out / arm.folder, resume=True)).stopped


def fine_tuning(arm: Arm, protocol: Mapping[str, Any], start: Mapping[str, str] | None = None) -> Recipe:
    """How an arm's detector learns, from `start` where that says of another start than the protocol's."""
    own = protocol["train"]
    size = {**own["model"].get("architecture", {}), **arm.architecture}
    plain = {
        **own,
        "seed": arm.seed,
        "precision": arm.precision,
        "data": {**own.get("data", {}), "sensors": list(arm.sensors), "every": arm.every},
        "run": {**own.get("run", {}), "judge": arm.steps is None},
        "model": {**own["model"], "architecture": size, "freeze_encoder": arm.frozen, **(start or {})},
    }
    return from_plain(Recipe, plain)


def outcome(arm: Arm, out: Path) -> dict[str, Any]:
    """What came of an arm that has come to its end: figures, means of what the log watches, curves."""
    header = checkpoints.read_header(out / arm.folder / FINAL)
    shown = ("map", "map_interval", "ap50", "ap50_interval")
    judged = () if arm.steps else arm.sensors
    log = rows(out / arm.folder / "log.csv")
    means = {name: fmean(float(row[name]) for row in log if row[name]) for name in log[0] if _watched(name)}
    told = {
        "arm": arm.name,
        "seed": arm.seed,
        "sensors": {s: {k: header.metrics[s][k] for k in shown} for s in judged},
        "h_map": header.metrics.get("h_map"),
        "gradients": means,
        "minutes_by_machine": header.training.get("minutes_by_machine", {}),
        "curves": {name: curve(log, name) for name in ("loss", "gradient", "cosine")},
    }
    if arm.taps is not None:
        asked = [row for row in rows(encoder(arm, out) / "log.csv") if row.get("val_all")]
        told["answers"] = {name: float(v) for name, v in asked[-1].items() if name.startswith("val_") and v}
    return told


def costs(every: Sequence[Arm], protocol: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Processor time of a tile of 640 px in milliseconds, by arm and sensor, on one thread, weights at random: the
    least of `ROUNDS`, in each of which every architecture has its turn.
    """
    configs = {arm.name: configuration(fine_tuning(arm, protocol).model) for arm in every}
    models: dict[str, Detector] = {}  # by architecture
    for config in configs.values():
        torch.manual_seed(0)
        models.setdefault(str(config), Detector(config).eval())
    taken: dict[str, dict[str, float]] = {drawn: {} for drawn in models}
    tile, before = torch.rand(1, 3, 640, 640), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for drawn, model in models.items():
                    for sensor in model.config.classes:
                        begun = time.process_time()
                        model.predict(tile, sensor)
                        spent = round(1000 * (time.process_time() - begun), 1)
                        taken[drawn][sensor] = min(spent, taken[drawn].get(sensor, spent))
    finally:
        torch.set_num_threads(before)
    return {name: taken[str(config)] for name, config in configs.items()}


def _watched(name: str) -> bool:
    return name == "gradient" or name.endswith("_gradient") or name.startswith("cosine")


def write_tokenizer(corpus: Path, folder: Path, size: int) -> None:
    """Byte pairs of what a corpus says, `size` tokens at most, digits one by one; for transformers, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, pieces = "<|endoftext|>", pre_tokenizers.ByteLevel(add_prefix_space=False)
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pieces])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pieces.alphabet(), special_tokens=[end], show_progress=False
    )
    said = Corpus(corpus)
    made.train_from_iterator((turn["value"] for k in range(len(said)) for turn in said[k].turns), trainer)
    wrap: Any = PreTrainedTokenizerFast  # without annotations
    wrap(tokenizer_object=made, eos_token=end, pad_token=end).save_pretrained(folder)


def encoder(arm: Arm, out: Path) -> Path:
    """The run that an arm's encoder comes of."""
    return out / f"pretrain.{arm.taps}.{arm.seed}"


def curve(log: Sequence[Mapping[str, str]], column: str) -> dict[str, list[float]]:
    """Steps and values of a column, or of the mean of those it begins the names of, about `POINTS` of them: each is the
    mean of the rows since the one before.
    """
    names = [name for name in log[0] if name == column or name.startswith(f"{column}_")]
    here = [row for row in log if names and all(row[name] for name in names)]
    size = max(1, len(here) // POINTS)
    groups = [here[i : i + size] for i in range(0, len(here), size)]
    values = [fmean(float(row[name]) for row in group for name in names) for group in groups]
    return {
        "step": [int(group[-1]["step"]) for group in groups],
        "value": [float(f"{v:.5g}") for v in values],
    }


def table(results: Sequence[Mapping[str, Any]], spent: Mapping[str, Mapping[str, float]]) -> str:
    """MAP of each sensor, H-mAP and AP50 as Markdown, mean and range over the seeds; and what a tile costs."""
    lines = ["| arm | seeds | sar | rgb | ir | H-mAP | AP50 sar | rgb | ir | ms a tile |", "|---" * 10 + "|"]
    for name in dict.fromkeys(each["arm"] for each in results):
        own = [each for each in results if each["arm"] == name]
        told = {
            kind: [
                _spread([e["sensors"][sensor][kind] for e in own if sensor in e["sensors"]])
                for sensor in ("sar", "rgb", "ir")
            ]
            for kind in ("map", "ap50")
        }
        together = _spread([value for _, value in all_of(own)])
        cost = f"{fmean(spent[name].values()):.0f}" if name in spent else "–"
        cells = [name, str(len({each["seed"] for each in own})), *told["map"], together, *told["ap50"]]
        lines.append(f"| {' | '.join(cells)} | {cost} |")
    return "\n".join(lines) + "\n"


def all_of(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Arm and H-mAP of each seed whose runs have all sensors between them: one of all, or a specialist of each."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for each in results:
        own = found.setdefault((each["arm"], each["seed"]), {})
        own |= {sensor: told["map"] for sensor, told in each["sensors"].items()}
    return [(arm, harmonic([*own.values()])) for (arm, _), own in found.items() if len(own) == 3]


def rows(log: Path) -> list[dict[str, str]]:
    """A run's log."""
    with log.open(newline="") as file:
        return list(csv.DictReader(file))


def answers(results: Sequence[Mapping[str, Any]]) -> str:
    """What the encoders answer on held-out images, beside a grey image's and another's, as Markdown."""
    found = ["| encoder of | sensor | right | of a grey image | of another image |", "|---|---|---|---|---|"]
    arms_of: dict[tuple[tuple[str, float], ...], list[str]] = {}  # by what their encoder answers
    for each in results:
        if "answers" in each:
            arms_of.setdefault(tuple(each["answers"].items()), []).append(f"{each['arm']}.{each['seed']}")
    for given, names in arms_of.items():
        for sensor in ("sar", "rgb", "ir"):
            told = [dict(given)[f"val_{sensor}{kind}"] for kind in ("", "_blank", "_shuffled")]
            found.append(f"| {', '.join(names)} | {sensor} | {' | '.join(f'{v:.2f}' for v in told)} |")
    return "\n".join(found) + "\n"


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """H-mAP of each arm, a dot a seed; loss, gradient norm and how the sensors' gradients agree over the steps of
    fine-tuning. As a PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    first, *panels = figure.subplots(2, 2).flatten()
    colours = dict(zip("ABCD", ("#E69F00", "#56B4E9", "#009E73", "#CC79A7"), strict=True))
    places: dict[str, int] = {}
    for arm, value in sorted(all_of(results)):
        place = places.setdefault(arm, len(places))
        first.plot(value, place, "o", color=colours[arm[0]], alpha=0.8)
    first.set_yticks([*places.values()], [*places])
    first.invert_yaxis()
    first.grid(axis="x", lw=0.3)
    first.set(title="H-mAP, a dot a seed", xlabel="H-mAP on val")
    shown = [f"{arm}{precision}" for arm in "ABC" for precision in ("", "16")]
    told: set[str] = set()
    for each in sorted((each for each in results if each["arm"] in shown), key=lambda each: str(each["arm"])):
        style = {"color": colours[each["arm"][0]], "lw": 1, "ls": "--" if each["arm"].endswith("16") else "-"}
        style |= {"alpha": 0.4 if each["arm"] in told else 1.0}
        label = None if each["arm"] in told else each["arm"]
        told.add(each["arm"])
        for panel, drawn in zip(panels, each["curves"].values(), strict=True):
            panel.plot(drawn["step"], drawn["value"], label=label, **style)
    titles = ("loss", "gradient norm", "cosine of the sensors' gradients")
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel="step")
    for panel in panels[:2]:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panels[2].axhline(0, color="grey", lw=0.5)
    if told:
        panels[0].legend(title="dashed: bf16", ncols=2)
    figure.savefig(path, dpi=110)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    told = f"{fmean(values):.3f}"
    return told if len(values) == 1 else f"{told} ({min(values):.3f} to {max(values):.3f})"


def fingerprint(protocol: Mapping[str, Any], arm: Arm, steps: int | None) -> str:
    """Of all that what comes out of an arm depends on; which other arms and seeds there are does not matter."""
    parts = ("train",) if arm.taps is None else tuple(protocol)
    same = {name: protocol[name] for name in parts if name not in ("seeds", "arms")}
    own: list[Any] = [arm.taps, arm.sensors, arm.precision, arm.architecture, arm.steps]
    own += ["frozen"] if arm.frozen else []
    own += [arm.every] if arm.every != 1 else []
    return hashlib.sha256(json.dumps([same, own, steps], sort_keys=True).encode()).hexdigest()[:16]


def recorded(every: Sequence[Arm], records: Path, marks: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What came of the arms that are done, by name. ParameterError for a record of another protocol."""
    found = {}
    for arm in every:
        path = records / f"{arm.folder}.json"
        if path.is_file():
            found[arm.folder] = json.loads(path.read_text(encoding="utf-8"))
            told, mark = found[arm.folder]["protocol"], marks[arm.folder]
            if told != mark:
                raise ParameterError(
                    f"{path} is of another protocol ({told}, this one is {mark}); "
                    "name another folder with --records, or put it away"
                )
    return found


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    with draft(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def tell(results: Sequence[Mapping[str, Any]], records: Path) -> None:
    """Write what came out so far."""
    known = records / COSTS
    spent = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    draw(results, records / "results.png")
    write(records / "results.md", f"{table(results, spent)}\n{answers(results)}")


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
    parser.add_argument("--records", type=Path, help="folder of what came out")
    parser.add_argument("--only", help="some arms, such as A.0,C.1")
    parser.add_argument("--steps", type=int, help="so many in every run, to see that it runs")
    parser.add_argument("--time", action="store_true", help="measure what a tile costs, and train nothing")
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
        own = args.steps is not None or args.protocol != PROTOCOL
        records = args.records or (args.out / "records" if own else RECORDS)
        records.mkdir(parents=True, exist_ok=True)
        marks = {arm.folder: fingerprint(protocol, arm, args.steps) for arm in every}
        if args.time:
            write(records / COSTS, json.dumps(costs(every, protocol)) + "\n")
            tell(list(recorded(every, records, marks).values()), records)
            return
        prepare(protocol, args.data, args.out)
        for arm in chosen:
            if arm.folder in recorded(every, records, marks):
                continue
            if not (args.out / arm.folder / FINAL).exists() and not run(
                arm, protocol, args.data, args.out, args.steps
            ):
                sys.exit(f"stopped in {arm.folder}: run the same again, and it goes on")
            record = {"protocol": marks[arm.folder], **outcome(arm, args.out)}
            write(records / f"{arm.folder}.json", json.dumps(record) + "\n")
            tell(list(recorded(every, records, marks).values()), records)
            print(f"{arm.folder} is done", flush=True)
    except BabelError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")


if __name__ == "__main__":
    main()
