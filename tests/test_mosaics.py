"""Frames laid out as scenes: every pixel and every box comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from babelrs_geo import boxes, open_scene
from babelrs_geo.datasets.airbus import read_airbus
from babelrs_geo.datasets.mosaics import Assigned, lay_out, write_labels, write_mosaic
from babelrs_geo.datasets.soi import Record
from babelrs_geo.errors import LabelError, ParameterError
from babelrs_geo.scenes import SceneOptions
from babelrs_geo.vectors import read_labels

AS_IT_IS = SceneOptions(collar=False)
GROUND = Assigned(crs="EPSG:32651", corner=(283_000.0, 1_615_000.0), gsd=0.5)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=1, max_size=7),
    st.sampled_from(["sar", "rgb", "ir"]),
    st.integers(0, 9),
    st.integers(0, 2),
)
def test_frames_come_back_from_the_scene(
    tmp_path: Path, sizes: list[tuple[int, int]], sensor: str, gap: int, border: int
) -> None:
    draw, records = np.random.default_rng(0), []
    for i, (height, width) in enumerate(sizes):
        shape = (height, width, 3) if sensor == "rgb" else (height, width)
        image = draw.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        own = np.column_stack(
            [draw.uniform(2, 6, (2, 2)), draw.uniform(2, 9, (2, 2)), draw.uniform(-90, 90, 2)]
        )
        records.append(Record(sensor, tmp_path / f"{i}.png", own, np.array([1, 0]), border))
    placed = lay_out(records, gap)
    write_mosaic(tmp_path / "scene.tif", placed, GROUND)
    assert write_labels(tmp_path / "labels.gpkg", placed, ("a", "b"), GROUND) == 2 * len(records)
    with open_scene(tmp_path / "scene.tif", sensor, AS_IT_IS) as scene:
        whole = scene.read((0, 0, scene.width, scene.height))
        objects = read_labels(tmp_path / "labels.gpkg", kind="oriented").on("scene", scene.georef, alone=True)
        assert scene.gsd == pytest.approx(0.5, rel=0.01)
    assert whole.valid.sum() == sum((h - 2 * border) * (w - 2 * border) for h, w in sizes)
    for p in placed:
        with Image.open(p.record.path) as image:
            bytes_ = np.asarray(image.convert("RGB"))[
                border : image.height - border, border : image.width - border
            ]
        there = whole.image[:, p.y : p.y + p.height, p.x : p.x + p.width]
        np.testing.assert_allclose(there, bytes_.transpose(2, 0, 1) / 255, atol=1e-6)
        assert whole.valid[p.y : p.y + p.height, p.x : p.x + p.width].all()
    wanted = np.concatenate([p.record.boxes + np.array([p.x, p.y, 0, 0, 0]) for p in placed])
    np.testing.assert_allclose(boxes.rotated_iou_pairs(objects.boxes, wanted), 1, atol=1e-5)
    assert list(objects.classes) == ["b", "a"] * len(records)
    assert not list(tmp_path.glob(".*"))


def test_converted_frames_lie_in_nodata(tmp_path: Path) -> None:
    Image.fromarray(np.full((10, 12), 200, np.uint8)).save(tmp_path / "a.png")
    placed = lay_out([Record("ir", tmp_path / "a.png", np.zeros((0, 5)), np.zeros(0, np.int64))], gap=4)
    write_mosaic(tmp_path / "scene.tif", placed, GROUND, lambda v: v.astype(np.uint16) + 1000, nodata=7)
    with open_scene(tmp_path / "scene.tif", "ir", AS_IT_IS) as scene:
        assert (scene.width, scene.height) == (20, 18)
        raw, valid = scene.read_both((0, 0, 20, 18))
    assert set(np.unique(raw)) == {7, 1200}
    assert valid.sum() == 120 and (raw[0][valid] == 1200).all()
    with pytest.raises(ParameterError, match="no frames"):
        lay_out([])


@pytest.mark.parametrize("name", ["labels.shp", "labels.geojson", "labels.gpkg"])
def test_labels_of_several_files_are_whole(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / "a.png")
    placed = lay_out([Record("ir", tmp_path / "a.png", np.array([[20, 15, 9, 5, 30.0]]), np.array([1]))])
    for _ in range(2):  # over what is there, too
        assert write_labels(tmp_path / name, placed, ("car", "ship"), GROUND) == 1
    found = read_labels(tmp_path / name, kind="oriented")
    write_mosaic(tmp_path / "scene.tif", placed, GROUND)
    with open_scene(tmp_path / "scene.tif", "ir", AS_IT_IS) as scene:
        objects = found.on("scene", scene.georef, alone=True)
    assert list(objects.classes) == ["ship"]
    np.testing.assert_allclose(boxes.rotated_iou_pairs(objects.boxes, placed[0].record.boxes), 1, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_annotated_aircraft_are_read(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"annotations\.csv cannot be read"):
        read_airbus(tmp_path)
    rows = ['1,b.jpg,"[(2, 3), (8, 3), (8, 9), (2, 9), (2, 3)]",Airplane']
    rows += ['2,a.jpg,"[(1, 1), (4, 1), (4, 3), (1, 3), (1, 1)]",Truncated_airplane']
    (tmp_path / "annotations.csv").write_text("\r\n".join(["id,image_id,geometry,class", *rows]))
    with pytest.raises(LabelError, match=r"\w\.jpg is missing"):
        read_airbus(tmp_path)
    for name in "ab":
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / f"{name}.jpg")
    first, second = read_airbus(tmp_path)
    assert (first.path.name, second.path.name) == ("a.jpg", "b.jpg")
    np.testing.assert_allclose(boxes.bounds(second.boxes), [[2, 3, 8, 9]])
