"""Who computes a detection: detectors of this process, or of the workers of a Dask cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from babelrs_geo.cluster import Workers, connect, dashboard
from babelrs_geo.errors import ParameterError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from babelrs_geo.detections import Detections
    from babelrs_geo.inference import Crew, Look
    from babelrs_geo.models.zoo import Weights


BATCH = 4
"""Tiles computed at once, unless more or fewer are asked for."""
LARGEST_BATCH = 64
"""Beyond it a GPU gains nothing."""
SHARE = 0.7
"""Of a GPU's free memory that batches may take: what boxes need depends on the pixels."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Who computes, and what is kept meanwhile; nothing here changes what is found."""

    workers: Workers = field(default_factory=Workers)
    """Processes of this machine, or those of a Dask scheduler."""
    spool: str | os.PathLike[str] | None = None
    """A folder for what is done, so that a run that died can go on; None keeps it in memory alone. It belongs to one
    scene's run, and is the caller's to remove once the result is saved."""
    resume: bool = False
    """Go on with what an earlier run of the same left in `spool`."""
    dashboard: Callable[[str], None] | None = None
    """Called with the address of the Dask cluster's dashboard, where it has one."""


@dataclass(frozen=True)
class Where:
    """Weights and what they run on."""

    weights: str | None
    """By name or file; None for weights that are in memory alone."""
    device: str
    threads: int | None


@dataclass(frozen=True)
class _Loader:
    """Detectors where they are needed: weights by name or file, as a worker finds them."""

    weights: str
    sha256: str
    sensor: str
    score: float | None
    classes: tuple[str, ...]
    device: str
    threads: int | None
    """None leaves a worker its own."""

    def __call__(self) -> list[Callable[[NDArray[np.float32]], list[Detections]]]:
        """The detectors. Raises WeightsError where the file is missing or another here."""
        import torch

        from babelrs_geo.models import zoo

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        loaded = [zoo.load(self.weights, name) for name in devices(self.device)]
        if loaded[0].sha256 != self.sha256:
            raise WeightsError(
                f"a worker's weights {self.weights} are not those of this process ({loaded[0].sha256[:12]}, "
                f"{self.sha256[:12]}); give the workers the same file and version of babelrs-geo"
            )
        return [each.detector(self.sensor, self.score, self.classes) for each in loaded]


@contextmanager
def crew_of(
    running: Running,
    look: Look,
    loaded: list[Weights],
    score: float | None,
    classes: tuple[str, ...],
    where: Where,
) -> Iterator[Crew]:
    """Those who compute the groups of a look: this process by the weights it loaded, or workers by their own."""
    sensor = str(look.scene.sensor)
    if running.workers.alone:
        detectors = [each.detector(sensor, score, classes) for each in loaded]
        with torch_threads(where.threads):
            yield lambda groups, tick: look.parts(detectors, groups, tick)
        return
    from babelrs_geo.inference import over_dask

    if where.weights is None:
        raise ParameterError(f'workers load weights themselves: pass "{loaded[0].name}" by name or file')
    named = Path(where.weights)
    load = _Loader(
        weights=str(named.absolute()) if named.is_file() else where.weights,
        sha256=loaded[0].sha256,
        sensor=sensor,
        score=score,
        classes=classes,
        device=where.device,
        threads=where.threads or _shared_threads(running.workers),
    )
    with connect(running.workers) as client:
        if running.dashboard is not None and (address := dashboard(client)):
            running.dashboard(address)
        yield over_dask.crew(client, look, load)


def _shared_threads(workers: Workers) -> int | None:
    """The threads here for each process of this machine; None for a scheduler's workers, which may be on others."""
    if workers.scheduler is not None:
        return None
    import torch

    return max(1, torch.get_num_threads() // workers.processes)


def fitting_batch(
    where: Sequence[str], detectors: Sequence[Callable[..., object]], size: tuple[int, int]
) -> int:
    """The largest power of two whose batches of tiles of `size` (height, width) fit each GPU of `where`, by what two
    tiles need beside what is free; `BATCH` on a CPU, whose memory is not asked.
    """
    import numpy as np
    import torch

    fits = [BATCH] if all(name.startswith("cpu") for name in where) else [LARGEST_BATCH]
    for name, detector in zip(where, detectors, strict=True):
        if not name.startswith("cuda"):
            continue
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(name)
        torch.cuda.reset_peak_memory_stats(name)
        held = torch.cuda.memory_allocated(name)
        try:
            detector(np.zeros((2, 3, *size), np.float32))
        except torch.cuda.OutOfMemoryError:
            fits.append(1)
            continue
        needed = (torch.cuda.max_memory_allocated(name) - held) / 2
        fits.append(max(1, int(SHARE * free / max(needed, 1))))
    return 1 << (min(fits).bit_length() - 1)


def load_weights(weights: str | os.PathLike[str] | Weights, device: str) -> tuple[list[Weights], str]:
    """The weights, once per device, and the kind of device."""
    if not isinstance(weights, str | os.PathLike):
        return [weights], device
    from babelrs_geo.models import zoo

    named = devices(device)
    return [zoo.load(os.fspath(weights), each) for each in named], named[0].partition(":")[0]


def devices(text: str) -> list[str]:
    """The devices that `auto`, `cpu`, `cuda` or `cuda:0,cuda:1` names; ParameterError for one that is not there."""
    import torch

    if text == "auto":
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        kind, colon, number = name.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
            raise ParameterError(
                f'unknown device "{name}": expected auto, cpu, cuda, or a list such as cuda:0,cuda:1'
            )
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise ParameterError(
                f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices here; "
                "pass cpu, or install a torch build that matches the driver"
            )
    if len(set(names)) < len(names):
        raise ParameterError(f'device "{text}" names a device twice: name each once')
    return names


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """`threads` CPU threads in torch for a while; its own choice where None."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
