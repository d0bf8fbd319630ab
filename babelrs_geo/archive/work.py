"""What is done with one scene of an archive: open, look whether it is a duplicate, detect, write a draft."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from babelrs_geo.archive.addresses import scrub
from babelrs_geo.archive.ledger import DONE, DUPLICATE, FAILED, INCOMPLETE
from babelrs_geo.archive.outputs import footprint, stac_item, write_json
from babelrs_geo.archive.practice import practise
from babelrs_geo.archive.remote import state_of, web_address
from babelrs_geo.archive.safe import is_product, is_safe, opened
from babelrs_geo.errors import BabelError, OutputError, SceneError

if TYPE_CHECKING:
    from babelrs_geo.archive.cell import Turn
    from babelrs_geo.detect import DetectOptions, Found, Running
    from babelrs_geo.models.zoo import Weights
    from babelrs_geo.scenes import Scene

_HEAD, _BLOCK, _BLOCKS = 1 << 16, 1 << 14, 8
"""Bytes of a file that its fingerprint looks at: the first 64 KiB, then 8 blocks of 16 KiB, the last at the end."""

SHARED = "shared"
"""How a task ends that is not a whole scene: with how many groups of tiles there are, or with some of them done."""
SHARED_FROM = 4
"""Groups of tiles from which on a scene is given to several workers."""


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
    unknown: bool = False
    """Whether size or stamp are not known: a server is then asked."""
    parts: str = ""
    """A folder where a scene of many tiles is done in parts by several workers; empty where one does all of it."""
    groups: tuple[int, ...] | None = None
    """Of such a scene: the groups of tiles that are this task; None for what is done once."""
    gather: bool = False
    """Whether all its parts are there, and the result is to be made."""


@dataclass(frozen=True)
class Outcome:
    """How a scene ended."""

    state: str
    reason: str | None = None
    again: bool = False
    """Whether another attempt may end otherwise."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the ledger."""


class _InTurn:
    """Weights whose detectors compute in their turn."""

    def __init__(self, weights: Any, turn: Turn) -> None:
        self._weights, self._turn = weights, turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def detector(self, *given: Any) -> Callable[[Any], Any]:
        """As of the weights themselves."""
        return _Waits(self._weights.detector(*given), self._turn)


@dataclass(frozen=True)
class _Waits:
    """A detector that waits for its turn."""

    compute: Callable[[Any], Any]
    turn: Turn

    @property
    def takes_bytes(self) -> bool:
        return getattr(self.compute, "takes_bytes", False)

    def __call__(self, images: Any) -> Any:
        with self.turn:
            return self.compute(images)


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

    def start(self, turn: Turn) -> Callable[[Task], Outcome]:
        """Load, and give what takes one scene."""
        if self.options.threads is not None:
            import torch

            torch.set_num_threads(self.options.threads)
        loaded = self.load()
        practise(loaded, self.options)
        loaded = cast("Weights", _InTurn(loaded, turn))
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
        from babelrs_geo.detect import Running, check_crs, detect, plan_for
        from babelrs_geo.detect.crew import BATCH
        from babelrs_geo.inference.look import GROUP
        from babelrs_geo.scenes import SceneOptions, open_scene

        if task.groups is None:
            values |= self._looked_up(task)
            if values.get("fingerprint") in task.twins:
                return Outcome(DUPLICATE)
        reading: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in {**self.reading, **task.options}.items()
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with ExitStack() as stack:
                path, sensor = task.path, task.sensor or self.sensor
                if is_product(path):
                    path, sensor = stack.enter_context(opened(path)), "sar"
                scene = stack.enter_context(open_scene(path, sensor, SceneOptions(**reading)))
                values["sensor"] = str(scene.sensor)
                if self.crs is not None:
                    check_crs(self.crs, georeferenced=scene.georef.on_earth)
                plan = plan_for(scene, weights.header, self.options)
                options, running = self.options, Running()
                size = options.batch if isinstance(options.batch, int) else BATCH
                if task.parts and len(plan.grid) >= SHARED_FROM * GROUP * size:
                    options = replace(options, batch=size)  # the same for all that share
                    running = Running(spool=task.parts, resume=True)
                    if not task.gather:
                        return self._shared(task, scene, weights, options, running)
                found = detect(scene, weights, options, running=running)
                values |= self._written(task, scene, found)
        caution = next((str(w.message) for w in caught if issubclass(w.category, UserWarning)), None)
        failed = values["tiles_failed"]
        if failed:
            why = next(iter(found.coverage.loc[found.coverage["state"] == "failed", "reason"]))
            return Outcome(INCOMPLETE, f"{failed} of {values['tiles']} tiles could not be read: {why}")
        return Outcome(DONE, caution and f"caution: {caution}")

    def _looked_up(self, task: Task) -> dict[str, Any]:
        """What tells whether a scene is another, or has changed: columns of the ledger."""
        path = Path(task.path)
        # A product's manifest holds the checksums of all its files.
        content = path / "manifest.safe" if is_safe(path) else path
        if content.is_file():
            return {"fingerprint": fingerprint(content, whole=self.full_hash)}
        address = web_address(task.path)
        return state_of(address) if address is not None and task.unknown else {}

    def _shared(
        self, task: Task, scene: Scene, weights: Weights, options: DetectOptions, running: Running
    ) -> Outcome:
        """Tell how many groups there are, or do some of them."""
        from babelrs_geo.detect import contribute

        try:
            groups = contribute(scene, weights, options, running, task.groups or ())
        except OutputError:  # parts of the scene as it was before it changed, or of another release
            if task.groups is not None:
                raise
            shutil.rmtree(task.parts, ignore_errors=True)
            groups = contribute(scene, weights, options, running)
        return Outcome(SHARED, values={"groups": groups})

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
    from babelrs_geo.scenes.facts import gdal_path

    secrets = {}
    if task.path != task.source:
        secrets = {gdal_path(task.path): task.source, task.path: task.source}
    return " ".join(scrub(reason, secrets).split())


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
