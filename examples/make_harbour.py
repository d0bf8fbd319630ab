"""Make the example scene: a simulated SAR image of a harbour, and the ships that are in it.

    python examples/make_harbour.py            # writes beside this file
    python examples/make_harbour.py --folder /tmp

Nothing in it is a real acquisition, and the file's tags say so. Its place is real (the Gulf of Fos, UTM zone
31N) so that it lands somewhere on a map, but its coast is not the coast there. What is kept from real images:
fully developed speckle of a few looks, correlated by the impulse response; strong scatterers with the side
lobes of that response; a textured land side with streets and corner reflectors; a quay and breakwaters as
bright as ships; ships at anchor, under way with a wake, or moored at a quay; buoys, which are
not ships; and a slanted border without data.

Positions are continuous pixels (x right, y down, (0, 0) the outer corner of the first pixel), headings are
degrees clockwise from the top of the image, which is grid north.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyproj
import rasterio
from numpy.typing import NDArray
from rasterio import Affine

Array = NDArray[np.float64]

WIDTH, HEIGHT = 1200, 900
SPACING_M = 5.0
CRS = "EPSG:32631"
EAST, NORTH = 658_000.0, 4_806_000.0  # outer corner of the first pixel
SEED = 20_260_601
LOOKS = 4
ACQUIRED = "2026:06:01 05:52:14"

SEA, LAND, QUAY = 28.0, 75.0, 150.0  # mean amplitudes, digital numbers
HARBOUR_X, HARBOUR_Y, HARBOUR_TURN = 850.0, 700.0, 9.0  # origin and clockwise turn of the harbour's own axes


@dataclass(frozen=True)
class Ship:
    """One ship: where its middle is (pixels), its size (metres), where its bow points, and what it does."""

    x: float
    y: float
    length: float
    width: float
    heading: float
    state: str  # "anchored", "under way" or "moored"
    amplitude: float  # of its hull; the superstructure is several times that

    @property
    def outline(self) -> Array:
        """Corners (5, 2) in pixels: the rectangle with a pointed bow that the simulation fills."""
        half, beam = self.length / SPACING_M / 2, self.width / SPACING_M / 2
        along = np.array([-half, half - 1.2 * beam, half, half - 1.2 * beam, -half])
        across = np.array([-beam, -beam, 0.0, beam, beam])
        sin, cos = np.sin(np.radians(self.heading)), np.cos(np.radians(self.heading))
        return np.column_stack([self.x + along * sin + across * cos, self.y - along * cos + across * sin])

    def local(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Pixels to (along the hull toward the bow, across it to starboard), in pixels from its middle."""
        sin, cos = np.sin(np.radians(self.heading)), np.cos(np.radians(self.heading))
        dx, dy = x - self.x, y - self.y
        return dx * sin - dy * cos, dx * cos + dy * sin


def from_harbour(u: float, v: float) -> tuple[float, float]:
    """Harbour axes (u along the quay, v toward the land; pixels) to image pixels."""
    turn = np.radians(HARBOUR_TURN)
    return (
        float(HARBOUR_X + u * np.cos(turn) - v * np.sin(turn)),
        float(HARBOUR_Y + u * np.sin(turn) + v * np.cos(turn)),
    )


def to_harbour(x: Array, y: Array) -> tuple[Array, Array]:
    """Image pixels to harbour axes."""
    turn = np.radians(HARBOUR_TURN)
    dx, dy = x - HARBOUR_X, y - HARBOUR_Y
    return dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn)


def fleet() -> list[Ship]:
    """The ships, known to the pixel: anchored ones head into one wind, moored ones lie along the quay."""
    anchored = [
        (212, 118, 294, 32, 318, 320), (371, 262, 183, 27, 312, 260), (560, 96, 229, 32, 325, 340),
        (148, 372, 140, 22, 305, 240), (706, 214, 166, 26, 321, 280), (905, 118, 333, 46, 315, 330),
        (1042, 268, 190, 30, 328, 260), (474, 424, 110, 18, 310, 250), (300, 512, 200, 30, 322, 300),
        (1100, 92, 140, 22, 319, 240), (836, 352, 120, 20, 309, 230), (608, 330, 90, 15, 316, 300),
        (1108, 432, 105, 17, 313, 260),
    ]  # fmt: skip
    under_way = [
        (425, 160, 140, 22, 62, 300), (752, 455, 240, 32, 171, 310), (244, 236, 75, 14, 205, 330),
        (966, 380, 100, 17, 282, 280), (540, 232, 70, 13, 118, 340),
    ]  # fmt: skip
    moored = [  # (u, v) in harbour axes; the quays lie at v = 90 and at u = -25 and 5, the sides of the pier
        (-190, 85.5, 180, 28, 90, 310), (-120, 86.5, 115, 19, 270, 280), (60, 85, 229, 32, 90, 320),
        (140, 86.5, 130, 20, 90, 270), (-30, 30, 200, 30, 0, 310), (9.5, 42, 140, 22, 180, 290),
    ]  # fmt: skip
    ships = [Ship(x, y, le, wi, he, "anchored", am) for x, y, le, wi, he, am in anchored]
    ships += [Ship(x, y, le, wi, he, "under way", am) for x, y, le, wi, he, am in under_way]
    for u, v, length, width, heading, amplitude in moored:
        x, y = from_harbour(u, v)
        ships.append(Ship(x, y, length, width, (heading + HARBOUR_TURN) % 360, "moored", amplitude))
    return ships


BUOYS = ((655.0, 545.0), (850.0, 585.0), (690.0, 400.0), (60.0, 250.0))


def blur(image: Array, taps: Array) -> Array:
    """Convolve both axes with an odd kernel; the border is reflected."""
    reach = len(taps) // 2
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (reach, reach)
        wide = np.pad(image, pad, mode="reflect")
        size = image.shape[axis]
        image = sum(
            (tap * np.take(wide, range(k, k + size), axis=axis) for k, tap in enumerate(taps)),
            start=np.zeros_like(image),
        )
    return image


def smooth_field(rng: np.random.Generator, cell: float) -> Array:
    """A field (HEIGHT, WIDTH) of mean 0 and deviation 1 that varies over about `cell` pixels (B-spline)."""
    rows, columns = int(HEIGHT / cell) + 4, int(WIDTH / cell) + 4
    knots = rng.standard_normal((rows, columns))

    def along(values: Array, at: Array) -> Array:
        base = at.astype(int)
        t = (at - base)[:, None]
        a, b, c, d = (values[base + k] for k in range(4))
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        return (weights[0] * a + weights[1] * b + weights[2] * c + weights[3] * d) / 6

    field = along(along(knots, np.arange(HEIGHT) / cell).T, np.arange(WIDTH) / cell).T
    return (field - field.mean()) / field.std()


def ground(rng: np.random.Generator) -> tuple[Array, NDArray[np.bool_]]:
    """Mean amplitude (HEIGHT, WIDTH) of sea, land and harbour without ships, and where it is land."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    u, v = to_harbour(x, y)
    swell = 0.05 * np.sin(2 * np.pi * (x * 0.8 + y * 0.6) / 23 + 0.8 * smooth_field(rng, 60))
    amplitude = SEA * (1 + 0.10 * smooth_field(rng, 140) + 0.04 * smooth_field(rng, 30) + swell)

    coast = 655 + 26 * smooth_field(rng, 110) + 6 * smooth_field(rng, 18)
    basin = (np.abs(u) < 235) & (v < 90) & (v > -160)
    pier = (u > -25) & (u < 5) & (v > -12)
    quay_apron = (np.abs(u) < 260) & (v > -20) & (v < 130)
    land = ((y > coast) | quay_apron) & (~basin | pier)

    town = np.clip(0.5 + 0.6 * smooth_field(rng, 170), 0, 1)
    bend_x, bend_y = x + 16 * smooth_field(rng, 120), y + 16 * smooth_field(rng, 120)
    streets = (np.mod(0.9 * bend_x + 0.43 * bend_y, 19) < 2.4) | (
        np.mod(-0.43 * bend_x + 0.9 * bend_y, 37) < 2.4
    )
    blocks = (
        rng.gamma(0.9, 1 / 0.9, (HEIGHT // 4 + 1, WIDTH // 4 + 1)).repeat(4, 0).repeat(4, 1)[:HEIGHT, :WIDTH]
    )
    built = np.where(streets, 0.45, 0.55 + 0.9 * blocks)
    fields = 0.75 + 0.12 * smooth_field(rng, 25) + 0.18 * smooth_field(rng, 70)
    amplitude[land] = (LAND * (town * built * 1.5 + (1 - town) * fields))[land]

    apron = land & quay_apron
    amplitude[apron] = 0.5 * QUAY
    stacks = (
        apron & (np.mod(u, 21) < 13) & (np.mod(v, 9) < 5) & (v > 98)
    )  # rows of containers behind the quay
    amplitude[stacks] = 1.6 * QUAY
    corners = land & (rng.random((HEIGHT, WIDTH)) < 0.0045 * (0.2 + town))
    amplitude[corners] += 250 * rng.gamma(1.2, 1.0, int(corners.sum()))

    arm = (np.abs(np.abs(u) - 248) < 2.5) & (v > -150) & (v < -18)
    mole = (np.abs(v + 150) < 2.5) & (np.abs(u) < 250) & (np.abs(u + 20) > 55)  # the gap is the entrance
    amplitude[arm | mole] = 1.5 * QUAY * rng.gamma(3, 1 / 3, int((arm | mole).sum()))
    return np.maximum(amplitude, 4.0), land | arm | mole


def add_ship(amplitude: Array, ship: Ship, rng: np.random.Generator) -> None:
    """Put a ship (hull, bright side, bridge, strong scatterers, wake) into the mean amplitude, in place."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    along, across = ship.local(x, y)
    half, beam = ship.length / SPACING_M / 2, ship.width / SPACING_M / 2
    if (
        ship.state == "under way"
    ):  # the turbulent wake is smoother than the sea, the arms of the bow wave rougher
        astern = -half - along
        fade = np.exp(-np.maximum(astern, 0) / 70) * (astern > 0)
        amplitude *= 1 - 0.5 * fade * (np.abs(across) < beam + 0.5)
        amplitude *= 1 + 0.35 * fade * (np.abs(np.abs(across) - beam - 0.12 * astern) < 1.2)
    bow = np.clip((half - along) / (1.2 * beam), 0, 1)
    hull = (np.abs(along) <= half) & (np.abs(across) <= np.maximum(beam * bow, 0.4))
    amplitude[hull] = ship.amplitude * rng.gamma(4, 1 / 4, int(hull.sum()))
    amplitude[hull & (across < -0.4 * beam)] *= (
        1.5  # the side that faces the radar, which looks from the left
    )
    bridge = hull & (np.abs(along + 0.72 * half) < max(0.09 * half, 0.8))
    amplitude[bridge] += 2.0 * ship.amplitude
    for place in rng.uniform(-0.8, 0.8, max(2, int(ship.length / 45))):
        px, py = np.hypot(along - place * half, across) < 0.8, hull
        amplitude[px & py] += ship.amplitude * rng.uniform(1.0, 4.0)


def valid_area() -> NDArray[np.bool_]:
    """Where the sensor looked: a strip that lies slightly askew in the raster, as strips do."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    return (
        (x - 0.045 * y > 8) & (x - 0.045 * y < WIDTH - 14) & (y + 0.02 * x > 36) & (y + 0.02 * x < HEIGHT - 4)
    )


def speckle(amplitude: Array, rng: np.random.Generator) -> Array:
    """Multi-look amplitude of a scene with the given mean amplitude.

    Each look is circular complex Gaussian (fully developed speckle) filtered by a weighted-sinc impulse
    response, which correlates neighbours and gives strong scatterers side lobes; the intensities of LOOKS
    such looks are averaged.
    """
    reach = np.arange(-6, 7)
    taps = np.sinc(reach / 1.35) * (0.70 + 0.30 * np.cos(np.pi * reach / 7))
    taps /= np.sqrt((taps**2).sum())
    intensity = np.zeros_like(amplitude)
    for _ in range(LOOKS):
        for _ in range(2):  # in phase and in quadrature
            intensity += blur(amplitude * rng.standard_normal(amplitude.shape), taps) ** 2
    return np.sqrt(intensity / (2 * LOOKS))


def simulate() -> tuple[NDArray[np.uint16], list[Ship]]:
    """The image (HEIGHT, WIDTH), uint16 amplitude with 0 as nodata, and the ships in it."""
    rng = np.random.default_rng(SEED)
    amplitude, _ = ground(rng)
    ships = fleet()
    for ship in ships:
        add_ship(amplitude, ship, rng)
    for x, y in BUOYS:
        amplitude[int(y), int(x)] += 300
    image = np.clip(np.rint(speckle(amplitude, rng)), 1, 4095).astype(np.uint16)
    image[~valid_area()] = 0
    return image, ships


def write_scene(path: Path, image: NDArray[np.uint16]) -> None:
    """Write the image as a Cloud Optimized GeoTIFF whose tags say what it is."""
    profile = {
        "driver": "COG", "width": WIDTH, "height": HEIGHT, "count": 1, "dtype": "uint16", "nodata": 0,
        "crs": CRS, "transform": Affine(SPACING_M, 0, EAST, 0, -SPACING_M, NORTH),
        "compress": "deflate", "level": 9, "blocksize": 256, "overviews": "none",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(image, 1)
        target.set_band_description(1, "VV amplitude")
        target.update_tags(
            SENSOR="SAR",
            POLARISATION="VV",
            UNITS="amplitude",
            SIMULATED="yes",
            TIFFTAG_DATETIME=ACQUIRED,
            TIFFTAG_IMAGEDESCRIPTION="Simulated SAR harbour, not a real acquisition (make_harbour.py)",
        )


def write_truth(path: Path, ships: list[Ship]) -> None:
    """Write the ships as GeoJSON polygons in longitude and latitude (RFC 7946), one feature a line."""
    to_lonlat = pyproj.Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
    features = []
    for number, ship in enumerate(ships, start=1):
        outline = ship.outline
        lon, lat = to_lonlat.transform(EAST + outline[:, 0] * SPACING_M, NORTH - outline[:, 1] * SPACING_M)
        ring = [[round(float(a), 7), round(float(b), 7)] for a, b in zip(lon, lat, strict=True)]
        x0, y0 = outline.min(axis=0)
        x1, y1 = outline.max(axis=0)
        properties = {
            "id": number, "class": "ship", "state": ship.state,
            "length_m": ship.length, "width_m": ship.width,
            "grid_heading_deg": round(ship.heading, 2), "px_x": round(ship.x, 2), "px_y": round(ship.y, 2),
            "px_bounds": [round(float(value), 2) for value in (x0, y0, x1, y1)],
        }  # fmt: skip
        geometry = {"type": "Polygon", "coordinates": [[*ring[::-1], ring[-1]]]}
        features.append({"type": "Feature", "properties": properties, "geometry": geometry})
    lines = ",\n".join(json.dumps(feature) for feature in features)
    path.write_text(f'{{"type": "FeatureCollection", "features": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write the scene and its truth into a folder."""
    parser = argparse.ArgumentParser(
        description="Make the simulated SAR harbour and the places of its ships."
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args(arguments).folder
    image, ships = simulate()
    write_scene(folder / "harbour_sar.tif", image)
    write_truth(folder / "harbour_ships.geojson", ships)


if __name__ == "__main__":
    main()
