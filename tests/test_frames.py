"""Benchmarks in their published layouts, made small, as samples of the one contract."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_datasets import write_soi
from torch.utils.data import DataLoader
from torchgeo.datasets import DIOR, DOTA, VHR10, EuroSAT

from babelrs_geo.boxes import bounds
from babelrs_geo.datasets.dronevehicle import CLASSES, read_dronevehicle
from babelrs_geo.datasets.frames import FrameDataset, TorchGeoFrames
from babelrs_geo.datasets.mosaics import Assigned, lay_out, write_mosaic
from babelrs_geo.datasets.samples import check, collate
from babelrs_geo.datasets.soi import Record, class_names, fingerprint, read_split
from babelrs_geo.errors import LabelError, ParameterError, SceneError

BOX = [30, 20, 60, 32]  # of what is bright in a frame


def frame(path: Path, border: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((70 + 2 * border, 90 + 2 * border), 255, np.uint8)
    inner = pixels[border : 70 + border, border : 90 + border]
    inner[:] = 30
    inner[20:32, 30:60] = 220
    Image.fromarray(pixels).convert("RGB").save(path, quality=95)


def lies_on_its_pixels(sample, label, classes):
    check(sample, classes)
    assert sample["image"].shape == (3, 70, 90)
    np.testing.assert_allclose(bounds(sample["boxes"]), [BOX], atol=1e-3)
    assert sample["labels"].tolist() == [label]
    assert sample["image"][0, 21:31, 31:59].min() > 0.8 and sample["image"][0, 40:].max() < 0.2


def test_soi_det_as_published(tmp_path):
    write_soi(tmp_path)
    sets = {}
    for sensor, classes in (("sar", ("ship",)), ("rgb", ("plane", "ship")), ("ir", ("person", "car"))):
        sets[sensor] = FrameDataset(read_split(tmp_path, sensor, "train", classes), classes)
        for number in range(len(sets[sensor])):
            lies_on_its_pixels(sets[sensor][number], int(sensor == "ir"), len(classes))
    loader = DataLoader(sets["sar"], batch_size=2, collate_fn=collate)
    assert next(iter(loader))["sar"]["image"].shape == (2, 3, 70, 90)
    sets["rgb"].records[1].path.write_bytes(b"no image")
    with pytest.raises(SceneError, match=r"1\.png cannot be read"):
        sets["rgb"][1]


@pytest.mark.parametrize(
    ("kind", "suffix"), [("uint16", "png"), ("uint16", "tif"), ("int32", "tif"), ("float32", "tif")]
)
def test_frames_of_more_than_bytes_are_refused(tmp_path, kind, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.linspace(0, 60_000, 400).reshape(20, 20).astype(kind)).save(path)
    record = Record("ir", path, np.zeros((0, 5)), np.zeros(0, np.int64))
    told = rf"deep\.{suffix} has numbers of more than 8 bits .*gdal_translate -ot Byte -scale"
    with pytest.raises(SceneError, match=told):
        FrameDataset([record], ("car",))[0]
    ground = Assigned(crs="EPSG:32651", corner=(283_000.0, 1_615_000.0), gsd=0.5)
    with pytest.raises(SceneError, match=told):
        write_mosaic(tmp_path / "scene.tif", lay_out([record]), ground)


def test_dotas_own_header_is_passed_over(tmp_path):
    write_soi(tmp_path)
    text = tmp_path / "DOTA_800pix" / "train" / "annfiles" / "0.txt"
    text.write_text(f"imagesource:GoogleEarth\ngsd:0.14\n{text.read_text()}")
    lies_on_its_pixels(FrameDataset(read_split(tmp_path, "rgb", "train", ("plane",)), ("plane",))[0], 0, 1)


def xml(*objects: str) -> str:
    size = "<size><width>290</width><height>270</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def tags(**values: float) -> str:
    return "".join(f"<{k}>{v}</{k}>" for k, v in values.items())


def polygon(name: str, x0: float, y0: float, x1: float, y1: float) -> str:
    corners = {"x1": x0, "y1": y0, "x2": x1, "y2": y0, "x3": x1, "y3": y1, "x4": x0, "y4": y1}
    return f"<object><name>{name}</name><polygon>{tags(**corners)}</polygon></object>"


def write_dronevehicle(root: Path, text: str) -> None:
    for end in ("", "r"):
        frame(root / "train" / f"trainimg{end}" / "00001.jpg", border=100)
        (root / "train" / f"trainlabel{end}").mkdir(parents=True)
        (root / "train" / f"trainlabel{end}" / "00001.xml").write_text(text)


@pytest.mark.parametrize("sensor", ["ir", "rgb"])
def test_dronevehicle_as_published_loses_its_border(tmp_path, sensor):
    bright = [v + 100 for v in BOX]
    border = polygon("car", 10, 10, 40, 30)  # in the white
    unknown = polygon("*", *bright)
    point = "<object><name>car</name><point><x>150</x><y>140</y></point></object>"
    write_dronevehicle(tmp_path, xml(polygon("feright car", *bright), border, unknown, point))
    records = read_dronevehicle(tmp_path, "train", sensor)
    lies_on_its_pixels(FrameDataset(records, CLASSES)[0], CLASSES.index("FERIGHT_CAR"), 5)
    assert records[0].sensor == sensor and len(fingerprint(records)) == 64
    assert records[0].dropped == 2  # what lies in the white does not show


@pytest.mark.parametrize(
    ("spelt", "name"),
    [("truvk", "TRUCK"), ("feright", "FERIGHT_CAR"), ("freight-car", "FERIGHT_CAR"), ("Bus", "BUS")],
)
def test_dronevehicles_spellings(tmp_path, spelt, name):
    box = tags(xmin=130, ymin=120, xmax=160, ymax=132)
    write_dronevehicle(tmp_path, xml(f"<object><name>{spelt}</name><bndbox>{box}</bndbox></object>"))
    assert read_dronevehicle(tmp_path, "train")[0].labels.tolist() == [CLASSES.index(name)]
    lower = tuple(c.lower() for c in CLASSES)
    lies_on_its_pixels(
        FrameDataset(read_dronevehicle(tmp_path, "train", classes=lower), lower)[0], CLASSES.index(name), 5
    )


def test_what_dronevehicle_lacks_is_told(tmp_path):
    with pytest.raises(LabelError, match="is missing; expected DroneVehicle's XML"):
        read_dronevehicle(tmp_path, "train")
    with pytest.raises(LabelError, match="'sar' is not in DroneVehicle"):
        read_dronevehicle(tmp_path, "train", "sar")
    write_dronevehicle(tmp_path, xml(polygon("boat", 130, 120, 160, 132)))
    with pytest.raises(LabelError, match=r"00001\.xml has class 'boat'; expected one of CAR"):
        read_dronevehicle(tmp_path, "train")
    path = tmp_path / "train" / "trainlabelr" / "00001.xml"
    for text, told in (
        ("<annotation>", "cannot be read"),
        (xml(polygon("car", 1, 2, 3, 4).replace("<x4>1</x4>", "")), "lacks a corner"),
    ):
        path.write_text(text)
        with pytest.raises(LabelError, match=told):
            read_dronevehicle(tmp_path, "train")
    (tmp_path / "train" / "trainimgr" / "00001.jpg").unlink()
    with pytest.raises(LabelError, match="has no image"):
        read_dronevehicle(tmp_path, "train")


def write_dota(root: Path) -> None:
    folder = root / "train" / "annotations" / "version1.0"
    folder.mkdir(parents=True)
    rows = []
    for k, lines in enumerate(("imagesource:x\ngsd:0.1\n30 20 60 20 60 32 30 32 ship 0\n", "")):
        frame(root / "train" / "images" / f"P{k}.png")
        (folder / f"P{k}.txt").write_text(lines)
        rows.append((f"train/images/P{k}.png", f"train/annotations/version1.0/P{k}.txt", "train", "1.0"))
    pd.DataFrame(rows, columns=["image_path", "annotation_path", "split", "version"]).to_csv(
        root / "samples.csv"
    )


def write_dior(root: Path) -> None:
    frame(root / "Images" / "00001.jpg")
    frame(root / "Images" / "00002.jpg")
    box = tags(**dict(zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True)))
    (root / "Labels").mkdir()
    text = f"<annotation><object><name>ship</name><bndbox>{box}</bndbox></object></annotation>"
    text = text.replace("<object>", "<filename>00001.jpg</filename><object>")
    (root / "Labels" / "00001.xml").write_text(text)
    rows = [("Images/00001.jpg", "Labels/00001.xml", "train"), ("Images/00002.jpg", "", "test")]
    pd.DataFrame(rows, columns=["image_path", "label_path", "split"]).to_csv(root / "sample_df.csv")


def write_vhr10(root: Path) -> None:
    (root / "NWPU VHR-10 dataset.zip").write_bytes(b"")
    inner = root / "NWPU VHR-10 dataset"
    frame(inner / "positive image set" / "001.jpg")
    frame(inner / "negative image set" / "001.jpg")
    x0, y0, x1, y1 = BOX
    item = {
        "id": 0,
        "image_id": 0,
        "category_id": 2,
        "iscrowd": 0,
        "area": 360,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
    }
    item["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    document = {
        "images": [{"id": 0, "file_name": "001.jpg", "width": 90, "height": 70}],
        "annotations": [item],
        "categories": [{"id": i, "name": n} for i, n in enumerate(VHR10.categories)],
    }
    (inner / "annotations.json").write_text(json.dumps(document))


def test_torchgeos_dota(tmp_path):
    write_dota(tmp_path)
    for way in ("oriented", "horizontal"):
        found = TorchGeoFrames(DOTA(tmp_path, "train", "1.0", way, download=False))
        lies_on_its_pixels(found[0], found.classes.index("ship"), 18)
        check(found[1])
        assert (found[0]["name"], len(found[1]["boxes"])) == ("P0.png", 0)


def test_torchgeos_dior(tmp_path):
    write_dior(tmp_path)
    found = TorchGeoFrames(DIOR(tmp_path, "train", download=False))
    lies_on_its_pixels(found[0], found.classes.index("ship"), 20)
    unlabelled = TorchGeoFrames(DIOR(tmp_path, "test", download=False))[0]
    check(unlabelled)
    assert unlabelled["name"] == "00002.jpg"
    (tmp_path / "Images" / "00001.jpg").write_bytes(b"no image")
    with pytest.raises(SceneError, match=r"00001\.jpg cannot be read"):
        found[0]


# pycocotools 2.0 hands NumPy 2 an array of the older protocol
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_torchgeos_vhr10(tmp_path):
    write_vhr10(tmp_path)
    found = TorchGeoFrames(VHR10(tmp_path, "positive", download=False))
    lies_on_its_pixels(found[0], found.classes.index("ships"), 10)
    negative = TorchGeoFrames(VHR10(tmp_path, "negative", download=False))[0]
    check(negative)
    assert negative["name"] == "negative/001.jpg" and not len(negative["boxes"])


def test_other_datasets_have_no_adapter():
    with pytest.raises(ParameterError, match="EuroSAT has no adapter"):
        TorchGeoFrames(EuroSAT.__new__(EuroSAT))


SOI = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "soi_mini"


@pytest.mark.shared
@pytest.mark.skipif(not SOI.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize("sensor", ["sar", "rgb", "ir"])
def test_real_frames_keep_the_contract(sensor):
    classes = class_names(SOI, sensor, "val")
    frames = FrameDataset(read_split(SOI, sensor, "val", classes), classes)
    for number in range(0, len(frames), max(1, len(frames) // 5)):
        check(frames[number], len(classes))
