"""Vectors in and out: detections to features on the map, the ground looked at, files, and areas of interest.

Everything is column-wise: no loop over features. A file is made under a hidden folder beside its final place,
flushed to the disk and renamed, so that whatever interrupts a run, the output is whole or absent.

Columns of the features, one row per object, in the order of the detections:

| column | type | meaning |
|---|---|---|
| `class`, `score` | text, float | what it is and how sure the detector is, 0 to 1 |
| `sensor`, `box` | text | `sar`, `ir` or `rgb`; `horizontal` or `oriented` |
| `length_m`, `width_m` | float | sides on the ground in metres, the longer first; a horizontal box's bounds |
| `area_m2` | float | the box on the ground in square metres; a horizontal box's bounds |
| `heading_deg` | float | the length clockwise from true north, 0 <= h < 180; null for horizontal boxes |
| `lon`, `lat` | float | centre, EPSG:4326 in degrees, whatever the layer's CRS |
| `px_x`, `px_y` | float | centre in scene pixels: x right, y down, (0, 0) the first pixel's outer corner |
| `scene`, `acquired` | text, UTC time | where and when it was seen; the time is null where unknown |

Metres are geodesic, on the WGS 84 ellipsoid, whatever the CRS: the metres of EPSG:3395 or EPSG:3857 are not
true ones. Numbers are rounded to what a table can use: millimetres, 0.01 degree of heading, 1e-8 degree (1
mm) of longitude and latitude, 0.001 px, 1e-6 of score. Geometry is not rounded.

A scene without georeference has its geometry in pixels, x right and **y down**, in a layer without CRS;
metres, heading, longitude and latitude are null, as they are where the CRS is not of the Earth. Mind that
QGIS shows such an image with y up, its rows at negative y: the processing tool "Affine transform" with a
scale of -1 in y lays the boxes over it.
"""

from babelrs_geo.vectors.antimeridian import to_crs
from babelrs_geo.vectors.areas import read_area
from babelrs_geo.vectors.files import (
    PROVENANCE_KEY,
    SUFFIXES,
    check_name,
    check_target,
    clock,
    drop_journals,
    write,
    write_matches,
)
from babelrs_geo.vectors.labels import Labels, Objects, read_labels
from babelrs_geo.vectors.results import Result, read_result
from babelrs_geo.vectors.tables import Origin, area_km2, coverage, cut, features

__all__ = [
    "PROVENANCE_KEY",
    "SUFFIXES",
    "Labels",
    "Objects",
    "Origin",
    "Result",
    "area_km2",
    "check_name",
    "check_target",
    "clock",
    "coverage",
    "cut",
    "drop_journals",
    "features",
    "read_area",
    "read_labels",
    "read_result",
    "to_crs",
    "write",
    "write_matches",
]
