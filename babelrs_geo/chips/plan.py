"""What will be cut, before any pixel is read: blocks of ground, their splits, regions, chips, and tasks.

A scene is parted into *blocks* of a few chips a side, on whole blocks of the file. Blocks of different scenes that
lie on the same ground are linked, and each group goes to one split as a whole; a scene of fewer than four blocks is one
block. Neighbouring blocks of one split in a row are joined to a *region*, and the grid of chips lies inside a region:
no pixel of a scene is in two regions, hence none is in two splits, and every block of the file belongs to one task,
which decodes it once. Where chips of different scenes and splits still share ground (grids that do not line up),
those of the lower-priority split are left out: train before val before test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from babelrs_geo.boxes import bounds
from babelrs_geo.chips.ground import outlines, sharing
from babelrs_geo.chips.options import SPLITS, ChipOptions
from babelrs_geo.chips.shown import background, shown
from babelrs_geo.scenes import Scene
from babelrs_geo.tiling import Grid, Rect
from babelrs_geo.vectors import Objects

_ALIGN = (
    512  # most files' blocks divide it, so that scenes of one grid are parted alike however they are stored
)
_LARGEST = 4096  # blocks of a file beyond this are not kept whole: a block of ground would be too large
_FEW = 4  # a scene of fewer blocks stays whole
_FAIR = 2  # groups of blocks for each split, from which on none stays empty
_RUN = 6  # blocks a region has at most: bounds the memory of a task
_LINKED = 0.01  # of a block's ground shared with another scene's: they go to the same split
_SEQUENTIAL = {"PNG", "JPEG", "GIF", "BMP", "WEBP"}  # formats that can only be decoded from the start


@dataclass(frozen=True, eq=False)
class Entry:
    """A scene of a run."""

    name: str
    """First part of its chips' names."""
    folder: str
    """Folder of its chips under images/."""
    source: str
    """Where the scene came from, for the index."""
    scene: Scene
    objects: Objects | None
    """Its labels in scene pixels; None where the run has no labels."""


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip to be cut."""

    name: str
    rect: Rect
    split: str
    footprint: shapely.Geometry | None


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of one split, with the chips of its own grid."""

    rect: Rect
    chips: tuple[Chip, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """What one worker does at once: regions of a scene that share blocks of the file with no other task."""

    key: str
    """Names the task's part of the index; the same whenever the same is asked."""
    entry: Entry
    regions: tuple[Region, ...]
    rows: NDArray[np.int64] | None = None
    """Which of the scene's objects the entry holds; None for all."""

    @property
    def pixels(self) -> int:
        """Of all its chips."""
        return sum(c.rect.width * c.rect.height for region in self.regions for c in region.chips)

    def light(self) -> Task:
        """The same with the objects it needs alone: what is sent to a worker."""
        objects = self.entry.objects
        if objects is None:
            return self
        edge = bounds(objects.boxes)
        low = np.min([r.rect[:2] for r in self.regions], 0)
        high = np.max([(r.rect.x1, r.rect.y1) for r in self.regions], 0)
        rows = np.flatnonzero((edge[:, :2] < high).all(1) & (edge[:, 2:] > low).all(1))
        return replace(self, entry=replace(self.entry, objects=objects[rows]), rows=rows)


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a run will do."""

    tasks: tuple[Task, ...]
    conflicts: int
    """Chips left out because a chip of another scene and split lies on their ground."""
    area: dict[str, int] = field(default_factory=dict)
    """Pixels of ground handed to each split."""


def plan(entries: Sequence[Entry], options: ChipOptions) -> Plan:
    """Part the scenes, hand out splits, lay the grids, and leave out chips on another split's ground."""
    blocks = [_blocks(entry.scene, options) for entry in entries]
    splits, area = _assign(entries, blocks, options)
    regions = [
        _regions(entry, rows, names, options)
        for entry, rows, names in zip(entries, blocks, splits, strict=True)
    ]
    lost = _conflicts(regions) if len(entries) > 1 else set()
    tasks = []
    for number, (entry, rows) in enumerate(zip(entries, regions, strict=True)):
        kept = [
            [Region(r.rect, tuple(c for c in r.chips if id(c) not in lost)) for r in row if r.chips]
            for row in rows
        ]
        for group in _groups(entry.scene, kept):
            group = [region for region in group if region.chips]
            if group:
                first = group[0].rect
                tasks.append(Task(f"{number:05d}_{first.y}_{first.x}", entry, tuple(group)))
    return Plan(tuple(tasks), len(lost), area)


def _blocks(scene: Scene, options: ChipOptions) -> list[list[Rect]]:
    """Rows of the scene's blocks; together they partition it."""
    span = options.size + (options.block - 1) * (options.size - options.overlap)
    down, across = scene.facts.block
    columns = _cuts(
        scene.width, _side(span, across if across < scene.width else 1, options.size), options.size
    )
    rows = _cuts(scene.height, _side(span, down if down < scene.height else 1, options.size), options.size)
    if (len(columns) - 1) * (len(rows) - 1) < _FEW:
        return [[Rect(0, 0, scene.width, scene.height)]]
    return [
        [Rect(x, y, x1 - x, y1 - y) for x, x1 in zip(columns, columns[1:], strict=False)]
        for y, y1 in zip(rows, rows[1:], strict=False)
    ]


def _side(span: int, file_block: int, size: int) -> int:
    """Pixels of a block's side: about `span`, at least `size`, in whole blocks of the file."""
    unit = min(_ALIGN, 1 << (max(span // 2, 16).bit_length() - 1))
    if unit % file_block and file_block <= _LARGEST:
        unit = file_block
    return max(round(span / unit), -(-size // unit), 1) * unit


def _cuts(length: int, side: int, size: int) -> list[int]:
    """Where blocks start along an axis, and its end; the last block takes what is left over."""
    count = max(1, round(length / side))
    while count > 1 and length - (count - 1) * side < size:
        count -= 1
    return [i * side for i in range(count)] + [length]


def _assign(
    entries: Sequence[Entry], blocks: list[list[list[Rect]]], options: ChipOptions
) -> tuple[list[dict[Rect, str]], dict[str, int]]:
    """The split of every block, by scene, and the pixels each split got.

    Groups of linked blocks come in an order drawn by lot from the place of their first block, and each goes to the
    split that lacks most of its share: shares are met as closely as the blocks allow, but none stays empty where there
    are two groups for each.
    """
    flat = [[rect for row in rows for rect in row] for rows in blocks]
    grounds = [outlines(rects, entry.scene.georef) for entry, rects in zip(entries, flat, strict=True)]
    roots = _linked(grounds)
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, root in roots.items():
        members.setdefault(root, []).append(place)
    weight = {root: sum(flat[s][b].width * flat[s][b].height for s, b in of) for root, of in members.items()}
    total = sum(weight.values())
    lack = {name: share * total for name, share in zip(SPLITS, options.split, strict=True) if share > 0}

    def order(root: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        shape, rect = grounds[root[0]][root[1]], flat[root[0]][root[1]]
        centre = f"{entries[root[0]].name} {rect.x} {rect.y}" if shape is None else _place(shape)
        return options.lot(centre), root

    chosen: dict[tuple[int, int], str] = {}
    area = dict.fromkeys(SPLITS, 0)
    left = sorted(members, key=order)
    fair = len(left) >= _FAIR * len(lack)
    for number, root in enumerate(left):
        bare = [split for split in lack if not area[split]]
        last = fair and len(left) - number <= len(bare)  # what is left is needed so that none stays empty
        name = max(bare if last else lack, key=lambda split: lack[split])
        lack[name] -= weight[root]
        area[name] += weight[root]
        chosen[root] = name
    return [{rect: chosen[roots[s, b]] for b, rect in enumerate(rects)} for s, rects in enumerate(flat)], area


def _place(shape: shapely.Geometry) -> str:
    """A block's ground as text that rounding does not change: about ten metres."""
    west, south, east, north = shape.bounds
    return f"{(west + east) / 2:.4f} {(south + north) / 2:.4f}"


def _linked(grounds: list[NDArray[np.object_]]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every block (scene, number) the block that stands for its group.

    Scenes come by the size of their blocks on the ground, largest first. A block joins the one earlier block it
    shares most ground with: groups never grow together, as they would if all that overlap were joined.
    """

    def size(s: int) -> float:
        held = [shapely.area(g) for g in grounds[s] if g is not None]
        return -round(float(np.log2(max(np.mean(held), 1e-30))), 1) if held else 0.0

    roots: dict[tuple[int, int], tuple[int, int]] = {}
    shapes: list[shapely.Geometry] = []
    known: list[tuple[int, int]] = []
    for s in sorted(range(len(grounds)), key=lambda s: (size(s), s)):
        own = grounds[s]
        best: dict[int, tuple[float, int]] = {}
        for i, j, shared in zip(*sharing(own, np.array(shapes, object)), strict=True):
            if shared > _LINKED * shapely.area(own[i]) and shared > best.get(int(i), (0.0, 0))[0] * (
                1 + 1e-6
            ):
                best[int(i)] = (float(shared), int(j))
        for b in range(len(own)):
            roots[s, b] = roots[known[best[b][1]]] if b in best else (s, b)
        known += [(s, b) for b in range(len(own))]
        shapes += list(own)
    return roots


def _regions(
    entry: Entry, rows: list[list[Rect]], splits: dict[Rect, str], options: ChipOptions
) -> list[list[Region]]:
    """Rows of regions: neighbours of one split in a row joined, each with the chips that are wanted of it."""
    found = []
    for row in rows:
        runs: list[list[Rect]] = []
        for rect in row:
            if runs and splits[rect] == splits[runs[-1][0]] and len(runs[-1]) < _RUN:
                runs[-1].append(rect)
            else:
                runs.append([rect])
        found.append([_region(entry, run, splits[run[0]], options) for run in runs])
    return found


def _region(entry: Entry, run: list[Rect], split: str, options: ChipOptions) -> Region:
    whole = Rect(run[0].x, run[0].y, run[-1].x1 - run[0].x, run[0].height)
    tiles = Grid(whole.width, whole.height, options.size, options.overlap)
    every = [Rect(t.outer.x + whole.x, t.outer.y + whole.y, t.outer.width, t.outer.height) for t in tiles]
    named = _wanted(entry.objects, whole, {f"{entry.name}_{r.x}_{r.y}": r for r in every}, options)
    shapes = outlines(list(named.values()), entry.scene.georef)
    return Region(
        whole,
        tuple(Chip(name, r, split, shape) for (name, r), shape in zip(named.items(), shapes, strict=True)),
    )


def _wanted(
    objects: Objects | None, whole: Rect, named: dict[str, Rect], options: ChipOptions
) -> dict[str, Rect]:
    """The chips of a region that are cut where their pixels are valid: with objects, or drawn as background."""
    if objects is None or options.background == 1:
        return named
    near = objects[shown(objects, whole).rows]
    return {
        name: rect
        for name, rect in named.items()
        if background(name, options) or shown(near, rect).kept(options).any()
    }


def _conflicts(regions: list[list[list[Region]]]) -> set[int]:
    """Identities of the chips that lie on ground of another scene's chip of a split that goes before theirs."""
    chips = [(s, c) for s, rows in enumerate(regions) for row in rows for r in row for c in r.chips]
    scene = np.array([s for s, _ in chips])
    rank = np.array([SPLITS.index(c.split) for _, c in chips])
    shapes = np.array([c.footprint for _, c in chips], object)
    lost: set[int] = set()
    for low in reversed(range(len(SPLITS) - 1)):  # what is left out itself leaves out nothing
        mine, others = np.flatnonzero(rank == low), np.flatnonzero(rank > low)
        others = others[[id(chips[k][1]) not in lost for k in others]]
        i, j, _ = sharing(shapes[mine], shapes[others])
        apart = scene[mine[i]] != scene[others[j]]
        lost |= {id(chips[k][1]) for k in mine[i[apart]]}
    return lost


def _groups(scene: Scene, rows: list[list[Region]]) -> list[list[Region]]:
    """Regions that one task reads, so that no two tasks decode the same block of the file."""
    if scene.driver in _SEQUENTIAL:
        return [[region for row in rows for region in row]]
    if any(region.rect.x % scene.facts.block[1] for row in rows for region in row):
        return rows  # the file is stored in strips: a row of regions is read at once
    return [[region] for row in rows for region in row]
