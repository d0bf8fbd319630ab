"""The detector, timed: `python benchmarks/model.py` (some minutes; `--parts compact` one; the full model needs 8 GB).

Each row is a median over repeats, beside the time that its floating-point operations alone would take: those of
linear layers, attention and convolutions (torch's FlopCounterMode), at the rate of the best large matrix product
of the same type in the same run. What is not counted, and so lowers the share, is all that only moves memory:
norms, activations, the sampling of deformable attention and RoIAlign, sorting and NMS. Peak memory is that of a
process of its own, over what it held once the model was loaded. Thresholds of the heads are lowered until each finds
a hundred objects in the made-up image, so that NMS counts; with `--checkpointing` blocks are computed again
in the backward pass. Do not run beside anything else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from babelrs_geo.models.checkpoints import load
from babelrs_geo.models.detector import Detector, HorizontalTarget, OrientedTarget
from babelrs_geo.models.rotated import outer

WEIGHTS = Path(__file__).parents[1] / "babelrs_geo" / "models" / "weights" / "compact.safetensors"
SIZE = {"full": 800, "compact": 640}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORK = ("trunk", "trunk+backward", "sar", "rgb", "ir", "losses+backward")
DEMANDED = {
    ("full", "trunk"): 0.6,
    ("compact", "trunk"): 0.4,
    ("compact", "sar"): 0.25,
    ("compact", "rgb"): 0.25,
}
"""Least share of the time of the operations alone, forward in fp32."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    part: str
    work: str
    dtype: str
    seconds: float
    gflop: float
    rate: float
    """GFLOP/s of the best large matrix product."""
    memory_mb: float

    @property
    def share(self) -> float:
        """Of the time of the operations alone."""
        return self.gflop / self.rate / self.seconds


def timed(action: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one call to warm up."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def best_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of some large square matrix products."""
    best = 0.0
    for n in (1024, 2048, 3072):
        a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def counted(action: Callable[[], Any]) -> float:
    """GFLOP of one call: linear layers, attention and convolutions, forward and backward."""

    def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def fused_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return int(2.5 * sdpa_flop_count(query, key, value))  # scores again, and four products of their size

    def convolution_backward(gradient: Any, image: Any, kernel: Any, *rest: Any, **_: Any) -> int:
        transposed, wanted = rest[4], rest[7]
        return conv_flop_count(image, kernel, gradient, transposed) * sum(wanted[:2])

    # torch counts its fused attention of GPUs, not the one of CPUs, and the backward pass of depthwise convolutions
    # as if they were dense
    own = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: fused_backward,
        torch.ops.aten.convolution_backward: convolution_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        action()
    return counter.get_total_flops() / 1e9


def scene(size: int) -> Tensor:
    """An image (1, 3, size, size) in [0, 1] with structure at several scales."""
    torch.manual_seed(0)
    image = torch.zeros(1, 3, size, size)
    for cells in (4, 16, 64):
        noise = torch.rand(1, 3, cells, cells)
        image += torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear") / 3
    return image


def crowded(model: Detector, image: Tensor, sensor: str, boxes: int = 100) -> None:
    """Lower the sensor's score threshold until it finds `boxes` objects, so that NMS has something to do."""
    head = model.sar_bbox_head if sensor == "sar" else model.oriented_heads(sensor)[1]
    while len(model.predict(image, sensor)[0][0]) < boxes and head.config.score > 1e-9:
        head.config = replace(head.config, score=head.config.score / 1.5)


def actions(model: Detector, image: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. `trunk` is the backbone with the neck's RGB call."""

    def trunk() -> list[Tensor]:
        with torch.no_grad():
            return model.neck(model.features(image))

    def back(loss: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        loss.backward()

    size = image.shape[2]
    corner = torch.linspace(60, size - 60, 8)
    boxes = torch.stack([corner, corner.flip(0), *(torch.full((8,), v) for v in (48.0, 20.0, 0.4))], 1)
    images = dict.fromkeys(("sar", "rgb", "ir"), image)
    targets: dict[str, Any] = {}
    for sensor in images:
        labels = torch.full((8,), model.config.labels(sensor).start)
        horizontal = sensor == "sar"
        kind = HorizontalTarget if horizontal else OrientedTarget
        targets[sensor] = kind(outer(boxes) if horizontal else boxes, labels, (size, size))
    return {
        "trunk": trunk,
        "trunk+backward": lambda: back(
            torch.stack([m.float().mean() for m in model.neck(model.features(image))]).sum()
        ),
        **{s: partial(model.predict, image, s) for s in images},
        "losses+backward": lambda: back(
            torch.stack(list(model.losses({s: (x, [targets[s]]) for s, x in images.items()}).values())).sum()
        ),
    }


def measure(part: str, work: str, dtype: str, args: argparse.Namespace) -> Row:
    """One row, in the calling process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load(WEIGHTS)[0] if part == "compact" else Detector().to(memory_format=torch.channels_last).eval()
    model.requires_grad_("backward" in work)
    model.checkpoint_gradients(args.checkpointing)
    image = scene(SIZE[part])
    rate = best_rate(DTYPES[dtype])
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        if work in ("sar", "rgb", "ir"):
            crowded(model, image, work)
        action = actions(model, image)[work]
        seconds = timed(action, args.repeats)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gflop = counted(action)
    rate = max(rate, best_rate(DTYPES[dtype]))
    return Row(part, work, dtype, seconds, gflop, rate, (peak - held) / 1024)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="full,compact")
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{args.threads} threads, medians of {args.repeats}; three images for losses+backward\n")
    print(
        "| part | work | type | s | GFLOP | GEMM GFLOP/s | share of the operations' time | demanded | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for part in args.parts.split(","):
        for work in args.work.split(","):
            for dtype in args.dtypes.split(","):
                # A process of its own, so that its peak is its own.
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, (part, work, dtype, args))
                rows.append(asdict(row) | {"share": row.share})
                least = DEMANDED.get((part, work)) if dtype == "fp32" else None
                print(
                    f"| {part} | {work} | {dtype} | {row.seconds:.3f} | {row.gflop:.1f} | {row.rate:.0f} | "
                    f"{row.share:.0%} | {f'{least:.0%}' if least else ''} | {row.memory_mb:.0f} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
