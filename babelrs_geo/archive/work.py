"""What is done with one scene of an archive: open, look whether it is a duplicate, detect, write a draft."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babelrs_geo.archive.addresses import scrub
from babelrs_geo.archive.ledger import DONE, DUPLICATE, FAILED, INCOMPLETE
from babelrs_geo.archive.outputs import footprint, stac_item, write_json
from babelrs_geo.archive.safe import is_safe, write_vrt
from babelrs_geo.errors import BabelError, OutputError, ParameterError, SceneError

if TYPE_CHECKING:
    from babelrs_geo.detect import DetectOptions, Found
    from babelrs_geo.models.zoo import Weights
    from babelrs_geo.scenes import Scene

_HEAD, _BLOCK, _BLOCKS = 1 << 16, 1 << 14, 8
"""Bytes of a file that its fingerprint looks at: the first 64 KiB, then 8 blocks of 16 KiB, the last at the end."""


@dataclass(frozen=True)
class Task:
    """A scene and where its draft goes."""

    id: int
    source: str
    path: str
    """As opened; may hold a signature, and goes nowhere but to GDAL."""
    name: str
    """Of the output file."""
    drafts: str
    sensor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    twins: frozenset[str] = frozenset()
    """Fingerprints of scenes of the same size that came before and are done."""


@dataclass(frozen=True)
class Outcome:
    """How a scene ended."""

    state: str
    reason: str | None = None
    again: bool = False
    """Whether another attempt may end otherwise."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the ledger."""


@dataclass(frozen=True)
class Detection:
    """The work: weights and how they look at scenes. Picklable; loads the weights where it starts."""

    weights: str
    device: str
    options: DetectOptions
    sensor: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    """Of `scenes.SceneOptions`, for scenes that say nothing else."""
    crs: str | None = None
    full_hash: bool = False

    def load(self) -> Weights:
        """The weights. Raises WeightsError."""
        from babelrs_geo.models import zoo

        return zoo.load(self.weights, self.device)

    def start(self) -> Callable[[Task], Outcome]:
        """Load, and give what takes one scene."""
        if self.options.threads is not None:
            import torch

            torch.set_num_threads(self.options.threads)
        loaded = self.load()
        return lambda task: self._one(task, loaded)

    def _one(self, task: Task, weights: Weights) -> Outcome:
        """A scene, whatever is wrong with it. Raises OutputError alone: no scene is to blame for a full disk."""
        begun, host = time.perf_counter(), socket.gethostname()
        values: dict[str, Any] = {"host": host}
        try:
            outcome = self._detected(task, weights, values)
        except OutputError:
            raise
        except (BabelError, MemoryError) as error:
            memory = isinstance(error, MemoryError) or "out of memory" in str(error)
            remote = isinstance(error, SceneError) and "://" in task.path
            outcome = Outcome(FAILED, str(error) or "out of memory", memory or remote)
            gc.collect()
        except Exception as error:
            outcome = Outcome(FAILED, f"unexpected {type(error).__name__}: {error} (a fault of the program)")
        reason = None if outcome.reason is None else shown(outcome.reason, task)
        values["seconds"] = round(time.perf_counter() - begun, 3)
        return replace(outcome, reason=reason, values={**values, **outcome.values})

    def _detected(self, task: Task, weights: Weights, values: dict[str, Any]) -> Outcome:
        from babelrs_geo.detect import check_crs, detect, plan_for
        from babelrs_geo.scenes import SceneOptions, open_scene

        path = Path(task.path)
        # A product's manifest holds the checksums of all its files.
        content = path / "manifest.safe" if is_safe(path) else path
        if content.is_file():
            values["fingerprint"] = fingerprint(content, whole=self.full_hash)
            if values["fingerprint"] in task.twins:
                return Outcome(DUPLICATE)
        sensor, opened = task.sensor or self.sensor, task.path
        if is_safe(path) or (path.suffix.lower() == ".zip" and path.is_file()):
            opened, sensor = str(write_vrt(path, Path(task.drafts) / str(task.id))), "sar"
        reading: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in {**self.reading, **task.options}.items()
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open_scene(opened, sensor, SceneOptions(**reading)) as scene:
                values["sensor"] = str(scene.sensor)
                if self.crs is not None:
                    check_crs(self.crs, georeferenced=scene.georef.crs is not None)
                plan = plan_for(scene, weights.header, self.options)
                fitted = replace(self.options, batch=fitting(self.options.batch, len(plan.grid)))
                found = detect(scene, weights, fitted)
                values |= self._written(task, scene, found)
        caution = next((str(w.message) for w in caught if issubclass(w.category, UserWarning)), None)
        failed = values["tiles_failed"]
        if failed:
            why = next(iter(found.coverage.loc[found.coverage["state"] == "failed", "reason"]))
            return Outcome(INCOMPLETE, f"{failed} of {values['tiles']} tiles could not be read: {why}")
        return Outcome(DONE, caution and f"caution: {caution}")

    def _written(self, task: Task, scene: Scene, found: Found) -> dict[str, Any]:
        """Write the draft; gives the columns of the ledger that it fills."""
        drafts = Path(task.drafts)
        ring = footprint(scene)
        classes = {str(k): int(v) for k, v in found.features["class"].value_counts().sort_index().items()}
        item = stac_item(task.name, task.source, ring, found.provenance, classes)
        try:
            write_json(drafts / f"{Path(task.name).stem}.json", item)
        except OSError as error:
            raise OutputError(
                f"{task.name} cannot be written ({error.strerror}); check the disk's space"
            ) from error
        found.save(drafts / task.name, overwrite=True, crs=self.crs)
        tiles = found.provenance["tiles"]
        return {
            "tiles": sum(tiles.values()),
            "tiles_failed": tiles["failed"],
            "detections": len(found.features),
            "classes": json.dumps(classes),
            "acquired": found.provenance["scene"]["acquired"],
            "footprint": None if ring is None else json.dumps(ring),
        }


def shown(reason: str, task: Task) -> str:
    """A reason in one line that holds nothing secret."""
    from babelrs_geo.scenes.reader import gdal_path

    secrets = {}
    if task.path != task.source:
        secrets = {gdal_path(task.path): task.source, task.path: task.source}
    return " ".join(scrub(reason, secrets).split())


def fitting(batch: int, tiles: int) -> int:
    """The largest batch, at most `batch`, that pads the fewest images to compute `tiles`: a function of the grid alone.

    A scene of one tile is then computed alone, not with three images of zeros.
    """
    if tiles < 1 or batch < 1:
        raise ParameterError(f"batch is {batch} for {tiles} tiles, expected at least 1 of each")
    return min(range(min(batch, tiles), 0, -1), key=lambda b: -(-tiles // b) * b)


def fingerprint(path: Path, *, whole: bool = False) -> str:
    """What is the same for two files of the same content: size and a hash of the header and of blocks spread over the
    file, or of all of it.
    """
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        if whole:
            while piece := file.read(1 << 22):
                digest.update(piece)
        else:
            digest.update(file.read(_HEAD))
            for n in range(1, _BLOCKS + 1):
                file.seek(max(0, (size - _BLOCK) * n // _BLOCKS))
                digest.update(file.read(_BLOCK))
    kind = "f" if whole else "s"
    return f"{kind}{size:x}-{digest.hexdigest()}"


def weights_hash(name: str) -> str:
    """SHA-256 of the file that a name of weights means. Raises WeightsError."""
    from babelrs_geo.models import checkpoints, zoo

    return checkpoints.sha256(os.fspath(zoo.find(name)))
