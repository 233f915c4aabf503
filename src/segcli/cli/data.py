"""`segcli data`: find, fetch, check, describe, look at and convert data sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from segcli.cli.options import Json, Quiet, Verbose
from segcli.cli.terminal import Terminal
from segcli.errors import MachineError, UsageError

if TYPE_CHECKING:
    from segcli.data.convert import Conversion
    from segcli.data.sets import DataSet
    from segcli.data.verify import Finding
    from segcli.palettes import ClassSet

app = typer.Typer(
    help="Find, download, check, describe, show and convert data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)

SHOWN_FAILURES = 10

Name = Annotated[
    str, typer.Argument(help="A name of `segcli data list`, a folder, a list file or a TOML file.")
]
Root = Annotated[Optional[Path], typer.Option(help="The folder of a known data set.")]  # noqa: UP045
Split = Annotated[str, typer.Option(help="Which part; several are joined with +. [all there are]")]


@app.command("list")
def list_data(root: Root = None, quiet: Quiet = False, verbose: Verbose = False, json: Json = False) -> None:
    """The data sets that segcli knows, and where they are on this machine.

    Each is looked for in --root, in the folder that the environment variable SEGCLI_DATA names, in ./data,
    and in the user's cache folder; in the last three below its own name, as in ./data/voc.

    \b
    Example:
      SEGCLI_DATA=/datasets segcli data list
    """
    from segcli.data.sets import KNOWN, find_data, search_places

    terminal = Terminal(quiet, json, answers=True)
    entries = []
    for name, known in KNOWN.items():
        try:
            layout, folder = find_data(name, root)
            found: dict[str, Any] = {"folder": str(folder), "splits": list(layout.splits(folder))}
        except MachineError:
            found = {"folder": None, "splits": []}
        source = {"address": known.address, "md5": known.md5 or None, "login": known.login}
        entries.append({"name": name, "about": known.about, **found, **source})
    for entry in entries:
        where = "not here; "
        if entry["folder"]:
            where = f"{entry['folder']}: {', '.join(entry['splits'])}"
        elif entry["md5"]:
            where += f"segcli data download {entry['name']}"
        else:
            where += entry["address"] + (" (login needed)" if entry["login"] else "")
        terminal.say(f"{entry['name']:<11} {entry['about']}\n{'':<11} {where}")
    places = [str(place.parent if root is None else place) for place in search_places("voc", root)]
    terminal.say(f"Looked in: {', '.join(places)}")
    terminal.document({"searched": places, "data": entries})


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="voc, voc2012 .. voc2007, or voc-sbd.")],
    root: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for it. [below SEGCLI_DATA where that is set, else ./data]"),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Download a public data set, check it and unpack it.

    A download that broke off is continued; an archive that was saved by hand in the folder is used.
    Sets that need a login are not fetched: the address is printed. Exit code 3 when it cannot be had.

    \b
    Examples:
      segcli data download voc
      segcli data download voc-sbd --root /datasets/voc-sbd
    """
    from segcli.cli.downloading import Downloading
    from segcli.data.fetch import fetch
    from segcli.data.sets import KNOWN, find_data, search_places

    terminal = Terminal(quiet, json)
    if name not in KNOWN:
        import difflib

        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else "`segcli data list` shows the names"
        raise UsageError(f"no data set is called {name!r}; {hint}")
    try:
        layout, folder = find_data(name, root)
        terminal.say(f"{name} is here already: {folder}")
    except MachineError:
        with Downloading(terminal) as watch:
            fetch(name, search_places(name, root)[0], watch)
        layout, folder = find_data(name, root)
        terminal.say(f"{name} is in {folder}")
    terminal.document({"name": name, "folder": str(folder), "splits": list(layout.splits(folder))})


@app.command()
def verify(
    name: Name,
    split: Split = "",
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Read every image and label of a data set, and say what is wrong with which file.

    One line per finding, with the fix: missing, damaged or lossy files, sizes that differ, values that are
    no class, masks of 0 and 255, files without a partner, images in two splits. Exit code 1 when there are
    findings.

    \b
    Examples:
      segcli data verify my/
      segcli data verify voc --split train+val
    """
    from segcli.data.sets import open_data, split_names
    from segcli.data.verify import Finding, check, check_overlap

    terminal = Terminal(quiet, json)
    names = split.split("+") if split else whole(split_names(name, root))
    parts: dict[str, DataSet] = {}
    findings: list[Finding] = []
    for part in names:
        try:
            parts[part] = open_data(name, part, root)
        except UsageError as error:
            if split or "has no image" not in str(error):
                raise
            findings.append(Finding(Path(name), f"the split {part} is empty", "add images, or remove it"))
    if parts:
        together = open_data(name, "+".join(parts), root)
        with progress(terminal, "checked", len(together.samples)) as done:
            findings += check(together, done)
        apart = {part: data for part, data in parts.items() if part in ("train", "val", "test")}
        findings += check_overlap(apart)
    for finding in findings:
        terminal.warn(str(finding).replace("\n", " "))
    counts = {part: len(dataset.samples) for part, dataset in parts.items()}
    classes = next(iter(parts.values())).class_set.names if parts else ()
    counted = ", ".join(f"{part} {count}" for part, count in counts.items())
    verdict = f"{len(findings)} findings" if findings else "nothing wrong"
    terminal.say(f"{name}: {counted}; {len(classes)} classes; {verdict}")
    terminal.document(
        {
            "name": name,
            "splits": counts,
            "classes": list(classes),
            "findings": [
                {"path": str(f.path), "problem": f.problem, "fix": f.fix, "serious": f.serious}
                for f in findings
            ],
        }
    )
    if findings:
        raise typer.Exit(1)


@app.command()
def stats(
    name: Name,
    split: Split = "",
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Pixels and images per class, class weights, sizes, mean and standard deviation of the colours.

    The weights are those of `segcli train --class-weights auto`: 1 / ln(1.02 + share), scaled to mean 1.

    \b
    Example:
      segcli data stats camvid --split train --json
    """
    from segcli.data.stats import class_weights, statistics

    terminal = Terminal(quiet, json, answers=True)
    dataset = open_whole(name, split, root)
    with progress(terminal, "read", len(dataset.samples)) as done:
        found = statistics(dataset, done)
    weights, total = class_weights(found.pixels), max(1, int(found.pixels.sum()))
    per_class: list[dict[str, Any]] = [
        {
            "name": class_name,
            "pixels": int(found.pixels[i]),
            "share": round(int(found.pixels[i]) / total, 6),
            "images": int(found.images[i]),
            "weight": round(float(weights[i]), 4),
        }
        for i, class_name in enumerate(dataset.class_set.names)
    ]
    rows = [
        [
            f"{i} {c['name']}",
            f"{c['pixels']:,}",
            f"{100 * c['share']:.2f}",
            f"{c['images']:,}",
            f"{c['weight']:.3f}",
        ]
        for i, c in enumerate(per_class)
    ]
    terminal.table(["class", "pixels", "%", "images", "weight"], rows)
    everything = total + found.ignored
    terminal.say(f"ignored: {found.ignored:,} pixels ({100 * found.ignored / everything:.2f} %)")
    common = ", ".join(f"{w} x {h} ({count})" for (w, h), count in found.sizes.most_common(5))
    more = f" and {len(found.sizes) - 5} more" if len(found.sizes) > 5 else ""
    terminal.say(f"sizes: {common}{more}")
    mean, std = ([round(float(v), 4) for v in values] for values in (found.mean, found.std))
    terminal.say(f"mean {mean}, standard deviation {std} (RGB, white = 1)")
    warn_failed(found.failed, terminal)
    terminal.document(
        {
            "name": dataset.name,
            "split": dataset.split,
            "images": sum(found.sizes.values()),
            "per_class": per_class,
            "ignored_pixels": found.ignored,
            "sizes": [
                {"width": w, "height": h, "images": count} for (w, h), count in found.sizes.most_common()
            ],
            "mean": mean,
            "std": std,
            "failed": [{"name": failed, "problem": problem} for failed, problem in found.failed],
        }
    )
    if found.failed:
        raise typer.Exit(1)


@app.command()
def show(
    name: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write, .jpg or .png.")] = Path(
        "samples.jpg"
    ),
    split: Split = "",
    root: Root = None,
    count: Annotated[int, typer.Option(min=1, max=200, help="Number of images.")] = 12,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """One picture of images with their labels as overlays, evenly spaced over the set.

    \b
    Example:
      segcli data show camvid --split val --count 6 --out camvid.jpg
    """
    from segcli.data.show import sample_picture
    from segcli.files import write_atomic
    from segcli.images import encode_jpeg, encode_png

    if out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UsageError(f"--out {out}: choose a name that ends in .jpg or .png")
    terminal = Terminal(quiet, json)
    dataset = open_whole(name, split, root)
    picture, shown, failed = sample_picture(dataset, count)
    warn_failed(failed, terminal)
    if picture is not None:
        write_atomic(out, encode_png(picture) if out.suffix.lower() == ".png" else encode_jpeg(picture))
        terminal.say(f"{out}: {len(shown)} of {len(dataset.samples)} images of {dataset.name}")
    terminal.document(
        {
            "picture": str(out) if picture is not None else None,
            "shown": shown,
            "failed": [{"name": failed_name, "problem": problem} for failed_name, problem in failed],
        }
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A folder of label files (with sub-folders), or one file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the masks.")],
    kind: Annotated[
        str,
        typer.Option(
            "--from",
            help="binary, cityscapes, cityscapes-train-ids, ade20k, camvid, colors, labelme, or ids.",
        ),
    ] = "ids",
    classes: Annotated[
        str, typer.Option(help="A class set or its file: the colours of `colors`, the labels of `labelme`.")
    ] = "",
    changes: Annotated[str, typer.Option("--map", help="Values to change, as OLD=NEW,OLD=NEW.")] = "",
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Label files of others into masks whose values are class ids; the id map is always printed.

    \b
      binary                masks of 0 and 255: 255 becomes class 1
      cityscapes            label ids become train ids, the rest is ignored
      cityscapes-train-ids  back to the label ids that the test server wants
      ade20k                0 is ignored, 1..150 become 0..149
      camvid                SegNet's labels: 11 is ignored
      colors                pictures in the colours of --classes
      labelme               JSON files; _background_ is 0, __ignore__ is ignored
      ids                   only what --map says changes

    Inputs stay as they are. 255 means ignore. Exit code 1 when a file could not be converted.

    \b
    Examples:
      segcli data convert raw/ --from binary --out my/masks
      segcli data convert labels/ --from colors --classes camvid32 --out masks/
      segcli data convert json/ --from labelme --classes labels.txt --out masks/
      segcli data convert raw/ --map 128=1,200=2 --out my/masks
    """
    from segcli.data.convert import convert_all, source_files
    from segcli.files import require_writable

    terminal = Terminal(quiet, json)
    conversion = choose_conversion(source, kind, classes, changes)
    files = source_files(source, conversion)
    here = out.resolve()
    if here.is_relative_to(source.resolve()) or any((here / name) == path.resolve() for path, name in files):
        raise UsageError(
            f"--out {out} lies in the folder of the inputs; choose another, so that they stay apart"
        )
    require_writable(out)
    id_map = describe_map(conversion, terminal)
    with progress(terminal, "converted", len(files)) as done:
        result = convert_all(files, conversion, out, done)
    counted = {str(i): int(count) for i, count in enumerate(result.pixels) if count}
    listed = ", ".join(f"{i} x {count:,}" for i, count in counted.items())
    terminal.say(f"{result.written} masks in {out}; ids and their pixels: {listed or 'none'}")
    warn_failed([(str(path), problem) for path, problem in result.failed], terminal)
    terminal.document(
        {
            "out": str(out),
            "written": result.written,
            "map": id_map,
            "pixels": counted,
            "failed": [{"path": str(path), "problem": problem} for path, problem in result.failed],
        }
    )
    if result.failed:
        raise typer.Exit(1)


def choose_conversion(source: Path, kind: str, classes: str, changes: str) -> Conversion:
    """The conversion that the options ask for."""
    import dataclasses
    import difflib

    from segcli.data.convert import CONVERSIONS, labelme_classes, parse_map, source_files
    from segcli.palettes import get_class_set

    if kind not in CONVERSIONS:
        near = difflib.get_close_matches(kind, CONVERSIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(CONVERSIONS)}"
        raise UsageError(f"--from {kind!r} is unknown; {hint}")
    conversion = CONVERSIONS[kind]
    if kind == "ids" and not changes:
        raise UsageError("nothing to convert: give --from KIND, or --map OLD=NEW")
    if changes and (conversion.colors or conversion.shapes):
        raise UsageError(f"--map does not go with --from {kind}; change the result in a second step")
    if kind == "colors" and not classes:
        raise UsageError("--from colors needs --classes: a class set such as camvid32, or its file")
    if changes:
        conversion = dataclasses.replace(conversion, table=conversion.table | parse_map(changes))
    if classes:
        return dataclasses.replace(conversion, classes=get_class_set(classes))
    if kind == "labelme":
        paths = [path for path, _ in source_files(source, conversion)]
        return dataclasses.replace(conversion, classes=labelme_classes(paths))
    return conversion


def describe_map(conversion: Conversion, terminal: Terminal) -> list[dict[str, Any]]:
    """Print what becomes what, and return the same for JSON."""
    classes = conversion.classes
    named: list[tuple[str, int]] = []
    if conversion.colors and classes is not None:
        named = [(str(tuple(color)), i) for i, color in enumerate(classes.colors)]
        named.append((str(tuple(classes.ignore_color)), classes.ignore))
    elif conversion.shapes and classes is not None:
        named = [*((name, i) for i, name in enumerate(classes.names)), ("__ignore__", 255)]
    else:
        named = [(str(old), new) for old, new in sorted(conversion.table.items())]
    rows = [[old, str(new), class_name(new, classes)] for old, new in named]
    terminal.table(["in the file", "id", "class"], rows, title=conversion.about)
    if conversion.keeps:
        terminal.say("all other values stay")
    return [{"from": old, "id": new} for old, new in named]


def class_name(number: int, classes: ClassSet | None) -> str:
    if classes is not None and number < len(classes):
        return classes.names[number]
    return "ignored" if number == 255 else ""


def whole(names: tuple[str, ...]) -> list[str]:
    """Splits that together are everything: `all` where there is such a split."""
    return ["all"] if "all" in names else list(names)


def open_whole(name: str, split: str, root: Path | None) -> DataSet:
    from segcli.data.sets import open_data, split_names

    return open_data(name, split or "+".join(whole(split_names(name, root))), root)


@contextmanager
def progress(terminal: Terminal, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; call the function that it gives after every file."""
    started, count = time.monotonic(), 0
    with terminal.progress("files") as bar:
        line = bar.add_task(what, total=total, rate="")

        def done() -> None:
            nonlocal count
            count += 1
            bar.update(line, completed=count, rate=f"{count / (time.monotonic() - started):.0f}")

        yield done


def warn_failed(failed: list[tuple[str, str]], terminal: Terminal) -> None:
    """A line for each of the first files that failed, and how many there are."""
    for name, problem in failed[:SHOWN_FAILURES]:
        terminal.warn(f"failed: {name}: {problem}")
    if len(failed) > SHOWN_FAILURES:
        terminal.warn(f"failed: {len(failed)} files in all; --json lists them")
