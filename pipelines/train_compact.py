"""Train the bundled weights: python pipelines/train_compact.py ../shared/data/soi_mini runs/compact

Goes on from runs/compact/last.pt where it exists; `--start FILE.safetensors` begins from existing weights
instead of ImageNet's. What came of it is written by pipelines/release_compact.py.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import yaml

from babelrs_geo.datasets.augment import Augment
from babelrs_geo.datasets.soi import read_split
from babelrs_geo.models.detector import COMPACT, Detector
from babelrs_geo.models.imagenet import load_efficientnet_lite0
from babelrs_geo.training import TrainOptions, freeze_prior, train


def phases(path: Path) -> list[TrainOptions]:
    """Training options of a YAML file, one a phase."""
    document = yaml.safe_load(path.read_text())
    found = []
    for phase in document["phases"]:
        for sensor, own in phase["augment"].items():
            phase["augment"][sensor] = Augment(**own | {"scale": tuple(own["scale"])})
        found.append(TrainOptions(**document["common"] | phase))
    return found


def main() -> None:
    """Read the arguments, then train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout")
    parser.add_argument("out", type=Path, help="folder of the run: last.pt and log.jsonl")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--start", type=Path, help="safetensors to begin from")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan = phases(args.config)
    records = {s: read_split(args.data, s, "train", names) for s, names in COMPACT.classes.items()}
    torch.manual_seed(plan[0].seed)
    model = Detector(COMPACT)
    if args.start:
        from safetensors.torch import load_file

        model.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    else:
        load_efficientnet_lite0(model.backbone.spm.get_submodule("trunk"))
    freeze_prior(model)
    for options in plan:
        train(model, records, options, args.out, args.device)


if __name__ == "__main__":
    main()
