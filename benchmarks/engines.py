"""The compact detector by several engines on a CPU: `python benchmarks/engines.py --sensor sar` (3 minutes, idle).

Timed is the whole forward pass with heads and suppression, on an image of structure at several scales with the score
threshold lowered until a hundred boxes are found. Engines run backbone, neck and the first head (`Detector.dense`);
what depends on the boxes runs in torch in all of them. Rounds take turns; the ratio is to torch as it is used, in the
same round. Boxes are compared with torch's in float32: an engine's are equal where it finds the same rows, coordinates
within .01 px and scores within 1e-3. ONNX Runtime and OpenVINO are timed where they are installed; --compile tries
torch.compile as well, which may take many minutes before its first image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babelrs_geo.models.checkpoints import load
from babelrs_geo.models.detector import Detector, Prediction
from babelrs_geo.models.onnx import Dense, export_onnx

WEIGHTS = Path(__file__).parents[1] / "babelrs_geo" / "models" / "weights" / "compact.safetensors"
Engine = Callable[[Tensor], tuple[Tensor, ...]]


def scene(batch: int, size: int) -> Tensor:
    """Images (batch, 3, size, size) in [0, 1] with structure at several scales."""
    torch.manual_seed(0)
    image = torch.zeros(batch, 3, size, size)
    for cells in (4, 16, 64):
        noise = torch.rand(batch, 3, cells, cells)
        image += torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear") / 3
    return image


def crowded(model: Detector, image: Tensor, sensor: str) -> None:
    """Lower the score threshold until a hundred objects are found."""
    head = model.sar_bbox_head if sensor == "sar" else model.oriented_heads(sensor)[1]
    while len(model.predict(image[:1], sensor)[0][0]) < 100 and head.config.score > 1e-9:
        head.config = replace(head.config, score=head.config.score / 1.5)


def traced(dense: Dense, images: Tensor) -> Engine:
    """TorchScript, frozen and optimised for inference (oneDNN's fusions)."""
    script = torch.jit.freeze(torch.jit.trace(dense, images, check_trace=False))
    return torch.jit.optimize_for_inference(script)


def bf16(dense: Dense, images: Tensor) -> Engine:
    """Autocast; heads give float32."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tuple(t.float() for t in dense(x))

    return run


def contiguous(dense: Dense, images: Tensor) -> Engine:
    """Weights in channels-first order, as they would be without `channels_last`."""
    copy = Dense(load(WEIGHTS)[0].to(memory_format=torch.contiguous_format), dense.sensor).eval()
    return copy


def compiled(dense: Dense, images: Tensor) -> Engine:
    """torch.compile with its default backend."""
    return torch.compile(dense)


def onnxruntime(file: Path, threads: int) -> Engine:
    """ONNX Runtime on CPU."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: tuple(map(torch.from_numpy, session.run(None, {"images": x.numpy()})))


def openvino(file: Path, threads: int, shape: tuple[int, ...], precision: str) -> Engine:
    """OpenVINO on CPU, for one shape."""
    ov = import_module("openvino")
    core = ov.Core()
    model = core.read_model(str(file))
    model.reshape(list(shape))
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    ready = core.compile_model(model, "CPU", options)
    names = [output.get_any_name() for output in model.outputs]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        result = ready([x.numpy()])
        return tuple(torch.from_numpy(result[name].copy()) for name in names)

    return run


def difference(ours: list[Prediction], theirs: list[Prediction]) -> str:
    """How far boxes are from ours: rows of each, and the largest distances of matched rows."""
    coordinate = score = 0.0
    for (a, s, k), (b, t, m) in zip(ours, theirs, strict=True):
        if len(a) != len(b):
            return f"other rows: {sum(len(x[0]) for x in theirs)} for {sum(len(x[0]) for x in ours)}"
        far = (a[:, None, :4] - b[None, :, :4]).abs().amax(-1) + 1e6 * (k[:, None] != m[None])
        if not len(a):
            continue
        nearest = far.argmin(1)
        coordinate = max(coordinate, float(far.min(1).values.max()))
        score = max(score, float((s - t[nearest]).abs().max()))
    verdict = "equal" if coordinate <= 0.01 and score <= 1e-3 else "not equal"
    return f"{verdict}: {coordinate:.1e} px, {score:.1e}"


def engines(
    dense: Dense, images: Tensor, args: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], Engine]]:
    """How to make each engine, by name."""
    shape = tuple(images.shape)
    file = folder / "dense.onnx"
    if not file.exists():
        export_onnx(WEIGHTS, file, args.sensor)
    out: dict[str, Callable[[], Engine]] = {
        "torch": lambda: dense,
        "torch, channels first": lambda: contiguous(dense, images),
        "torch, bf16": lambda: bf16(dense, images),
        "torch.jit, frozen": lambda: traced(dense, images),
    }
    if args.compile:
        out["torch.compile"] = lambda: compiled(dense, images)
    if find_spec("onnxruntime"):
        out["ONNX Runtime"] = lambda: onnxruntime(file, args.threads)
    if find_spec("openvino"):
        out["OpenVINO, f32"] = lambda: openvino(file, args.threads, shape, "f32")
        out["OpenVINO, bf16"] = lambda: openvino(file, args.threads, shape, "bf16")
    wanted = ("torch", *args.engines.split(";")) if args.engines else tuple(out)
    return {name: make for name, make in out.items() if name in wanted}


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sensor", choices=("sar", "rgb", "ir"), default="sar")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", help="only these beside torch, separated by semicolons")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, header = load(WEIGHTS)
    dense = Dense(model, args.sensor).eval()
    print(
        "| batch | engine | s an image | torch's time over it | made in s | boxes |\n|---|---|---|---|---|---|"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for batch in map(int, args.batches.split(",")):
            images = scene(batch, header.tile)
            crowded(model, images, args.sensor)
            sizes = [(header.tile, header.tile)] * batch
            ready: dict[str, Engine] = {}
            made: dict[str, float] = {}
            boxes: dict[str, str] = {}

            def whole(engine: Engine, images: Tensor = images, sizes: Any = sizes) -> list[Prediction]:
                return model.finish(*dense.unpack(engine(images)), args.sensor, sizes)

            for name, make in engines(dense, images, args, Path(folder)).items():
                start = time.perf_counter()
                try:
                    ready[name] = make()
                    found = whole(ready[name])
                except Exception as error:  # an engine that fails is a finding, not the end
                    ready.pop(name, None)
                    print(
                        f"| {batch} | {name} | | | | failed: {' '.join(str(error).split())[:150]} |",
                        flush=True,
                    )
                    continue
                made[name] = time.perf_counter() - start
                if name == "torch":
                    exact = found
                boxes[name] = difference(exact, found)
            seconds: dict[str, list[float]] = {name: [] for name in ready}
            for _ in range(args.rounds):
                for name, engine in ready.items():
                    start = time.perf_counter()
                    whole(engine)
                    seconds[name].append((time.perf_counter() - start) / batch)
            for name, taken in seconds.items():
                gain = statistics.median(a / b for a, b in zip(seconds["torch"], taken, strict=True))
                row = {"batch": batch, "engine": name, "seconds": round(statistics.median(taken), 3)}
                row |= {"gain": round(gain, 2), "made": round(made[name], 1), "boxes": boxes[name]}
                rows.append(row)
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
