"""Two ways to look at a scene: as a lazy xarray, and as words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr

    from babelrs_geo.scenes.scene import Scene

_CHUNK = 1024  # pixels a side, brought to whole blocks of the file


class _Lazy:
    """What dask slices: reads a window when indexed."""

    ndim = 3

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.shape = (scene.count, scene.height, scene.width)
        self.dtype = np.dtype(scene.dtype)

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        bands, rows, columns = (s.indices(n) for s, n in zip(key, self.shape, strict=True))
        window = (columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0])
        if min(window[2:]) < 1:  # dask asks for nothing when it wants to know what kind of array this is
            return np.zeros((len(range(*bands)), max(window[3], 0), max(window[2], 0)), self.dtype)
        return self.scene.read_raw(window)[slice(*bands), :: rows[2], :: columns[2]].astype(
            self.dtype, copy=False
        )


def view(scene: Scene, block: tuple[int, int]) -> xr.DataArray:
    """The scene as `(band, y, x)`, chunked in whole blocks of about 1024 pixels a side."""
    import dask.array as da
    import xarray as xr
    from dask.base import tokenize

    chunks = tuple(
        min(n, max(1, round(_CHUNK / b)) * b) for n, b in zip((scene.height, scene.width), block, strict=True)
    )
    name = f"scene-{tokenize(scene.path, scene.width, scene.height, scene.dtype)}"
    array = da.from_array(  # type: ignore[no-untyped-call]
        _Lazy(scene), chunks=(scene.count, *chunks), name=name, asarray=False, fancy=False
    )
    x, y = np.arange(scene.width) + 0.5, np.arange(scene.height) + 0.5
    affine = scene.georef.affine
    if affine is not None and affine.is_rectilinear and affine.b == 0:
        x, y = affine.c + affine.a * x, affine.f + affine.e * y
    out = xr.DataArray(
        array,
        dims=("band", "y", "x"),
        coords={"band": np.arange(1, scene.count + 1), "y": y, "x": x},
        name=scene.name,
    )
    reference: dict[str, str] = {}
    if scene.georef.crs is not None and affine is not None:
        reference["crs_wkt"] = scene.georef.crs.to_wkt()
    if affine is not None:
        reference["GeoTransform"] = " ".join(map(repr, affine.to_gdal()))
    out = out.assign_coords(spatial_ref=((), 0, reference))
    return out if scene.nodata is None else out.assign_attrs(_FillValue=scene.nodata)


def describe(scene: Scene) -> dict[str, str]:
    """What the scene is and how it will be read, by heading."""
    about, radiometry, georef = scene._reader.facts.bands, scene.radiometry, scene.georef
    labels = [about.label(b) or about.interpretations[b - 1] for b in radiometry.bands]
    out = {
        "path": scene.path,
        "format": f"{scene.driver}, {scene.width} x {scene.height} pixels, {scene.count} x {scene.dtype}",
        "sensor": f"{scene.sensor} ({scene.sensor_reason})",
        "bands": ", ".join(f"{b} ({label})" for b, label in zip(radiometry.bands, labels, strict=True)),
        "radiometry": "8-bit, x / 255" if radiometry.is_exact else f"{radiometry.kind}, {_ranges(scene)}",
        "georeference": _georeference(scene),
    }
    if scene.gsd is not None:
        lon, lat = (float(v) for v in georef.to_lonlat(scene.width / 2, scene.height / 2))
        out["centre"] = f"{abs(lat):.5f} {'NS'[lat < 0]}, {abs(lon):.5f} {'EW'[lon < 0]}"
        out["ground sampling"] = f"{scene.gsd:.4g} m a pixel (true metres, at the centre)"
    if scene.acquired is not None:
        out["acquired"] = scene.acquired.isoformat()
    out["validity"] = _validity(scene)
    levels = scene._reader.facts.overviews
    out["overviews"] = ", ".join(f"1:{d}" for d in levels) or "none"
    return out


def _ranges(scene: Scene) -> str:
    pairs = zip(scene.radiometry.low, scene.radiometry.high, strict=True)
    given = "as asked" if scene.options.limits is not None else "estimated once for the scene"
    return "; ".join(f"{low:.4g} to {high:.4g}" for low, high in pairs) + f" ({given})"


def _georeference(scene: Scene) -> str:
    georef = scene.georef
    if georef.kind == "none":
        return "none: results will be in pixels"
    code = georef.crs_text if len(georef.crs_text or "") < 20 else "WKT"
    crs = f"{georef.crs.name} ({code})" if georef.on_earth and georef.crs is not None else georef.lack
    if georef.kind == "affine":
        turned = georef.affine is not None and (georef.affine.b != 0 or georef.affine.d != 0)
        return f"{'rotated' if turned else 'north-up'} affine, {crs}"
    if georef.kind == "gcps":
        worst = georef.gcp_residuals().max()
        return f"{len(georef.gcps)} control points, thin-plate spline, {crs}, residuals up to {worst:.2g} px"
    return f"rational polynomials at {georef.height:g} m{' above ' + georef.dem if georef.dem else ''}, {crs}"


def _validity(scene: Scene) -> str:
    facts = scene._reader.facts
    sources = [
        name for name, there in (("a mask", facts.mask != "none"), ("an alpha band", facts.alpha)) if there
    ]
    if scene.nodata is not None:
        sources.append(f"nodata {scene.nodata:g}")
    if scene.options.collar and scene.nodata != 0 and scene._border.collar().packed:
        sources.append("a black collar" if sources else "a black collar, not declared")
    return f"{100 * scene.valid_share:.1f} % valid" + (f" ({', '.join(sources)})" if sources else "")
