"""Benchmarks as datasets of samples: records of our own readers, and TorchGeo's DOTA, DIOR and VHR10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch.utils.data import Dataset
from torchgeo.datasets import DIOR, DOTA, VHR10

from babelrs_geo.boxes import areas, from_corners, from_xyxy
from babelrs_geo.datasets.augment import load_image
from babelrs_geo.datasets.samples import Sample, make_sample
from babelrs_geo.datasets.soi import Record
from babelrs_geo.errors import ParameterError, SceneError
from babelrs_geo.sensors import Sensor


class FrameDataset(Dataset[Sample]):
    """Labelled frames: `FrameDataset(read_split(root, "sar", "train", classes), classes)`.

    Records of `soi.read_split` and `dronevehicle.read_dronevehicle`. A frame that cannot be read, or whose numbers are
    not bytes, is a SceneError with its name.
    """

    def __init__(
        self,
        records: Sequence[Record],
        classes: Sequence[str],
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        self.records, self.classes, self.transforms = list(records), tuple(classes), transforms

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sample:
        record = self.records[number]
        image, name = load_image(record), record.path.name
        sample = make_sample(image, None, record.boxes, record.labels, sensor=record.sensor, name=name)
        return sample if self.transforms is None else self.transforms(sample)


class TorchGeoFrames(Dataset[Sample]):
    """TorchGeo's DOTA, DIOR or VHR10 with samples as everywhere here: `TorchGeoFrames(DIOR(root, "train"))`.

    Their own samples differ: pixels up to 255, boxes under `bbox` (eight numbers) or `bbox_xyxy`, labels under
    `label` or `labels`, VHR10's counted from its background. Boxes without area are left out. Give the
    dataset no transforms of its own. Raises ParameterError for any other dataset.
    """

    def __init__(
        self,
        dataset: DOTA | DIOR | VHR10,
        sensor: str | Sensor = Sensor.RGB,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        if not isinstance(dataset, DOTA | DIOR | VHR10):
            raise ParameterError(
                f"{type(dataset).__name__} has no adapter; pass TorchGeo's DOTA, DIOR or VHR10"
            )
        self.dataset, self.sensor, self.transforms = dataset, Sensor.parse(sensor), transforms
        self.classes = tuple(dataset.categories[1:] if isinstance(dataset, VHR10) else dataset.classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Sample:
        name = self._name(number)
        try:
            given: dict[str, Any] = self.dataset[number]
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise SceneError(f"{name} cannot be read ({' '.join(str(error).split())})") from error
        labels = given.get("labels", given.get("label"))
        if "bbox" in given:
            boxes = from_corners(np.asarray(given["bbox"], np.float64).reshape(-1, 4, 2))
        elif "bbox_xyxy" in given:
            boxes = from_xyxy(np.asarray(given["bbox_xyxy"], np.float64).reshape(-1, 4))
        else:  # DIOR's test split and VHR10's negative images have none
            boxes, labels = np.zeros((0, 5)), []
        indices = np.asarray(labels, np.int64) - isinstance(self.dataset, VHR10)
        real = areas(boxes) > 0
        image = given["image"].to(torch.float32) / 255
        sample = make_sample(image, None, boxes[real], indices[real], sensor=self.sensor, name=name)
        return sample if self.transforms is None else self.transforms(sample)

    def _name(self, number: int) -> str:
        if isinstance(self.dataset, VHR10):
            return f"{self.dataset.split}/{number % len(self) + 1:03d}.jpg"
        return Path(str(self.dataset.sample_df["image_path"].iloc[number])).name
