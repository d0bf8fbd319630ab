"""`ChipDataset`: the chips that `babelrs-geo tile` wrote, of one sensor, as a TorchGeo dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import geopandas as gpd
import numpy as np
from numpy.typing import NDArray

from babelrs_geo.chips import open_chip, read_index, read_labels
from babelrs_geo.datasets.ground import GroundDataset, GroundOptions, Picture
from babelrs_geo.datasets.samples import label_indices
from babelrs_geo.errors import ParameterError
from babelrs_geo.scenes import Scene
from babelrs_geo.sensors import Sensor


class ChipDataset(GroundDataset):
    """Chips of one sensor in a folder: their pixels as the scene has them, their labels, their place.

    `split` is `train`, `val` or `test`, all of them if None. `classes` fixes the order of the classes; all that are
    in the folder, sorted, if None, so that the splits agree.

    Raises LabelError where the folder is not whole or has a class outside `classes`, ParameterError where it has no
    such chips, SceneError with its name for a chip that cannot be read.
    """

    named = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        sensor: str | Sensor,
        split: str | None = None,
        classes: Sequence[str] | None = None,
        options: GroundOptions | None = None,
    ) -> None:
        self.folder = Path(folder)
        table, labels = read_index(self.folder), read_labels(self.folder)
        names = sorted(labels["class"].unique()) if classes is None else list(classes)
        kind = Sensor.parse(sensor)
        chosen = table[(table["sensor"] == str(kind)) & (split is None or table["split"] == split)]
        if chosen.empty:
            have = table.groupby(["sensor", "split"]).size()
            told = ", ".join(f"{n} of {s} in {p}" for (s, p), n in have.items()) or "no chips"
            raise ParameterError(
                f"{self.folder} has no chips of {kind} in split {split or 'any'}, only {told}"
            )
        self.table = chosen.reset_index(drop=True)
        self.paths = [str(self.folder / path) for path in self.table["path"]]
        self._objects = _objects(labels, names, self.folder)
        super().__init__(self._pictures(), kind, names, options or GroundOptions())

    def _pictures(self) -> list[Picture]:
        """The chips of a scene share one georeference, moved: one of them is opened for all."""
        found: dict[str, tuple[int, int, Scene]] = {}
        pictures = []
        for i, row in enumerate(self.table.itertuples()):
            if row.scene not in found:
                with self._open(i) as scene:
                    found[row.scene] = (row.x, row.y, scene)
            x, y, scene = found[row.scene]
            place = scene.georef.window((row.x - x, row.y - y, row.width, row.height))
            pictures.append(Picture(row.chip, row.width, row.height, place, row.acquired))
        return pictures

    def _open(self, picture: int) -> AbstractContextManager[Scene]:
        return open_chip(self.folder, self.table.iloc[picture])

    def _labelled(self, picture: int, scene: Scene) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        nothing = np.zeros((0, 5)), np.zeros(0, np.int64)
        return self._objects.get(self.pictures[picture].name, nothing)


def _objects(
    labels: gpd.GeoDataFrame, classes: Sequence[str], folder: Path
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Boxes (N, 5) and labels (N,) of each chip that has some."""
    numbers = label_indices(labels["class"], classes, folder / "labels.parquet")
    boxes = labels[["cx", "cy", "w", "h", "r"]].to_numpy(np.float64)
    rows = labels.groupby("chip", sort=False).indices
    return {str(chip): (boxes[at], numbers[at]) for chip, at in rows.items()}
