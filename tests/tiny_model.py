"""The detector's classes with tiny numbers, for tests that run it or train it."""

from __future__ import annotations

from dataclasses import replace

from babelrs_geo.models.detector import COMPACT
from babelrs_geo.models.vit import ViTConfig

TINY = replace(
    COMPACT,
    backbone=replace(
        COMPACT.backbone,
        vit=ViTConfig(64, 16, 24, 2, 2, position_std=0.02),
        stages=(1, 1),
        heads=2,
        prior="convolutional",
        prior_width=8,
    ),
    neck_channels=32,
    gfl=replace(COMPACT.gfl, channels=32, groups=8, score=0.0),
    rpn=replace(COMPACT.rpn, channels=16, proposals=20),
    roi=replace(COMPACT.roi, channels=16, score=0.0),
)
