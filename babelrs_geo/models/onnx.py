"""A detector as ONNX, for programs without torch: what is the same work for every image, without boxes.

Exported are backbone, neck and the first head of one sensor (`Detector.dense`). Suppression, and the second stage of
the oriented detectors, depend on what is found and stay outside: `Detector.finish` does them in torch. The batch is
free, the size of the images is the one that the weights were made for.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from babelrs_geo.errors import OutputError, ParameterError
from babelrs_geo.models import checkpoints, zoo
from babelrs_geo.models.detector import Detector

NEEDED = 'pip install "babelrs-geo[onnx]"'


class Dense(nn.Module):
    """`Detector.dense` for one sensor as a module: a batch (N, 3, H, W) in [0, 1] to a flat tuple of tensors."""

    def __init__(self, model: Detector, sensor: str) -> None:
        super().__init__()
        self.model, self.sensor = model, sensor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels, (first, second) = self.model.dense(images, self.sensor)
        # SAR's boxes need its head's outputs alone
        return (*(() if self.sensor == "sar" else levels), *first, *second)

    def names(self) -> list[str]:
        """What the outputs are called, by stride: what each is stands in `docs/weights.md`."""
        sar = self.sensor == "sar"
        kinds = ["scores", "sides"] if sar else ["maps", "scores", "deltas"]
        strides = self.model.config.gfl.strides if sar else self.model.config.rpn.strides
        return [f"{kind}_{stride}" for kind in kinds for stride in strides]

    def unpack(self, outputs: tuple[Tensor, ...]) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
        """What `Detector.finish` takes, from the flat tuple."""
        n = len(self.model.config.gfl.strides)
        parts = [list(outputs[k : k + n]) for k in range(0, len(outputs), n)]
        return ([] if self.sensor == "sar" else parts[0]), (parts[-2], parts[-1])


def export_onnx(
    weights: str | os.PathLike[str], output: str | os.PathLike[str], sensor: str, *, overwrite: bool = False
) -> list[str]:
    """Write the part of a detector that `Dense` is, with its header in the file's metadata; give its outputs' names.

    Raises WeightsError where the weights are no detector of the sensor, ParameterError where a package for it is not
    there or the output is not called .onnx, OutputError where it exists or cannot be written.
    """
    path, target = zoo.find(weights), Path(output)
    header = checkpoints.read_header(path)
    header.chosen(sensor)
    if target.suffix != ".onnx":
        raise ParameterError(f'the output is "{target}", expected a name that ends with .onnx')
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(f"{target} exists already: choose another name, or pass --overwrite to replace it")
    try:
        import onnxscript  # noqa: F401
    except ImportError as cause:
        raise ParameterError(
            f"ONNX is written by onnx and onnxscript, which are not installed: {NEEDED}"
        ) from cause
    module = Dense(checkpoints.load(path)[0], sensor).eval()
    # two images, since an axis of one is taken for fixed
    images = torch.zeros(2, 3, header.tile, header.tile)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=module.names(),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=1024)}},
        )
    if program is None:
        raise ParameterError("torch gave no ONNX program; use the torch that setup.cfg asks for")
    program.model.metadata_props.update({checkpoints.KEY: header.to_json(), "sensor": sensor})
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder, target.name)
            program.save(draft)
            draft.replace(target)
    except OSError as cause:
        raise OutputError(f"{target} cannot be written ({cause.strerror}); choose another place") from cause
    return module.names()
