"""The sample: one dictionary that every dataset yields, and how samples become a batch.

| key | what it is |
|---|---|
| `image` | float32 tensor (3, h, w) in [0, 1]: model input, zero where not valid |
| `valid` | bool tensor (h, w), True where the scene was really seen |
| `boxes` | `BoundingBoxes` float32 (N, 5), CXCYWHR in pixels of the image, degrees counter-clockwise; whole boxes, which may reach beyond the edge; canvas (h, w), `clamping_mode` None |
| `labels` | int64 tensor (N,), indices into the dataset's `classes` |
| `sensor` | `sar`, `ir` or `rgb` |
| `name` | of the scene, chip or frame |

Datasets on the ground add, as TorchGeo 0.8 spells them, `crs` (the dataset's) and `bounds` (the query that was
answered: slices of x, y and time), and `transform` (`Affine` from pixels of the image to `crs`, None where there
is none: control points, RPCs, another CRS, no georeference), `window` and `scale`: the image is
`Scene.read(window, scale)`, padded with pixels that are not valid where the window leaves the scene.

A batch is nested by sensor, `{sensor: batch}`, with the same keys: `image` (n, 3, h, w) and `valid` (n, h, w) are
stacked, everything else is a list of n. Sensors are never mixed in one tensor.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from babelrs_geo.boxes import corners, from_corners
from babelrs_geo.errors import LabelError, ParameterError
from babelrs_geo.sensors import Sensor

Sample = dict[str, Any]
"""What the table above says."""

Batch = dict[str, Any]
"""The same keys, stacked or as lists."""


def as_boxes(boxes: ArrayLike | Tensor, canvas: tuple[int, int]) -> BoundingBoxes:
    """Boxes (N, 5) as torchvision takes them: float32, canvas (height, width), never clamped."""
    rows = torch.as_tensor(np.asarray(boxes, np.float32).reshape(-1, 5))
    return BoundingBoxes(rows, format=BoundingBoxFormat.CXCYWHR, canvas_size=canvas, clamping_mode=None)


def make_sample(
    image: NDArray[np.float32] | Tensor,
    valid: NDArray[np.bool_] | Tensor | None,
    boxes: ArrayLike,
    labels: ArrayLike,
    *,
    sensor: str,
    name: str,
) -> Sample:
    """A sample from (3, h, w) in [0, 1], (h, w) or None for all valid, (N, 5) and (N,)."""
    picture = torch.as_tensor(image)
    height, width = picture.shape[1:]
    seen = torch.ones(height, width, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return {
        "image": picture,
        "valid": seen,
        "boxes": as_boxes(boxes, (height, width)),
        "labels": torch.as_tensor(np.asarray(labels, np.int64).reshape(-1)),
        "sensor": str(sensor),
        "name": name,
    }


def check(sample: Mapping[str, Any], classes: int | None = None) -> None:
    """Raise ParameterError, naming the sample, where it breaks the contract; `classes` is how many there are."""
    name = sample.get("name")
    for key in ("image", "valid", "boxes", "labels", "sensor", "name"):
        if key not in sample:
            raise ParameterError(f"sample {name!r} has no {key!r}; datasets.samples says what a sample holds")
    image, valid, boxes, labels = (sample[key] for key in ("image", "valid", "boxes", "labels"))
    height, width = image.shape[-2:]
    right = {
        "image is float32 (3, h, w)": image.dtype == torch.float32 and image.shape == (3, height, width),
        "valid is bool (h, w)": valid.dtype == torch.bool and valid.shape == (height, width),
        "boxes are CXCYWHR (N, 5)": isinstance(boxes, BoundingBoxes)
        and boxes.format is BoundingBoxFormat.CXCYWHR
        and boxes.ndim == 2
        and boxes.shape[1] == 5,
        "labels are int64, one a box": labels.dtype == torch.int64 and labels.shape == (len(boxes),),
    }
    if all(right.values()):
        right |= {
            "values lie in [0, 1]": not image.numel() or bool(image.min() >= 0 and image.max() <= 1),
            "pixels are zero where not valid": not bool(image[:, ~valid].any()),
            "the canvas is the image and boxes are not clamped": tuple(boxes.canvas_size) == (height, width)
            and boxes.clamping_mode is None,
            "labels are classes": not len(labels)
            or bool(labels.min() >= 0 and (classes is None or labels.max() < classes)),
            "the sensor is known": sample["sensor"] in set(Sensor),
        }
    for promise, held in right.items():
        if not held:
            raise ParameterError(f"sample {name!r} breaks the contract that {promise}")


def label_indices(names: Iterable[str], classes: Sequence[str], source: object) -> NDArray[np.int64]:
    """Class names to indices (N,) into `classes`. LabelError naming `source` for a name that is not there."""
    place = {name: i for i, name in enumerate(classes)}
    try:
        return np.array([place[name] for name in names], np.int64)
    except KeyError as error:
        raise LabelError(
            f"{source} has class {error.args[0]!r}; expected one of {', '.join(classes) or 'none'}"
        ) from None


def scale_boxes(boxes: ArrayLike, sx: float, sy: float) -> NDArray[np.float64]:
    """Boxes (N, 5) of an image whose columns are scaled by `sx` and rows by `sy`.

    Where the two differ a turned box becomes a parallelogram: the smallest rectangle around it is taken.
    """
    given = np.asarray(boxes, np.float64).reshape(-1, 5)
    if sx == sy:
        return given * (sx, sy, sx, sy, 1.0)
    scaled = from_corners(corners(given) * (sx, sy))
    upright = given[:, 4] == 0.0
    scaled[upright] = given[upright] * (sx, sy, sx, sy, 1.0)
    return scaled


def collate(samples: Iterable[Mapping[str, Any]]) -> dict[str, Batch]:
    """Samples, or what this function made of some, to `{sensor: batch}`, in the order they come.

    It is the `collate_fn` of a DataLoader and of TorchGeo's combined datasets alike. Images of one sensor that
    differ in size are padded to the largest at the right and the bottom, with pixels that are not valid.
    """
    flat: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        for one in [sample] if "image" in sample else [s for b in sample.values() for s in unbatch(b)]:
            flat.setdefault(one["sensor"], []).append(one)
    return {sensor: _stack(group) for sensor, group in flat.items()}


def unbatch(batch: Mapping[str, Any]) -> list[Sample]:
    """The samples of one sensor's batch."""
    return [
        {key: value if key == "sensor" else value[i] for key, value in batch.items()}
        for i in range(len(batch["image"]))
    ]


def _stack(group: Sequence[Mapping[str, Any]]) -> Batch:
    height, width = (max(s["image"].shape[axis] for s in group) for axis in (1, 2))
    padded = [pad(s, height, width) for s in group]
    keys = [key for key in group[0] if all(key in s for s in group)]
    batch: Batch = {key: [s[key] for s in padded] for key in keys}
    batch["image"], batch["valid"] = torch.stack(batch["image"]), torch.stack(batch["valid"])
    batch["sensor"] = group[0]["sensor"]
    return batch


def pad(sample: Mapping[str, Any], height: int, width: int) -> Sample:
    """The sample with at least `height` rows and `width` columns: what is added, at the right and the bottom,
    is not valid.
    """
    rows, columns = sample["image"].shape[1:]
    more = (0, max(width - columns, 0), 0, max(height - rows, 0))
    if not any(more):
        return dict(sample)
    image, valid = F.pad(sample["image"], more), F.pad(sample["valid"], more)
    return {
        **sample,
        "image": image,
        "valid": valid,
        "boxes": as_boxes(sample["boxes"], (image.shape[1], image.shape[2])),
    }
