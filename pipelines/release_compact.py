"""Turn a training run into the bundled weights: measure on val, choose thresholds, write weights and model
card.

    python pipelines/release_compact.py ../shared/data/soi_mini runs/compact babelrs_geo/models/weights

Everything the header and the card say of the weights is measured or read here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from babelrs_geo.datasets.soi import fingerprint, read_split
from babelrs_geo.evaluation import Evaluation, evaluate, without_transformer
from babelrs_geo.metrics import h_mean
from babelrs_geo.models import checkpoints
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import COMPACT, Detector

MEAN_CLASSES = {**COMPACT.classes, "ir": ("person", "car", "bicycle")}
"""Classes in each sensor's mean; infrared's "other-vehicle" has 12 objects in val and is left out."""

GSD = {"sar": (1.0, 15.0), "rgb": (0.08, 2.0), "ir": (0.05, 0.3)}
"""Metres a pixel that the sources cover, as they state them; infrared from its flight heights, 60 to 130
m.
"""

RADIOMETRY = {
    "sar": "8-bit amplitude / 255; other SAR as amplitude from 0 to a scene-wide percentile",
    "ir": "8-bit brightness (hot is bright) / 255; other infrared between scene-wide percentiles",
    "rgb": "8-bit red, green, blue / 255",
}

LICENCE = (
    "Research and non-commercial use. Trained on SSDD (no licence stated; research use) and NWPU VHR-10 (research "
    "use) besides HIT-UAV (CC BY 4.0); the start of the convolutional prior is EfficientNet-Lite0 (Apache-2.0). The "
    "code's Apache-2.0 licence does not cover these weights."
)

LEAST_SCORE = 0.1
"""Floor of the score thresholds: below it a class with few objects would let anything through."""

CARD = Path(__file__).with_name("model_card.md")
"""The card's text, with places for figures."""


def measure(model: Detector, data: Path) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Evaluations of the three val splits and their report, with and without the vision transformer."""
    evaluations: dict[str, Evaluation] = {}
    report: dict[str, Any] = {}
    silent: dict[str, Any] = {}
    for sensor, classes in COMPACT.classes.items():
        records = read_split(data, sensor, "val", classes)
        evaluations[sensor] = evaluate(model, records)
        report[sensor] = evaluations[sensor].report(MEAN_CLASSES[sensor])
        with without_transformer(model):
            silent[sensor] = evaluate(model, records).report(MEAN_CLASSES[sensor], replicates=1)
        print(sensor, json.dumps(report[sensor]), "without transformer", silent[sensor]["map"], flush=True)
    means = {
        "h_map": h_mean(*(report[s]["map"] for s in ("sar", "rgb", "ir"))),
        "h_map_without_transformer": h_mean(*(silent[s]["map"] for s in ("sar", "rgb", "ir"))),
    }
    return evaluations, report | means


def phases(config: str) -> str:
    """The phases of a run in words."""
    parts, before = [], 0
    for phase in yaml.safe_load(config)["phases"]:
        size = phase["augment"]["sar"]["size"]
        quota = ", ".join(f"{n} {sensor}" for sensor, n in phase["quota"].items())
        parts.append(f"{phase['steps'] - before} steps of {size} px crops ({quota} a step)")
        before = phase["steps"]
    return ", then ".join(parts)


def card(header: Header, parameters: int) -> str:
    """The model card: the text beside this script with the header's figures filled in."""
    rows = []
    for sensor in ("sar", "ir", "rgb"):
        own = header.metrics[sensor]
        rows.append(
            "| {} | {} | {:.3f} ({:.3f} to {:.3f}) | {:.3f} ({:.3f} to {:.3f}) |".format(
                sensor, own["images"], own["ap50"], *own["ap50_interval"], own["map"], *own["map_interval"]
            )
        )
    classes = [
        f"| {sensor} | {name} | {own['objects']} | {own['ap50']:.3f} ({own['interval'][0]:.3f} to "
        f"{own['interval'][1]:.3f}) | {header.thresholds[sensor][name]:.2f} |"
        for sensor in ("sar", "ir", "rgb")
        for name, own in header.metrics[sensor]["by_class"].items()
    ]
    values = {
        "name": header.name,
        "parameters": f"{parameters / 1e6:.1f}",
        "table": "\n".join(rows),
        "classes": "\n".join(classes),
        "h_map": f"{header.metrics['h_map']:.3f}",
        "h_map_silent": f"{header.metrics['h_map_without_transformer']:.3f}",
        "licence": header.licence,
        "phases": phases(header.training["config"]),
        "start": header.training["start"],
        "floor": f"{LEAST_SCORE:g}",
        "minutes": f"{header.training['minutes']:.0f}",
        "hash": header.training["data_sha256"],
        "images": ", ".join(f"{n} {s}" for s, n in header.training["images"].items()),
    }
    text = CARD.read_text()
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="folder for NAME.safetensors and NAME.md")
    parser.add_argument("--name", default="compact")
    args = parser.parse_args()
    config = (CARD.parent / "train_compact.yaml").read_text()
    state = torch.load(args.run / "last.pt", weights_only=True, map_location="cpu")
    model = Detector(COMPACT)
    # Measured as stored: in half precision.
    model.load_state_dict({k: v.half().float() for k, v in state["mean"].items()})
    model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    evaluations, report = measure(model, args.data)
    train = {s: read_split(args.data, s, "train", c) for s, c in COMPACT.classes.items()}
    header = Header(
        name=args.name,
        classes=dict(COMPACT.classes),
        box_kind={"sar": "horizontal", "rgb": "oriented", "ir": "oriented"},
        gsd=GSD,
        thresholds={
            s: {k: round(max(v, LEAST_SCORE), 3) for k, v in e.thresholds().items()}
            for s, e in evaluations.items()
        },
        radiometry=RADIOMETRY,
        architecture=COMPACT.to_dict(),
        licence=LICENCE,
        training={
            "data": "SSDD (sar), NWPU VHR-10 (rgb), HIT-UAV (ir)",
            "images": {s: len(r) for s, r in train.items()},
            "data_sha256": fingerprint([r for records in train.values() for r in records]),
            "start": "ImageNet EfficientNet-Lite0 prior; the rest at random",
            "config": config,
            "steps": int(state["step"]),
            "minutes": state["seconds"] / 60,
        },
        metrics=report,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoints.save(args.out / f"{args.name}.safetensors", model, header)
    parameters = sum(p.numel() for p in model.parameters())
    (args.out / f"{args.name}.md").write_text(card(header, parameters))


if __name__ == "__main__":
    main()
