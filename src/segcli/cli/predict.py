"""`segcli predict`: from photographs to masks and overlays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from segcli.cli.downloading import get_model
from segcli.cli.options import Device, Json, Model, Offline, Precision, Quiet, Runtime, Tta, Verbose
from segcli.cli.runs import (
    Overwrite,
    Workers,
    default_workers,
    list_inputs,
    refuse_empty,
    report,
    run_and_show,
)
from segcli.cli.terminal import Terminal
from segcli.errors import UsageError
from segcli.inference.layout import PRODUCTS
from segcli.models.zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from segcli.inference.segmentation import Segmenter

Source = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="SOURCE",
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
Opacity = Annotated[float, typer.Option(min=0, max=1, help="Of the colours in overlays.")]


def predict(
    sources: Source = None,
    out: Out = "masks",
    list_file: ListFile = None,
    model: Model = DEFAULT_MODEL,
    save: Save = "mask,overlay",
    overwrite: Overwrite = False,
    device: Device = "auto",
    precision: Precision = "auto",
    runtime: Runtime = "torch",
    batch_size: BatchSize = "auto",
    workers: Workers = None,
    size: Size = None,
    tta: Tta = "none",
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
    from segcli.inference.engine import Progress
    from segcli.inference.layout import RUN_FOLDER
    from segcli.inference.pipeline import Task
    from segcli.inference.shards import parse_shard
    from segcli.inference.sources import parse
    from segcli.inference.storage import open_storage
    from segcli.inference.tta import variants_of
    from segcli.models.info import read_info

    terminal = Terminal(quiet, json)
    kinds = kinds_of(save)
    images_at_a_time = batch_size_of(batch_size)
    variants_of(tta)
    part = parse_shard(shard) if shard else None
    results = open_storage(out, part.record if part else RUN_FOLDER)
    found = parse(sources or [], list_file, out, SUFFIXES)
    refuse_empty(found, "image")
    if list_only:
        list_inputs(found, part, terminal, "image")
        return
    model_file = get_model(model, terminal, offline)
    if "mask" in kinds and read_info(model_file).second_class_set:
        kinds.append("geometric")

    # What cannot be had is an error even when there is nothing to do, and results depend on the precision.
    from segcli.device import describe, pick_precision, pick_runtime

    picked = pick_runtime(runtime, device)
    precision = pick_precision(precision, picked)

    def start() -> Segmenter:
        from segcli.inference.segmentation import Segmenter
        from segcli.models.checkpoint import load_model

        loaded = load_model(model_file)
        images = "images" if progress.total is None else f"{progress.total:,} images"
        images = "1 image" if progress.total == 1 else images
        classes = f"{len(loaded.info.class_set)} classes"
        computing = f"on {describe(picked)} in {precision}"
        computing += " by OpenVINO" if runtime == "openvino" else ""
        terminal.say(f"Segmenting {images} with {model_file.stem} ({classes}) {computing}.")
        segmenter = Segmenter(loaded, picked, kinds, images_at_a_time, size, opacity, tta, precision, runtime)
        if verbose:
            at_a_time = f"{segmenter.batch_size} at a time; workers that read: {task.workers}"
            terminal.say(
                f"Weights {loaded.sha256[:12]} of {model_file}; {at_a_time}; saving {', '.join(kinds)}."
            )
        return segmenter

    progress = Progress()
    task = Task(
        sources=found,
        out=results,
        kinds=kinds,
        model=model_file.stem,
        settings={
            "weights": sha256(model_file),
            "size": size,
            "tta": tta,
            "opacity": opacity,
            "precision": precision,
            "runtime": runtime,
        },
        options={
            "sources": sources or ["--list", list_file],
            "model": str(model_file),
            "save": kinds,
            "device": device,
            "batch_size": batch_size,
            "workers": workers,
        },
        start=start,
        workers=default_workers() if workers is None else workers,
        overwrite=overwrite,
        shard=part,
    )
    seconds = run_and_show(task, progress, terminal, "image", "Segmenting")
    report(task, progress, seconds, terminal, "image")


def kinds_of(save: str) -> list[str]:
    """The products of `--save`, in the order of `CHOICES`."""
    wanted = [kind.strip() for kind in save.split(",") if kind.strip()]
    unknown = [kind for kind in wanted if kind not in CHOICES]
    if unknown or not wanted:
        raise UsageError(f"--save {save!r}: choose from {', '.join(CHOICES)}, with commas in between")
    return [kind for kind in CHOICES if kind in wanted]


def batch_size_of(text: str) -> int | None:
    """The number of `--batch-size`, None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text!r}: give auto or a number from 1")
    return int(text)
