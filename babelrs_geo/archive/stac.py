"""STAC: the scenes of an ItemCollection file, or of a search at an API."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from babelrs_geo.archive.addresses import bare, scrub
from babelrs_geo.archive.sources import Item
from babelrs_geo.errors import LabelError, ParameterError

_IMAGES = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff", "image/png", "image/jpeg")


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is asked of a STAC API."""

    url: str
    collections: tuple[str, ...] = ()
    bbox: tuple[float, float, float, float] | None = None
    """West, south, east, north, in degrees."""
    datetime: str | None = None
    """As STAC has it: `2026-01-01/2026-01-31`."""
    asset: str | None = None
    """Which of an item's assets is the scene, such as `vv`; may be left out where there is but one raster."""
    limit: int | None = None
    """Items at most."""


def read_items(path: Path, asset: str | None = None) -> Iterator[Item]:
    """The scenes of an ItemCollection, or of a single item, in a file.

    An item without a fitting asset is an `Item` with a fault. Raises LabelError where the file is neither.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("type")
    except (OSError, ValueError, AttributeError) as error:
        raise LabelError(f"{path} cannot be read as STAC ({error}); pass an ItemCollection") from error
    if kind == "FeatureCollection":
        features = found.get("features", [])
    elif kind == "Feature":
        features = [found]
    else:
        raise LabelError(f"{path} is a {kind}, expected a STAC ItemCollection; search an API with --stac URL")
    for feature in features:
        yield scene_of(feature, asset, str(path.absolute()))


def search(asked: Search) -> Iterator[Item]:
    """The scenes that a STAC API finds. Raises ParameterError where it does not answer, or pystac-client is missing."""
    try:
        from pystac_client import Client
        from pystac_client.exceptions import APIError
    except ModuleNotFoundError as error:
        raise ParameterError(
            "searching a STAC API needs pystac-client: pip install 'babelrs-geo[stac]'"
        ) from error
    import requests

    # It warns of what it tries again, with the whole address.
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        client = Client.open(asked.url)
        found = client.search(
            collections=list(asked.collections) or None,
            bbox=asked.bbox,
            datetime=asked.datetime,
            max_items=asked.limit,
        )
        for feature in found.items_as_dicts():
            yield scene_of(feature, asked.asset, asked.url)
    except (APIError, requests.RequestException, OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = scrub(" ".join(str(error).split())) or type(error).__name__
        raise ParameterError(
            f"the STAC API at {bare(asked.url)} does not answer as one ({reason}); check --stac and its options"
        ) from error
    finally:
        logger.setLevel(level)


def scene_of(feature: Mapping[str, Any], asset: str | None, base: str) -> Item:
    """A STAC item as a scene: the asset named, else its only raster that is data."""
    assets: Mapping[str, Mapping[str, Any]] = feature.get("assets") or {}
    properties = feature.get("properties") or {}
    name = str(feature.get("id") or "item")
    key, fault = _choose(assets, asset)
    own = next((link.get("href") for link in feature.get("links", []) if link.get("rel") == "self"), None)
    itself = bare(str(own)) if own else f"{bare(base)}#{name}"
    if fault:
        return Item(itself, itself, fault=fault)
    chosen = assets[key]
    address = _absolute(str(chosen.get("href", "")), base, feature)
    options: dict[str, Any] = {}
    polarisations = chosen.get("sar:polarizations") or properties.get("sar:polarizations") or []
    sar = bool(polarisations) or "sar:instrument_mode" in properties
    return Item(
        bare(address),
        address,
        "sar" if sar else None,
        options,
        size=chosen.get("file:size"),
        stamp=chosen.get("file:checksum") or properties.get("updated"),
        faulty=itself,
    )


def _choose(assets: Mapping[str, Mapping[str, Any]], asset: str | None) -> tuple[str, str]:
    """The asset's key, or why there is none."""
    there = ", ".join(assets) or "none"
    if asset is not None:
        return (
            (asset, "") if asset in assets else ("", f'the STAC item has no asset "{asset}", it has {there}')
        )
    rasters = [k for k, a in assets.items() if str(a.get("type", "")).split(";")[0] in _IMAGES]
    data = [k for k in rasters if "data" in (assets[k].get("roles") or ())] or [
        k for k in rasters if not {"thumbnail", "overview", "visual"} & {k, *(assets[k].get("roles") or ())}
    ]
    if len(data) == 1:
        return data[0], ""
    return "", f"the STAC item has {len(data)} rasters of data ({there}): name one with --asset"


def _absolute(href: str, base: str, feature: Mapping[str, Any]) -> str:
    """An asset's address, resolved against the item's own or the file that told of it."""
    if "://" in href or href.startswith("/"):
        return href
    own = next((link.get("href", "") for link in feature.get("links", []) if link.get("rel") == "self"), "")
    if "://" in own:
        return urljoin(own, href)
    if "://" in base:
        return urljoin(base.rstrip("/") + "/", href)
    return str((Path(base).parent / href).resolve())
