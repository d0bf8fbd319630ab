"""The examples of docs/datasets.md run, in order, over small files of the names they use."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import shapely
from conftest import NORTH_UP, UTM, Raster, write_raster
from test_datasets import write_soi
from test_frames import polygon, write_dronevehicle, xml

from babelrs_geo import open_scene
from babelrs_geo.chips import ChipOptions, cut_chips
from babelrs_geo.vectors.labels import read_labels

PAGE = Path(__file__).parents[1] / "docs" / "datasets.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    sar = write_raster(Path("sar"), Raster(rng.integers(1, 255, (150, 150), dtype=np.uint8)))
    write_raster(Path("rgb"), Raster(rng.integers(1, 255, (3, 120, 120), dtype=np.uint8)))
    ring = [NORTH_UP @ p for p in ((20, 30), (50, 30), (50, 40), (20, 40))]
    gpd.GeoDataFrame({"class": ["ship"]}, geometry=[shapely.Polygon(ring)], crs=UTM).to_file("ships.gpkg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # splits that stay empty
        options = ChipOptions(size=64, overlap=16, split=(1, 0, 0))
        cut_chips([open_scene(sar, "sar")], "chips", [read_labels("ships.gpkg")], options)
    write_soi(Path("soi"))
    write_dronevehicle(Path("dronevehicle"), xml(polygon("car", 130, 120, 160, 132)))
    names: dict = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["batch"]["image"].shape == (4, 3, 64, 64)
    assert {len(names["whole"]), len(names["chips"])} == {9} and names["same"]["name"] == "sar_0_0"
    assert {k: len(v["image"]) for k, v in names["pair"].items()} == {"sar": 1, "rgb": 1}
    assert len(names["both"]) == 1 and len(names["either"]) == 2
    assert {k: tuple(v["image"].shape) for k, v in names["mixed"].items()} == {
        "sar": (2, 3, 48, 48),
        "rgb": (1, 3, 48, 48),
    }
    assert len(names["soi"]) == 2 and len(names["drone"]) == 1
    assert next(iter(names["loader"]))["sar"]["image"].shape == (4, 3, 64, 64)


def test_what_evaluation_reads_needs_no_torchgeo():
    rooms = ("soi", "augment", "sampling", "published", "dronevehicle")
    code = "import sys; sys.modules['torchgeo'] = sys.modules['requests'] = None\n"
    code += (
        "\n".join(f"import babelrs_geo.datasets.{room}" for room in rooms) + "\nimport babelrs_geo.evaluation"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
