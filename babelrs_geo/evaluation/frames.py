"""Labelled images, one after the other, as a detector sees them: frames of a benchmark and chips alike."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelrs_geo.boxes import bounds, clip, from_xyxy
from babelrs_geo.chips import open_chip, read_index, read_labels
from babelrs_geo.datasets.augment import load_image
from babelrs_geo.datasets.published import Published, prepare
from babelrs_geo.datasets.soi import FOLDERS, Record, class_names, read_split
from babelrs_geo.detect import DetectOptions, plan_for
from babelrs_geo.detections import Detections
from babelrs_geo.errors import LabelError, ParameterError
from babelrs_geo.models.checkpoints import Header


@dataclass(frozen=True)
class Frame:
    """One labelled image."""

    name: str
    image: Tensor
    """(3, h, w) float32 in [0, 1], as the model sees it."""
    size: tuple[int, int]
    """Rows and columns of the image without padding."""
    back: tuple[float, float]
    """Pixels of the labels a pixel of the image, in x and y."""
    truth: Detections
    """What is there and may be seen, with score 1, in pixels of the labels."""
    valid: NDArray[np.bool_] | None = None
    """(h, w) where the image was really seen; None for everywhere. What is centred elsewhere is not reported."""


@dataclass(frozen=True)
class Frames:
    """The labelled images of one sensor, loaded one by one."""

    sensor: str
    count: int
    load: Callable[[int], Frame]
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Objects by class that are labelled, but of a class the detector does not know: they are not judged."""
    unlabelled: tuple[str, ...] = ()
    """Classes that the detector knows and nobody labelled: what it finds of them is not judged."""
    objects: int | None = None
    """Labelled objects that are judged; None where nobody counted."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Frame]:
        return (self.load(i) for i in range(self.count))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which labelled images are shown, and how. Raises `ParameterError` where options contradict one another."""

    split: str | Mapping[str, str] = "val"
    """Name of the split, for all sensors or by sensor."""
    sensors: tuple[str, ...] | None = None
    """Sensors to judge; None for all that both the data and the weights have."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Names of the weights' classes in place of the data's, where they differ."""
    background: bool = True
    """Count RGB and infrared images without labels as well; the published figures leave them out."""
    fit: bool = False
    """Show frames of a benchmark resized to the weights' input, as published, and not in their own pixels."""
    gsd: float | str | None = None
    """Metres a pixel to show chips at, or "native"; None to stay in the weights' range, as `detect` does."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is opened."""
        DetectOptions(gsd=self.gsd)

    def split_of(self, sensor: str) -> str:
        """The split of one sensor. ParameterError where none is given."""
        if isinstance(self.split, str):
            return self.split
        if sensor not in self.split:
            raise ParameterError(
                f"no split is given for {sensor}, only for {', '.join(self.split)}; name one, or leave {sensor} out"
            )
        return self.split[sensor]


def find_frames(
    data: Path, header: Header, options: DataOptions | None = None
) -> tuple[dict[str, Frames], dict[str, str]]:
    """The labelled images in `data` by sensor, for weights with this header; and sensors left out, with the reason.

    `data` is a folder in SOI-Det's layout or one of chips. Only classes that both sides know are judged.

    Raises LabelError where there is neither, a split is missing or without objects, or no class is shared;
    WeightsError where the weights lack a sensor that was asked for.
    """
    options = options or DataOptions()
    chips = (data / "index.parquet").is_file() or (data / "tile.json").is_file()
    if chips:
        index = read_index(data)
        there = [s for s in FOLDERS if (index["sensor"] == s).any()]
    else:
        there = [s for s, folder in FOLDERS.items() if (data / folder).is_dir()]
    if not there:
        raise LabelError(
            f"{data} holds no labelled images; expected chips of babelrs-geo tile (index.parquet) or SOI-Det's "
            f"folders ({', '.join(FOLDERS.values())})"
        )
    found: dict[str, Frames] = {}
    left_out: dict[str, str] = {}
    for sensor in options.sensors or there:
        if sensor not in there:
            raise LabelError(f"{data} has nothing of {sensor}, only {', '.join(there)}; name another sensor")
        if options.sensors is None and sensor not in header.classes:
            left_out[sensor] = f"the weights do not know {sensor}"
            continue
        known = header.chosen(sensor)
        frames = (_chips if chips else _soi)(data, sensor, header, options)
        if set(frames.unlabelled) == set(known):
            named = ", ".join(frames.unknown) or "none"
            left_out[sensor] = f"no class is shared: the data has {named}, the weights {', '.join(known)}"
            continue
        found[sensor] = frames
    if not found:
        why = "; ".join(f"{sensor}: {reason}" for sensor, reason in left_out.items())
        raise LabelError(f"nothing to judge in {data} ({why}); pass other weights, or rename classes")
    if not any(frames.objects for frames in found.values()):
        splits = ", ".join(dict.fromkeys(map(options.split_of, found)))
        raise LabelError(f"nothing to count: no labelled object in split {splits}; choose another --split")
    return found, left_out


def record_frames(
    records: Sequence[Record],
    names: Sequence[str],
    judged: Sequence[str] | None = None,
    fit: int | None = None,
) -> Frames:
    """Frames of a benchmark, whose labels point into `names`; only those of `judged` (all by default) are kept.

    They are shown in their own pixels, or with `fit` resized to a long side of so many and padded to a square.
    """
    chosen = tuple(names if judged is None else judged)
    place = _places(names, chosen)
    labels = [label for record in records for label in record.labels]
    counts = Counter(names[label] for label in labels if place[label] < 0)
    objects = len(labels) - counts.total()

    def load(i: int) -> Frame:
        record = records[i]
        image = load_image(record)
        height, width = image.shape[1:]
        size = (height, width)
        if fit is not None:
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            image, size = prepare(pixels, Published(size=fit))
        truth = _truth(record.boxes, place[record.labels], chosen, record.sensor)
        return Frame(record.path.name, image, size, (width / size[1], height / size[0]), truth)

    return Frames(records[0].sensor, len(records), load, dict(sorted(counts.items())), objects=objects)


def _soi(data: Path, sensor: str, header: Header, options: DataOptions) -> Frames:
    split = options.split_of(sensor)
    names = class_names(data, sensor, split)
    records = read_split(data, sensor, split, names)
    if not options.background and sensor != "sar":
        records = [record for record in records if len(record.labels)]
    if not records:
        raise LabelError(f"{data} has no {sensor} images in split {split}; name another split")
    mine = [options.rename.get(name, name) for name in names]
    known = header.chosen(sensor)
    judged = [name for name in known if name in mine]
    frames = record_frames(records, mine, judged, header.tile if options.fit else None)
    return _without(frames, known, judged)


def _chips(data: Path, sensor: str, header: Header, options: DataOptions) -> Frames:
    split = options.split_of(sensor)
    index, labels = read_index(data), read_labels(data)
    table = index[(index["sensor"] == sensor) & (index["split"] == split)].reset_index(drop=True)
    if table.empty:
        have = index.groupby(["sensor", "split"]).size()
        told = ", ".join(f"{n} of {s} in {p}" for (s, p), n in have.items())
        raise LabelError(f"{data} has no chips of {sensor} in split {split}, only {told}; name another split")
    # Which classes the data knows is a matter of the folder, not of one split; its other sensors count as well
    # only where they share chips.
    chips = set(index.loc[index["sensor"] == sensor, "chip"])
    labels = labels[labels["chip"].isin(chips)].reset_index(drop=True)
    names = labels["class"].map(lambda name: options.rename.get(name, name)).to_numpy(str)
    known = header.chosen(sensor)
    judged = tuple(name for name in known if name in set(names))
    order = {name: i for i, name in enumerate(judged)}
    numbers = np.array([order.get(name, -1) for name in names], np.int64)
    boxes = labels[["cx", "cy", "w", "h", "r"]].to_numpy(np.float64)
    objects = labels.groupby("chip", sort=False).indices
    if not options.background and sensor != "sar":
        table = table[table["chip"].isin(objects)].reset_index(drop=True)
    here = labels["chip"].isin(set(table["chip"])).to_numpy()
    counts = Counter(str(name) for name in names[here & (numbers < 0)])

    def load(i: int) -> Frame:
        row = table.iloc[i]
        mine = objects.get(row["chip"], np.zeros(0, np.int64))
        with open_chip(data, row) as chip:
            plan = plan_for(chip, header, DetectOptions(gsd=options.gsd, overlap=0))
            if plan.caution:
                warnings.warn(plan.caution, UserWarning, stacklevel=2)
            rows, columns = chip.shape_at(plan.scale)
            pixels = chip.read((0, 0, columns, rows), plan.scale)
            extent = (0, 0, chip.width, chip.height)
        back = (extent[2] / columns, extent[3] / rows)
        truth = _truth(boxes[mine], numbers[mine], judged, sensor, extent)
        truth = truth[on_valid(truth, pixels.valid, back)]
        image = torch.from_numpy(np.ascontiguousarray(pixels.image))
        return Frame(row["chip"], image, (rows, columns), back, truth, pixels.valid)

    total = int((here & (numbers >= 0)).sum())
    frames = Frames(sensor, len(table), load, dict(sorted(counts.items())), objects=total)
    return _without(frames, known, judged)


def on_valid(
    objects: Detections, valid: NDArray[np.bool_], back: tuple[float, float] = (1.0, 1.0)
) -> NDArray[np.bool_]:
    """(N,) whether each object's centre was seen; `back` are its pixels to a pixel of `valid` (h, w)."""
    column, row = (np.floor(objects.boxes[:, k] / back[k]).astype(np.int64) for k in (0, 1))
    rows, columns = valid.shape
    told: NDArray[np.bool_] = valid[row.clip(0, rows - 1), column.clip(0, columns - 1)]
    return told


def _without(frames: Frames, known: Sequence[str], judged: Sequence[str]) -> Frames:
    """The frames with a note of the classes that nobody labelled."""
    unlabelled = tuple(name for name in known if name not in judged)
    return replace(frames, unlabelled=unlabelled)


def _places(names: Sequence[str], judged: Sequence[str]) -> NDArray[np.int64]:
    """Position in `judged` of each of `names`, -1 where it is not there."""
    return np.array([judged.index(name) if name in judged else -1 for name in names], np.int64)


def _truth(
    boxes: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    sensor: str,
    extent: tuple[int, int, int, int] | None = None,
) -> Detections:
    """Objects (those with label -1 left out) as the sensor's kind of box, cut to what can be seen of them."""
    kept = labels >= 0
    boxes, labels = boxes[kept], labels[kept]
    if sensor == "sar":
        boxes = from_xyxy(bounds(boxes))
    if extent is not None:
        boxes = clip(boxes, extent)
        seen = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
        boxes, labels = boxes[seen], labels[seen]
    ones = np.ones(len(boxes), np.float32)
    return Detections(boxes, ones, labels, tuple(classes), sensor != "sar")
