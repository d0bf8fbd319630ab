"""`Sensor` (SAR, IR, RGB) and its radiometry: which bands are read and how their numbers become model input
in [0, 1].

The weights were trained on 8-bit frames as `x / 255`, grey copied to three channels. So

* **8-bit data of any sensor** is `x / 255`, exactly, with nothing estimated;
* everything else is brought to look like those frames, by one linear range per band that is *fixed or
  estimated once per scene* (`estimate`, from an overview or spread samples) and never per tile: an object
  looks the same in every tile.

| sensor | kind | in the file | model input |
|---|---|---|---|
| SAR | `amplitude` | digital numbers, sigma-nought amplitude, magnitude of complex data | `a / high` |
| SAR | `intensity` | power, linear (`sigma0`, `gamma0`) | amplitude `sqrt(p)`, then as above |
| SAR | `db` | decibels, `20 log10(amplitude)` = `10 log10(power)` | amplitude `10**(x / 20)`, then as above |
| IR | `kelvin`, `centikelvin`, `celsius` | temperatures | `(x - low) / (high - low)` |
| IR | `counts` | raw 16-bit counts of the camera | the same |
| RGB | `reflectance` | 16-bit or float optical data | the same, a band at a time |

**SAR range.** Low is amplitude 0; high is twelve times the 25th percentile of the amplitude, or its 95th
percentile if that is larger. In the SSDD training frames (8-bit amplitude) the sea's median is 24 of 255 and
ships saturate: with the dark quarter of the scene at a twelfth of the range, open sea lands there whether the
scene is half land or all water, which no single high percentile achieves (over water alone the 99.5th is
still speckle and would make the sea grey). The second term keeps at most 5 % of a bright, urban scene
saturated.

**Infrared range.** Linear, so the unit does not matter. The .5th and 99.5th percentiles of the scene are put
where they lie in the HIT-UAV training frames, 24 and 224 of 255, which leaves head-room for people and
engines hotter than 99.5 % of the scene.

**RGB range.** A band at a time (which also takes out the blue cast of raw reflectances): the .5th and 99.5th
percentiles go to 3 and 248 of 255, where they lie in the NWPU VHR-10 training frames.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.errors import ParameterError, SensorError


class Sensor(enum.StrEnum):
    """What took the picture, as far as the model cares."""

    SAR = "sar"
    IR = "ir"
    RGB = "rgb"

    @classmethod
    def parse(cls, value: str | Sensor) -> Sensor:
        """`"SAR"`, `"sar"` or a Sensor to a Sensor. SensorError for anything else."""
        try:
            return cls(str(value).lower())
        except ValueError:
            raise SensorError(f"sensor {value!r} is unknown; pass one of sar, ir, rgb") from None


KINDS: dict[Sensor, tuple[str, ...]] = {
    Sensor.SAR: ("uint8", "amplitude", "intensity", "db"),
    Sensor.IR: ("uint8", "kelvin", "centikelvin", "celsius", "counts"),
    Sensor.RGB: ("uint8", "reflectance"),
}
"""The units each sensor can be in."""

_DB_FLOOR = -200.0  # dB: amplitude 1e-10, zero for every purpose, yet a number JSON can hold
_MOST_DB = 100.0  # of a median, without its sign
_SAR_BACKGROUND = 12.0  # high = this times the 25th percentile of the amplitude


@dataclass(frozen=True, kw_only=True)
class Bands:
    """What a file says of its bands, as plain values: all that choosing a sensor, bands and units looks
    at.
    """

    dtype: str
    """NumPy name of the data type shared by the bands."""
    interpretations: tuple[str, ...]
    """Colour interpretation of each band under rasterio's names: `gray`, `red`, `alpha`, `nir`, `sar_c`,
    ..."""
    descriptions: tuple[str, ...] = ()
    """Description of each band, empty where there is none."""
    units: tuple[str, ...] = ()
    """Unit of each band, empty where there is none."""
    tags: str = ""
    """All metadata items of the file and its bands as one text, `KEY=value` a line."""
    name: str = ""
    """File name: Sentinel-1's says what it is."""
    scale: tuple[float, ...] = ()
    """Factor of each band to its unit, 1 where empty."""
    offset: tuple[float, ...] = ()
    """Offset of each band to its unit, 0 where empty."""

    @property
    def colours(self) -> tuple[int, ...]:
        """1-based bands that hold pictures: all but alpha."""
        return tuple(i for i, name in enumerate(self.interpretations, 1) if name != "alpha")

    def label(self, band: int) -> str:
        """Description and unit of a 1-based band, as one text."""
        parts = (texts[band - 1] for texts in (self.descriptions, self.units) if len(texts) >= band)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Radiometry:
    """How raw numbers become model input: plain values, the same for every tile of a scene, JSON and back."""

    sensor: Sensor
    """Whose table row applies."""
    kind: str
    """One of `KINDS[sensor]`."""
    bands: tuple[int, ...]
    """1-based bands of the file: one for SAR and IR, red, green and blue for RGB."""
    low: tuple[float, ...]
    """What becomes 0, one a band, in the kind's own unit."""
    high: tuple[float, ...]
    """What becomes 1, one a band, in the kind's own unit."""
    scale: tuple[float, ...] = field(default=())
    """Factor from the file's numbers to the kind's unit, one a band; empty for 1."""
    offset: tuple[float, ...] = field(default=())
    """Offset from the file's numbers to the kind's unit, one a band; empty for 0."""

    def __post_init__(self) -> None:
        expected = 3 if self.sensor is Sensor.RGB else 1
        if self.kind not in KINDS[self.sensor]:
            raise ParameterError(
                f"units {self.kind!r} do not fit {self.sensor}; pass one of {', '.join(KINDS[self.sensor])}"
            )
        if not len(self.bands) == len(self.low) == len(self.high) == expected:
            raise SensorError(
                f"{self.sensor} takes {expected} band(s) with a range each, not bands {self.bands}"
            )
        for low, high in zip(self.low, self.high, strict=True):
            if not (low < high and np.isfinite([low, high]).all()):
                raise ParameterError(
                    f"range is {low:g} to {high:g}, expected two numbers, the first below the second"
                )

    @property
    def is_exact(self) -> bool:
        """True where model input is `x / 255` of the stored bytes, with nothing estimated."""
        return self.kind == "uint8" and set(self.low) == {0.0} and set(self.high) == {255.0}

    def apply(self, raw: NDArray[np.generic], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Raw numbers `(band, y, x)` of `bands`, in order, to model input `(3, y, x)` in [0, 1]; 0 where not
        `valid` `(y, x)`.
        """
        out = np.empty((3, *valid.shape), np.float32)
        for i, band in enumerate(raw):
            if self.is_exact:
                plane = band.astype(np.float32)
                plane /= np.float32(255.0)
                np.clip(plane, 0.0, 1.0, out=plane)  # resampled bytes may ring past the range
            else:
                plane = self._stretch(band, valid, i)
            out[i] = plane
        out[:, ~valid] = 0.0
        for i in range(len(raw), 3):
            out[i] = out[0]
        out += np.float32(0.0)  # of -0 and 0, NumPy's clip gives this or that by where a pixel lies
        return out

    def _stretch(self, band: NDArray[np.generic], valid: NDArray[np.bool_], i: int) -> NDArray[np.float32]:
        """One band to [0, 1]. Floats of the file stay floats: each step is rounded correctly. Powers are not, and have
        float64 inside, so that no rounding depends on where in a tile a pixel lies.
        """
        seen = magnitude(band)
        inside = np.float32 if seen.dtype == np.float32 and self.kind != "db" else np.float64
        value: NDArray[Any] = np.where(valid, seen, 0).astype(inside)
        if self.scale or self.offset:
            value = value * inside(self.scale[i] if self.scale else 1.0)
            value = value + inside(self.offset[i] if self.offset else 0.0)
        low, high = to_linear(self.kind, np.array([self.low[i], self.high[i]]))
        value = (to_linear(self.kind, value) - inside(low)) / inside(high - low)
        return np.clip(value, 0.0, 1.0).astype(np.float32)

    def to_json(self) -> str:
        """As one line of JSON, for an index of chips or the provenance of a result."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Radiometry:
        """What `to_json` wrote, equal to the original."""
        held = json.loads(text)
        fields = {k: tuple(v) for k, v in held.items() if k not in ("sensor", "kind")}
        return cls(sensor=Sensor.parse(held["sensor"]), kind=held["kind"], **fields)


def magnitude(raw: NDArray[np.generic]) -> NDArray[np.generic]:
    """Complex samples to their amplitude; real ones as they are."""
    return np.abs(raw) if np.iscomplexobj(raw) else raw


def to_linear(kind: str, value: NDArray[Any]) -> NDArray[Any]:
    """From the kind's unit to the quantity that is stretched: amplitude for SAR, itself for the others."""
    if kind == "intensity":
        return np.sqrt(np.maximum(value, 0.0))
    if kind == "db":
        return np.power(10.0, np.clip(value, _DB_FLOOR, -_DB_FLOOR) / 20.0)
    return value


def _from_linear(kind: str, value: float) -> float:
    """The inverse of `to_linear` for one number."""
    if kind == "intensity":
        return value * value
    if kind == "db":
        return max(20.0 * float(np.log10(max(value, 1e-300))), _DB_FLOOR)
    return value


def estimate(
    sensor: Sensor, kind: str, bands: Sequence[int], sample: NDArray[np.generic], about: Bands
) -> Radiometry:
    """The scene's radiometry from valid raw numbers spread over all of it.

    `sample` is `(band, n)` of `bands`, in order, valid pixels only; it may be empty (nothing valid: any range
    serves), and is not looked at for 8-bit data.
    """
    scale = tuple(about.scale[b - 1] for b in bands) if about.scale else ()
    offset = tuple(about.offset[b - 1] for b in bands) if about.offset else ()
    if set(scale) <= {1.0} and set(offset) <= {0.0}:
        scale = offset = ()
    if kind == "uint8":
        return Radiometry(
            sensor=sensor, kind=kind, bands=tuple(bands), low=(0.0,) * len(bands), high=(255.0,) * len(bands)
        )
    ranges = []
    for i, values in enumerate(magnitude(sample)):
        unit = values.astype(np.float64)
        if scale or offset:
            unit = unit * (scale[i] if scale else 1.0) + (offset[i] if offset else 0.0)
        if not np.isfinite(unit).all():
            unit = unit[np.isfinite(unit)]
        ranges.append(_range(sensor, kind, unit) if unit.size else (0.0, 1.0))
    low, high = zip(*ranges, strict=True)
    return Radiometry(
        sensor=sensor, kind=kind, bands=tuple(bands), low=low, high=high, scale=scale, offset=offset
    )


def sar_range(kind: str, values: NDArray[np.float64]) -> tuple[float, float]:
    """What becomes 0 and 1 for SAR, in the kind's unit, from finite values in that unit, not empty.

    From amplitude 0 to twelve times its 25th percentile, or to its 95th where that is larger (the module's
    text says why). Where 95 % of the scene are zero, the brightest pixel is the top. Raises SensorError for
    numbers that are no decibels.
    """
    middle = float(np.median(values))
    if kind == "db" and abs(middle) > _MOST_DB:
        raise SensorError(
            f"sar in dB has a median of {middle:g}, expected -{_MOST_DB:g} to {_MOST_DB:g}; give the file its scale "
            "(gdal_edit.py -scale 0.01 for hundredths), or say what the numbers are with --units"
        )
    amplitude = to_linear(kind, values)
    p25, p95 = np.percentile(amplitude, [25.0, 95.0])
    high = float(max(_SAR_BACKGROUND * p25, p95)) or float(amplitude.max()) or 1.0
    return (_DB_FLOOR if kind == "db" else 0.0), _from_linear(kind, high)


def infrared_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """What becomes 0 and 1 for infrared, in any unit, from finite values, not empty.

    The .5th and 99.5th percentiles go to 24 and 224 of 255, where the HIT-UAV frames have theirs.
    """
    return _anchored(values, 24.0, 224.0)


def colour_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """What becomes 0 and 1 for one colour band of more than 8 bits, from finite values, not empty.

    The .5th and 99.5th percentiles go to 3 and 248 of 255, where the NWPU VHR-10 frames have theirs.
    """
    return _anchored(values, 3.0, 248.0)


def _anchored(values: NDArray[np.float64], low_byte: float, high_byte: float) -> tuple[float, float]:
    """The range that puts the .5th and 99.5th percentiles at two 8-bit values."""
    low, high = (float(v) for v in np.percentile(values, [0.5, 99.5]))
    step = (high - low) / (high_byte - low_byte)
    if step <= 0.0:  # one value nearly everywhere: a range of one unit keeps it dark and finite
        return low, low + 1.0
    return low - low_byte * step, high + (255.0 - high_byte) * step


def _range(sensor: Sensor, kind: str, values: NDArray[np.float64]) -> tuple[float, float]:
    if sensor is Sensor.SAR:
        return sar_range(kind, values)
    return infrared_range(values) if sensor is Sensor.IR else colour_range(values)


_POLARISATION = re.compile(r"(?<![a-z])([vh][vh])(?![a-z])", re.IGNORECASE)
_SAR_WORDS = re.compile(
    r"sentinel-?_?1(?!\d)|\bs1[abcd]_|umbra|iceye|capella|terrasar|tandem-?x|radarsat|cosmo-?skymed|alos-?2|palsar|\bsar\b"
    r"|synthetic.aperture|sigma_?(nought|naught|0)|gamma_?(nought|naught|0)|beta_?(nought|naught|0)",
    re.IGNORECASE,
)
_SAR_NAME = re.compile(r"^s1[abcd][-_](iw|ew|sm|wv|s\d|iw\d)[-_]|umbra|iceye|capella", re.IGNORECASE)
_COLOUR_WORDS = re.compile(r"(?<!infra[ -])(?<!coastal )\b(red|green|blue)\b(?!.?edge)", re.IGNORECASE)
_SAYS_NOTHING = re.compile(r"((band|layer)?\W*\d+)?", re.IGNORECASE)
_IR_WORDS = re.compile(
    r"thermal|\blwir\b|\bmwir\b|microbolometer|brightness.temperature|\bflir\b|zenmuse.?(xt|h20t|h30t)|radiometric.temperature",
    re.IGNORECASE,
)
_IR_UNITS = re.compile(
    r"^(k|kelvin|degk|centi-?kelvin|ck|c|°c|degc|celsius|degrees? c(elsius)?)$", re.IGNORECASE
)


def infer(about: Bands) -> tuple[Sensor, str]:
    """The sensor and why, where the metadata settles it. SensorError, saying what to pass, where it does
    not.
    """
    colours = [about.interpretations[b - 1] for b in about.colours]
    labels = [about.label(b) for b in about.colours]
    picture = {"red", "green", "blue"} <= set(colours)
    if any(name.startswith("sar_") for name in colours):
        return Sensor.SAR, "a band's colour interpretation is SAR"
    if any(name in {"tir", "lwir", "mwir"} for name in colours):
        return Sensor.IR, "a band's colour interpretation is thermal infrared"
    if not picture:
        if any(_POLARISATION.search(label.replace("_", " ")) for label in labels):
            return Sensor.SAR, f"a band is described by its polarisation ({'; '.join(labels)})"
        if any(_IR_UNITS.match(unit.strip()) for unit in about.units):
            return Sensor.IR, f"the unit is a temperature ({'; '.join(u for u in about.units if u)})"
        if found := _SAR_NAME.search(about.name):
            return Sensor.SAR, f"the file's name says so ({found.group()})"
        for words, sensor in ((_SAR_WORDS, Sensor.SAR), (_IR_WORDS, Sensor.IR)):
            if found := words.search("\n".join([about.tags, *labels])):
                return sensor, f"the metadata names {found.group()!r}"
    if picture:
        return Sensor.RGB, "its bands are red, green and blue"
    raise SensorError(
        f"the metadata of {about.name or 'the scene'} does not say which sensor took it "
        f"({about.dtype}, bands {', '.join(colours) or 'none'}); pass --sensor sar, ir or rgb"
    )


_SO_MANY = {1: "one", 3: "three"}


def choose_bands(
    sensor: Sensor, about: Bands, bands: tuple[int, ...] | None = None, polarisation: str | None = None
) -> tuple[int, ...]:
    """The 1-based bands to read: as asked, else by polarisation (SAR) or colour (RGB). SensorError where they
    do not fit.
    """
    count, colours = len(about.interpretations), about.colours
    need = 3 if sensor is Sensor.RGB else 1
    if bands is not None:
        if len(bands) != need or not all(1 <= b <= count for b in bands):
            given, has = ",".join(map(str, bands)) or "empty", "1 band" if count == 1 else f"{count} bands"
            fit = ",".join("1" * need) if count == 1 else f"{_SO_MANY[need]} from 1 to {count}"
            raise SensorError(
                f"bands is {given}, but {about.name} has {has}, and {sensor} takes {_SO_MANY[need]}: pass {fit}"
            )
        return tuple(bands)
    if "palette" in about.interpretations:
        raise SensorError(
            f"{about.name} is paletted; expand it first: gdal_translate -expand rgb {about.name} rgb.tif"
        )
    if sensor is Sensor.SAR:
        return (_polarised(about, polarisation),)
    if polarisation is not None:
        raise SensorError(f"polarisation {polarisation!r} was asked of {sensor}; only SAR has one")
    if sensor is Sensor.RGB:
        return _red_green_blue(about)
    thermal = [
        b
        for b in colours
        if about.interpretations[b - 1] in {"tir", "lwir", "mwir"} or _IR_WORDS.search(about.label(b))
    ]
    if thermal or len(colours) in (1, 3):  # three may be grey copied thrice: the scene checks that they agree
        return ((thermal or list(colours))[0],)
    raise SensorError(
        f"ir takes 1 band, but {about.name} has {len(colours)}, none described as thermal; pass the band"
    )


def _polarised(about: Bands, asked: str | None) -> int:
    """The band of the polarisation asked for, else VV, HH, HV, VH in this order, else the first band."""
    colours = about.colours
    if not colours:
        raise SensorError(f"{about.name} has no band but alpha; sar takes 1 band")
    found: dict[str, int] = {}
    for b in colours:
        if match := _POLARISATION.search(about.label(b).replace("_", " ")):
            found.setdefault(match.group(1).upper(), b)
    if not found and len(colours) == 1 and (match := re.search(r"-([vh][vh])-", about.name, re.IGNORECASE)):
        found[match.group(1).upper()] = colours[0]  # Sentinel-1 measurement files are named s1a-iw-grd-vv-...
    if asked is not None:
        if asked.upper() not in found:
            held = ", ".join(found) or "none that are described"
            raise SensorError(
                f"polarisation {asked!r} was asked of {about.name}, which has {held}; pass one of these"
            )
        return found[asked.upper()]
    for name in ("VV", "HH", "HV", "VH"):
        if name in found:
            return found[name]
    if len(colours) > 4:
        raise SensorError(
            f"sar takes 1 band, but {about.name} has {len(colours)}, none a named polarisation; pass the band"
        )
    return colours[0]


def _red_green_blue(about: Bands) -> tuple[int, ...]:
    """Bands in the order red, green, blue: by colour interpretation, by description, else the first three of up to four
    that say nothing of themselves.
    """
    colours = about.colours
    if len(colours) < 3:
        raise SensorError(
            f"rgb takes 3 bands, but {about.name} has {len(colours)}; pass --sensor sar or ir if it is one"
        )
    by_colour = {about.interpretations[b - 1]: b for b in reversed(colours)}
    told = {b: about.label(b).replace("_", " ").strip() for b in colours}
    by_label = {m.group(1).lower(): b for b in reversed(colours) if (m := _COLOUR_WORDS.search(told[b]))}
    for held in (by_colour, by_label):
        if {"red", "green", "blue"} <= held.keys():
            return held["red"], held["green"], held["blue"]
    if len(colours) > 4 or (len(colours) == 4 and not all(map(_SAYS_NOTHING.fullmatch, told.values()))):
        raise SensorError(
            f"which of the {len(colours)} bands of {about.name} are red, green and blue is not said; pass them, such "
            "as --bands 3,2,1"
        )
    return colours[0], colours[1], colours[2]


def choose_kind(
    sensor: Sensor, about: Bands, bands: Sequence[int], sample: NDArray[np.generic], units: str | None = None
) -> str:
    """What the numbers are: as asked, else from data type, unit and description, else from the values of the
    sample.

    `sample` is `(band, n)`, valid raw numbers spread over the scene. SAR is dB where the band says so, or where a
    tenth of the numbers or more are negative and most are 1 or more without their sign; without a word on its unit it
    is intensity where numbers are real and mostly below 1 (calibrated power is), else amplitude. Infrared is kelvin
    from 150 to 500, centikelvin from 15,000 to 50,000, celsius where real or signed, else counts.
    """
    if units is not None:
        kind = {
            "decibel": "db",
            "power": "intensity",
            "k": "kelvin",
            "ck": "centikelvin",
            "c": "celsius",
        }.get(units.lower(), units.lower())
        if kind not in KINDS[sensor]:
            raise SensorError(f"units {units!r} do not fit {sensor}; pass one of {', '.join(KINDS[sensor])}")
        return kind
    if about.dtype == "uint8":
        return "uint8"
    if sensor is Sensor.RGB:
        return "reflectance"
    text = (about.label(bands[0]) + "\n" + about.tags).lower()
    values = magnitude(sample)[0].astype(np.float64) if sample.size else np.zeros(1)
    if about.scale or about.offset:
        values = (
            values * (about.scale or (1.0,) * bands[0])[bands[0] - 1]
            + (about.offset or (0.0,) * bands[0])[bands[0] - 1]
        )
    finite = np.isfinite(values)
    if not finite.all():
        values = values[finite] if finite.any() else np.zeros(1)
    if sensor is Sensor.SAR:
        if np.iscomplexobj(sample) or about.dtype.startswith("complex"):
            return "amplitude"
        label = about.label(bands[0]).lower().replace("_", " ")
        # noise taken off power leaves some of it below 0, too, but small
        below = (values < 0.0).mean() >= 0.1 and np.median(np.abs(values)) >= 1.0
        if below or re.search(r"\b(db|decibels?)\b", label):
            return "db"
        if re.search(r"amplitude|magnitude|\bdn\b", text):
            return "amplitude"
        if re.search(r"intensity|power|sigma|gamma|beta", label):
            return "intensity"
        is_real = np.issubdtype(np.dtype(about.dtype), np.floating)
        return "intensity" if is_real and np.median(values) < 1.0 else "amplitude"
    unit = (about.units[bands[0] - 1] if about.units else "").strip().lower()
    if _IR_UNITS.match(unit):
        return "centikelvin" if unit.startswith(("centi", "ck")) else "kelvin" if "k" in unit else "celsius"
    middle = float(np.median(values))
    if 150.0 <= middle <= 500.0:
        return "kelvin"
    if 15_000.0 <= middle <= 50_000.0:
        return "centikelvin"
    return "counts" if about.dtype.startswith("uint") else "celsius"
