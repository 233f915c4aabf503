"""`segcli colorize`: class maps as pictures, and colour-coded pictures back as class maps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from segcli.cli.options import Json, Quiet, Verbose
from segcli.cli.runs import Overwrite, Workers, refuse_empty, run_and_report
from segcli.cli.terminal import Terminal
from segcli.errors import UsageError
from segcli.inference.crew import default_workers

if TYPE_CHECKING:
    from segcli.inference.coloring import Colorizer, Decolorizer
    from segcli.palettes import ClassSet

WRITERS = 4  # threads; they wait for the disk half of the time

Masks = Annotated[
    list[str],
    typer.Argument(
        metavar="MASKS...",
        help="Masks (PNG, TIFF, .npy, ...), folders, quoted globs, URLs of them, or - for a list on stdin.",
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder or URL for the pictures; made when missing.")]
Palette = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--palette",
        "-p",
        help="voc, camvid, camvid32, cityscapes, ade20k, or a file with names and colours.",
        show_default="each mask's own, else VOC's",
    ),
]
Images = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder with the photographs of the masks: overlays are written to _overlay."),
]
Legend = Annotated[bool, typer.Option("--legend", help="Add the classes that occur below every picture.")]
Boundaries = Annotated[bool, typer.Option("--boundaries", help="Draw lines between the classes.")]
ToIds = Annotated[
    bool, typer.Option("--to-ids", help="The way back: colour-coded pictures to masks. Needs --palette.")
]


def colorize(
    masks: Masks,
    out: Out,
    palette: Palette = None,
    images: Images = None,
    legend: Legend = False,
    boundaries: Boundaries = False,
    to_ids: ToIds = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Turn class maps into colour pictures, or colour-coded pictures back into class maps.

    The tree is kept: masks/a/b.png becomes colors/a/b.png, and with --images colors/_overlay/a/b.jpg.
    A file with names and colours is TOML (names, colors), or text with lines "r g b name".

    With --to-ids every colour becomes the id of its class. Colours that the palette does not have are
    listed and the file is reported as failed; nothing is guessed. JPEG is refused: it changes colours.

    \b
    Examples:
      segcli colorize masks/ --out colors/
      segcli colorize labels/ -o colors/ --palette cityscapes --legend
      segcli colorize masks/ -o colors/ --images photos/ --boundaries
      segcli colorize LabelColors/ -o masks/ --to-ids --palette label_colors.txt
    """
    import cv2

    from segcli.images import SUFFIXES
    from segcli.inference.coloring import Colorizer, Decolorizer, Photos
    from segcli.inference.engine import Progress
    from segcli.inference.pipeline import Task
    from segcli.inference.sources import parse
    from segcli.inference.storage import open_storage
    from segcli.palettes import get_class_set

    terminal = Terminal(quiet, json)
    classes = get_class_set(palette) if palette else None
    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images}: there is no such folder")
    if to_ids:
        refuse_with_ids(classes, images, legend, boundaries)
    results = open_storage(out)
    found = parse(masks, None, out, SUFFIXES if to_ids else SUFFIXES | {".npy"})
    refuse_empty(found, "mask")

    def start() -> Colorizer | Decolorizer:
        cv2.setNumThreads(1)  # the writers are threads already
        if to_ids:
            assert classes is not None  # by refuse_with_ids
            return Decolorizer(classes)
        photos = Photos(images, found.base) if images is not None else None
        return Colorizer(classes, legend, boundaries, photos)

    progress = Progress()
    task = Task(
        sources=found,
        out=results,
        kinds=["mask"] if to_ids else ["picture", "overlay"] if images else ["picture"],
        model=f"colorize {classes.name}" if classes else "colorize",
        settings={
            "colorize": "to ids" if to_ids else "to colors",
            "palette": fingerprint(classes) if classes else None,
            "images": str(images.resolve()) if images else None,
            "legend": legend,
            "boundaries": boundaries,
        },
        options={"sources": masks, "palette": palette},
        start=start,
        reader="colors" if to_ids else "mask",
        workers=default_workers() if workers is None else workers,
        writers=WRITERS,
        overwrite=overwrite,
    )
    run_and_report(task, progress, terminal, "mask", "Colouring")


def refuse_with_ids(classes: ClassSet | None, images: Path | None, legend: bool, boundaries: bool) -> None:
    """Raise UsageError for options that do not go with --to-ids, or when the palette is missing."""
    if classes is None:
        raise UsageError("--to-ids needs --palette: a name or a file that says which colour is which class")
    given = {"--images": images is not None, "--legend": legend, "--boundaries": boundaries}
    wrong = [option for option, is_given in given.items() if is_given]
    if wrong:
        raise UsageError(f"{wrong[0]} draws pictures and --to-ids makes masks; leave one of them out")


def fingerprint(classes: ClassSet) -> str:
    """A short name for the content of a class set: results of another one are not mixed in."""
    return f"{classes.name} {hashlib.sha256(repr(classes).encode()).hexdigest()[:16]}"
