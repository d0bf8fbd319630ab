"""The whole sentence: a scene and weights to features on the map, the ground looked at, and how it came
about.

Imported with the package itself, so nothing heavy is imported here until a function is called.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babelrs_geo.detect.area import MapArea, area_of
from babelrs_geo.detect.crew import (
    BATCH,
    Running,
    Where,
    crew_of,
    devices,
    fitting_batch,
    load_weights,
    torch_threads,
)
from babelrs_geo.detect.plan import NATIVE, Plan, plan_for
from babelrs_geo.errors import (
    BatchError,
    GeorefError,
    ParameterError,
    SceneError,
)
from babelrs_geo.tiling import Grid

if TYPE_CHECKING:
    import geopandas as gpd

    from babelrs_geo.detections import Detections
    from babelrs_geo.inference import Crew, Look
    from babelrs_geo.inference.spool import Spool
    from babelrs_geo.models.zoo import Weights
    from babelrs_geo.scenes import Scene

__all__ = [
    "DetectOptions",
    "Found",
    "Outlook",
    "Plan",
    "Running",
    "check_crs",
    "contribute",
    "detect",
    "devices",
    "outlook",
    "plan_for",
]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """What to look for, where, and how.

    Raises `ParameterError` where a value is out of range or contradicts another.
    """

    tile: int | None = None
    """Side of a tile, in pixels as the model sees them (after resampling); None for the weights' own."""
    overlap: int = 128
    """Pixels shared by neighbouring tiles: objects up to this size are seen whole by some tile."""
    score: float | None = None
    """One threshold in [0, 1] for all classes, in place of the weights' own by class."""
    classes: tuple[str, ...] | None = None
    """Classes to report; None for all that the weights know for the sensor."""
    gsd: float | str | None = None
    """Metres per pixel to read the scene at; "native" for its own pixels; None to stay in the weights' range.
    """
    aoi: str | os.PathLike[str] | None = None
    """A vector file; what is centred outside its polygons is not reported."""
    scales: tuple[float, ...] = (1.0,)
    """1, and shares of it at which the scene is read once more for objects larger than a tile, such as (1, 0.25)."""
    batch: int | str = BATCH
    """Tiles computed at once; "auto" for as many as a GPU's memory holds, and fewer where memory does not suffice."""
    device: str = "auto"
    """auto, cpu, cuda, or several such as cuda:0,cuda:1, which compute batches in turn."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's own choice."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is opened."""
        tile = max(1, self.overlap + 1) if self.tile is None else self.tile
        Grid(1, 1, tile, self.overlap)  # refuses what no grid can have
        if self.score is not None and not 0 <= self.score <= 1:
            raise ParameterError(f"score is {self.score:g}, expected a number from 0 to 1")
        if isinstance(self.classes, str):
            raise ParameterError(
                f'classes is the text "{self.classes}", expected names such as ("ship", "car")'
            )
        if self.classes is not None and not self.classes:
            raise ParameterError("classes is empty: name at least one class, or leave it out for all")
        if isinstance(self.gsd, str) and self.gsd != NATIVE:
            raise ParameterError(f'gsd is "{self.gsd}", expected metres per pixel or "{NATIVE}"')
        if isinstance(self.gsd, int | float) and not 0 < self.gsd < float("inf"):
            raise ParameterError(f'gsd is {self.gsd}, expected metres per pixel above 0, or "{NATIVE}"')
        object.__setattr__(self, "scales", tuple(sorted(map(float, self.scales), reverse=True)))
        if self.scales[:1] != (1.0,) or len(set(self.scales)) < len(self.scales) or not self.scales[-1] > 0:
            raise ParameterError(
                f"scales is {', '.join(f'{scale:g}' for scale in self.scales) or 'empty'}; expected 1 and numbers "
                "between 0 and 1, each once, such as 1,0.25; to read all coarser or finer, pass --gsd"
            )
        if self.batch != AUTO and not (isinstance(self.batch, int) and self.batch >= 1):
            raise ParameterError(f'batch is {self.batch}, expected a whole number of at least 1, or "{AUTO}"')
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads >= 1):
            raise ParameterError(f"threads is {self.threads}, expected a whole number of at least 1")


@dataclass(frozen=True)
class Outlook:
    """What a run would cost on this machine."""

    tiles: int
    """Tiles of all passes, in the area of interest, that are expected to hold valid pixels."""
    seconds_per_tile: float
    """Measured on one batch in the middle of the scene."""

    @property
    def seconds(self) -> float:
        """The whole scene, without the merge and the writing."""
        return self.tiles * self.seconds_per_tile


@dataclass(frozen=True)
class Found:
    """What was found in a scene."""

    features: gpd.GeoDataFrame
    """One row an object, in the scene's CRS (EPSG:4326 for GCP and RPC scenes, none and pixels without
    georeference).
    """
    coverage: gpd.GeoDataFrame
    """The ground looked at: tiles dissolved by how they ended."""
    provenance: dict[str, Any]
    """Software, weights, parameters, radiometry, tiles and times: JSON values, and nothing about the host."""
    detections: Detections
    """The same objects in scene pixels, row for row."""

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False, crs: str | None = None) -> Path:
        """Write .gpkg, .parquet or .geojson (by the suffix), in `crs` where given, and return its path.

        Raises `OutputError` where the file exists and `overwrite` is False or where it cannot be written,
        `ParameterError` for an unknown suffix or CRS, `GeorefError` where there is no georeference to
        transform from, or none that leads to `crs`.
        """
        from babelrs_geo import vectors

        features, coverage = self.features, self.coverage
        if crs is not None:
            target = check_crs(crs, georeferenced=features.crs is not None)
            features, coverage = _to_crs(features, target), _to_crs(coverage, target)
        provenance = self.provenance | {"crs": None if features.crs is None else features.crs.to_string()}
        return vectors.write(Path(path), features, coverage, provenance, overwrite=overwrite)


def detect(
    scene: Scene,
    weights: str | os.PathLike[str] | Weights = "compact",
    options: DetectOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    running: Running | None = None,
) -> Found:
    """Find objects in a scene.

    `weights` is the name of bundled weights, a file, or weights already loaded (which then stay on their
    device, and in this process). `progress` is called with (tiles done, tiles in all). `running` says who computes
    and where to keep what is done.

    A scene outside the weights' range of ground sampling is read resampled into it, and a `UserWarning` says
    so where that is more than fourfold; boxes come back in scene pixels.

    Raises `SceneError` where nothing could be read or no pixel is valid, `WeightsError` where the weights
    cannot be used or lack the sensor, `ParameterError` for an unknown class or device, its `BatchError` where the
    memory does not suffice, `LabelError` where the area of interest misses the scene, `GeorefError` where one is
    asked of a scene without georeference, `OutputError` where `running.spool` cannot be written or is another run's.
    """
    from babelrs_geo import inference, vectors

    options, running = options or DetectOptions(), running or Running()
    started = vectors.clock()
    begun = _begin(scene, weights, options, running)
    if begun.caution:
        warnings.warn(begun.caution, UserWarning, stacklevel=2)
    while True:
        try:
            with begun.crew() as crew:
                found, coverage = inference.gather(begun.look, crew, begun.area, progress, begun.keep)
            break
        except BatchError:
            if options.batch != AUTO or begun.look.options.batch == 1:
                raise
        # All anew: batches of another size have other last digits, and a result is of one size.
        if begun.keep is not None:
            begun.keep.remove()
        batch = begun.look.options.batch // 2
        begun = begun.again(batch)
        told = f"memory did not suffice for batches of {2 * batch} tiles: begun again with {batch}"
        warnings.warn(told, UserWarning, stacklevel=2)
    area, about = begun.area, begun.about
    if coverage.looked_at == 0:
        where = "it" if area is None else "the area of interest"
        raise SceneError(
            f"{scene.name}: no pixel in {where} is valid (nodata {scene.nodata}), so nothing to look at: "
            "check the nodata value and the mask, or switch off the search for a black collar"
        )
    origin = vectors.Origin(scene.name, str(scene.sensor), scene.acquired)
    ground = vectors.coverage(coverage.inners, coverage.states, coverage.reasons, scene.georef)
    if area is not None:
        ground = vectors.cut(ground, area.geometry)
    return Found(
        vectors.features(found, scene.georef, origin),
        ground,
        about | {"tiles": coverage.counts(), "started": started, "finished": vectors.clock()},
        found,
    )


def contribute(
    scene: Scene,
    weights: str | os.PathLike[str] | Weights,
    options: DetectOptions,
    running: Running,
    numbers: Collection[int] = (),
) -> int:
    """Do some groups of a detection's tiles, which others may do the rest of, into `running.spool`; a `detect` that
    resumes from there finds them. Gives how many groups there are. Raises as `detect` does.
    """
    from babelrs_geo.inference import groups_of

    begun = _begin(scene, weights, options, running)
    groups = groups_of(begun.look, begun.area)
    if numbers and begun.keep is not None:
        there = begun.keep.parts()
        mine = [group for group in groups if group.number in numbers and group.number not in there]
        with begun.crew() as crew:
            for group, part in crew(mine, lambda _: None) if mine else ():
                begun.keep.put(group.number, part)
    return len(groups)


@dataclass(frozen=True)
class _Begun:
    """A detection before the first tile."""

    look: Look
    area: MapArea | None
    about: dict[str, Any]
    """Its provenance, but for what came of it."""
    caution: str
    keep: Spool | None
    crew: Callable[[], AbstractContextManager[Crew]]
    again: Callable[[int], _Begun]
    """The same with batches of another size."""


def _begin(
    scene: Scene, weights: str | os.PathLike[str] | Weights, options: DetectOptions, running: Running
) -> _Begun:
    area = None if options.aoi is None else area_of(scene, options.aoi)
    loaded, device = load_weights(weights, options.device)
    plan = plan_for(scene, loaded[0].header, options)
    named = os.fspath(weights) if isinstance(weights, str | os.PathLike) else None
    on = Where(named, options.device, options.threads)

    def sized(batch: int) -> _Begun:
        look = _look(scene, plan, batch)
        about = _provenance(look, loaded[0], plan, replace(options, batch=batch), device)
        keep = _spool(running, about | scene.identity | {"area": area and area.geometry.wkt})
        crew = partial(crew_of, running, look, loaded, options.score, plan.classes, on)
        return _Begun(look, area, about, plan.caution, keep, crew, sized)

    return sized(_first_batch(scene, loaded, plan, options, running))


def _look(scene: Scene, plan: Plan, batch: int) -> Look:
    """The plan as `inference` takes it."""
    from babelrs_geo.inference import InferenceOptions, Look

    return Look(scene, plan.grid, plan.scale, InferenceOptions(batch=batch), plan.coarser, plan.large)


def _first_batch(
    scene: Scene, loaded: list[Weights], plan: Plan, options: DetectOptions, running: Running | None = None
) -> int:
    """The batch as asked; for auto that of the run to go on with, or what fits."""
    if isinstance(options.batch, int):
        return options.batch
    if running is not None and running.spool is not None and running.resume:
        from babelrs_geo.inference.spool import noted

        if (about := noted(Path(running.spool))) is not None:
            return int(about["parameters"]["batch"])
    detectors = [each.detector(scene.sensor, options.score, plan.classes) for each in loaded]
    size = min(plan.grid.tile, plan.grid.height), min(plan.grid.tile, plan.grid.width)
    return fitting_batch([each.device for each in loaded], detectors, size)


def _spool(running: Running, about: dict[str, Any]) -> Spool | None:
    """Where parts are kept, if anywhere. Raises OutputError."""
    if running.spool is None:
        return None
    from babelrs_geo.inference.spool import Spool

    return Spool(Path(running.spool), about, resume=running.resume)


def outlook(
    scene: Scene, weights: str | os.PathLike[str] | Weights, options: DetectOptions
) -> tuple[Plan, Outlook]:
    """The plan for a scene and what it would cost here, measured on one batch. Raises as `detect` does."""
    from babelrs_geo.inference import groups_of

    area = None if options.aoi is None else area_of(scene, options.aoi)
    loaded, _ = load_weights(weights, options.device)
    plan = plan_for(scene, loaded[0].header, options)
    detector = loaded[0].detector(scene.sensor, options.score, plan.classes)
    look = _look(scene, plan, _first_batch(scene, loaded, plan, options))
    with torch_threads(options.threads):
        seconds = look.seconds_per_tile(detector)
    asked = sum(len(group.tiles) for group in groups_of(look, area))
    return plan, Outlook(max(1, round(asked * scene.valid_share)), seconds / len(loaded))


def check_crs(crs: str, *, georeferenced: bool) -> Any:
    """The `pyproj.CRS` that `crs` names. Raises `ParameterError` where it names none, `GeorefError` where the
    scene has no georeference to transform from.
    """
    import pyproj

    try:
        target = pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError:
        raise ParameterError(
            f'"{crs}" is not a coordinate reference system: pass one such as EPSG:4326 or a WKT string'
        ) from None
    if not georeferenced:
        raise GeorefError(
            f"the scene has no place on Earth, so its features cannot be written in {crs}: leave the CRS out "
            "(they are then in pixels, or in the scene's own axes), or give the scene a georeference"
        )
    return target


def _to_crs(frame: gpd.GeoDataFrame, crs: Any) -> gpd.GeoDataFrame:
    import numpy as np

    from babelrs_geo import vectors

    moved = frame.set_geometry(vectors.to_crs(frame.geometry, crs))
    if len(moved) and not np.isfinite(moved.total_bounds).all():
        raise GeorefError(
            f"the scene lies outside the ground that {crs.to_string()} can show: pass another CRS"
        )
    return moved


def _name(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else Path(path).name


def _provenance(
    look: Look, weights: Weights, plan: Plan, options: DetectOptions, device: str
) -> dict[str, Any]:
    """All that made the result what it is: names, never paths, so that two hosts tell the same."""
    from babelrs_geo import __version__

    scene = look.scene
    sensor = str(scene.sensor)
    thresholds = weights.header.thresholds[sensor]
    asked = asdict(
        replace(options, tile=plan.grid.tile, aoi=_name(options.aoi), device=device, scales=plan.scales)
    )
    return {
        "software": f"babelrs-geo {__version__}",
        "weights": {"name": weights.name, "sha256": weights.sha256},
        "scene": {
            "name": scene.name,
            "width": scene.width,
            "height": scene.height,
            "gsd_m": scene.gsd,
            "sensor": sensor,
            "acquired": None if scene.acquired is None else scene.acquired.isoformat(),
            "options": asdict(replace(scene.options, dem=_name(scene.options.dem))),
        },
        "radiometry": json.loads(scene.radiometry.to_json()),
        "parameters": asked
        | {
            "classes": list(plan.classes),
            "thresholds": {
                name: thresholds[name] if options.score is None else options.score for name in plan.classes
            },
            "scale": plan.scale,
            "model_gsd_m": plan.gsd,
            "merging": asdict(look.options.merging),
        },
    }
