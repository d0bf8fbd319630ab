"""The whole run: scenes and labels to a chip folder, by one process or by Dask, to the same files whoever works and
however often it was stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from babelrs_geo import __version__
from babelrs_geo.chips.cut import SPOOL, cut_task, part_path
from babelrs_geo.chips.options import SPLITS, ChipOptions
from babelrs_geo.chips.plan import Entry, Plan, Task, plan
from babelrs_geo.chips.tables import INDEX, NOTE, write_tables, write_text
from babelrs_geo.cluster import CUTTING, Workers, connect, first, held_back, pool
from babelrs_geo.drafts import is_draft, make_folder
from babelrs_geo.errors import LabelError, OutputError, ParameterError
from babelrs_geo.scenes import Scene, file_state
from babelrs_geo.vectors import Labels, Objects

Progress = Callable[[int, int], None]
ALIGNED = "aligned"
"""Folder of scenes brought to one grid."""
_LIVES = 3  # times that processes are started, where some are lost


@dataclass(frozen=True)
class Cut:
    """What a run left."""

    folder: Path
    chips: dict[str, int]
    """How many, by split."""
    objects: int
    """Rows of the labels: an object counts in every chip that holds it."""
    conflicts: int
    """Chips left out because another split's scene lies on their ground."""


def cut_chips(
    scenes: Sequence[Scene],
    folder: str | os.PathLike[str],
    labels: Sequence[Labels] = (),
    options: ChipOptions | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Cut:
    """Cut scenes into chips of raw numbers with their labels, an index and splits that share no ground.

    Run again on the same folder it goes on where it stopped, and a run that ended does nothing. `progress` is called
    with (tasks done, tasks in all). Warns (UserWarning) where labels miss a scene or a split stays empty.

    Raises OutputError where the folder holds something else, or chips cut with other parameters; LabelError where
    labels and a scene do not go together; SceneError where a scene cannot be read, after which the same may be run
    again. Ctrl+C is answered between two tasks.
    """
    return cut_entries(_entries(scenes, labels), folder, options, workers, progress, sources(labels))


def cut_entries(
    entries: Sequence[Entry],
    folder: str | os.PathLike[str],
    options: ChipOptions | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
    told: dict[str, Any] | None = None,
) -> Cut:
    """`cut_chips` for scenes that already have names, folders and labels; `told` is noted with the parameters."""
    options, workers, out = options or ChipOptions(), workers or Workers(), Path(folder).absolute()
    asked = _asked(entries, options, told or {})
    note = _open_folder(out, asked)
    if (out / INDEX).exists() and note.get("counts"):
        shutil.rmtree(out / SPOOL, ignore_errors=True)
        return _ended(out, note["counts"])
    with held_back() as answer, _crew(workers) as work:
        planned = plan(entries, options)
        left = [task for task in planned.tasks if not part_path(out, task.key).exists()]
        for scene in {id(task.entry): task.entry.scene for task in left}.values():
            answer()
            scene.find_collar()
            scene.close()  # a later read opens it again: there may be more scenes than a process may have files open
        done = itertools.count(len(planned.tasks) - len(left))

        def tell() -> None:
            if progress:
                progress(next(done), len(planned.tasks))
            answer()

        tell()
        work(left, out, options, tell)
    counts = write_tables(out, planned, entries)
    _tell_empty(counts["chips"], planned, options)
    write_text(out / NOTE, json.dumps(asked | {"counts": counts}, indent=1))
    _tidy(out)
    return _ended(out, counts)


def _entries(scenes: Sequence[Scene], labels: Sequence[Labels]) -> list[Entry]:
    """Scenes with names that are theirs alone, and their labels."""
    if not scenes:
        raise ParameterError("no scene was given; pass at least one")
    _refuse_one_name(scenes, labels)
    entries: list[Entry] = []
    for scene in scenes:
        if any(scene.path == other.source for other in entries):
            raise ParameterError(f"{scene.path} was given twice; give each scene once")
        stem = Path(scene.name).stem or "scene"
        taken = {other.name for other in entries}
        others = (f"{stem}-{k}" for k in itertools.count(2))
        name = next(n for n in itertools.chain([stem], others) if n not in taken)
        objects = objects_on(scene, [each.on(stem, scene.georef, alone=len(scenes) == 1) for each in labels])
        entries.append(Entry(name, name, scene.path, scene, objects))
    return entries


def _refuse_one_name(scenes: Sequence[Scene], labels: Sequence[Labels]) -> None:
    """LabelError where labels in pixels bear the name of several scenes."""
    for each in labels:
        for name in sorted(each.named):
            alike = dict.fromkeys(scene.path for scene in scenes if Path(scene.name).stem == name)
            if len(alike) > 1:
                raise LabelError(
                    f"{' and '.join(alike)} are both named {name}, and {each.path} has labels in pixels of {name}: "
                    "whose they are cannot be told; rename a scene and its labels, or tile each in a run of its own"
                )


def objects_on(scene: Scene, found: Sequence[Objects]) -> Objects | None:
    """What labels show of a scene, of all that each of them found; None where there are no labels. Warns where they
    show nothing of it.
    """
    if not found:
        return None
    objects = _within(Objects.concatenate(found), scene)
    if not len(objects):
        warnings.warn(
            f"no label lies on scene {scene.name}: all its chips are background; check that labels and scene "
            "show the same ground, or bear the same name where they are in pixels",
            stacklevel=2,
        )
    return objects


def _within(objects: Objects, scene: Scene) -> Objects:
    """The objects of which the scene may show something."""
    from babelrs_geo.boxes import bounds

    edge = bounds(objects.boxes)
    return objects[
        (edge[:, 2] > 0) & (edge[:, 3] > 0) & (edge[:, 0] < scene.width) & (edge[:, 1] < scene.height)
    ]


def sources(labels: Sequence[Labels]) -> dict[str, Any]:
    """The label files, by what is in them."""
    told = []
    for each in labels:
        path = Path(each.path.partition("|")[0])
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"")
        told.append({"path": each.path, "kind": each.kind, "sha256": digest.hexdigest()})
    return {"labels": told}


def _asked(entries: Sequence[Entry], options: ChipOptions, told: dict[str, Any]) -> dict[str, Any]:
    """All that decides the content of the files, and its hash."""
    scenes = []
    for entry in entries:
        objects = None if entry.objects is None else _digest(entry.objects)
        scenes.append(
            entry.scene.identity | file_state(entry.source) | {"name": entry.name, "objects": objects}
        )
    text = json.dumps(_chosen(options, told) | {"scenes": scenes}, sort_keys=True)
    return {**json.loads(text), "hash": hashlib.sha256(text.encode()).hexdigest()}


def _chosen(options: ChipOptions, told: dict[str, Any]) -> dict[str, Any]:
    """What decides the content of the files beside the scenes, as JSON gives it back."""
    body = {"software": f"babelrs-geo {__version__}", "parameters": asdict(options) | told}
    chosen: dict[str, Any] = json.loads(json.dumps(body))
    return chosen


def _digest(objects: Objects) -> str:
    """Of what labels show of a scene: which column the classes come from, and where the scene lies, changes it."""
    digest = hashlib.sha256(np.ascontiguousarray(objects.boxes).tobytes())
    digest.update(objects.oriented.tobytes())
    digest.update("\n".join(map(str, objects.classes)).encode())
    return digest.hexdigest()


def check_folder(out: Path, options: ChipOptions, told: dict[str, Any]) -> None:
    """Refuse a folder, by OutputError, before anything is made for it, as far as can be told without the scenes."""
    _note_in(out, _chosen(options, told))


def _open_folder(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The folder's note: that of an earlier run of the same, or a new one."""
    if (found := _note_in(out, asked)) is not None:
        return found
    make_folder(out)
    write_text(out / NOTE, json.dumps(asked, indent=1))
    return asked


def _note_in(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The note of an earlier run of the same; None in a folder that is new or empty."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder for the chips with -o")
    note = out / NOTE
    if note.exists():
        try:
            found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{note} cannot be read ({error}); remove the folder, or name another with -o"
            ) from error
        if any(found.get(key) != asked[key] for key in asked if key != "scenes"):  # the hash is of them too
            raise OutputError(
                f"{out} holds chips cut otherwise ({_difference(found, asked)}); run what it was cut with, remove it, "
                "or name another folder with -o"
            )
        return found
    if out.is_dir() and any(each.name != ALIGNED for each in out.iterdir()):
        raise OutputError(f"{out} is not empty and no chip folder; name an empty or a new folder with -o")
    return None


def _difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first thing that differs between two notes, in a few words."""
    was, now = found.get("parameters", {}), asked["parameters"]
    for name in now:
        if was.get(name) != now[name]:
            if name == "labels":
                return "the labels differ"
            return f"{name} {was.get(name)} there, {now[name]} now"
    if found.get("software") != asked["software"]:
        return f"by {found.get('software')}, this is {asked['software']}"
    return "the scenes differ"


def _tell_empty(chips: dict[str, int], planned: Plan, options: ChipOptions) -> None:
    """Warn where a split that was asked for got no chip."""
    empty = [name for name, share in zip(SPLITS, options.split, strict=True) if share > 0 and not chips[name]]
    if empty:
        why = "the scenes have too few blocks of ground to fill it; lower --block or --size, or add scenes"
        if any(planned.area[name] for name in empty):
            why = (
                "on the ground that was for it no chip has an object and a valid pixel, or another split needs them "
                "all; lower --block, raise --background, choose another --seed, or add scenes"
            )
        warnings.warn(f"no chip goes to {' and '.join(empty)}: {why}", stacklevel=4)


Work = Callable[[Sequence[Task], Path, ChipOptions, Callable[[], None]], None]
"""Does tasks, in any order, and calls the last argument as each is done. A task's error ends it."""


@contextmanager
def _crew(workers: Workers) -> Iterator[Work]:
    """What does tasks: this process, Dask's scheduler of local processes, or the workers of a cluster.

    Processes start while the caller still plans, and end with the block.
    """
    if workers.scheduler is not None:
        with ExitStack() as stack, ThreadPoolExecutor(1) as starter:
            starting = starter.submit(_client, workers, stack)
            try:
                yield lambda *given: _by_cluster(starting.result(), *given)
            finally:
                starting.exception()  # started or failed: what it opened is on the stack
    elif workers.alone:
        yield _alone
    else:
        workers.prepare(CUTTING)
        yield lambda *given: _by_processes(workers.processes, *given)


def _alone(tasks: Sequence[Task], out: Path, options: ChipOptions, tell: Callable[[], None]) -> None:
    for task in tasks:
        cut_task(task.light(), str(out), options)
        tell()


def _by_processes(
    count: int, tasks: Sequence[Task], out: Path, options: ChipOptions, tell: Callable[[], None]
) -> None:
    """By Dask's scheduler of local processes. Where one of them is lost, others go on with what it had in hand."""
    from dask import multiprocessing as local
    from dask.callbacks import Callback

    left = list(tasks)
    for lives in reversed(range(_LIVES)):
        graph = {  # of what is ready Dask does the last key first
            f"{number:06d}": (partial(cut_task, task.light(), str(out), options),)
            for number, task in enumerate(reversed(_largest_first(left)))
        }
        try:
            with pool(count) as workers, Callback(posttask=lambda *_: tell()):  # type: ignore[no-untyped-call]
                local.get(graph, list(graph), pool=workers, chunksize=1, optimize_graph=False)
            return
        except BrokenProcessPool as error:
            if not lives:
                raise OutputError(
                    f"{out} is not whole: {_LIVES} times a process that cuts chips was lost; where memory is short "
                    "take fewer (--workers 1), then run the same again: it goes on where it stopped"
                ) from error
            left = [task for task in left if not part_path(out, task.key).exists()]


def _by_cluster(
    client: Any, tasks: Sequence[Task], out: Path, options: ChipOptions, tell: Callable[[], None]
) -> None:
    light = [task.light() for task in _largest_first(tasks)]
    futures = client.map(cut_task, light, folder=str(out), options=options, pure=False, batch_size=64)
    ended: SimpleQueue[Any] = SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    try:
        for _ in futures:
            first(ended).result()
            tell()
    finally:
        client.cancel(futures)


def _largest_first(tasks: Sequence[Task]) -> list[Task]:
    """So that the workers end together."""
    return sorted(tasks, key=lambda task: -task.pixels)


def _client(workers: Workers, stack: ExitStack) -> Any:
    """A client, closed with the stack, of workers that have imported all of this."""
    client = stack.enter_context(connect(workers))
    client.run(_ready)
    return client


def _ready() -> None:
    """Does nothing, but imports all of this where it is called."""


def _ended(out: Path, counts: dict[str, Any]) -> Cut:
    return Cut(out, counts["chips"], counts["objects"], counts["left_out_for_other_splits"])


def _tidy(out: Path) -> None:
    """Remove the parts of the index, and what killed processes left half written."""
    shutil.rmtree(out / SPOOL, ignore_errors=True)
    for path in out.rglob(".*"):
        if is_draft(path.name) and path.is_file():
            path.unlink(missing_ok=True)
