"""`segcli predict`: from photographs to masks and overlays."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from segcli.cli.options import Device, Json, Model, Quiet, Verbose
from segcli.cli.terminal import Terminal, printable
from segcli.errors import UsageError
from segcli.inference.layout import MANIFEST_FILE, PRODUCTS, RUN_FOLDER
from segcli.models.zoo import DEFAULT_MODEL, find_model

if TYPE_CHECKING:
    from segcli.inference.engine import Progress, Task
    from segcli.inference.segmentation import Segmentation, Segmenter
    from segcli.inference.sources import Sources

LINE_EVERY = 30  # seconds between two lines about the progress, where there is no terminal
SHOWN_CLASSES = 12

Source = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="Images, folders (with all sub-folders), quoted globs, or - for a list on stdin."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the masks; it is made when missing.")]
ListFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--list", help="A file with one path per line, or NUL-separated, instead of SOURCE."),
]
Save = Annotated[str, typer.Option(help=f"What to save, with commas: {', '.join(PRODUCTS)}.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Do everything again, also where earlier results are good.")
]
BatchSize = Annotated[
    str, typer.Option(help="Images at a time on a GPU, or auto. On the CPU it is one, whatever is given.")
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=0, help="Processes that read images; 0 reads them unprotected.", show_default="by cores"
    ),
]
Size = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=8, help="Shorter side in pixels at which images are computed.", show_default="the model's"
    ),
]
Opacity = Annotated[float, typer.Option(min=0, max=1, help="Of the colours in overlays.")]


def predict(
    sources: Source = None,
    out: Out = Path("masks"),
    list_file: ListFile = None,
    model: Model = DEFAULT_MODEL,
    save: Save = "mask,overlay",
    overwrite: Overwrite = False,
    device: Device = "auto",
    batch_size: BatchSize = "auto",
    workers: Workers = None,
    size: Size = None,
    opacity: Opacity = 0.5,
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
      segcli predict 'photos/**/*.jpg' -o masks/ --save mask,compare --model fcn8s-camvid
      find photos -name '*.jpg' -size +100k -print0 | segcli predict - --out masks/
    """
    from segcli.files import sha256
    from segcli.images import SUFFIXES
    from segcli.inference.engine import Progress, Task
    from segcli.inference.sources import parse

    terminal = Terminal(quiet, json)
    kinds = kinds_of(save)
    images_at_a_time = batch_size_of(batch_size)
    found = parse(sources or [], list_file, str(out), SUFFIXES)
    refuse_empty(found)
    model_file = find_model(model)
    if device not in ("auto", "cpu"):
        from segcli.device import pick_device

        pick_device(device)  # a GPU that is not there is an error even when there is nothing to do

    def start() -> Segmenter:
        from segcli.device import describe, pick_device
        from segcli.inference.segmentation import Segmenter
        from segcli.models.checkpoint import load_model

        loaded = load_model(model_file)
        picked = pick_device(device)
        images = "images" if progress.total is None else f"{progress.total:,} images"
        classes = f"{len(loaded.info.class_set)} classes"
        terminal.say(f"Segmenting {images} with {model_file.stem} ({classes}) on {describe(picked)}.")
        return Segmenter(loaded, picked, kinds, images_at_a_time, size, opacity)

    progress = Progress()
    task = Task(
        sources=found,
        out=out,
        kinds=kinds,
        model=model_file.stem,
        settings={"weights": sha256(model_file), "size": size, "opacity": opacity},
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
    )
    seconds = run_and_show(task, progress, terminal)
    report(task, progress, seconds, terminal)


def kinds_of(save: str) -> list[str]:
    """The products of `--save`, in the order of `PRODUCTS`."""
    wanted = [kind.strip() for kind in save.split(",") if kind.strip()]
    unknown = [kind for kind in wanted if kind not in PRODUCTS]
    if unknown or not wanted:
        raise UsageError(f"--save {save!r}: choose from {', '.join(PRODUCTS)}, with commas in between")
    return [kind for kind in PRODUCTS if kind in wanted]


def batch_size_of(text: str) -> int | None:
    """The number of `--batch-size`, None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text!r}: give auto or a number from 1")
    return int(text)


def default_workers() -> int:
    """Half of the cores, at most 8: enough to feed a GPU, and the CPU needs its cores for the network."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2)) if hasattr(os, "sched_getaffinity") else 2


def refuse_empty(sources: Sources) -> None:
    """Stop when there is not a single image. A list is not looked at: stdin can be read only once.

    Raises:
        UsageError: Says what was found instead.
    """
    from segcli.inference.sources import PassedOver, discover

    passed_over = PassedOver()
    if sources.entries[0][0] == "list" or next(discover(sources, passed_over), None) is not None:
        return
    names = ", ".join(path for _, path in sources.entries[:3])
    instead = f"; found {found}" if (found := passed_over.describe()) else ""
    suffixes = ", ".join(sorted(sources.suffixes))
    raise UsageError(f"there are no images in {names}{instead}.\nImages are files named {suffixes}.")


def run_and_show(task: Task[Segmentation], progress: Progress, terminal: Terminal) -> float:
    """Run, with a progress bar or a line now and then. Returns the seconds that it took."""
    from segcli.inference.engine import count, run

    begun = time.monotonic()
    ended = threading.Event()
    counting = (task.sources, progress, ended)
    threads = [threading.Thread(target=show, args=(progress, terminal, ended), daemon=True)]
    if ("list", "-") not in task.sources.entries:
        threads.append(threading.Thread(target=count, args=counting, daemon=True))
    for thread in threads:
        thread.start()
    try:
        run(task, progress)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    return time.monotonic() - begun


def show(progress: Progress, terminal: Terminal, ended: threading.Event) -> None:
    """Keep the user informed until `ended` is set."""
    if not sys.stderr.isatty():
        while not ended.wait(LINE_EVERY):
            total = f" of {progress.total:,}" if progress.total else ""
            terminal.say(f"{progress.inputs:,}{total} images, {rate(progress)} images/s{time_left(progress)}")
        return
    with terminal.progress() as bar:
        line = bar.add_task("Reading the model", total=None, rate="-")
        while not ended.wait(0.2):
            computing = "Segmenting" if progress.computing_since else "Reading the model"
            bar.update(
                line,
                description=computing,
                total=progress.total,
                completed=progress.inputs,
                rate=rate(progress),
            )


def rate(progress: Progress) -> str:
    """Images per second since the network began."""
    if not progress.computing_since:
        return "-"
    return f"{speed(progress):.1f}"


def speed(progress: Progress) -> float:
    elapsed = time.monotonic() - progress.computing_since
    return (progress.done + progress.failed) / max(elapsed, 1e-3)


def time_left(progress: Progress) -> str:
    """ ", about 12 min left", or "" when that is not known yet."""
    if not (progress.total and progress.computing_since and progress.done):
        return ""
    seconds = (progress.total - progress.inputs) / speed(progress)
    minutes = round(seconds / 60)
    if minutes < 1:
        return ", less than a minute left"
    return f", about {minutes} min left" if minutes < 120 else f", about {minutes / 60:.1f} h left"


def report(task: Task[Segmentation], progress: Progress, seconds: float, terminal: Terminal) -> None:
    """Say what became of the files, and exit accordingly."""
    manifest = task.out / RUN_FOLDER / MANIFEST_FILE
    pixels = progress.pixels.total()
    shares = {name: count / pixels for name, count in progress.pixels.most_common()}
    terminal.document(
        {
            "out": str(task.out),
            "model": task.model,
            "inputs": progress.inputs,
            "done": progress.done,
            "skipped": progress.skipped,
            "failed": progress.failed,
            "seconds": round(seconds, 3),
            "interrupted": bool(progress.interrupted),
            "classes": {name: round(share, 6) for name, share in shares.items()},
            "failures": [{"source": source, "reason": reason} for source, reason in progress.failures],
            "manifest": str(manifest),
        }
    )
    if progress.interrupted:
        total = f" of {progress.total:,}" if progress.total else ""
        done = progress.done + progress.skipped
        terminal.warn(f"Stopped: {done:,}{total} images are done. The same command goes on from here.")
        raise typer.Exit(128 + progress.interrupted)
    if not progress.inputs:
        raise UsageError("the list of files is empty")

    if shares:
        rows = [(name, f"{share:.1%}") for name, share in list(shares.items())[:SHOWN_CLASSES]]
        if len(shares) > len(rows):
            rows.append(
                (f"{len(shares) - len(rows)} more", f"{1 - sum(list(shares.values())[:SHOWN_CLASSES]):.1%}")
            )
        terminal.table(["Class", "of all pixels"], rows)
    if passed_over := progress.passed_over.describe():
        terminal.say(f"Not taken as images: {passed_over}.")
    counts = [f"{progress.done:,} done"]
    counts += [f"{progress.skipped:,} done before"] if progress.skipped else []
    counts += [f"{progress.failed:,} failed"] if progress.failed else []
    noun = "image" if progress.inputs == 1 else "images"
    terminal.say(
        f"{progress.inputs:,} {noun} in {seconds:.1f} s: {', '.join(counts)}. Results are in {task.out}."
    )
    if progress.failed:
        for source, reason in progress.failures:
            terminal.warn(f"  {one_line(source)}: {one_line(reason)}")
        if progress.failed > len(progress.failures):
            terminal.warn(f"  and {progress.failed - len(progress.failures):,} more, see {manifest}")
        raise typer.Exit(1)


def one_line(text: str) -> str:
    """A name or reason without anything that could break the line."""
    return printable(text).replace("\n", "\\n")
