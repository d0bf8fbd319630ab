"""Several sensors on one grid: where pixels go, what they hold, and the shift between them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from conftest import NORTH_UP, UTM, Raster, write_raster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babelrs_geo.boxes import bounds, corners, from_corners
from babelrs_geo.chips import ChipOptions, cut_chips, open_chip, read_index, read_labels
from babelrs_geo.chips.registered import cut_registered
from babelrs_geo.coregister import Onto, Shared, align, measure, shared_grid
from babelrs_geo.errors import GeorefError, LabelError, OutputError, ParameterError
from babelrs_geo.georef import Georef
from babelrs_geo.scenes import Scene, SceneOptions, open_scene
from babelrs_geo.vectors import read_labels as read_label_file

PLAIN = SceneOptions(collar=False)


FINE = 4  # a picture is drawn so many times finer, so that it can be moved by fractions of a pixel


def town(size: int, seed: int = 0, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Rectangles of many grey levels in [0, 1], drawn `FINE` times finer and moved right and down by pixels."""
    r = np.random.default_rng(seed)
    n = (size + 40) * FINE
    image = np.full((n, n), 0.3)
    for _ in range(size * size // 1500):
        x, y = r.integers(0, n, 2)
        w, h = r.integers(8 * FINE, 40 * FINE, 2)
        image[y : y + h, x : x + w] = r.uniform(0.1, 0.9)
    x, y = 20 * FINE - round(dx * FINE), 20 * FINE - round(dy * FINE)
    return image[y : y + size * FINE, x : x + size * FINE]


def seen(fine: np.ndarray) -> np.ndarray:
    """Pixels: means of the fine picture."""
    return fine.reshape(fine.shape[0] // FINE, FINE, -1, FINE).mean((1, 3))


def sar_of(fine: np.ndarray, seed: int = 1) -> np.ndarray:
    """Another sensor's look at the same: another order of brightness, and speckle of four looks."""
    power = seen((np.abs(np.sin(7 * fine)) * 900 + 20) ** 2)
    return np.sqrt(power * np.random.default_rng(seed).gamma(4, 1 / 4, power.shape)).astype(np.float32)


def rgb_of(fine: np.ndarray) -> np.ndarray:
    return np.stack([np.clip(seen(fine) * 250 + k, 1, 255) for k in (0, 2, 4)]).astype(np.uint8)


def at(x: float, y: float, pixel: float) -> rasterio.Affine:
    return rasterio.transform.from_origin(NORTH_UP.c + x, NORTH_UP.f - y, pixel, pixel)


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (3.0, -2.0), (0.5, 0.75), (-5.25, 1.5)])
def test_the_shift_between_sensors_is_measured_below_a_pixel(tmp_path, dx, dy):
    image = town(420)
    a = write_raster(tmp_path / "a", Raster(rgb_of(image)))
    b = write_raster(tmp_path / "b", Raster(sar_of(town(420, 0, dx, dy))))
    with open_scene(a, "rgb", PLAIN) as rgb, open_scene(b, "sar", PLAIN) as sar:
        _, shared = shared_grid({"rgb": rgb, "sar": sar}, "rgb")
        found = measure(Onto(rgb, shared), Onto(sar, shared))
    assert found[:2] == pytest.approx((dx, dy), abs=0.2)
    assert found[2] > 10


def test_where_nothing_matches_no_shift_is_told(tmp_path):
    a = write_raster(tmp_path / "a", Raster(rgb_of(town(300, 1))))
    b = write_raster(
        tmp_path / "b", Raster(np.random.default_rng(0).normal(9, 1, (300, 300)).astype("float32"))
    )
    with open_scene(a, "rgb", PLAIN) as rgb, open_scene(b, "sar", PLAIN) as sar:
        _, shifts = align({"rgb": rgb, "sar": sar}, tmp_path / "on", correct=True)
    assert np.isnan(shifts[0].dx)
    assert not shifts[0].corrected
    assert "no shift can be told" in shifts[0].sentence()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pixel=st.sampled_from([2.5, 5.0, 10.0, 17.0, 30.0]),
    x=st.floats(-40, 40),
    y=st.floats(-40, 40),
    seed=st.integers(0, 99),
)
def test_resampling_follows_its_definition(tmp_path_factory, pixel, x, y, seed):
    """Against sums written out one pixel at a time; where a scene is coarser, a ramp comes out exactly."""
    folder = tmp_path_factory.mktemp("onto")
    r = np.random.default_rng(seed)
    values = r.uniform(1, 9, (40, 50)).astype(np.float32)
    valid = r.random(values.shape) > 0.1
    path = write_raster(folder / "s", Raster(np.where(valid, values, np.nan), transform=at(x, y, pixel)))
    shared = Shared(Georef.from_affine(tuple(NORTH_UP), UTM), 24, 20)
    with open_scene(path, "ir", SceneOptions(collar=False, units="counts")) as scene:
        got, ok = Onto(scene, shared).read((3, 2, 20, 15))
    reach = max(1.0, 10.0 / pixel)
    for i, j in ((0, 0), (7, 11), (14, 19)):
        sx, sy = ((j + 3.5) * 10 - x) / pixel - 0.5, ((i + 2.5) * 10 - y) / pixel - 0.5
        rows, columns = np.mgrid[-60:120, -60:120]
        weight = np.maximum(0, 1 - abs(columns - sx) / reach) * np.maximum(0, 1 - abs(rows - sy) / reach)
        inside = (rows >= 0) & (rows < 40) & (columns >= 0) & (columns < 50)
        weights = weight * inside
        weights[inside] *= valid.ravel()
        share = weights.sum() / weight.sum()
        if abs(share - 0.5) < 1e-6:
            continue
        assert ok[i, j] == (share >= 0.5)
        if ok[i, j]:
            full = np.zeros(weight.shape)
            full[inside] = values.ravel()
            assert got[0, i, j] == pytest.approx((weights * full).sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("turned", [0.0, 30.0])
def test_of_a_finer_scene_parts_are_read_at_a_time_to_the_same_numbers(tmp_path, monkeypatch, turned):
    """Memory does not grow with the ratio of the pixels' sizes."""
    place = at(-500, -500, 1.25) @ rasterio.Affine.rotation(turned)
    path = write_raster(tmp_path / "s", Raster(rgb_of(town(1600)), transform=place))
    shared = Shared(Georef.from_affine(tuple(NORTH_UP), UTM), 150, 130)
    read: list[int] = []
    whole = Scene.read_both

    def counted(self, window, **how):
        read.append(window[2] * window[3])
        return whole(self, window, **how)

    monkeypatch.setattr(Scene, "read_both", counted)
    with open_scene(path, "rgb", PLAIN) as scene:
        expected, seen_all = Onto(scene, shared).read((3, 2, 140, 120))
        (at_once,) = read
        monkeypatch.setattr("babelrs_geo.coregister._SOURCE", 40_000)
        got, seen_parts = Onto(scene, shared).read((3, 2, 140, 120))
    assert got.tobytes() == expected.tobytes() and seen_parts.tobytes() == seen_all.tobytes()
    assert seen_all.mean() > 0.5
    assert len(read) > 20 and max(read[1:]) < 3 * 40_000 < at_once / 5


def test_speckle_is_averaged_as_power_whatever_its_unit(tmp_path):
    power = np.random.default_rng(0).exponential(0.02, (200, 200))
    kinds = {"intensity": power, "amplitude": np.sqrt(power), "db": 10 * np.log10(power)}
    shared = Shared(Georef.from_affine(tuple(at(0, 0, 40)), UTM), 50, 50)
    back = []
    for units, values in kinds.items():
        path = write_raster(tmp_path / units, Raster(values.astype(np.float64)))
        with open_scene(path, "sar", SceneOptions(collar=False, units=units)) as scene:
            raw, _ = Onto(scene, shared).read((0, 0, 50, 50))
        back.append({"intensity": raw, "amplitude": raw**2, "db": 10 ** (raw / 10)}[units])
    np.testing.assert_allclose(back[1], back[0], rtol=1e-6)
    np.testing.assert_allclose(back[2], back[0], rtol=1e-6)
    assert back[0].mean() == pytest.approx(power.mean(), rel=0.01)


def test_three_sensors_are_cut_alike(tmp_path):
    """One grid, one name a chip, one validity, the reference's own numbers, and each sensor's own radiometry."""
    image = town(400)
    a = write_raster(tmp_path / "a", Raster(sar_of(image), nodata=-1.0))
    b = write_raster(tmp_path / "b", Raster(rgb_of(town(400, 0, 1, 0)), transform=at(200, 100, 10)))
    thermal = (seen(image)[::2, ::2] * 30 + 290).astype(np.float32)
    thermal[:40, :40] = np.nan
    c = write_raster(tmp_path / "c", Raster(thermal, transform=at(0, 0, 20), units=("K",)))
    ship = shapely.box(NORTH_UP.c + 1500, NORTH_UP.f - 1600, NORTH_UP.c + 1700, NORTH_UP.f - 1500)
    gpd.GeoDataFrame({"class": ["ship"]}, geometry=[ship], crs=UTM).to_file(tmp_path / "l.gpkg")
    with (
        open_scene(a, "sar", PLAIN) as sar,
        open_scene(b, "rgb", PLAIN) as rgb,
        open_scene(c, "ir", PLAIN) as ir,
    ):
        scenes = {"sar": sar, "rgb": rgb, "ir": ir}
        options = ChipOptions(size=96, overlap=32, block=1)
        labels = [read_label_file(tmp_path / "l.gpkg")]
        cut, shifts = cut_registered(scenes, tmp_path / "chips", labels, options, reference="sar")
        assert [s.sensor for s in shifts] == ["rgb", "ir"]
        again, _ = cut_registered(scenes, tmp_path / "chips", labels, options, reference="sar")
        assert again == cut
        with pytest.raises(OutputError, match="otherwise"):
            cut_registered(scenes, tmp_path / "chips", labels, options, reference="rgb")
        index = read_index(tmp_path / "chips")
        names = {s: set(rows["chip"]) for s, rows in index.groupby("sensor")}
        assert names["sar"] == names["rgb"] == names["ir"]
        assert cut.conflicts == 0
        for _, rows in index.groupby("chip"):
            assert rows["split"].nunique() == rows["valid"].nunique() == rows["geometry"].nunique() == 1
        for row in index.itertuples():
            with open_chip(tmp_path / "chips", row._asdict()) as chip:
                assert chip.radiometry.high == scenes[row.sensor].radiometry.high
                whole = (0, 0, chip.width, chip.height)
                x, y = (round(float(v)) for v in sar.georef.to_pixel(*chip.georef.to_map(0, 0)))
                if row.sensor == "sar":
                    own = sar.read_raw((x, y, chip.width, chip.height))
                    assert (chip.read_raw(whole) == own).all()
                    joint = chip.valid(whole)
                    assert not joint[: max(0, 80 - y), : max(0, 80 - x)].any()
        assert (
            len(read_labels(tmp_path / "chips")) == index.loc[index["sensor"] == "sar", "objects"].sum() > 0
        )


def test_a_correction_takes_the_shift_out(tmp_path):
    image = town(400)
    a = write_raster(tmp_path / "a", Raster(rgb_of(image)))
    b = write_raster(tmp_path / "b", Raster(sar_of(town(400, 0, 4, -3))))
    with open_scene(a, "rgb", PLAIN) as rgb, open_scene(b, "sar", PLAIN) as sar:
        scenes = {"rgb": rgb, "sar": sar}
        aligned, (shift,) = align(scenes, tmp_path / "on", "rgb", correct=True)
        assert (shift.dx, shift.dy) == pytest.approx((4, -3), abs=0.2)
        assert shift.corrected
        _, shared = shared_grid(aligned, "rgb")
        left = measure(Onto(aligned["rgb"], shared), Onto(aligned["sar"], shared))
        assert left[:2] == pytest.approx((0, 0), abs=0.15)
        for scene in aligned.values():
            scene.close()


def test_files_of_another_source_or_polarisation_are_not_taken_for_the_same(tmp_path):
    a = write_raster(tmp_path / "a", Raster(rgb_of(town(60))))
    two = np.concatenate([sar_of(town(60)).reshape(1, 60, 60)] * 2)
    b = write_raster(tmp_path / "b", Raster(two, descriptions=("VV", "VH")))
    with open_scene(a, "rgb", PLAIN) as rgb:
        for polarisation in ("VV", "VH"):
            told = nullcontext() if polarisation == "VV" else pytest.raises(OutputError, match="otherwise")
            with open_scene(b, "sar", SceneOptions(polarisation=polarisation)) as sar, told:
                align({"rgb": rgb, "sar": sar}, tmp_path / "on", "rgb")
        write_raster(tmp_path / "b", Raster(two + 1, descriptions=("VV", "VH")))
        with open_scene(b, "sar") as sar, pytest.raises(OutputError, match="otherwise"):
            align({"rgb": rgb, "sar": sar}, tmp_path / "on", "rgb")


def test_what_cannot_be_brought_together_is_told(tmp_path):
    a = write_raster(tmp_path / "a", Raster(rgb_of(town(60))))
    far = write_raster(tmp_path / "far", Raster(sar_of(town(60)), transform=at(9e4, 0, 10)))
    lost = write_raster(tmp_path / "lost", Raster(sar_of(town(60)), crs=None, transform=None))
    with open_scene(a, "rgb") as rgb, open_scene(far, "sar") as sar, open_scene(lost, "sar") as none:
        for scenes, error, said in (
            ({"rgb": rgb, "sar": sar}, GeorefError, "share no ground"),
            ({"rgb": rgb, "sar": none}, GeorefError, "no place on the ground"),
            ({"rgb": rgb}, ParameterError, "at least two"),
        ):
            with pytest.raises(error, match=said):
                shared_grid(scenes)
        with pytest.raises(ParameterError, match="reference ir"):
            shared_grid({"rgb": rgb, "sar": sar}, "ir")


WHOLE = ChipOptions(size=256, overlap=0, split=(1, 0, 0))


def rasters(folder: Path, *, turned: float = 0.0, shift: tuple[float, float] = (0, 0)) -> tuple[Path, Path]:
    """A reference of 10 m pixels, turned by degrees, and a finer scene around it that shows the same."""
    place = at(-200, -100, 10) @ rasterio.Affine.rotation(turned)
    a = write_raster(folder / "radar", Raster(sar_of(town(200)), transform=place))
    b = write_raster(folder / "optic", Raster(rgb_of(town(400, 0, *shift)), transform=at(0, 0, 5)))
    return a, b


@pytest.mark.parametrize("turned", [0.0, 20.0])
@pytest.mark.parametrize("kind", ["oriented", "horizontal"])
@pytest.mark.parametrize("name", ["radar", "optic"])
def test_labels_in_pixels_of_one_scene_go_with_its_ground(tmp_path, turned, kind, name):
    """Whatever part of it the shared grid is, however large its pixels are, and wherever its north lies."""
    a, b = rasters(tmp_path, turned=turned)
    x, y = {"radar": (100, 90), "optic": (190, 210)}[name]
    quad = corners(np.array([[x, y, 20.0, 8.0, 0.0 if kind == "horizontal" else 35.0]]))[0]
    text = tmp_path / f"{name}.txt"
    text.write_text(" ".join(map(repr, quad.ravel().tolist())) + " ship 0\n")
    with open_scene(a, "sar", PLAIN) as sar, open_scene(b, "rgb", PLAIN) as rgb:
        labels = [read_label_file(text, kind=kind)]
        scenes = {"sar": sar, "rgb": rgb}
        cut_registered(scenes, tmp_path / "chips", labels, WHOLE, reference="sar")
        own = (sar if name == "radar" else rgb).georef
        with open_chip(tmp_path / "chips", read_index(tmp_path / "chips").iloc[0]) as chip:
            there = np.stack(chip.georef.to_pixel(*own.to_map(quad[:, 0], quad[:, 1])), -1)
    (row,) = read_labels(tmp_path / "chips").itertuples()
    assert row.oriented == (kind == "oriented")
    box = np.array([[row.cx, row.cy, row.w, row.h, row.r]])
    if row.oriented:
        np.testing.assert_allclose(box, from_corners(there[None]), atol=1e-6)
    else:
        np.testing.assert_allclose(bounds(box)[0], [*there.min(0), *there.max(0)], atol=1e-6)


def test_labels_in_pixels_follow_their_picture_where_its_shift_is_taken_out(tmp_path):
    image = town(400)
    a = write_raster(tmp_path / "a", Raster(rgb_of(image)))
    b = write_raster(tmp_path / "b", Raster(sar_of(town(400, 0, 4, -3))))
    (tmp_path / "b.txt").write_text("100 100 120 100 120 120 100 120 ship 0\n")
    with open_scene(a, "rgb", PLAIN) as rgb, open_scene(b, "sar", PLAIN) as sar:
        labels = [read_label_file(tmp_path / "b.txt")]
        scenes = {"rgb": rgb, "sar": sar}
        options = ChipOptions(size=400, overlap=0, split=(1, 0, 0))
        cut_registered(scenes, tmp_path / "on", labels, options, reference="rgb", correct=True)
    (row,) = read_labels(tmp_path / "on").itertuples()
    assert (row.cx, row.cy) == pytest.approx((106, 113), abs=0.2)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["elsewhere"], "bears the name of none"),
        (["radar", "optic"], "bears the names of several"),
    ],
)
def test_labels_in_pixels_of_no_one_scene_are_refused_before_anything_is_written(tmp_path, names, said):
    a, b = rasters(tmp_path)
    (tmp_path / "dota").mkdir()
    for name in names:
        (tmp_path / "dota" / f"{name}.txt").write_text("10 10 20 10 20 20 10 20 ship 0\n")
    with open_scene(a, "sar", PLAIN) as sar, open_scene(b, "rgb", PLAIN) as rgb:
        labels = [read_label_file(tmp_path / "dota")]
        with pytest.raises(LabelError, match=said) as caught:
            cut_registered({"sar": sar, "rgb": rgb}, tmp_path / "chips", labels, WHOLE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chips").exists()


def test_scenes_of_one_name_and_one_grid_share_labels_in_pixels(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    a = write_raster(tmp_path / "one" / "tile", Raster(sar_of(town(64))))
    b = write_raster(tmp_path / "two" / "tile", Raster(rgb_of(town(64))))
    c = write_raster(tmp_path / "tile", Raster(rgb_of(town(64)), transform=at(50, 0, 10)))
    (tmp_path / "tile.txt").write_text("10 10 20 10 20 20 10 20 ship 0\n")
    labels = [read_label_file(tmp_path / "tile.txt")]
    with (
        open_scene(a, "sar", PLAIN) as sar,
        open_scene(b, "rgb", PLAIN) as rgb,
        open_scene(c, "rgb", PLAIN) as moved,
    ):
        cut_registered({"sar": sar, "rgb": rgb}, tmp_path / "chips", labels, WHOLE)
        assert read_labels(tmp_path / "chips")[["cx", "cy"]].to_numpy().tolist() == [[15, 15]]
        with pytest.raises(LabelError, match="several"):
            cut_registered({"sar": sar, "rgb": moved}, tmp_path / "other", labels, WHOLE)


def test_a_folder_of_something_else_is_refused_before_scenes_are_aligned(tmp_path):
    a, b = rasters(tmp_path)
    mine, file, cut = tmp_path / "mine", tmp_path / "file", tmp_path / "cut"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    file.write_text("")
    with open_scene(a, "sar", PLAIN) as sar, open_scene(b, "rgb", PLAIN) as rgb:
        cut_chips([sar], cut, options=WHOLE)
        for folder, said in (
            (mine, "no chip folder"),
            (file, "is a file"),
            (file / "below", "cannot be created"),
            (cut, "reference"),
        ):
            with pytest.raises(OutputError, match=said):
                cut_registered({"sar": sar, "rgb": rgb}, folder, (), WHOLE, reference="sar")
    assert [each.name for each in mine.iterdir()] == ["letter.txt"]
    assert not (cut / "aligned").exists()
