"""Suppression and the convolutional prior inside the network, held to torchvision and to torch's own batch norm."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import batched_nms as reference

from babelrs_geo.models.efficientnet import SHOWN, EfficientNetLite0, _Convolution
from babelrs_geo.models.suppression import batched_nms


@given(st.integers(0, 2**32), st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.booleans())
@example(0, 35, 0.3, False)  # two boxes with an IoU of 3/10, which is more than .3 in float32
def test_the_same_boxes_stay_as_by_torchvision(seed, count, iou, ties):
    draw = np.random.default_rng(seed)
    corner = draw.integers(0, 40, (count, 2))
    boxes = torch.tensor(
        np.concatenate([corner, corner + draw.integers(0, 25, (count, 2))], 1), dtype=torch.float32
    )
    scores = torch.tensor(draw.integers(0, 9, count) / 9 if ties else draw.random(count), dtype=torch.float32)
    groups = torch.tensor(draw.integers(0, 3, count))
    assert batched_nms(boxes, scores, groups, iou).tolist() == reference(boxes, scores, groups, iou).tolist()


def test_folded_convolutions_are_those_of_the_batch_norms():
    torch.manual_seed(0)
    mine, tensors, norms = EfficientNetLite0(), [], []
    for conv in [each for each in mine.modules() if isinstance(each, _Convolution)]:
        norm = nn.BatchNorm2d(conv.out_channels, eps=1e-3).eval()
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.data.uniform_(0.5, 1.5)
        tensors += [conv.weight.clone(), norm.weight, norm.bias, norm.running_mean, norm.running_var]
        norms.append((conv, norm))
    copy = EfficientNetLite0()
    assert copy.fold([*tensors, torch.zeros(3)])[0].shape == (3,)
    for conv, norm in norms:  # the norm after each convolution, not folded
        conv.register_forward_hook(lambda module, given, out, norm=norm: norm(out))
    image = torch.rand(1, 3, 61, 97)
    with torch.no_grad():
        for stride, wanted, got in zip((4, 8, 16, 32), mine(image), copy(image), strict=True):
            assert got.shape[2:] == (math.ceil(61 / stride), math.ceil(97 / stride))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert [m.shape[1] for m in copy(image)] == list(SHOWN.values())
    with pytest.raises(ValueError, match="expected at least"):
        copy.fold(tensors[5:])


@pytest.mark.parametrize("size", [7, 8])
def test_the_odd_pixel_of_padding_is_right_and_below(size):
    conv = _Convolution(1, 1, 3, 2)
    image = torch.rand(1, 1, size, size)
    around = (1, 1, 1, 1) if size % 2 else (0, 1, 0, 1)
    torch.testing.assert_close(conv(image), F.conv2d(F.pad(image, around), conv.weight, conv.bias, 2))


def test_detection_needs_neither_torchvision_nor_torchs_compiler():
    """They take longer to import than a small scene to look at."""
    program = """
import sys, numpy
from babelrs_geo.models import zoo
for sensor in ("sar", "rgb"):
    zoo.load("compact").detector(sensor)(numpy.random.default_rng(0).random((1, 3, 64, 64), numpy.float32))
print([name for name in ("torchvision", "torch._dynamo", "timm", "sympy") if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]", told
