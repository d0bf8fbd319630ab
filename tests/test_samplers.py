"""Quotas, seeds and views: every random choice is a function of seed, step, rank and place."""

from __future__ import annotations

import multiprocessing
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

from babelrs_geo.boxes import corners, from_corners, rotated_iou_pairs
from babelrs_geo.datasets.samplers import Draw, Mixture, Queries, QuotaSampler
from babelrs_geo.datasets.samples import check, collate, make_sample, pad, scale_boxes
from babelrs_geo.datasets.scenes import SceneDataset
from babelrs_geo.datasets.seeding import Seeded, generator, seeded
from babelrs_geo.datasets.transforms import Augmentation, Together, resize
from babelrs_geo.errors import ParameterError
from babelrs_geo.training.loading import begin_work

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

quotas = st.fixed_dictionaries({"sar": st.integers(1, 3), "rgb": st.integers(0, 3), "ir": st.integers(1, 2)})


def draws(sampler: QuotaSampler) -> list[list[Draw]]:
    return list(sampler)


@settings(max_examples=60)
@given(quotas, st.integers(0, 9), st.integers(1, 4), st.integers(0, 30))
def test_batches_are_a_function_of_seed_step_and_rank(quota, seed, world, start):
    sizes = {"sar": 7, "rgb": 5, "ir": 3}
    for rank in range(world):
        whole = draws(QuotaSampler(sizes, quota, seed, 0, start + 6, rank, world))
        later = draws(QuotaSampler(sizes, quota, seed, start, start + 6, rank, world))
        assert whole[start:] == later
        for step, batch in enumerate(whole):
            assert [d.source for d in batch] == [s for s, n in quota.items() for _ in range(n)]
            assert [d.key for d in batch] == [(seed, step, rank, place) for place in range(len(batch))]
            assert all(0 <= d.number < sizes[d.source] for d in batch)


@settings(max_examples=30)
@given(quotas, st.integers(0, 9), st.integers(1, 4))
def test_ranks_share_each_permutation(quota, seed, world):
    sizes = {"sar": 12, "rgb": 12, "ir": 12}
    ranks = [draws(QuotaSampler(sizes, quota, seed, 0, 12, rank, world)) for rank in range(world)]
    for source, count in quota.items():
        drawn = [
            d.number
            for step in zip(*ranks, strict=True)
            for batch in step
            for d in batch
            if d.source == source
        ]
        assert sorted(drawn) == sorted(list(range(12)) * (count * world))


def _draws_of_a_rank(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put((rank, draws(QuotaSampler({"sar": 9, "rgb": 5}, {"sar": 2, "rgb": 1}, 3, 2, 6))))
    torch.distributed.barrier()  # whoever leaves first would break the other's connection
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_torch_distributed(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_draws_of_a_rank, args=(r, tmp_path / "store", results)) for r in range(2)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=180) for _ in ranks)
    for process in ranks:
        process.join()
    for rank in range(2):
        given = QuotaSampler({"sar": 9, "rgb": 5}, {"sar": 2, "rgb": 1}, 3, 2, 6, rank, 2)
        assert found[rank] == draws(given)


def test_what_cannot_be_mixed_is_told():
    with pytest.raises(ParameterError, match="quotas are of sar and images of rgb"):
        QuotaSampler({"rgb": 3}, {"sar": 1})
    with pytest.raises(ParameterError, match="rank 2 of 2"):
        QuotaSampler({"rgb": 3}, {"rgb": 1}, rank=2, world=2)
    with pytest.raises(ParameterError, match="steps from 3 to 2"):
        QuotaSampler({"rgb": 3}, {"rgb": 1}, start=3, stop=2)
    with pytest.raises(ParameterError, match="which is no source"):
        Mixture({}, {"sar": lambda s, g: s})
    with pytest.raises(TypeError, match="endless"):
        len(QuotaSampler({"rgb": 3}, {"rgb": 1}))


@pytest.fixture
def scenes(make_raster):
    rng = np.random.default_rng(0)
    return {
        sensor: SceneDataset(
            [make_raster(rng.integers(1, 255, (bands, 90, 90), dtype=np.uint8), sensor)], sensor
        )
        for sensor, bands in (("sar", 1), ("rgb", 3), ("ir", 1))
    }


def test_a_mixed_loader_starts_at_any_step_with_any_workers(scenes):
    sources = {s: Queries(d, GridGeoSampler(d, 40, 25)) for s, d in scenes.items()}
    views = {
        s: Augmentation(size=32, oriented=s != "sar", looks=(1, 8) if s == "sar" else None) for s in sources
    }
    mixture = Mixture(sources, views)

    def batches(start, workers):
        sampler = QuotaSampler(mixture.sizes(), {"sar": 2, "rgb": 1, "ir": 1}, 5, start, 8)
        return list(DataLoader(mixture, batch_sampler=sampler, collate_fn=collate, num_workers=workers))

    whole, again = batches(0, 0), batches(5, 2)
    assert len(whole) == 8 and len(again) == 3
    for one, two in zip(whole[5:], again, strict=True):
        assert {s: len(b["image"]) for s, b in one.items()} == {"sar": 2, "rgb": 1, "ir": 1}
        for sensor in one:
            assert torch.equal(one[sensor]["image"], two[sensor]["image"])
            assert one[sensor]["name"] == two[sensor]["name"]
    assert not torch.equal(whole[0]["sar"]["image"], whole[1]["sar"]["image"])


@pytest.mark.parametrize("own", [True, False])
def test_seeding_covers_what_torchgeo_draws_globally(make_raster, own):
    paths = [make_raster(np.full((1, 60, 60), 9 + i, np.uint8), f"s{i}") for i in range(5)]
    dataset = SceneDataset(paths, "sar")

    def queries(sampler):
        return [str(q) for q in sampler]

    def made(kind, **more):
        return kind(dataset, 16, length=12, generator=torch.Generator() if own else None, **more)

    for kind, more in ((RandomGeoSampler, {}), (RandomBatchGeoSampler, {"batch_size": 3})):
        torch.manual_seed(1)
        plain = queries(made(kind, **more))
        torch.manual_seed(2)
        assert plain != queries(made(kind, **more))  # TorchGeo's choice of the scene follows the global state
        first = queries(Seeded(made(kind, **more), 7))
        torch.manual_seed(3)
        before = torch.get_rng_state()
        sampler = Seeded(made(kind, **more), 7)
        assert queries(sampler) == first == queries(sampler)
        assert len(sampler) == len(first)
        assert torch.equal(torch.get_rng_state(), before)
        sampler.set_epoch(1)
        assert queries(sampler) != first


def test_seeded_blocks():
    def both():
        return torch.rand(2).tolist(), random.random()

    torch.manual_seed(0)
    random.seed(0)
    expected = both()
    torch.manual_seed(0)
    random.seed(0)
    with seeded(1, 2, 3):
        inside = both()
    assert both() == expected
    with seeded(1, 2, 3):
        assert both() == inside
    with seeded(1, 2, 4):
        assert both() != inside


class Drawing(torch.utils.data.Dataset):
    """Samples that are drawn from the global generators of torch, NumPy and Python."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002


@pytest.mark.parametrize("begin", [None, begin_work])
def test_what_workers_draw_follows_from_the_loaders_generator(begin):
    def epochs(*key):
        loader = DataLoader(
            Drawing(),
            num_workers=2,
            generator=generator(*key),
            worker_init_fn=begin,
            collate_fn=lambda drawn: drawn[0],
        )
        return [list(loader) for _ in range(2)]

    found = epochs(5, 0)
    assert found == epochs(5, 0)
    numbers = np.array([found, epochs(5, 1), epochs(6, 0)])  # seed and rank, epoch, image, generator
    for kind in range(3):
        assert len(np.unique(numbers[..., kind])) == 3 * 2 * 4


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_boxes_stay_on_their_pixels(seed, oriented, flip):
    image = torch.full((3, 200, 260), 0.2)
    image[:, 80:120, 90:170] = 0.9
    valid = torch.ones(200, 260, dtype=torch.bool)
    valid[:30] = False
    image[:, ~valid] = 0
    sample = make_sample(image, valid, [[130, 100, 80, 40, 0]], [3], sensor="rgb", name="frame")
    view = Augmentation(
        size=128, scale=(0.6, 1.2), oriented=oriented, flip=flip, gamma=0, contrast=0, visible=0.99
    )
    found = view(sample, generator(seed))
    check(found)
    assert found["image"].shape == (3, 128, 128)
    assert torch.equal(found["image"], view(sample, generator(seed))["image"])
    bright = found["image"][0] > 0.55
    for quad in corners(found["boxes"]):
        middle = quad.mean(0)
        for corner in quad:
            inner, outer = middle + (corner - middle) * 0.85, middle + (corner - middle) * 1.25
            if (inner > 1).all() and (inner < 127).all():
                assert bright[int(inner[1]), int(inner[0])]
            if (outer > 1).all() and (outer < 127).all():
                assert not bright[int(outer[1]), int(outer[0])]
    if oriented is False and len(found["boxes"]):
        assert (found["boxes"][:, 4] == 0).all()


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_co_registered_samples_are_seen_from_one_place(seed):
    image = torch.rand(3, 90, 100, generator=torch.Generator().manual_seed(1))
    sar = make_sample(image, None, [[30, 40, 20, 10, 0]], [0], sensor="sar", name="a")
    rgb = make_sample(image, None, [], [], sensor="rgb", name="a")  # labelled by the other alone
    geometry = {"size": 64, "gamma": 0.0, "contrast": 0.0, "turn": 0.0}
    together = Together({"sar": Augmentation(**geometry, oriented=False), "rgb": Augmentation(**geometry)})
    both = together(collate([sar, rgb]), generator(seed))
    assert torch.equal(both["sar"]["image"], both["rgb"]["image"])
    again = together(collate([sar, rgb]), generator(seed))
    assert torch.equal(both["sar"]["image"], again["sar"]["image"])


def test_what_cannot_be_seen_together_is_told():
    with pytest.raises(ParameterError, match="give all one geometry"):
        Together({"sar": Augmentation(oriented=False), "rgb": Augmentation()})
    one = make_sample(torch.zeros(3, 8, 8), None, [], [], sensor="sar", name="a")
    other = make_sample(torch.zeros(3, 8, 9), None, [], [], sensor="rgb", name="a")
    for views in ({"sar": Augmentation()}, {"sar": Augmentation(), "rgb": Augmentation()}):
        with pytest.raises(ParameterError, match="of sar, rgb sized"):
            Together(views)(collate([one, other]), generator(0))


def test_all_eight_ways_to_lay_a_square_come_up():
    image = torch.zeros(3, 64, 64)
    image[:, :20, :40] = 1  # no symmetry
    sample = make_sample(image, None, [], [], sensor="rgb", name="square")
    view = Augmentation(size=64, scale=(1, 1), turn=0, gamma=0, contrast=0)
    ways = {
        tuple((view(sample, generator(k))["image"][0, ::9, ::9] > 0.5).flatten().tolist()) for k in range(80)
    }
    assert len(ways) == 8


def test_speckle_and_polarity():
    flat = make_sample(torch.full((3, 80, 80), 0.3), None, [], [], sensor="sar", name="flat")
    still = {"size": 80, "scale": (1, 1), "turn": 0, "gamma": 0, "contrast": 0}
    for looks in (1.0, 4.0):
        view = Augmentation(**still, looks=(looks, looks))(flat, generator(1))
        check(view)
        noise = (view["image"][0].double() / 0.3) ** 2
        if looks == 4.0:  # few of one look's are within [0, 1]
            assert float(noise.mean()) == pytest.approx(1, abs=0.03)
            assert float(noise.var()) == pytest.approx(1 / looks, rel=0.1)
        assert torch.equal(view["image"][0], view["image"][2])
    warm = Augmentation(**still, invert=1.0)(flat, generator(1))
    assert torch.allclose(warm["image"], torch.tensor(0.7), atol=1e-5)
    shifts = {
        round(float(Augmentation(**still, offset=0.2)(flat, generator(k))["image"].mean()), 3)
        for k in range(9)
    }
    assert len(shifts) > 5 and all(0.1 <= s <= 0.5 for s in shifts)
    for bad in ({"size": 0}, {"scale": (2, 1)}, {"visible": 0}, {"looks": (0, 1)}):
        with pytest.raises(ParameterError):
            Augmentation(**bad)


boxes = st.tuples(st.floats(5, 95), st.floats(5, 95), st.floats(2, 60), st.floats(2, 60), st.floats(-90, 90))


@settings(max_examples=100)
@given(boxes, st.floats(0.3, 3), st.floats(0.3, 3))
def test_axes_scaled_apart(box, sx, sy):
    found = scale_boxes([box], sx, sy)
    plain = from_corners(corners([box]) * (sx, sy))
    assert rotated_iou_pairs(found, plain)[0] > 1 - 1e-6 or box[4] == 0
    assert np.allclose(scale_boxes([(*box[:4], 0.0)], sx, sy)[0, 2:], (box[2] * sx, box[3] * sy, 0))
    assert np.allclose(scale_boxes([box], sx, sx)[0], np.multiply(box, (sx, sx, sx, sx, 1)))


def test_resize_carries_all_along():
    image = torch.zeros(3, 40, 60)
    image[:, 10:20, 15:45] = 1
    sample = make_sample(image, None, [[30, 15, 30, 10, 0]], [0], sensor="ir", name="x")
    small = resize(sample, 20, 120)
    check(small)
    assert np.allclose(small["boxes"][0], [60, 7.5, 60, 5, 0])
    assert small["image"][0, 6:9, 35:85].min() > 0.9 and small["image"][0, 12:].max() < 0.1


def test_collation_pads_and_keeps_sensors_apart():
    def frame(sensor, height, width, count):
        boxes = np.tile([5.0, 5, 4, 4, 0], (count, 1))
        return make_sample(
            np.ones((3, height, width), np.float32), None, boxes, np.zeros(count), sensor=sensor, name=sensor
        )

    batch = collate([frame("sar", 8, 9, 2), frame("rgb", 8, 8, 0), frame("sar", 10, 7, 1)])
    assert list(batch) == ["sar", "rgb"]
    assert batch["sar"]["image"].shape == (2, 3, 10, 9) and batch["rgb"]["valid"].shape == (1, 8, 8)
    assert batch["sar"]["valid"].sum(dim=(1, 2)).tolist() == [72, 70]
    assert [len(b) for b in batch["sar"]["boxes"]] == [2, 1]
    assert {tuple(b.canvas_size) for b in batch["sar"]["boxes"]} == {(10, 9)}
    assert collate([batch, batch])["sar"]["name"] == ["sar"] * 4
    check(pad(frame("sar", 4, 4, 1), 6, 6))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("image", torch.ones(3, 4, 4, dtype=torch.float64), "image is float32"),
        ("image", torch.full((3, 4, 4), 1.5), "values lie in"),
        ("valid", torch.zeros(4, 4, dtype=torch.bool), "zero where not valid"),
        ("labels", torch.tensor([1]), "one a box"),
        ("boxes", torch.zeros(0, 5), "CXCYWHR"),
        ("sensor", "lidar", "sensor is known"),
    ],
)
def test_a_broken_sample_is_named(key, value, told):
    sample = make_sample(np.ones((3, 4, 4), np.float32), None, [], [], sensor="ir", name="frame 7")
    check(sample)
    with pytest.raises(ParameterError, match=f"'frame 7' breaks the contract that .*{told}"):
        check({**sample, key: value})
    with pytest.raises(ParameterError, match="has no 'valid'"):
        check({k: v for k, v in sample.items() if k != "valid"})
