"""Turn what `babelrs-geo train` left into weights that ship: measure on val, choose thresholds, write weights and
model card.

    python pipelines/release_compact.py ../shared/data/soi_mini runs/compact/best.safetensors babelrs_geo/models/weights

Everything the header and the card say of the weights is measured here, or was kept by the run in their own header; so
weights that ship already may be measured anew, with another `--nms` say. `--mean BEFORE` releases the mean of the run's
weights and of those that it started from, which keeps more of what these knew of other images than the run's
(Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from babelrs_geo.errors import WeightsError
from babelrs_geo.evaluation import without_transformer
from babelrs_geo.models import checkpoints
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import Detector
from babelrs_geo.models.plain import from_plain
from babelrs_geo.training.data import sources
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.validation import LEAST_SCORE, Verdict, judge

CARD = Path(__file__).with_name("model_card.md")
"""The card's text, with places for figures."""

WORDS = {"sar": "SAR", "ir": "infrared", "rgb": "RGB"}


def measure(model: Detector, header: Header, recipe: Recipe, data: Path) -> Header:
    """The header with figures and thresholds measured on the val splits of `data`, as babelrs-geo train does."""
    part = recipe.data
    judged = sources([data], part.val, header.config.classes, part, learn=False)
    step = int(header.training["steps"])
    found = _verdict(judge(model, judged, recipe, step))
    with without_transformer(model):
        silent = _verdict(judge(model, judged, recipe, step))
    metrics = {**found.metrics(), "h_map_without_transformer": silent.h_map}
    return replace(header, thresholds=found.thresholds, metrics=metrics)


def _verdict(found: Verdict | None) -> Verdict:
    assert found is not None  # the first process has one, and there is no other
    return found


def phases(recipe: Recipe) -> str:
    """The phases of a run in words."""
    parts, before = [], 0
    for phase in recipe.phases:
        size = phase.views[recipe.data.sensors[0]].chosen.size
        quota = ", ".join(f"{n} {sensor}" for sensor, n in recipe.quota(phase).items())
        parts.append(f"{phase.steps - before} steps of {size} px crops ({quota} a step)")
        before = phase.steps
    return ", then ".join(parts)


def start(training: Mapping[str, Any]) -> str:
    """What the weights began with, and what those began with, in words."""
    before = training.get("before")
    if before is None:
        given = str(training["start"])
        return {"imagenet": "ImageNet's EfficientNet-Lite0 in the prior, the rest at random"}.get(
            given, given
        )
    same = before.get("data_sha256") == training["data_sha256"]
    made = [f"{before['steps']} steps"] if "steps" in before else []
    made += [f"{before['minutes']:.0f} minutes"] if "minutes" in before else []
    made += ["the same images"] if same else []
    came = f", which came of {', '.join(made)}, from {start(before)}" if "start" in before else ""
    return f"the weights {before['name']} (SHA-256 `{before['sha256']}`){came}"


def mean_with(model: Detector, header: Header, before: Path) -> Header:
    """Put half of the weights `before`, which the run started from, into the model, and say so in its header.

    Raises WeightsError where the run started from others.
    """
    started, found = header.training.get("before") or {}, checkpoints.sha256(before)
    if started.get("sha256") != found:
        raise WeightsError(
            f"{before} (SHA-256 {found}) is not what the run started from ({started.get('sha256', 'no weights')}); "
            "give those to --mean"
        )
    old = checkpoints.tensors(before)
    # rounded as they will be stored: what is measured is what ships
    model.load_state_dict(
        {k: ((v + old[k].float()) / 2).half().float() for k, v in model.state_dict().items()}
    )
    return replace(header, training={**header.training, "mean_with": found})


def minutes(training: Mapping[str, Any]) -> float:
    """Of a run and all before it."""
    before = training.get("before")
    return float(training.get("minutes", 0.0)) + (0.0 if before is None else minutes(before))


def means(header: Header) -> str:
    """Which means leave out classes, in words."""
    parts = []
    for sensor, names in header.classes.items():
        judged = header.metrics[sensor]["classes_in_mean"]
        if set(judged) != set(names):
            parts.append(f"The {WORDS[sensor]} mean is that of {', '.join(judged)}. ")
    return "".join(parts)


def tables(header: Header) -> dict[str, str]:
    """Rows of the card's two tables."""
    rows, classes = [], []
    for sensor in header.classes:
        own = header.metrics[sensor]
        rows.append(
            "| {} | {} | {:.3f} ({:.3f} to {:.3f}) | {:.3f} ({:.3f} to {:.3f}) |".format(
                sensor, own["images"], own["ap50"], *own["ap50_interval"], own["map"], *own["map_interval"]
            )
        )
        classes += [
            f"| {sensor} | {name} | {each['objects']} | {each['ap50']:.3f} ({each['interval'][0]:.3f} to "
            f"{each['interval'][1]:.3f}) | {header.thresholds[sensor][name]:.2f} |"
            for name, each in own["by_class"].items()
        ]
    return {"table": "\n".join(rows), "classes": "\n".join(classes)}


def card(header: Header, recipe: Recipe, parameters: int) -> str:
    """The model card: the text beside this script with the header's figures filled in."""
    training = header.training
    by_machine = training.get("minutes_by_machine", {})
    values = {
        "name": header.name,
        "parameters": f"{parameters / 1e6:.1f}",
        **tables(header),
        "means": means(header),
        "h_map": f"{header.metrics['h_map']:.3f}",
        "h_map_silent": f"{header.metrics['h_map_without_transformer']:.3f}",
        "licence": header.licence,
        "phases": phases(recipe),
        "start": start(training),
        "mean": "What is stored is the mean of the run's weights and of its start. "
        if "mean_with" in training
        else "",
        "floor": f"{LEAST_SCORE:g}",
        "machines": ", ".join(f"{spent:.0f} minutes on {name}" for name, spent in by_machine.items()),
        "precision": recipe.precision,
        "minutes": f"{minutes(training):.0f}",
        "hash": training["data_sha256"],
        "images": ", ".join(f"{n} {sensor}" for sensor, n in training["images"].items()),
        "sources": str(training["data"]),
        "gsd": ", ".join(f"{WORDS[s]} {low:g} to {high:g} m" for s, (low, high) in header.gsd.items()),
    }
    text = CARD.read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout, or of chips")
    parser.add_argument(
        "weights", type=Path, help="best.safetensors or final.safetensors of babelrs-geo train"
    )
    parser.add_argument("out", type=Path, help="folder for NAME.safetensors and NAME.md")
    parser.add_argument("--name", default="compact")
    parser.add_argument(
        "--nms", type=float, help="IoU above which turned boxes of a class are one; the run's"
    )
    parser.add_argument(
        "--mean", type=Path, metavar="BEFORE", help="release the mean with the weights the run started from"
    )
    args = parser.parse_args(arguments)
    model, header = checkpoints.load(args.weights)
    if "data_sha256" not in header.training:
        sys.exit(
            f"{args.weights} does not say which data and how many minutes it took; train it with this version"
        )
    if args.mean is not None:
        try:
            header = mean_with(model, header, args.mean)
        except WeightsError as error:
            sys.exit(f"{Path(__file__).name}: error: {error}")
    if args.nms is not None:
        roi = replace(model.config.roi, nms_iou=args.nms)
        header = replace(header, architecture=replace(model.config, roi=roi).to_dict())
        state, model = model.state_dict(), Detector(header.config).eval()
        model.load_state_dict(state)
    recipe: Recipe = from_plain(Recipe, yaml.safe_load(header.training["config"]))
    released = replace(measure(model, header, recipe, args.data), name=args.name)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoints.save(args.out / f"{args.name}.safetensors", model, released)
    parameters = sum(p.numel() for p in model.parameters())
    (args.out / f"{args.name}.md").write_text(card(released, recipe, parameters), encoding="utf-8")
    figures = {
        s: (round(own["map"], 3), round(own["ap50"], 3)) for s, own in released.metrics.items() if s in WORDS
    }
    print(
        f"{args.out / args.name}.safetensors: mAP and AP50 {figures}, H-mAP {released.metrics['h_map']:.3f}"
    )


if __name__ == "__main__":
    main()
