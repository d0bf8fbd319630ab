"""Two sensors together: `&` where both saw the same ground, `|` where each has its own.

Both give TorchGeo's `IntersectionDataset` and `UnionDataset`, so its samplers run on them; a sample is nested by
sensor (`samples.collate`), and can be combined again with a third.

* `a & b` of scenes pairs those that share ground, taken at most `GroundOptions.tolerance` apart; the index has one
  row for each pair, its common ground, and its interval (what both times share, or what lies between them).
* `a & b` of chips pairs those of the same name, which `babelrs-geo tile --coregister` gives to the chips of one
  place. Footprints are not laid over one another: overlapping chips would give slivers.
* `a | b` has the rows of both.

As with TorchGeo, the second dataset takes on the first one's CRS and resolution: here a copy of it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import NDArray
from torchgeo.datasets import GeoDataset, IntersectionDataset, UnionDataset

from babelrs_geo.datasets.samples import collate
from babelrs_geo.datasets.times import bounds_of, intervals, within
from babelrs_geo.errors import GeorefError, ParameterError

Rows = NDArray[np.int64]


class Combining(GeoDataset):
    """What scenes, chips and their combinations share: `&`, `|` and views of some rows."""

    named: bool
    """True where pictures are chips, known by their names."""
    tolerance: timedelta | None
    """How far apart in time what `&` pairs may be; None: however far."""

    def __and__(self, other: GeoDataset) -> Paired:
        """What both saw: see the module."""
        return intersect(self, other)

    def __or__(self, other: GeoDataset) -> United:
        """What either saw: see the module."""
        return unite(self, other)

    def view(
        self,
        rows: Rows,
        shapes: NDArray[np.object_] | None = None,
        times: pd.IntervalIndex | None = None,
        whole: bool = True,
    ) -> Self:
        """A copy that indexes `rows` of this one, with other footprints and intervals where they are given.

        With `whole` False no row stands for a picture as a whole any more.
        """
        raise NotImplementedError


class Paired(Combining, IntersectionDataset):
    """TorchGeo's `IntersectionDataset` of two datasets whose rows are paired one to one."""

    def __init__(self, first: Combining, second: Combining) -> None:
        # TorchGeo's own constructor overlays the footprints and intersects the times: the pairing is known here.
        self.datasets = [first, second]
        self.collate_fn, self.transforms = collate, None
        self.named = first.named and second.named
        self.tolerance = _stated(first, second)
        self.index = first.index[["name", "geometry"]].copy()

    def view(
        self,
        rows: Rows,
        shapes: NDArray[np.object_] | None = None,
        times: pd.IntervalIndex | None = None,
        whole: bool = True,
    ) -> Self:
        """Views of both, paired as they were."""
        return type(self)(*(d.view(rows, shapes, times, whole) for d in self.datasets))  # type: ignore[attr-defined]

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of index and queries."""
        return self.datasets[0].crs

    @crs.setter
    def crs(self, new_crs: pyproj.CRS) -> None:
        """Bring both datasets and the pairs to another CRS."""
        for dataset in self.datasets:
            dataset.crs = new_crs
        self.index = self.datasets[0].index[["name", "geometry"]].copy()


class United(Combining, UnionDataset):
    """TorchGeo's `UnionDataset`, nested by sensor."""

    def __init__(self, first: Combining, second: Combining) -> None:
        UnionDataset.__init__(self, first, second, collate_fn=collate)
        self.named = first.named and second.named
        self.tolerance = _stated(first, second)
        self.index = self._joined()

    def __getitem__(self, query: Any) -> dict[str, Any]:
        """As TorchGeo answers a query; a row's number gives that row alone."""
        if not isinstance(query, int | np.integer):
            return UnionDataset.__getitem__(self, query)
        number, first = range(len(self))[query], len(self.datasets[0])
        members: list[Any] = self.datasets
        one = members[0][number] if number < first else members[1][number - first]
        return collate([one])

    def _joined(self) -> gpd.GeoDataFrame:
        return pd.concat([d.index[["name", "geometry"]] for d in self.datasets])

    def view(
        self,
        rows: Rows,
        shapes: NDArray[np.object_] | None = None,
        times: pd.IntervalIndex | None = None,
        whole: bool = True,
    ) -> Self:
        """Views of both; their rows come first one's first."""
        parts, start = [], 0
        for dataset in self.datasets:
            mine = (rows >= start) & (rows < start + len(dataset))
            cut = None if shapes is None else shapes[mine]
            parts.append(dataset.view(rows[mine] - start, cut, None if times is None else times[mine], whole))  # type: ignore[attr-defined]
            start += len(dataset)
        return type(self)(*parts)

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of index and queries."""
        return self.datasets[0].crs

    @crs.setter
    def crs(self, new_crs: pyproj.CRS) -> None:
        """Bring both datasets to another CRS."""
        for dataset in self.datasets:
            dataset.crs = new_crs
        self.index = self._joined()


def intersect(first: GeoDataset, second: GeoDataset) -> Paired:
    """`first & second`. ParameterError where nothing pairs up, GeorefError where there is no common ground to
    pair on.
    """
    one, two = _alike(first, second)
    names = one.named and two.named
    i, j, shapes = _by_name(one, two) if names else _by_ground(one, two)
    tolerance = _stated(one, two)
    near, since, until = within(
        tuple(t[i] for t in bounds_of(one.index.index)),  # type: ignore[arg-type]
        tuple(t[j] for t in bounds_of(two.index.index)),  # type: ignore[arg-type]
        tolerance,
    )
    if not near.any():
        how = "have the same name" if names else "share ground"
        when = (
            "" if tolerance is None or not len(near) else f" and were taken within {tolerance} of each other"
        )
        remedy = (
            "chips of one place share it where they were cut with --coregister" if names else "check both"
        )
        raise ParameterError(f"no two pictures of the datasets {how}{when}; {remedy}")
    i, j, shapes = i[near], j[near], shapes[near]
    times = intervals(since[near], until[near])
    return Paired(one.view(i, shapes, times, names), two.view(j, shapes, times, names))


def unite(first: GeoDataset, second: GeoDataset) -> United:
    """`first | second`. GeorefError where one is mapped and the other is not."""
    one, two = _alike(first, second)
    if one.crs.is_engineering:  # laid out apart from each other too
        shapes = two.index.geometry.to_numpy()
        sides = np.concatenate([_sides(one.index.geometry.to_numpy()), _sides(shapes)])
        aside = one.index.total_bounds[2] + sides.max() - two.index.total_bounds[0]
        two = two.view(
            np.arange(len(two)), shapely.transform(shapes, lambda points: points + np.array([aside, 0.0]))
        )
    ends = (np.concatenate(end) for end in zip(*(bounds_of(d.index.index) for d in (one, two)), strict=True))
    times = intervals(*ends)  # a query of one dataset's row is not for a row of the other by its time
    rows, more = np.arange(len(one)), np.arange(len(two))
    return United(one.view(rows, times=times[: len(one)]), two.view(more, times=times[len(one) :]))


def _sides(shapes: NDArray[np.object_]) -> NDArray[np.float64]:
    box = shapely.bounds(shapes)
    return (box[:, 2:] - box[:, :2]).ravel()


def _alike(first: GeoDataset, second: GeoDataset) -> tuple[Combining, Combining]:
    """Both, the second as a copy in the first one's CRS and resolution."""
    for dataset in (first, second):
        if not isinstance(dataset, Combining):
            raise ParameterError(
                f"{type(dataset).__name__} does not yield samples of this package; combine SceneDataset, "
                "ChipDataset and what & and | make of them"
            )
    assert isinstance(first, Combining) and isinstance(second, Combining)
    two = second.view(np.arange(len(second)))
    two.crs, two.res = first.crs, first.res
    return first, two


def _stated(*datasets: Combining) -> timedelta | None:
    stated = [d.tolerance for d in datasets if d.tolerance is not None]
    return min(stated) if stated else None


def _by_name(one: Combining, two: Combining) -> tuple[Rows, Rows, NDArray[np.object_]]:
    """Positions of chips of the same name. GeorefError where two of them lie in different places."""
    left = pd.DataFrame({"name": one.index["name"].to_numpy(), "i": np.arange(len(one))})
    right = pd.DataFrame({"name": two.index["name"].to_numpy(), "j": np.arange(len(two))})
    pairs = left.merge(right, on="name", how="inner").sort_values("i", kind="stable")
    i, j = pairs["i"].to_numpy(np.int64), pairs["j"].to_numpy(np.int64)
    shapes, others = one.index.geometry.to_numpy()[i], two.index.geometry.to_numpy()[j]
    if not one.crs.is_engineering:
        off = np.abs(shapely.bounds(shapes) - shapely.bounds(others)) / (*one.res, *one.res)
        if off.size and off.max() > 0.5:
            name = pairs["name"].iloc[int(off.max(1).argmax())]
            raise GeorefError(
                f"the chips named {name} lie {off.max():.1f} px apart; chips of one place share a name where they "
                "were cut with --coregister"
            )
    return i, j, shapes


def _by_ground(one: Combining, two: Combining) -> tuple[Rows, Rows, NDArray[np.object_]]:
    """Positions of pictures that share at least a pixel of ground, and what they share."""
    if one.crs.is_engineering:
        raise GeorefError(
            "images without a georeference have no ground to pair on; cut chips that share names"
        )
    mine, theirs = one.index.geometry.to_numpy(), two.index.geometry.to_numpy()
    i, j = shapely.STRtree(theirs).query(mine, predicate="intersects")
    order = np.lexsort((j, i))
    i, j = i[order], j[order]
    shapes = shapely.intersection(mine[i], theirs[j])
    box = shapely.bounds(shapes)
    real = ((box[:, 2:] - box[:, :2]) >= one.res).all(axis=1) & (shapely.area(shapes) >= np.prod(one.res))
    return i[real], j[real], shapes[real]


__all__: Sequence[Any] = ["Combining", "Paired", "United", "intersect", "unite"]
