"""One detector for three sensors: shared backbone and neck, a head a sensor (BabelRS section 3).

SAR goes through GFL to horizontal boxes; RGB and infrared each have their own Oriented R-CNN.
`DetectorConfig()` is the paper's full model; `COMPACT` is the same classes with other numbers, for a laptop's
CPU. Images are (N, 3, H, W) float32 in [0, 1], H and W multiples of 32; smaller ones are padded right and
bottom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from babelrs_geo.models.adapter import AdapterConfig, ViTAdapter
from babelrs_geo.models.fpn import SharedFPN
from babelrs_geo.models.gfl import GFLConfig, GFLHead, HorizontalTarget
from babelrs_geo.models.oriented_rcnn import OrientedRoI, OrientedRPN, OrientedTarget, RoIConfig, RPNConfig
from babelrs_geo.models.plain import from_plain
from babelrs_geo.models.vit import ViTConfig

Prediction = tuple[Tensor, Tensor, Tensor]
"""Boxes, scores (n,) and labels (n,) of one image; boxes are (n, 4) xyxy for SAR, (n, 5) le90 otherwise."""

_CLASSES = {
    "sar": ("ship", "aircraft", "car", "tank", "bridge", "harbor"),
    "rgb": (
        "small-vehicle", "large-vehicle", "plane", "Ship", "Harbor", "tennis-court", "soccer-ball-field",
        "ground-track-field", "baseball-diamond", "swimming-pool", "roundabout", "basketball-court",
        "storage-tank", "Bridge", "helicopter",
    ),
    "ir": ("CAR", "BUS", "FERIGHT_CAR", "TRUCK", "VAN"),
}  # fmt: skip


PLAIN_SUM: Mapping[str, float] = {"sar": 1.0, "rgb": 1.0, "ir": 1.0}
"""Loss weights of the paper, whose loss is the plain sum over the sensors."""
RGB_HEAVIER: Mapping[str, float] = {"sar": 1.0, "rgb": 1.5, "ir": 1.0}
"""Loss weights of the original code, from which the published figures come."""


@dataclass(frozen=True)
class DetectorConfig:
    """Architecture and classes. Defaults are the paper's full model on SOI-Det: 378,012,045 parameters."""

    backbone: AdapterConfig = field(default_factory=AdapterConfig)
    neck_channels: int = 256
    gfl: GFLConfig = field(default_factory=GFLConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_CLASSES))
    """Classes a sensor, in the order of the shared label space: SAR first, then RGB, then infrared."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Normalisation of 8-bit values; ImageNet's for every sensor."""
    loss_weights: Mapping[str, float] = field(default_factory=lambda: dict(PLAIN_SUM))
    """Weight of each sensor's losses: `PLAIN_SUM` as the paper writes, or `RGB_HEAVIER` as the original code has
    it. Weights trained either way fit.
    """

    def labels(self, sensor: str) -> slice:
        """The sensor's share of the shared label space."""
        start = 0
        for name in ("sar", "rgb", "ir"):
            stop = start + len(self.classes.get(name, ()))
            if name == sensor:
                return slice(start, stop)
            start = stop
        raise KeyError(sensor)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, for a checkpoint's header."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectorConfig:
        """The configuration from `to_dict`, also after a round through JSON. Raises ParameterError."""
        return from_plain(cls, values)


COMPACT = DetectorConfig(
    backbone=AdapterConfig(
        vit=ViTConfig(image_size=640, dim=192, depth=6, heads=3, position_std=0.02),
        stages=(3, 3),
        heads=6,
        prior="efficientnet_lite0",
        extra_extractors=0,
        gamma=0.5,
        dropout=0.0,
        deform_ratio=0.5,
    ),
    neck_channels=96,
    gfl=GFLConfig(channels=96, convs=2, pre_nms=500, max_boxes=300, score=0.02),
    rpn=RPNConfig(
        channels=96, scale=4.0, pre_nms=400, nms_iou=0.75, proposals=300,
        positive_iou=0.5,  # of .7 a small object has its one best anchor at most
    ),
    roi=RoIConfig(
        channels=256, base_size=28.0, samples=192, max_boxes=300, score=0.02, start_stds=(0.01, 0.001),
        box_weight=2.0,
        nms_iou=0.5,  # the paper's .1 loses people who stand together
    ),
    classes={
        "sar": ("ship",),
        "rgb": (
            "plane", "ship", "storage-tank", "baseball-diamond", "tennis-court", "basketball-court",
            "ground-track-field", "harbor", "bridge", "vehicle",
        ),
        "ir": ("person", "car", "bicycle", "other-vehicle"),
    },
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
    loss_weights=dict(RGB_HEAVIER),
)  # fmt: skip
"""The bundled detector's configuration: EfficientNet-Lite0 as its spatial prior, 15 classes."""


class Detector(nn.Module):
    """The network. Parameter names are those of the published checkpoints."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: DetectorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DetectorConfig()
        classes = sum(len(names) for names in c.classes.values())
        self.backbone = ViTAdapter(c.backbone)
        self.neck = SharedFPN(c.backbone.vit.dim, c.neck_channels)
        self.sar_bbox_head = GFLHead(c.gfl, c.neck_channels, classes)
        self.rgb_rpn_head = OrientedRPN(c.rpn, c.neck_channels)
        self.rgb_roi_head = OrientedRoI(c.roi, c.neck_channels, classes)
        self.ifr_rpn_head = OrientedRPN(c.rpn, c.neck_channels)
        self.ifr_roi_head = OrientedRoI(c.roi, c.neck_channels, classes)
        for name, values in self.normalisation().items():
            self.register_buffer(name, values, persistent=False)

    def normalisation(self) -> dict[str, Tensor]:
        """The buffers `mean` and `std` (1, 3, 1, 1) for values in [0, 1]: configuration, not weights."""
        return {
            name: torch.tensor(getattr(self.config, name)).view(1, 3, 1, 1) / 255 for name in ("mean", "std")
        }

    def features(self, images: Tensor) -> list[Tensor]:
        """Backbone maps of images (N, 3, H, W) in [0, 1]; padding to a multiple of 32 is added after normalising."""
        x = (images - self.mean) / self.std
        bottom, right = -x.shape[2] % 32, -x.shape[3] % 32
        if bottom or right:
            x = nn.functional.pad(x, (0, right, 0, bottom))
        return self.backbone(x.contiguous(memory_format=torch.channels_last))

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Compute the backbone's blocks again in the backward pass: a third more work for much less memory.

        Losses and gradients stay the same.
        """
        self.backbone.checkpoint_gradients(on)

    def oriented_heads(self, sensor: str) -> tuple[OrientedRPN, OrientedRoI]:
        """Proposal and box head of RGB or infrared."""
        return (
            (self.rgb_rpn_head, self.rgb_roi_head)
            if sensor == "rgb"
            else (self.ifr_rpn_head, self.ifr_roi_head)
        )

    def losses(self, batch: Mapping[str, tuple[Tensor, Sequence[Any]]]) -> dict[str, Tensor]:
        """Losses of a batch of mixed sensors: images (n, 3, H, W) of one size and their targets, by sensor.

        Targets are `HorizontalTarget` for SAR and `OrientedTarget` otherwise. One pass of the backbone serves
        all.
        """
        maps = self.features(torch.cat([images for images, _ in batch.values()]))
        out: dict[str, Tensor] = {}
        start = 0
        for sensor, (images, targets) in batch.items():
            mine = [m[start : start + len(images)] for m in maps]
            start += len(images)
            if sensor == "sar":
                losses = self.sar_bbox_head.loss(self.neck(mine, 1), targets)
            else:
                levels = self.neck(mine)
                rpn, roi = self.oriented_heads(sensor)
                outputs = rpn(levels)
                losses = rpn.loss(levels, outputs, targets)
                losses |= roi.loss(levels, rpn.proposals(levels, outputs), targets)
            weight = self.config.loss_weights[sensor]
            out |= {f"{sensor}_{name}": weight * value for name, value in losses.items()}
        return out

    @torch.no_grad()
    def predict(
        self, images: Tensor, sensor: str, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Prediction]:
        """Objects in images of one sensor; `sizes` are (height, width) without padding. Labels are the shared ones."""
        sizes = sizes or [(images.shape[2], images.shape[3])] * len(images)
        return self.finish(*self.dense(images, sensor), sensor, sizes)

    def dense(self, images: Tensor, sensor: str) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
        """The neck's maps and the outputs of the sensor's first head, for any images alike: no boxes yet."""
        maps = self.features(images)
        levels = self.neck(maps, 1 if sensor == "sar" else 0)
        head = self.sar_bbox_head if sensor == "sar" else self.oriented_heads(sensor)[0]
        return levels, head(levels)

    @torch.no_grad()
    def finish(
        self,
        levels: Sequence[Tensor],
        outputs: tuple[list[Tensor], list[Tensor]],
        sensor: str,
        sizes: Sequence[tuple[int, int]],
    ) -> list[Prediction]:
        """Objects from what `dense` gave."""
        labels = self.config.labels(sensor)
        if sensor == "sar":
            return self.sar_bbox_head.boxes(outputs, sizes, labels)
        rpn, roi = self.oriented_heads(sensor)
        return roi.predict(levels, rpn.proposals(levels, outputs), sizes, labels)


__all__ = ["COMPACT", "Detector", "DetectorConfig", "HorizontalTarget", "OrientedTarget", "Prediction"]
