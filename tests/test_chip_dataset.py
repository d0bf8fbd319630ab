"""Chips, as they are cut, through TorchGeo: the same pixels and labels as the scenes'."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
from conftest import NORTH_UP, UTM, Raster, write_raster
from test_georef import made_up_rpc
from test_scene_dataset import gcps
from torch.utils.data import DataLoader
from torchgeo.samplers import GridGeoSampler, PreChippedGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

from babelrs_geo import open_scene
from babelrs_geo.chips import ChipOptions, cut_chips
from babelrs_geo.datasets.chips import ChipDataset
from babelrs_geo.datasets.ground import PIXELS, GroundOptions
from babelrs_geo.datasets.samples import check, collate
from babelrs_geo.errors import LabelError, ParameterError, SceneError
from babelrs_geo.vectors.labels import read_labels

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

RNG = np.random.default_rng(1)
OPTIONS = ChipOptions(size=64, overlap=16, split=(1, 0, 0))


def cut(folder: Path, scenes, labels=(), options=OPTIONS) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # splits that stay empty are told
        cut_chips(scenes, folder, labels, options)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A float SAR scene with a hole and a small RGB scene, labelled, as chips."""
    root = tmp_path_factory.mktemp("chips")
    amplitude = RNG.rayleigh(0.1, (150, 180)).astype(np.float32)
    amplitude[:40, :30] = np.nan
    ships = [(40, 50, 20, 8), (100, 60, 30, 10), (150, 120, 12, 24)]  # x, y, width, height
    for x, y, w, h in ships:
        amplitude[y : y + h, x : x + w] = 4.0
    sar = write_raster(root / "sar", Raster(amplitude, tags={"ACQUISITION_TIME": "2021-05-01T10:00:00Z"}))
    rgb = write_raster(root / "rgb", Raster(RNG.integers(1, 255, (3, 40, 50), dtype=np.uint8)))
    boxes = [
        shapely.Polygon([NORTH_UP @ p for p in [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]])
        for x, y, w, h in ships
    ]
    frame = gpd.GeoDataFrame({"class": ["ship", "boat", "ship"], "scene": "sar"}, geometry=boxes, crs=UTM)
    frame.to_file(root / "labels.gpkg")
    scenes = [open_scene(sar, "sar"), open_scene(rgb, "rgb")]
    labels = read_labels(root / "labels.gpkg")
    return scenes, ships, cut(root / "out", scenes, [labels, labels])


def test_a_query_of_its_bounds_gives_the_chip_as_the_scene_has_it(made):
    (scene, _), _, folder = made
    dataset = ChipDataset(folder, "sar")
    assert len(dataset) > 4 and dataset.classes == ("boat", "ship")
    for row, query in enumerate(PreChippedGeoSampler(dataset)):
        sample = dataset[query]
        check(sample, 2)
        chip = dataset.table.iloc[row]
        window = tuple(int(chip[k]) for k in ("x", "y", "width", "height"))
        pixels = scene.read(window)
        assert sample["name"] == chip["chip"]
        assert np.array_equal(sample["image"].numpy(), pixels.image)
        assert np.array_equal(sample["valid"].numpy(), pixels.valid)
        assert torch.equal(dataset[row]["image"], sample["image"])
        assert np.allclose(sample["transform"] @ (0, 0), NORTH_UP @ window[:2])


def test_labels_of_chips_lie_on_their_pixels(made):
    _, ships, folder = made
    dataset = ChipDataset(folder, "sar")
    seen = 0
    for row in range(len(dataset)):
        sample, chip = dataset[row], dataset.table.iloc[row]
        assert len(sample["boxes"]) == len(sample["labels"]) == chip["objects"]
        for box, label in zip(sample["boxes"].numpy(), sample["labels"].tolist(), strict=True):
            x, y = box[:2] - box[2:4] / 2 + (chip["x"], chip["y"])
            k = next(i for i, s in enumerate(ships) if np.allclose((x, y, *box[2:4]), s, atol=0.02))
            assert label == (0 if k == 1 else 1)
            seen += 1
    assert seen >= 3


def test_windows_within_overlapping_chips_are_the_scenes(made):
    (scene, _), _, folder = made
    dataset = ChipDataset(folder, "sar")
    for sampler in (RandomGeoSampler(dataset, 24, length=30), GridGeoSampler(dataset, 32, 32)):
        for query in sampler:
            sample = dataset[query]
            check(sample, 2)
            x, y = ~NORTH_UP @ (query[0].start, query[1].stop)
            size = sample["image"].shape[1]
            pixels = scene.read((round(x), round(y), size, size))
            assert np.array_equal(sample["image"].numpy(), pixels.image)
    loader = DataLoader(
        dataset, batch_sampler=RandomBatchGeoSampler(dataset, 24, 2, length=4), collate_fn=collate
    )
    assert [tuple(b["sar"]["image"].shape) for b in loader] == [(2, 3, 24, 24)] * 2


def test_chips_smaller_than_asked_are_padded(made):
    (_, scene), _, folder = made
    dataset = ChipDataset(folder, "rgb", options=GroundOptions(least=64))
    sample = dataset[next(iter(GridGeoSampler(dataset, 64)))]
    assert sample["image"].shape == (3, 64, 64) and sample["valid"].sum() == 40 * 50
    assert np.array_equal(sample["image"][:, :40, :50].numpy(), scene.read((0, 0, 50, 40)).image)


@pytest.mark.parametrize("kind", ["gcps", "rpcs"])
def test_chips_with_control_points_or_rpcs_are_not_warped(tmp_path, kind):
    pixels = RNG.integers(1, 255, (100, 130), dtype=np.uint8)
    place = {"crs": "EPSG:4326", "gcps": gcps(130, 100)} if kind == "gcps" else {"rpcs": made_up_rpc()}
    path = write_raster(tmp_path / "s", Raster(pixels, **place))
    scene = open_scene(path, "sar")
    assert scene.georef.kind == kind
    dataset = ChipDataset(cut(tmp_path / "out", [scene]), "sar")
    for row, query in enumerate(PreChippedGeoSampler(dataset)):
        chip, sample = dataset.table.iloc[row], dataset[query]
        window = tuple(int(chip[k]) for k in ("x", "y", "width", "height"))
        assert sample["name"] == chip["chip"]
        assert np.array_equal(sample["image"].numpy(), scene.read(window).image)
    for query in RandomGeoSampler(dataset, 20, length=10):
        check(dataset[query])


def test_chips_without_a_georeference(tmp_path):
    picture = Raster(
        RNG.integers(1, 255, (100, 130), dtype=np.uint8), crs=None, transform=None, suffix=".png"
    )
    scene = open_scene(write_raster(tmp_path / "p", picture), "ir")
    dataset = ChipDataset(cut(tmp_path / "out", [scene]), "ir")
    assert dataset.crs == PIXELS
    for row, query in enumerate(PreChippedGeoSampler(dataset)):
        chip = dataset.table.iloc[row]
        window = tuple(int(chip[k]) for k in ("x", "y", "width", "height"))
        assert np.array_equal(dataset[query]["image"].numpy(), scene.read(window).image)


def test_what_is_missing_is_told(made, tmp_path):
    _, _, folder = made
    with pytest.raises(ParameterError, match=r"no chips of ir in split any, only \d+ of rgb in train"):
        ChipDataset(folder, "ir")
    with pytest.raises(LabelError, match="class 'boat'; expected one of ship"):
        ChipDataset(folder, "sar", classes=("ship",))
    with pytest.raises(LabelError, match="no whole chip folder"):
        ChipDataset(tmp_path, "sar")
    dataset = ChipDataset(folder, "rgb")
    path = folder / dataset.table["path"].iloc[0]
    held = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(SceneError, match=path.name):
            dataset[0]
    finally:
        path.write_bytes(held)


def test_chips_survive_a_pickle_and_workers(made):
    _, _, folder = made
    dataset = ChipDataset(folder, "sar", split="train")
    queries = list(PreChippedGeoSampler(dataset))
    loader = DataLoader(dataset, batch_size=2, sampler=queries, num_workers=2, collate_fn=collate)
    names = [name for batch in loader for name in batch["sar"]["name"]]
    assert names == dataset.table["chip"].tolist()
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1]["image"], dataset[1]["image"])
