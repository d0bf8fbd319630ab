"""Instruction data: what is asked is answered by the labels, and corpora are read as the original reads them."""

from __future__ import annotations

import json
import pickle
import random
import re
import string
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from conftest import NORTH_UP, UTM, Raster, write_raster
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_datasets import write_soi

from babelrs_geo import cli, open_scene
from babelrs_geo.boxes import bounds
from babelrs_geo.chips import ChipOptions, cut_chips, open_chip, read_index
from babelrs_geo.concepts import concept, counted, indefinite, plural
from babelrs_geo.datasets.instruct import TASKS, Corpus, InstructOptions, boxes_in, write_corpus
from babelrs_geo.datasets.instruct.labelled import LabelledImage, Source, absence_weights, frames, labelled
from babelrs_geo.datasets.instruct.questions import boxes_text
from babelrs_geo.datasets.instruct.sheet import ANSWERED, ASKED, write_sheet
from babelrs_geo.datasets.instruct.writing import ask
from babelrs_geo.datasets.soi import Record, class_names, read_split
from babelrs_geo.errors import LabelError, OutputError, ParameterError, SceneError
from babelrs_geo.vectors.labels import read_labels

SHARED = Path(__file__).parents[2] / "shared" / "data" / "soi_mini"
SENSORS = {"sar": "SAR", "ir": "infrared", "rgb": "optical"}


# ----------------------------------------------------------------------------------------------------
# A judge who knows the labels: (concept, box) in thousandths of the image, and the concepts that are labelled.

Objects = list[tuple[str, tuple[float, ...]]]


def asked_for(text: str, known: list[str]) -> list[str]:
    """Concepts that a text names; a name within a longer one does not count."""
    forms = {form: thing for thing in known for form in (plural(thing), thing)}
    either = "|".join(sorted(forms, key=len, reverse=True))
    return list(dict.fromkeys(forms[form.lower()] for form in re.findall(rf"(?i)\b({either})\b", text)))


def near(a, b) -> bool:
    return bool(np.abs(np.subtract(a, b)).max() <= 1.0)


def judge(record: dict, objects: Objects, known: list[str], most: int) -> None:
    """Fail where the answer of a record is not what the labels say."""
    human, gpt = record["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt") and human["value"].startswith("<image>\n")
    question, answer, task = human["value"].removeprefix("<image>\n"), gpt["value"], record["task"]
    assert (
        question[0].isupper() and question[-1] in "?." and "{" not in question + answer and question.isascii()
    )
    boxes, plain = boxes_in(question), re.sub(r"<box>.*?</box>", "", question)
    there, things = Counter(thing for thing, _ in objects), asked_for(plain, known)
    if task == "count":
        (thing,) = things
        assert int(answer) == there[thing]
    elif task == "presence":
        (thing,) = things
        own = [box for name, box in objects if name == thing]
        if boxes:
            ((x0, y0, x1, y1),) = boxes
            whole = any(b[0] >= x0 - 1 and b[1] >= y0 - 1 and b[2] <= x1 + 1 and b[3] <= y1 + 1 for b in own)
            part = any(b[0] < x1 and b[1] < y1 and b[2] > x0 and b[3] > y0 for b in own)
            assert whole if answer == "Yes." else not part
        else:
            assert (answer == "Yes.") == bool(own)
        assert answer in ("Yes.", "No.")
    elif task == "refer":
        (box,) = boxes
        named = {name for name, other in objects if near(box, other)}
        assert answer in {f"{indefinite(name).capitalize()}." for name in named}
    elif task == "ground":
        (thing,) = things
        own = [box for name, box in objects if name == thing]
        given = boxes_in(answer)
        assert given == sorted(given, key=lambda b: (b[1], b[0], b[2], b[3]))
        if not own:
            assert answer == f"There are no {plural(thing)} in this image." and not given
            return
        assert len(given) == min(len(own), most)
        left = list(own)
        for box in given:
            left.remove(next(other for other in left if near(box, other)))
        assert (f" {most} largest " in question) == (len(own) > most)
        if left:  # none of them is larger, but for rounding
            assert max(map(area, left)) <= min(map(area, given)) + 2010
    elif task == "classes":
        offered = things or known
        expected = {thing for thing in offered if there[thing]}
        assert set(asked_for(answer, known)) == expected
        assert (answer == "None of them.") == (not expected)
        assert all((plural(t) if there[t] > 1 else indefinite(t)) in answer.lower() for t in expected)
    elif task == "caption":
        assert SENSORS[record["sensor"]] in answer
        if objects:
            assert all(counted(thing, n) in answer[0].lower() + answer[1:] for thing, n in there.items())
            assert set(asked_for(answer, known)) == set(there)
        else:
            assert " without " in answer and not set(asked_for(answer, known)) & set(there)
    else:
        assert (
            task == "sensor" and {"sar": "radar", "ir": "infrared", "rgb": "RGB"}[record["sensor"]] in answer
        )


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def objects_of(image: LabelledImage) -> Objects:
    scale = 1000 / np.array([*image.size, *image.size])
    return [(t, tuple(box)) for t, box in zip(image.concepts, (image.boxes * scale).tolist(), strict=True)]


# ----------------------------------------------------------------------------------------------------
# Any image

KNOWN = ["bus", "car", "person", "ship", "stadium", "storage tank"]


@st.composite
def images(draw) -> LabelledImage:
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    known = sorted(draw(st.sets(st.sampled_from(KNOWN), min_size=1)))
    edge = st.floats(0, 1)
    rows = draw(st.lists(st.tuples(edge, edge, edge, edge, st.sampled_from(known)), max_size=12))
    found = [
        (name, (min(a, c) * width, min(b, d) * height, max(a, c) * width, max(b, d) * height))
        for a, b, c, d, name in rows
        if abs(a - c) * width > 1e-6 and abs(b - d) * height > 1e-6
    ]
    weights = {thing: draw(st.floats(1e-9, 1)) for thing in known}
    sensor, empty = draw(st.sampled_from(list(SENSORS))), draw(st.floats(0, 1))
    return LabelledImage(
        draw(st.text(string.ascii_letters, min_size=1)),
        Path("/data/x.png"),
        (width, height),
        np.array([box for _, box in found]).reshape(-1, 4),
        tuple(name for name, _ in found),
        Source(sensor, weights, empty),
        complete=draw(st.sampled_from([True, True, True, False])),
    )


@given(images(), st.integers(0, 5), st.integers(1, 40), st.integers(2, 8))
@settings(max_examples=150)
def test_answers_are_what_the_labels_say(image, seed, per_image, most):
    options = InstructOptions(per_image=per_image, seed=seed, most_boxes=most)
    records = ask(image, Path("/data"), options)
    assert len(records) <= per_image and records
    for record in records:
        judge(record, objects_of(image), list(image.source.weights), most)
        assert record["image"] == "x.png" and record["sensor"] == image.source.sensor
        assert image.complete or record["task"] in ("refer", "sensor")
    texts = [record["conversations"][0]["value"] for record in records]
    assert len(set(texts)) == len(texts)


@given(images())
def test_boxes_come_back_from_text_within_a_thousandth(image):
    text = boxes_text(image.grid)
    assert re.fullmatch(r"<box>\[(\[\d+, \d+, \d+, \d+\](, )?)*\]</box>", text)
    back = np.array(boxes_in(text)).reshape(-1, 4)
    scale = np.array([*image.size, *image.size])
    assert (np.abs(back / 1000 - image.boxes / scale) <= 1e-3 + 1e-12).all()
    assert (back[:, 2:] > back[:, :2]).all() and (back >= 0).all() and (back <= 1000).all()


def test_what_could_as_well_be_another_thing_is_not_referred_to():
    boxes = np.array([[10.0, 10, 50, 50], [12, 10, 52, 50], [60, 60, 90, 90], [61, 60, 90, 90]])
    things = ("car", "ship", "ship", "ship")
    source = Source("sar", {"car": 1.0, "ship": 1.0}, 0.0)
    image = LabelledImage("x", Path("/data/x.png"), (100, 100), boxes, things, source)
    records = ask(image, Path("/data"), InstructOptions(tasks=("refer",), per_image=30))
    asked = {box for record in records for box in boxes_in(record["conversations"][0]["value"])}
    assert asked == {(600, 600, 900, 900), (610, 600, 900, 900)}


def test_a_phrase_of_the_reference_and_its_box():
    """The golden conversation: `<image>` and a line break first, then a box in double brackets."""
    assert boxes_in("<image>\nWhat is visible in the area <box>[[294, 46, 35, 69]]</box>?") == [
        (294, 46, 35, 69)
    ]
    assert boxes_text(np.array([[1, 2, 3, 4], [5, 6, 7, 8]])) == "<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>"


@given(images(), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_a_task_asks_the_same_whichever_others_are_asked(image, seed, rng):
    every = ask(image, Path("/data"), InstructOptions(seed=seed, per_image=1000))
    some = rng.sample(list(TASKS), rng.randint(1, len(TASKS)))
    fewer = ask(image, Path("/data"), InstructOptions(seed=seed, per_image=1000, tasks=tuple(some)))
    told = [json.dumps(r) for r in every if r["task"] in some]
    assert sorted(told) == sorted(json.dumps(r) for r in fewer)


# ----------------------------------------------------------------------------------------------------
# Whole data sets


def write_data(root: Path, count: int = 60) -> Path:
    """Random frames in SOI-Det's layout, some without objects, some objects across the edge."""
    rng = np.random.default_rng(3)
    sar = root / "SARDet_50K"
    (sar / "Annotations").mkdir(parents=True)
    (sar / "JPEGImages").mkdir()
    document: dict = {"categories": [{"id": 1, "name": "aircraft"}, {"id": 4, "name": "harbor"}]}
    document |= {"images": [], "annotations": []}
    for k in range(count):
        width, height = (int(v) for v in rng.integers(40, 200, 2))
        frame = Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8))
        frame.save(sar / "JPEGImages" / f"{k}.png")
        document["images"].append({"id": k, "file_name": f"{k}.png", "width": width, "height": height})
        for folder, names in (
            ("DOTA_800pix/train", ("small-vehicle", "plane", "Harbor")),
            ("DroneVehicle/dota_train", ("CAR",)),
        ):
            place = root / folder
            (place / "images").mkdir(parents=True, exist_ok=True)
            (place / "annfiles").mkdir(exist_ok=True)
            frame.save(place / "images" / f"{k}.png")
            lines = []
            for _ in range(rng.integers(0, 5)):
                cx, cy, a, b, r = rng.uniform((-10, -10, 4, 4, 0), (width + 10, height + 10, 60, 30, 3))
                turn = np.array([[np.cos(r), np.sin(r)], [-np.sin(r), np.cos(r)]])
                quad = np.array([[-a, -b], [a, -b], [a, b], [-a, b]]) / 2 @ turn + (cx, cy)
                lines.append(" ".join(f"{v:.2f}" for v in quad.ravel()) + f" {rng.choice(names)} 0\n")
            (place / "annfiles" / f"{k}.txt").write_text("".join(lines))
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = (float(v) for v in rng.uniform((-5, -5, 3, 3), (width - 4, height - 4, 50, 50)))
            label = {"image_id": k, "category_id": int(rng.choice([1, 4])), "bbox": [x, y, w, h]}
            document["annotations"].append(label)
    (sar / "Annotations" / "after_merge_train.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("soi"))


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(root: Path) -> dict[str, tuple[Objects, list[str]]]:
    """Objects and labelled concepts of each image, by its path below the root, from the readers of the labels."""
    found = {}
    for sensor in SENSORS:
        classes = class_names(root, sensor, "train")
        known = sorted({concept(name) for name in classes})
        for record in read_split(root, sensor, "train", classes):
            with Image.open(record.path) as image:
                width, height = image.size
            edges = np.clip(bounds(record.boxes), 0, [width, height, width, height])
            scaled = (edges * 1000 / np.array([width, height, width, height])).tolist()
            rows = [
                (concept(classes[label]), tuple(box))
                for label, box in zip(record.labels, scaled, strict=True)
                if area(box) > 0
            ]
            found[record.path.relative_to(root).as_posix()] = rows, known
    return found


def check_corpus(root: Path, output: Path, per_image: int) -> list[dict]:
    truth, records = expected(root), records_of(output)
    for record in records:
        judge(record, *truth[record["image"]], 20)
    assert {record["image"] for record in records} == set(truth)
    assert max(Counter(record["image"] for record in records).values()) <= per_image
    yes = Counter(r["conversations"][1]["value"] for r in records if r["task"] == "presence")
    spread = 4 * (sum(yes.values()) / 4) ** 0.5
    assert abs(yes["Yes."] - yes["No."]) < 2 * spread
    return records


def test_all_questions_of_a_data_set_are_answered_by_its_labels(data, tmp_path):
    written = write_corpus([data], tmp_path / "c.jsonl", InstructOptions(per_image=9))
    records = check_corpus(data, tmp_path / "c.jsonl", 9)
    assert written.records == Counter((r["sensor"], r["task"]) for r in records)
    assert written.images == {"sar": 60, "ir": 60, "rgb": 60} and not written.incomplete
    # harbor and plane are one thing in SAR and RGB, car in RGB and infrared
    names = {s: set(expected(data)[f"{folder}/0.png"][1]) for s, folder in PLACES.items()}
    assert names == {"sar": {"plane", "harbor"}, "rgb": {"car", "plane", "harbor"}, "ir": {"car"}}
    corpus = Corpus(written.meta)
    assert len(corpus) == len(records)
    for record, conversation in zip(records, corpus, strict=True):
        assert conversation.images == (data / record["image"],) and conversation.images[0].is_file()
        assert list(conversation.turns) == record["conversations"]
        assert (conversation.task, conversation.sensor) == (record["task"], record["sensor"])


@pytest.mark.parametrize("turns", [2, 3, 100])
def test_conversations_of_several_turns_ask_the_same_of_an_image_shown_once(data, tmp_path, turns):
    options = InstructOptions(per_image=5, tasks=("count", "presence", "sensor"))
    single = write_corpus([data], tmp_path / "one.jsonl", options)
    several = write_corpus([data], tmp_path / "more.jsonl", replace(options, turns=turns))
    assert several.records == single.records and several.images == single.images
    said: dict[str, list[str]] = {}
    for record in records_of(tmp_path / "one.jsonl"):
        said.setdefault(record["image"], []).extend(t["value"] for t in record["conversations"])
    corpus = Corpus(several.meta)
    assert json.loads(several.meta.read_text())["more"]["length"] == len(corpus)
    again: dict[str, list[str]] = {}
    for record, conversation in zip(records_of(tmp_path / "more.jsonl"), corpus, strict=True):
        values = [turn["value"] for turn in record["conversations"]]
        assert len(conversation.images) == 1 and 2 <= len(values) <= 2 * turns
        assert [value.count("<image>") for value in values] == [1, *[0] * (len(values) - 1)]
        again.setdefault(record["image"], []).extend(values)
    assert {name: [v.removeprefix("<image>\n") for v in each] for name, each in again.items()} == {
        name: [v.removeprefix("<image>\n") for v in each] for name, each in said.items()
    }
    assert any("task" not in record for record in records_of(tmp_path / "more.jsonl"))


@pytest.mark.parametrize("size", [48, 5000])
def test_squares_are_asked_about_by_what_shows_in_them(data, tmp_path, size):
    options = InstructOptions(per_image=9, crop=size, crops=3)
    written = write_corpus([data], tmp_path / "c.jsonl", options)
    truth, folder = expected(data), tmp_path / "c_images" / data.name
    whole, seen = Counter(), set()
    for record in records_of(tmp_path / "c.jsonl"):
        name, left, top = re.fullmatch(r"(.*)_(\d+)_(\d+)\.png", record["image"]).groups()
        x, y = int(left), int(top)
        with Image.open(folder / record["image"]) as square, Image.open(data / f"{name}.png") as frame:
            assert square.size == tuple(min(size, side) for side in frame.size)
            assert (
                np.asarray(square) == np.asarray(frame)[y : y + square.height, x : x + square.width]
            ).all()
            to_frame, to_square = np.array([*frame.size] * 2) / 1000, 1000 / np.array([*square.size] * 2)
            edges = np.array([x, y, x + square.width, y + square.height], float)
        objects, known = truth[f"{name}.png"]
        shown, complete = [], True
        for thing, box in objects:
            own = np.array(box) * to_frame
            low, high = np.maximum(own[:2], edges[:2]), np.minimum(own[2:], edges[2:])
            share = np.maximum(high - low, 0).prod() / (own[2:] - own[:2]).prod()
            complete &= not 1e-9 < share < 0.4 - 1e-9
            if share >= 0.4 - 1e-9:
                shown.append((thing, tuple((np.concatenate([low, high]) - [x, y, x, y]) * to_square)))
        judge(record, shown, known, 20)
        assert complete or record["task"] in ("refer", "sensor")
        whole[complete] += record["image"] not in seen
        seen.add(record["image"])
    assert whole[True] > 3 * whole[False] and whole[False] == written.incomplete
    assert len(seen) == written.images.total() and (len(seen) == 180) == (size == 5000)
    (tmp_path / "again").mkdir()
    write_corpus([data], tmp_path / "again" / "c.jsonl", options)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "again" / "c.jsonl").read_bytes()


PLACES = {
    "sar": "SARDet_50K/JPEGImages",
    "rgb": "DOTA_800pix/train/images",
    "ir": "DroneVehicle/dota_train/images",
}


@given(st.randoms(use_true_random=False), st.integers(0, 3))
@settings(max_examples=5)
def test_an_image_is_asked_the_same_whatever_comes_before_it(data, rng, seed):
    options = InstructOptions(seed=seed)
    all_of_them = frames(data, "rgb", "train")
    told = {image.name: ask(image, data, options) for image in all_of_them}
    rng.shuffle(all_of_them)
    again = frames(data, "rgb", "train")
    assert told == {image.name: ask(image, data, options) for image in all_of_them}
    assert told == {image.name: ask(pickle.loads(pickle.dumps(image)), data, options) for image in again}


def test_a_seed_gives_the_same_file_and_another_seed_another(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_corpus([data], tmp_path / f"{name}.jsonl", InstructOptions(seed=seed))
    texts = [(tmp_path / f"{name}.jsonl").read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    sensors = [json.loads(line)["sensor"] for line in texts[0].splitlines()[:60]]
    assert len(set(sensors)) == 3  # the first part of a file is as mixed as all of it


def test_presence_and_absence_are_asked_for_equally_often(data):
    """Also where a third of the images has no object, and of each concept."""
    yes: Counter = Counter()
    total: Counter = Counter()
    for seed in range(6):
        images = [i for s in ("rgb", "sar") for i in frames(data, s, "train")]
        for image in images:
            options = InstructOptions(per_image=1, tasks=("presence",), seed=seed)
            for record in ask(image, data, options):
                human, gpt = (turn["value"] for turn in record["conversations"])
                key = (image.source.sensor, *asked_for(human, list(image.source.weights)))
                total[key] += 1
                yes[key] += gpt == "Yes."
    assert 0.45 < sum(yes.values()) / sum(total.values()) < 0.55
    assert all(0.3 < yes[key] / total[key] < 0.7 for key in total), {k: yes[k] / total[k] for k in total}


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=30))
@settings(max_examples=50)
def test_weights_of_absence_are_positive_numbers_and_ask_as_often_as_there_is(rows):
    there = np.array(rows, bool).reshape(-1, 3)
    weights = absence_weights(there)
    assert np.isfinite(weights).all() and (weights > 0).all()
    seen = np.repeat(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], bool), (20, 18, 15, 4), axis=0)
    lacking = ~seen * absence_weights(seen)
    no = (lacking / lacking.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(no, (seen / seen.sum(1, keepdims=True)).mean(0), atol=0.01)


def test_frames_with_a_border_and_other_readers(tmp_path):
    Image.new("L", (300, 260)).save(tmp_path / "f.png")
    record = Record("ir", tmp_path / "f.png", np.array([[10.0, 10, 20, 20, 0]]), np.array([0]), border=100)
    (image,) = labelled([record], ["CAR"], tmp_path, {"CAR": "Small Lorry"})
    assert image.boxes.tolist() == [[100, 100, 120, 120]] and image.concepts == ("small lorry",)


def test_a_frame_of_which_a_label_was_dropped_is_not_asked_what_it_lacks(tmp_path):
    write_soi(tmp_path)
    path = tmp_path / "SARDet_50K" / "Annotations" / "after_merge_train.json"
    document = json.loads(path.read_text())
    crowd, ignored, thin = (
        {"image_id": 0, "category_id": 7, "bbox": [1, 1, 9, 9], **more}
        for more in ({"iscrowd": 1}, {"ignore": 1}, {"bbox": [1, 1, 0.5, 9]})
    )
    for more in (crowd, ignored, thin):
        path.write_text(json.dumps(document | {"annotations": [*document["annotations"], more]}))
        assert [image.complete for image in frames(tmp_path, "sar", "train")] == [False, True]
    text = tmp_path / "DOTA_800pix" / "train" / "annfiles" / "1.txt"
    text.write_text(text.read_text() + "1 1 9 1 9 2 1 2 plane 0\n")
    assert [image.complete for image in frames(tmp_path, "rgb", "train")] == [True, False]
    write_corpus([tmp_path], tmp_path / "c.jsonl", InstructOptions(per_image=20))
    records = {(r["sensor"], r["image"][-5], r["task"]) for r in records_of(tmp_path / "c.jsonl")}
    assert ("rgb", "0", "count") in records and ("rgb", "1", "refer") in records
    assert not {("rgb", "1", task) for task in ("count", "presence", "classes", "caption")} & records


def test_a_renamed_class_is_called_as_said(data, tmp_path):
    options = InstructOptions(renamed={"small-vehicle": "Vehicle"}, tasks=("refer",))
    write_corpus([data], tmp_path / "c.jsonl", options)
    answers = {(r["sensor"], r["conversations"][1]["value"]) for r in records_of(tmp_path / "c.jsonl")}
    assert ("rgb", "A vehicle.") in answers and ("rgb", "A car.") not in answers
    with pytest.raises(LabelError, match="no labels have class wagon"):
        write_corpus([data], tmp_path / "d.jsonl", InstructOptions(renamed={"wagon": "car"}))


# ----------------------------------------------------------------------------------------------------
# Chips


@pytest.fixture(scope="module")
def chip_folder(tmp_path_factory) -> Path:
    """A float SAR scene, so that pictures must be made, with ships; some are cut by chips' edges."""
    root = tmp_path_factory.mktemp("chips")
    rng = np.random.default_rng(2)
    amplitude = rng.rayleigh(0.1, (150, 180)).astype(np.float32)
    amplitude[:9, :30] = np.nan
    scene = write_raster(root / "sar", Raster(amplitude))
    ships = [(40, 50, 20, 8), (100, 60, 30, 10), (150, 120, 12, 24)]
    rings = [[NORTH_UP @ p for p in ((x, y), (x + w, y), (x + w, y + h), (x, y + h))] for x, y, w, h in ships]
    shapes = [shapely.Polygon(ring) for ring in rings]
    gpd.GeoDataFrame({"class": ["Ship", "boat", "Ship"]}, geometry=shapes, crs=UTM).to_file(root / "l.gpkg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # splits that stay empty
        options = ChipOptions(size=64, overlap=16, split=(1, 0, 0))
        cut_chips([open_scene(scene, "sar")], root / "out", [read_labels(root / "l.gpkg")], options)
    return root / "out"


def test_chips_are_asked_about_by_pictures_as_the_model_sees_them(chip_folder, data, tmp_path):
    (tmp_path / "made").mkdir()
    written = write_corpus([chip_folder], tmp_path / "made" / "c.jsonl", InstructOptions(per_image=9))
    index = read_index(chip_folder).set_index("chip")
    (tmp_path / "made").rename(tmp_path / "moved")  # pictures go with their corpus
    corpus = Corpus(tmp_path / "moved" / written.meta.name)
    assert written.incomplete == (index["dropped"] > 0).sum() > 0
    seen = set()
    for conversation in corpus:
        (path,) = conversation.images
        row = index.loc[path.stem]
        assert not row["dropped"] or conversation.task in ("refer", "sensor")
        seen.add(path.stem)
        with open_chip(chip_folder, row) as chip, Image.open(path) as picture:
            image = chip.read((0, 0, chip.width, chip.height)).image
            assert np.array_equal(np.asarray(picture), np.rint(image[0] * 255).astype(np.uint8))
    assert seen == set(index.index)
    both = write_corpus([chip_folder, data], tmp_path / "both.jsonl")
    names = {path for conversation in Corpus(both.meta) for path in conversation.images}
    assert all(path.is_file() for path in names) and len(names) == len(index) + 180


# ----------------------------------------------------------------------------------------------------
# The reader


def write_meta(folder: Path, parts: dict[str, tuple[list[str], dict]]) -> Path:
    entries = {}
    for name, (lines, entry) in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        entries[name] = {
            "root": "images",
            "annotation": f"{name}.jsonl",
            "data_augment": False,
            "length": 1,
        } | entry
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def line(text: str, **more) -> str:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Ja, ein Schiff – 船."}]
    return json.dumps({"conversations": turns} | more, ensure_ascii=False)


repeats = st.one_of(st.floats(0.01, 1), st.integers(1, 4))


@given(st.lists(st.tuples(st.integers(1, 12), repeats), min_size=1, max_size=4))
@settings(max_examples=30)
def test_parts_are_repeated_as_the_original_does(tmp_path_factory, sizes):
    parts, expected = {}, []
    for k, (count, repeat) in enumerate(sizes):
        lines = [line(f"é{k} {i} " + "x" * (i * 7 % 5)) for i in range(count)]
        parts[f"p{k}"] = (lines, {"repeat_time": repeat})
        rows = [json.loads(each)["conversations"] for each in lines]
        # internvl_chat: the first int(n * repeat) below 1, the list so many times above
        expected += rows[: int(count * repeat)] if repeat < 1 else rows * int(repeat)
    meta = write_meta(tmp_path_factory.mktemp("meta"), parts)
    if not expected:
        with pytest.raises(LabelError, match="names no record"):
            Corpus(meta)
        return
    corpus = pickle.loads(pickle.dumps(Corpus(meta)))  # as a loader's worker has it
    order = list(range(len(corpus)))
    random.Random(0).shuffle(order)
    read = {i: list(corpus[i].turns) for i in order}
    assert [read[i] for i in range(len(expected))] == expected and len(corpus) == len(expected)
    assert list(corpus[-1].turns) == expected[-1]
    with pytest.raises(IndexError):
        corpus[len(corpus)]


def test_conversations_of_every_kind(tmp_path):
    system = [{"from": "system", "value": "Be brief."}]
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "One."}]
    more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    lines = [
        line("<image>\nA?", image="a/1.png", task="count", sensor="ir", length=12, id=7),
        line("no mark", image="/abs/1.png"),
        json.dumps({"image": ["1.png", "2.png"], "conversations": system + turns + more}),
        "",
        line("text alone"),
        line("text alone", image=[]),
    ]
    part = {"max_dynamic_patch": 2, "data_augment": True, "sensor": "sar"}
    first, second, third, *texts = Corpus(write_meta(tmp_path, {"p": (lines, part)}))
    assert first.images == (tmp_path / "images" / "a" / "1.png",) and (first.task, first.sensor) == (
        "count",
        "ir",
    )
    assert second.images == (Path("/abs/1.png"),) and (second.task, second.sensor) == (None, "sar")
    assert [path.name for path in third.images] == ["1.png", "2.png"]
    assert [turn["from"] for turn in third.turns] == ["system", "human", "gpt", "human", "gpt"]
    assert [text.images for text in texts] == [(), ()]
    assert {each.most_tiles for each in (first, third)} == {2} and first.augment
    assert texts[0].where.endswith("p.jsonl:5")


GOOD = line("A?", image="1.png")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "is no record"),
        ("[1]", "expected an object"),
        ('{"conversations": []}', "no list of turns"),
        ('{"conversations": [{"from": "user", "value": "A"}]}', "not from system, human, gpt"),
        ('{"conversations": [{"from": "human", "value": 3}]}', "not from system, human, gpt"),
        ('{"conversations": [{"from": "human", "value": "A"}]}', "one from gpt at least"),
        (
            '{"conversations": [{"from": "gpt", "value": "A"}, {"from": "system", "value": "A"}]}',
            "expected it first",
        ),
        (line("<image>"), "0 images, but 1 times"),
        (line("<image> A", image=["1.png", "2.png"]), "2 images, but 1 times"),
        (line("A", image=3), "neither a path nor a list"),
        (line("A", video="1.mp4"), "about a video"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, bad, words):
    corpus = Corpus(write_meta(tmp_path, {"p": ([GOOD, "", bad, GOOD], {})}))
    assert corpus[0].images and corpus[2].images
    with pytest.raises(LabelError, match=re.escape(words)) as caught:
        corpus[1]
    assert f"{tmp_path / 'p.jsonl'}:3 " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"repeat_time": 1.5},
            "repeat_time of 'p' is 1.5; expected a share up to 1, or a whole number above it",
        ),
        ({"repeat_time": 0}, "repeat_time of 'p' is 0"),
        ({"repeat_time": True}, "repeat_time of 'p' is True"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch of 'p' is 0"),
        ({"annotation": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"annotation": None}, "annotation of 'p' is None; expected a path"),
        ({"data_augment": "no"}, "data_augment of 'p' is 'no'"),
        ({"sensor": 3}, "sensor of 'p' is 3"),
        ({"repeat_time": 0.1}, "names no record"),
    ],
)
def test_a_bad_meta_json_is_refused(tmp_path, entry, words):
    with pytest.raises(LabelError, match=re.escape(words)):
        Corpus(write_meta(tmp_path, {"p": ([GOOD], entry)}))


@pytest.mark.parametrize(
    ("text", "words"), [("[]", "no corpus's meta"), ("{", "no JSON"), ("{}", "no record")]
)
def test_what_is_no_meta_json_is_refused(tmp_path, text, words):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(LabelError, match=words):
        Corpus(tmp_path / "meta.json")
    with pytest.raises(LabelError, match="cannot be read"):
        Corpus(tmp_path / "none.json")


# ----------------------------------------------------------------------------------------------------
# The sheet, and the command


def test_the_sheet_shows_boxes_where_texts_have_them(tmp_path):
    Image.new("RGB", (360, 280)).save(tmp_path / "1.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat is <box>[[0, 0, 500, 500]]</box>?"},
        {"from": "gpt", "value": "One of <box>[[250, 250, 750, 1000], [9, 5, 3, 1]]</box>."},
    ]
    meta = write_meta(
        tmp_path, {"p": ([json.dumps({"image": "1.png", "conversations": turns}), GOOD], {"root": "."})}
    )
    assert write_sheet(Corpus(meta), tmp_path / "s.png", samples=9) == 2
    pixels = np.asarray(Image.open(tmp_path / "s.png"))[12:292, 12:372]
    assert tuple(pixels[100, 180]) == tuple(pixels[140, 50]) == ASKED
    assert tuple(pixels[200, 90]) == tuple(pixels[200, 270]) == ANSWERED
    (tmp_path / "1.png").write_text("none")
    with pytest.raises(SceneError, match=r"1\.png cannot be read as an image .*p\.jsonl:1 names it"):
        write_sheet(Corpus(meta), tmp_path / "s.png")


def call(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def test_the_command_writes_a_corpus_and_a_sheet_and_says_what_is_in_it(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(
        "instruct", data, "-o", "c.jsonl", "--tasks", "count,ground", "--sheet", "s.png", "--per-image", "2"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    head, *rows, asked, where = result.stdout.splitlines()
    counts = Counter((r["sensor"], r["task"]) for r in records_of(Path("c.jsonl")))
    assert head.split() == ["images", "count", "ground"]
    assert {row.split()[0]: row.split()[1:] for row in rows} == {
        s: ["60", str(counts[s, "count"]), str(counts[s, "ground"])] for s in SENSORS
    }
    assert (
        f"{counts.total()} questions of 180 images" in asked and "c.meta.json" in where and "s.png" in where
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "c.meta.json", "s.png"]
    before = Path("c.jsonl").read_bytes()
    result = call("instruct", data, "-o", "c.jsonl")
    assert (
        result.exit_code == 1
        and "pass --overwrite" in result.stderr
        and Path("c.jsonl").read_bytes() == before
    )
    result = call(
        "instruct", data, "-o", "c.jsonl", "--overwrite", "--json", "--split", "sar=train,rgb=train,ir=train"
    )
    told = json.loads(result.stdout)
    assert told["records"] == len(records_of(Path("c.jsonl"))) and set(told["by_sensor_and_task"]) == set(
        SENSORS
    )
    assert call("instruct", data, "-o", "d.jsonl", "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "-o", "c.jsonl"], 1, "holds no labelled images; expected chips of babelrs-geo tile"),
        (["DATA", "-o", "c.json"], 1, "does not end in .jsonl"),
        (["DATA", "-o", "none/c.jsonl"], 1, "is missing or not writable"),
        (["DATA", "-o", "c.jsonl", "--sheet", "s.jpg"], 1, "does not end in .png"),
        (["DATA", "-o", "c.jsonl", "--sheet", "none/s.png"], 1, "its folder is missing"),
        (["DATA", "-o", "c.jsonl", "--split", "val"], 1, "is missing; expected the COCO annotations"),
        (["DATA", "-o", "c.jsonl", "--split", "sar=train"], 1, "no split is given for rgb, only for sar"),
        (["DATA", "-o", "c.jsonl", "--tasks", "count,tell"], 1, "tasks has tell; expected some of classes"),
        (["DATA", "-o", "c.jsonl", "--tasks", ""], 1, "tasks has nothing"),
        (["DATA", "-o", "c.jsonl", "--per-image", "0"], 2, "--per-image"),
        (["DATA", "-o", "c.jsonl", "--rename", "car"], 2, "renames nothing"),
        (["DATA", "-o", "c.jsonl", "--rename", "wagon=car"], 1, "no labels have class wagon"),
        (["DATA", "DATA", "-o", "c.jsonl"], 1, "given twice"),
        (["CHIPS", "-o", "c.jsonl", "--split", "test"], 1, "has no chips of sar in split test, only"),
        (["CHIPS", "-o", "c.jsonl", "--crop", "64"], 1, "holds chips, which are cut already"),
        (["DATA", "-o", "c.jsonl", "--crop", "8"], 2, "--crop"),
        (["cut", "-o", "c.jsonl"], 1, "run the same tile command again"),
        (["broken", "-o", "c.jsonl"], 1, "cannot be read as an image"),
        (["-o", "c.jsonl"], 2, "DATA"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    data, chip_folder, tmp_path, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(tmp_path)
    Path("cut").mkdir()
    Path("cut/tile.json").write_text("{}")
    write_soi(Path("broken"))
    Path("broken/SARDet_50K/JPEGImages/1.png").write_text("none")
    given = [{"DATA": data, "CHIPS": chip_folder}.get(each, each) for each in arguments]
    result = call("instruct", *given)
    (told,) = result.stderr.splitlines()
    assert result.exit_code == code and told.startswith("babelrs-geo: error: ") and words in told, told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "cut"]


def test_stopped_on_the_way_it_leaves_what_was_there(data, tmp_path):
    output = tmp_path / "c.jsonl"
    output.write_text("precious")

    def stop(done, total):
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus([data], output, progress=stop)
    assert output.read_text() == "precious" and list(tmp_path.iterdir()) == [output]


def test_two_folders_of_chips_with_one_name_are_refused(chip_folder, tmp_path):
    (tmp_path / "out").symlink_to(chip_folder)
    other = tmp_path / "other" / "out"
    other.mkdir(parents=True)
    (other / "tile.json").write_text("{}")
    with pytest.raises(ParameterError, match="one name"):
        write_corpus([chip_folder, other], tmp_path / "c.jsonl")


def test_a_disk_that_refuses_is_said(data, tmp_path):
    (tmp_path / "c.meta.json").mkdir()
    with pytest.raises(OutputError, match=r"c\.meta\.json cannot be written"):
        write_corpus([data], tmp_path / "c.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "c.meta.json"]


def test_the_example_of_the_page_runs(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("soi").symlink_to(data)
    page = Path(__file__).parents[1] / "docs" / "pretrain.md"
    (block,) = re.findall(r"^```python\n(.*?Corpus.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(compile(block, str(page), "exec"), names)
    assert len(names["corpus"]) == names["written"].records.total() > 100 and names["conversation"].images


@pytest.mark.shared
def test_every_question_of_the_small_soi_det_is_answered_by_its_labels(tmp_path):
    written = write_corpus([SHARED], tmp_path / "c.jsonl")
    records = check_corpus(SHARED, tmp_path / "c.jsonl", 4)
    assert written.images == {"sar": 789, "ir": 1015, "rgb": 470} and len(records) > 9000
    assert len(Corpus(written.meta)) == len(records)
