"""Benchmark records and the crops drawn from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from babelrs_geo.boxes import bounds, corners
from babelrs_geo.datasets.augment import Augment, augment, load_image
from babelrs_geo.datasets.soi import Record, class_names, fingerprint, read_split
from babelrs_geo.errors import LabelError

RGB = ("plane", "ship")


def write_soi(root: Path, images: int = 2) -> None:
    """A folder in SOI-Det's layout: grey frames with one bright rectangle each, in all three sensors."""
    sar = root / "SARDet_50K"
    (sar / "Annotations").mkdir(parents=True)
    (sar / "JPEGImages").mkdir()
    document: dict[str, list[object]] = {
        "categories": [{"id": 7, "name": "ship"}],
        "images": [],
        "annotations": [],
    }
    for k in range(images):
        frame = np.full((70, 90), 30, np.uint8)
        frame[20:32, 30:60] = 220
        Image.fromarray(frame).save(sar / "JPEGImages" / f"{k}.png")
        document["images"].append({"id": k, "file_name": f"{k}.jpg", "width": 90, "height": 70})
        document["annotations"].append(
            {"image_id": k, "category_id": 7, "bbox": [30, 20, 30, 12], "iscrowd": 0}
        )
        for folder, sub, name in (
            (root / "DOTA_800pix" / "train", "images", "plane"),
            (root / "DroneVehicle" / "dota_train", "png_images", "car"),
        ):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            (folder / "annfiles").mkdir(exist_ok=True)
            Image.fromarray(frame).save(folder / sub / f"{k}.png")
            (folder / "annfiles" / f"{k}.txt").write_text(f"30 20 60 20 60 32 30 32 {name} 0\n")
    (sar / "Annotations" / "after_merge_train.json").write_text(json.dumps(document))


def test_all_three_sensors_are_read(tmp_path: Path) -> None:
    write_soi(tmp_path)
    for sensor, classes in (("sar", ("ship",)), ("rgb", RGB), ("ir", ("person", "car"))):
        records = read_split(tmp_path, sensor, "train", classes)
        assert [r.path.stem for r in records] == ["0", "1"]
        np.testing.assert_allclose(bounds(records[0].boxes), [[30, 20, 60, 32]], atol=1e-6)
        assert records[0].sensor == sensor
    assert records[0].labels.tolist() == [1]


def test_a_fingerprint_is_of_pixels_and_boxes(tmp_path: Path) -> None:
    write_soi(tmp_path)
    records = read_split(tmp_path, "rgb", "train", RGB)
    before = fingerprint(records)
    assert before == fingerprint(read_split(tmp_path, "rgb", "train", RGB))
    (tmp_path / "DOTA_800pix" / "train" / "annfiles" / "0.txt").write_text("30 20 60 20 60 32 30 32 ship 0\n")
    assert before != fingerprint(read_split(tmp_path, "rgb", "train", RGB))


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="is missing"):
        read_split(tmp_path, "sar", "train", ("ship",))
    with pytest.raises(LabelError, match="no folder in SOI-Det"):
        read_split(tmp_path, "lidar", "train", ("ship",))
    write_soi(tmp_path)
    with pytest.raises(LabelError, match="class 'plane'; expected one of ship"):
        read_split(tmp_path, "rgb", "train", ("ship",))
    (tmp_path / "DOTA_800pix" / "train" / "images" / "1.png").unlink()
    with pytest.raises(LabelError, match="has no image"):
        read_split(tmp_path, "rgb", "train", RGB)


def test_broken_labels_are_told_with_their_file(tmp_path: Path) -> None:
    write_soi(tmp_path)
    sar = tmp_path / "SARDet_50K" / "Annotations" / "after_merge_train.json"
    whole = sar.read_text()
    for text in (
        whole[:60],
        "[]",
        "{}",
        whole.replace('"bbox"', '"box"'),
        whole.replace("[30, 20, 30, 12]", "3"),
    ):
        sar.write_text(text)
        with pytest.raises(LabelError, match=r"after_merge_train\.json cannot be read as COCO's annotations"):
            read_split(tmp_path, "sar", "train", ("ship",))
    with pytest.raises(LabelError, match="cannot be read as COCO's"):
        sar.write_text("[]")
        class_names(tmp_path, "sar", "train")
    path = tmp_path / "DOTA_800pix" / "train" / "annfiles" / "0.txt"
    for text in ("1 2 3 4 5 6 7 8", "1 2 3 4 5 6 7 plane 0", "plane"):
        path.write_text(text)
        for read in (class_names, lambda *place: read_split(*place, RGB)):
            with pytest.raises(LabelError, match=rf"0\.txt has the row '{text}'; expected x and y of four"):
                read(tmp_path, "rgb", "train")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10_000),
    st.sampled_from(["sar", "rgb"]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 1.0]),
)
def test_boxes_stay_on_their_pixels(
    tmp_path: Path, seed: int, sensor: str, border: float, seam: float
) -> None:
    """Whatever crop is drawn, wherever the scene ends or another begins, the box's inside is bright, its
    surroundings dark."""
    path = tmp_path / "frame.png"
    if not path.exists():
        frame = np.full((200, 260), 40, np.uint8)
        frame[80:120, 90:170] = 240
        Image.fromarray(frame).save(path)
    box = np.array([[130.0, 100.0, 80.0, 40.0, 0.0]])
    record = Record(sensor, path, box, np.array([0]))
    options = Augment(size=128, scale=(0.6, 1.2), turn=sensor == "rgb", gamma=0, contrast=0, visible=0.99)
    options = replace(options, border=border, seam=seam)
    image = load_image(record)
    bare = torch.full_like(image, 40 / 255), replace(record, boxes=box[:0], labels=np.zeros(0, np.int64))
    crop, boxes, labels = augment(image, record, options, np.random.default_rng(seed), lambda _: bare)
    assert crop.shape == (3, 128, 128)
    assert len(boxes) == len(labels)
    for quad in corners(boxes):
        centre = quad.mean(0)
        for corner in quad:
            # another image may hide a hundredth of the box: a corner of it
            inner, outer = centre + (corner - centre) * 0.8, centre + (corner - centre) * 1.25
            if (inner > 1).all() and (inner < 127).all():
                assert crop[0, int(inner[1]), int(inner[0])] > 0.7
            if (outer > 1).all() and (outer < 127).all():
                assert crop[0, int(outer[1]), int(outer[0])] < 0.4


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_horizontal_boxes_stay_as_tight_as_they_are(seed: int) -> None:
    """SAR is turned by quarters alone, whatever the options are."""
    image, box = torch.zeros(3, 400, 400), np.array([[200.0, 200.0, 120.0, 12.0, 0.0]])
    record = Record("sar", Path("x"), box, np.array([0]))
    options = Augment(size=384, scale=(1, 1), visible=1.0)
    assert options.turn
    _, boxes, _ = augment(image, record, options, np.random.default_rng(seed))
    np.testing.assert_allclose(np.sort(boxes[:, 2:4]), np.tile([[12.0, 120.0]], (len(boxes), 1)), atol=1e-6)


def test_a_crop_at_a_border_is_the_crop_with_a_part_blank(tmp_path: Path) -> None:
    Image.fromarray(np.full((200, 260), 200, np.uint8)).save(tmp_path / "frame.png")
    record = Record("rgb", tmp_path / "frame.png", np.zeros((0, 5)), np.zeros(0, np.int64))
    image, shares = load_image(record), []
    for seed in range(20):
        whole = augment(image, record, Augment(size=64), np.random.default_rng(seed))[0]
        ended = augment(image, record, Augment(size=64, border=1.0), np.random.default_rng(seed))[0]
        blank = (ended == 0) & (whole > 0)
        assert torch.equal(ended[~blank], whole[~blank])
        shares.append(float(blank.float().mean()))
    assert max(shares) > 0.5 and len(set(shares)) > 10


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_beyond_a_seam_is_another_image(seed: int) -> None:
    """One straight edge from side to side; what shows on either side is labelled as that image's."""
    box = np.array([[100.0, 100.0, 60.0, 30.0, 0.0]])
    dark = (torch.full((3, 200, 200), 0.2), Record("ir", Path("a"), box, np.array([0])))
    light = (torch.full((3, 200, 200), 0.8), Record("ir", Path("b"), box, np.array([1])))
    options = Augment(size=64, scale=(0.8, 1.2), turn=False, gamma=0, contrast=0, seam=1.0)
    crop, boxes, labels = augment(*dark, options, np.random.default_rng(seed), lambda _: light)
    is_light = crop[0] > 0.5
    rows, columns = is_light.all(1), is_light.all(0)
    lines = rows if rows.any() else columns
    assert int(lines.sum() * 64) == int(is_light.sum()) and 8 <= int(lines.sum()) <= 56
    assert int((lines[1:] != lines[:-1]).sum()) == 1
    for (x, y), label in zip(boxes[:, :2], labels, strict=True):
        assert is_light[int(y), int(x)] == bool(label)


def test_a_crop_is_a_function_of_its_seed(tmp_path: Path) -> None:
    write_soi(tmp_path)
    record = read_split(tmp_path, "rgb", "train", RGB)[0]
    draws = [
        augment(load_image(record), record, Augment(size=64), np.random.default_rng(3)) for _ in range(2)
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    empty = replace(record, boxes=np.zeros((0, 5)), labels=np.zeros(0, np.int64))
    assert len(augment(load_image(empty), empty, Augment(size=64), np.random.default_rng(3))[1]) == 0
