"""`segcli predict`: from photographs to masks and overlays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from segcli.cli.downloading import get_model
from segcli.cli.options import (
    Json,
    Memory,
    Model,
    Offline,
    Precision,
    Quiet,
    Runtime,
    Tile,
    Tta,
    Verbose,
)
from segcli.cli.runs import Overwrite, Workers, list_inputs, refuse_empty, run_and_report
from segcli.cli.terminal import Terminal
from segcli.device import (
    check_precision,
    check_runtime,
    describe,
    memory_of_gpu,
    pick_devices,
    pick_precision,
    pick_runtime,
)
from segcli.errors import UsageError
from segcli.inference.crew import by_processor, count_up_to_many, crew_of
from segcli.inference.layout import PRODUCTS
from segcli.models.zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from segcli.inference.calibration import Calibration
    from segcli.inference.cluster import RayCluster
    from segcli.inference.segmentation import Segmenter
    from segcli.inference.shards import Shard
    from segcli.inference.sources import Sources
    from segcli.inference.storage import Storage

Source = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="SOURCE...",
        help="Images, folders (with all sub-folders), quoted globs, URLs of them, or - for a list on stdin.",
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder or URL for the masks; made when missing.")]
ListFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--list", help="A file with one path per line, or NUL-separated, instead of SOURCE."),
]
CHOICES = [
    kind for kind in PRODUCTS if kind != "geometric"
]  # that one comes with the mask, if the model has it
Save = Annotated[str, typer.Option(help=f"What to save, with commas: {', '.join(CHOICES)}.")]
OutFormat = Annotated[
    str, typer.Option(help="files, or webdataset: tar files with what is saved for many images in each.")
]
BatchSize = Annotated[
    str, typer.Option(help="Images at a time on a GPU, or auto. On the CPU it is one, whatever is given.")
]
Size = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=8, help="Shorter side in pixels at which images are computed.", show_default="the model's"
    ),
]
ShardOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Only part I of N, counted from 1: for job arrays. Then: segcli runs merge.",
    ),
]
ListOnly = Annotated[
    bool, typer.Option("--list-only", help="Print the inputs (of the shard) and their number; do no more.")
]
Devices = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:N, cuda:all or mps. cuda:all shares the images out among all GPUs; auto "
        "takes a GPU when there is one."
    ),
]
Processes = Annotated[
    str,
    typer.Option(
        metavar="auto|N",
        help="Processes that compute, among which the device and the cores are shared out. auto: several "
        "for a large folder, where one could not keep the GPU or many cores busy.",
    ),
]
Calibrate = Annotated[
    int, typer.Option("--calibrate", min=1, help="Inputs on which --precision int8 is calibrated, at most.")
]
Engine = Annotated[
    str, typer.Option(help="local, or ray: on a Ray cluster, or on one of its own; needs 'segcli[ray]'.")
]
RayAddress = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="auto|URL", help="The Ray cluster: HOST:PORT, or auto: the one that this machine belongs to."
    ),
]
NumActors = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, metavar="N", help="Ray actors that compute.", show_default="as many as there is room for"
    ),
]
GpusPerActor = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        min=0,
        metavar="N",
        help="GPUs that each takes; 0.5 lets two share one.",
        show_default="1 if there are",
    ),
]
CpusPerActor = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, metavar="N", help="Processors that each takes.", show_default="1 with a GPU, else up to 4"
    ),
]
Opacity = Annotated[float, typer.Option(min=0, max=1, help="Of the colours in overlays.")]


def predict(
    sources: Source = None,
    out: Out = "masks",
    list_file: ListFile = None,
    model: Model = DEFAULT_MODEL,
    save: Save = "mask,overlay",
    out_format: OutFormat = "files",
    overwrite: Overwrite = False,
    device: Devices = "auto",
    processes: Processes = "auto",
    engine: Engine = "local",
    ray_address: RayAddress = None,
    num_actors: NumActors = None,
    gpus_per_actor: GpusPerActor = None,
    cpus_per_actor: CpusPerActor = None,
    precision: Precision = "auto",
    runtime: Runtime = "torch",
    calibrate: Calibrate = 24,
    batch_size: BatchSize = "auto",
    workers: Workers = None,
    size: Size = None,
    tta: Tta = "none",
    tile: Tile = "auto",
    memory: Memory = "auto",
    opacity: Opacity = 0.5,
    shard: ShardOption = None,
    list_only: ListOnly = False,
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Segment images: write a mask of class ids, and an overlay to look at, for every one.

    Masks are palette PNGs of the size of their image; the values of their pixels are the class ids. The
    tree below the source is kept: photos/a/b.jpg becomes masks/a/b.png and masks/_overlay/a/b.jpg.
    The same command again does what is not done yet. What became of every file is listed in
    masks/_run/manifest.jsonl. Paths in a list count from the current folder.

    \b
    Examples:
      segcli predict photos/ --out masks/
      segcli predict 'photos/**/*.jpg' -o masks/ --save mask,compare
      find photos -size +100k -print0 | segcli predict - --out masks/
    """
    from segcli.files import sha256
    from segcli.images import SUFFIXES
    from segcli.inference.engine import Helpers, Progress
    from segcli.inference.layout import RUN_FOLDER
    from segcli.inference.manifest import kept_precision
    from segcli.inference.pipeline import Task
    from segcli.inference.plan import Plan
    from segcli.inference.processes import Processes as SeveralProcesses
    from segcli.inference.shards import parse_shard
    from segcli.inference.sources import counted, parse
    from segcli.inference.storage import open_storage
    from segcli.memory import memory_of
    from segcli.models.info import read_info

    terminal = Terminal(quiet, json)
    kinds = kinds_of(save)
    images_at_a_time = number_or_auto(batch_size, "--batch-size")
    of_each_device = number_or_auto(processes, "--processes")
    most = memory_of(memory)
    check_choices(out_format, tta, runtime, precision, tile)
    asked_of_ray = {
        "--ray-address": ray_address,
        "--num-actors": num_actors,
        "--gpus-per-actor": gpus_per_actor,
        "--cpus-per-actor": cpus_per_actor,
    }
    check_engine(engine, of_each_device, [name for name, value in asked_of_ray.items() if value is not None])
    cluster: RayCluster | None = None
    if engine == "ray":
        from segcli.inference.cluster import RayCluster, Wishes

        wishes = Wishes(ray_address, num_actors, gpus_per_actor, cpus_per_actor, workers or None)
        cluster = RayCluster(wishes, "cpu" if runtime == "openvino" else device)

    part = parse_shard(shard) if shard else None
    results = open_storage(out, part.record if part else RUN_FOLDER)
    found = parse(sources or [], list_file, out, SUFFIXES)
    refuse_empty(found, "image")
    if list_only:
        list_inputs(found, part, terminal, "image")
        return

    model_file = get_model(model, terminal, offline)
    weights = sha256(model_file)
    info = read_info(model_file)
    if "mask" in kinds and info.second_class_set:
        kinds.append("geometric")
    kept = None if overwrite or precision != "auto" else kept_precision(results)
    devices, precision, gpu = where_to_compute(device, runtime, precision, kept, cluster)
    shared = most if cluster is None and by_processor(device, runtime) else 0
    crew = crew_of(devices, gpu, shared, lambda: count_up_to_many(found, part), of_each_device, workers)
    settings = {
        "weights": weights,
        "size": size,
        "tta": tta,
        "opacity": opacity,
        "precision": precision,
        "runtime": runtime,
    }
    if out_format != "files":
        settings["out_format"] = out_format
    ranges = None
    if precision == "int8":
        calibration = calibration_for(
            model_file,
            weights,
            size,
            found,
            results,
            calibrate,
            crew.readers,
            most,
            overwrite,
            part,
            terminal,
        )
        ranges = calibration.ranges
        settings["calibration"] = calibration.digest
    most //= len(crew.devices)  # of each process
    plan = Plan(
        model_file,
        crew.devices[0],
        precision,
        kinds,
        images_at_a_time,
        size,
        opacity,
        tta,
        runtime,
        tile,
        most,
        len(crew.devices),
        ranges,
    )
    progress = Progress()

    def announce() -> None:
        images = "images" if progress.total is None else counted(progress.total, "image")
        where = str(cluster.places) if cluster else describe_devices(runtime, crew.devices)
        terminal.say(
            f"Segmenting {images} with {model_file.stem} ({len(info.class_set)} classes) "
            f"on {where} in {precision}" + (" by OpenVINO." if runtime == "openvino" else ".")
        )
        if verbose:
            terminal.say(
                f"Weights {weights[:12]} of {model_file}; {batch_size} at a time; "
                f"workers that read: {crew.readers}; saving {', '.join(kinds)}."
            )

    def start() -> Segmenter:
        announce()
        return plan.start()

    task = Task(
        sources=found,
        out=results,
        kinds=kinds,
        model=model_file.stem,
        settings=settings,
        options={
            "sources": sources or ["--list", list_file],
            "model": str(model_file),
            "save": kinds,
            "device": device,
            "processes": processes,
            "engine": engine,
            "batch_size": batch_size,
            "workers": workers,
            "tile": tile,
            "memory": memory,
        },
        start=start,
        workers=crew.readers,
        finishers=crew.finishers,
        memory=most,
        overwrite=overwrite,
        shard=part,
        in_tars=out_format == "webdataset",
    )
    helpers: Helpers | None = cluster
    if cluster:
        cluster.prepare(plan, memory, announce)
    elif len(crew.devices) > 1:
        starts = [replace(plan, device=name).start for name in crew.devices]
        helpers = SeveralProcesses(task, starts, announce)
    run_and_report(task, progress, terminal, "image", "Segmenting", helpers)


def where_to_compute(
    device: str, runtime: str, precision: str, kept: str | None, cluster: RayCluster | None
) -> tuple[list[str], str, int]:
    """The devices, the precision, and the bytes of memory of the GPU that is to be fed, 0 without one.

    Args:
        device, runtime, precision: As given.
        kept: The precision that the output folder was begun with, if it is to be kept.
        cluster: Where there is one, it knows its devices itself.

    Raises:
        UsageError: A device is not there, or cannot compute in that precision. What cannot be had is an error
            even when there is nothing to do.
    """
    if cluster:
        return [device], kept or cluster.precision(precision, runtime), 0
    no_gpu = device == "cpu" or (device == "auto" and not Path("/proc/driver/nvidia").exists())
    if kept and no_gpu and runtime == "torch":
        return [device], kept, 0  # when all is done PyTorch is not even imported

    devices = pick_devices(device) if device == "cuda:all" else [device]
    picked = pick_runtime(runtime, devices[0])
    return devices, kept or pick_precision(precision, picked, runtime), memory_of_gpu(picked)


def calibration_for(
    model_file: Path,
    weights: str,
    size: int | None,
    sources: Sources,
    out: Storage,
    count: int,
    workers: int,
    memory: int,
    overwrite: bool,
    shard: Shard | None,
    terminal: Terminal,
) -> Calibration:
    """What int8 is computed with: as the output folder has it, else from some of the inputs."""
    from segcli.inference.calibration import calibrate, keep, kept
    from segcli.models.checkpoint import load_model

    later = shard is not None and shard.number > 1
    found = None if overwrite and not later else kept(out, weights, size)
    if found is None:
        if later:
            raise UsageError(
                f"--precision int8: shard 1 calibrates it; start it first, and {shard} after that"
            )
        if ("list", "-") in sources.entries:
            raise UsageError("--precision int8 reads some images first, so give the list as a file: --list")
        terminal.say("Calibrating int8 on some of the images.")
        found = calibrate(load_model(model_file), weights, size, sources, count, workers, memory)
        keep(out, found)
    on = f"{found.held_out} other images" if found.held_out else "the same images"
    terminal.say(
        f"int8, calibrated on {found.images} images: {found.agreement:.2%} of the pixels of {on} "
        "have the class that they have in fp32."
    )
    return found


def kinds_of(save: str) -> list[str]:
    """The products of `--save`, in the order of `CHOICES`."""
    wanted = [kind.strip() for kind in save.split(",") if kind.strip()]
    unknown = [kind for kind in wanted if kind not in CHOICES]
    if unknown or not wanted:
        raise UsageError(f"--save {save!r}: choose from {', '.join(CHOICES)}, with commas in between")
    return [kind for kind in CHOICES if kind in wanted]


def check_choices(out_format: str, tta: str, runtime: str, precision: str, tile: str) -> None:
    """Raise UsageError for a value of these options that is unknown, or that the library cannot do."""
    from segcli.inference.tta import variants_of

    if out_format not in ("files", "webdataset"):
        raise UsageError(f"--out-format {out_format!r} is unknown; use files or webdataset")
    variants_of(tta)
    check_runtime(runtime)
    check_precision(precision, runtime)
    if tile not in ("auto", "on", "off"):
        raise UsageError(f"--tile {tile!r} is unknown; use auto, on or off")
    if tile == "on" and runtime == "openvino":
        raise UsageError("--tile on needs PyTorch; OpenVINO computes images whole")


def check_engine(engine: str, processes: int | None, of_ray: list[str]) -> None:
    """Raise UsageError for an `--engine` that is unknown, or options that the other one has.

    Args:
        engine: Its name.
        processes: Of `--processes`, None for auto.
        of_ray: The options that were given and that only Ray has.
    """
    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine!r} is unknown; use local or ray")
    if engine == "local" and of_ray:
        raise UsageError(f"{', '.join(of_ray)} {'is' if len(of_ray) == 1 else 'are'} for --engine ray")
    if engine == "ray" and (processes or 1) > 1:
        raise UsageError("--processes is for --engine local; with Ray give --num-actors")


def describe_devices(runtime: str, names: Sequence[str]) -> str:
    """The devices of this machine for people: `cpu (2 threads)`, or `cuda:0, cuda:1 (4 processes)`."""
    devices = [pick_runtime(runtime, name) for name in names]
    if len(devices) == 1:
        return describe(devices[0])
    return f"{', '.join(dict.fromkeys(map(str, devices)))} ({len(devices)} processes)"


def number_or_auto(text: str, option: str) -> int | None:
    """The number that an option was given, from 1; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{option} {text!r}: give auto or a number from 1")
    return int(text)
