"""How a scene will be read for given weights: its tiles, at which scale, and what is looked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from babelrs_geo import concepts
from babelrs_geo.errors import ParameterError, SceneError
from babelrs_geo.tiling import Grid

if TYPE_CHECKING:
    from babelrs_geo.detect import DetectOptions
    from babelrs_geo.models.checkpoints import Header
    from babelrs_geo.scenes import Scene

NATIVE = "native"

# A scene this little outside the weights' range of ground sampling is read at its own pixels: resampling
# blurs more than 2 % of size tells the detector.
GSD_TOLERANCE = 1.02

# An object that is shorter than this, in pixels of the scene, cannot be told from a bright spot.
PIXELS_TO_SEE = 3.0

# Beyond this factor, in resampling or in distance from the weights' range, what is found is no longer to be
# relied on.
GSD_WARNING = 4.0

# Objects that are stretched by more than this look like others.
STRETCH_WARNING = 1.5


@dataclass(frozen=True)
class Plan:
    """How a scene will be read for given weights."""

    grid: Grid
    """The tiles, in model pixels."""
    scale: float
    """Model pixels per scene pixel."""
    gsd: float | None
    """Metres per model pixel; None for a scene without a place on Earth."""
    classes: tuple[str, ...]
    """The classes that will be reported."""
    caution: str = ""
    """Why the result is to be taken with care, in one line; empty where there is no reason."""
    coarser: tuple[tuple[Grid, float], ...] = ()
    """Further passes for what is larger than a tile: grids, and model pixels per scene pixel."""

    large: tuple[str, ...] = ()
    """The classes that further passes look for: those of which there are objects longer than the overlap."""
    scales: tuple[float, ...] = (1.0,)
    """Those of `DetectOptions.scales` that are read: a scene that fits a tile is seen whole, and not read coarser."""

    @property
    def tiles(self) -> int:
        """Tiles of all passes."""
        return len(self.grid) + sum(len(grid) for grid, _ in self.coarser)


def plan_for(scene: Scene, header: Header, options: DetectOptions) -> Plan:
    """How `scene` will be read for weights with this header.

    Classes of which the longest there is would be shorter than three of the scene's pixels are not looked for, unless
    a ground sampling is asked for.

    Raises `WeightsError` where they lack the scene's sensor, `SceneError` where no class can be seen in the scene,
    `ParameterError` for a class they do not know or a ground sampling asked of a scene without georeference.
    """
    sensor = str(scene.sensor)
    classes = header.chosen(sensor, options.classes)
    unseen = () if options.gsd is not None else _unseen(scene, classes)
    classes = tuple(name for name in classes if name not in unseen)
    low, high = header.gsd[sensor]
    scale, gsd, caution = _scale(scene.gsd, (low, high), options.gsd)
    cautions = [caution, _stretched(scene)]
    if unseen:
        what = concepts.listed(list(unseen))
        cautions.append(f"{what} cannot be seen in pixels of {scene.gsd:.3g} m and is not looked for")
    passes: list[tuple[Grid, float]] = []
    longest = {name: concepts.longest(name) for name in classes}
    large = tuple(n for n, m in longest.items() if gsd is None or m is None or m > options.overlap * gsd)
    for share in options.scales:
        if passes and (len(passes[-1][0]) == 1 or not large):
            break
        height, width = scene.shape_at(scale * share)
        grid = Grid(width=width, height=height, tile=options.tile or header.tile, overlap=options.overlap)
        passes.append((grid, scale * share))
    told, scales = "; ".join(filter(None, cautions)), options.scales[: len(passes)]
    return Plan(passes[0][0], scale, gsd, classes, told, tuple(passes[1:]), large, scales)


def _stretched(scene: Scene) -> str:
    """Why a scene whose pixels are no squares on the ground, as degrees are in the north, is to be taken with care."""
    sides = scene.georef.pixel_sides(scene.width / 2, scene.height / 2)
    if sides is None or max(sides) <= STRETCH_WARNING * min(sides):
        return ""
    return (
        f"pixels are {sides[0]:.3g} by {sides[1]:.3g} m on the ground: objects look stretched and may be missed; "
        "warp the scene to its UTM zone first (gdalwarp -t_srs)"
    )


def _scale(
    native: float | None, known: tuple[float, float], asked: float | str | None
) -> tuple[float, float | None, str]:
    """(model pixels per scene pixel, metres per model pixel or None, caution) for a scene of `native` metres
    per pixel.
    """
    low, high = known
    if native is None:
        if isinstance(asked, int | float):
            raise ParameterError(
                f"the scene has no georeference on Earth, so its pixels have no size in metres and it cannot be "
                f"read at {asked:g} m: pass --gsd {NATIVE} or leave it out"
            )
        return 1.0, None, ""
    target = native
    if asked is None:
        target = (
            native if low / GSD_TOLERANCE <= native <= high * GSD_TOLERANCE else min(max(native, low), high)
        )
    elif not isinstance(asked, str):
        target = float(asked)
    scale = native / target
    off = max(low / target, target / high, 1.0)
    if max(scale, 1 / scale) > GSD_WARNING:
        return (
            scale,
            target,
            (
                f"the scene's pixels of {native:.3g} m are read resampled {_times(scale)} to {target:.3g} m "
                f"(the weights know {low:g} to {high:g} m): small objects may be missing or invented"
            ),
        )
    if off > GSD_WARNING:
        return (
            scale,
            target,
            (
                f"the scene is read at {target:.3g} m a pixel, {off:.1f}x outside what the weights know "
                f"({low:g} to {high:g} m): expect missed and false objects"
            ),
        )
    return scale, target, ""


def _unseen(scene: Scene, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes whose longest objects are shorter than `PIXELS_TO_SEE` of the scene's pixels; SceneError where all
    are.
    """
    if scene.gsd is None:
        return ()
    most = {name: metres for name in classes if (metres := concepts.longest(name)) is not None}
    unseen = tuple(name for name, metres in most.items() if metres < PIXELS_TO_SEE * scene.gsd)
    if len(unseen) < len(classes):
        return unseen
    pixels = max(most.values()) / scene.gsd
    raise SceneError(
        f"{scene.name}: its pixels of {scene.gsd:.3g} m cannot show {concepts.listed(list(unseen), 'or')}: the longest "
        f"there is has {pixels:.1f} of them, and {PIXELS_TO_SEE:g} are needed; take a finer scene, or pass --gsd to "
        "look all the same"
    )


def _times(scale: float) -> str:
    return f"{scale:.1f}x finer" if scale > 1 else f"{1 / scale:.1f}x coarser"
