"""`segcli train`: from a data set with labels to a model file."""

from __future__ import annotations

import dataclasses
import inspect
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

import typer

from segcli.cli.options import Device, Json, Quiet, Verbose
from segcli.cli.terminal import Terminal
from segcli.errors import UsageError
from segcli.training.config import RECIPES, TrainConfig, read_config, resolve, to_toml

if TYPE_CHECKING:
    from segcli.training.loop import Progress

Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder: model files, checkpoint, log, curves.")]
Config = Annotated[Optional[Path], typer.Option(help="TOML file with any of the options below.")]  # noqa: UP045
Recipe = Annotated[str, typer.Option(help=f"A named set of options: {', '.join(RECIPES)}.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew in a run folder of another training.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Try one batch; print memory and an estimate of the time.")
]


def train(
    out: Out = Path("runs/train"),
    config: Config = None,
    recipe: Recipe = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Train or fine-tune an FCN; the result is a model file for `segcli predict --model`.

    The run folder gets best.safetensors, last.safetensors, log.jsonl, curves.png (with the extra
    segcli[train]) and checkpoint.pt. The same command again goes on where an interrupted one stopped.

    Later sources of options win: defaults, --recipe, --config, the command line.

    \b
    Examples:
      segcli train --data camvid --root CamVid/ --out runs/camvid
      segcli train --data my/ --model fcn8s-voc --epochs 40 --out runs/my
      segcli train --config recipes/fcn8s-voc.toml --out runs/voc
      torchrun --nproc-per-node 4 -m segcli train --data voc --out runs/voc
    """
    if recipe and recipe not in RECIPES:
        raise UsageError(f"--recipe {recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    resolved = resolve(RECIPES.get(recipe, {}), read_config(config) if config else {}, given)
    terminal = Terminal(quiet, json)
    check_run_folder(out, resolved, overwrite)
    run_training(out, resolved, device, dry_run, terminal)


def check_run_folder(out: Path, config: TrainConfig, overwrite: bool) -> None:
    """Refuse a folder of another training, unless it may be overwritten.

    Raises:
        UsageError: The folder holds a training with other options.
    """
    saved = out / "config.toml"
    if not saved.is_file():
        return
    machine = {"workers", "root"}  # may differ without changing the result
    before, now = dataclasses.asdict(resolve(read_config(saved))), dataclasses.asdict(config)
    changed = [name for name in now if before[name] != now[name] and name not in machine]
    if changed and not overwrite:
        shown = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed[:3])
        raise UsageError(
            f"{out} holds a training with other options ({shown}).\n"
            "Choose another --out, or add --overwrite to start anew."
        )
    if overwrite:
        for name in ("checkpoint.pt", "config.toml", "log.jsonl"):
            (out / name).unlink(missing_ok=True)


def run_training(out: Path, config: TrainConfig, device_name: str, dry_run: bool, terminal: Terminal) -> None:
    """Set up, train, report."""
    from segcli.device import describe, pick_device, pick_precision
    from segcli.files import write_atomic
    from segcli.training import distributed, loop, record
    from segcli.training.setup import available_workers, make_task

    device = distributed.start(pick_device(device_name), config.batch_size)
    first = distributed.is_first()
    terminal.quiet |= not first
    precision = pick_precision(config.precision, device)
    workers = available_workers() if config.workers < 0 else config.workers
    config = dataclasses.replace(config, precision=precision, workers=workers)
    task = make_task(config, device)
    state = loop.new_state(task, config, device)
    terminal.say(
        f"Training {config.encoder} on {len(task.names)} images on {describe(device)} in {precision}."
    )
    if dry_run:
        try_one_batch(task, state, config, device, terminal)
        return
    if (out / loop.CHECKPOINT).is_file():
        loop.load_state(out, state)
        terminal.say(f"Going on in {out} at epoch {state.epoch + 1}, batch {state.batch + 1}.")
    if first:
        write_atomic(out / "config.toml", to_toml(config).encode())
    events = record.Events(out) if first else None

    with stop_requests() as stopped, terminal.progress() as bar:
        line = bar.add_task("epoch", total=None, rate="")

        def after_batch(progress: Progress) -> None:
            bar.update(
                line,
                description=f"epoch {progress.epoch + 1}/{config.epochs}  loss {progress.loss:.3f}",
                completed=progress.batch,
                total=progress.batches,
                rate=f"{progress.images_per_second:.1f}",
            )

        def after_epoch(entry: dict[str, Any]) -> None:
            terminal.say(epoch_line(entry, config))
            if events is not None:
                events.epoch(entry)
                record.draw_curves(out, state.history, task.score)

        watcher = loop.Watcher(after_batch, after_epoch, lambda: bool(stopped))
        finished = loop.train(task, state, config, out, device, watcher)
    if events is not None:
        events.close()
    distributed.finish()
    if not finished:
        terminal.warn(
            f"Stopped at epoch {state.epoch + 1}, batch {state.batch}. The same command goes on from there."
        )
        raise typer.Exit(128 + stopped[0])
    report(out, state.history, task.score, terminal)


def epoch_line(entry: dict[str, Any], config: TrainConfig) -> str:
    """One epoch in one line."""
    parts = [f"epoch {entry['epoch']:>3}/{config.epochs}", f"loss {entry['loss']:.4f}"]
    parts += [f"{name.replace('_', ' ')} {100 * entry[name]:.2f}"
              for name in ("mean_iou", "pixel_accuracy", "accuracy") if name in entry]  # fmt: skip
    return "  ".join([*parts, f"lr {entry['lr']:.2e}", f"{entry['seconds']:.0f} s"])


def report(out: Path, history: list[dict[str, Any]], score: str, terminal: Terminal) -> None:
    """The result: the best epoch, its scores per class, and how to use it."""
    scored = [entry for entry in history if score in entry]
    best = max(scored, key=lambda entry: entry[score]) if scored else history[-1]
    if "per_class" in best:
        rows = [[name, f"{100 * iou:.1f}"] for name, iou in best["per_class"].items()]
        terminal.table(["class", "IoU"], [*rows, ["mean", f"{100 * best['mean_iou']:.1f}"]])
    name = "best.safetensors" if scored else "last.safetensors"
    terminal.say(
        f"Best epoch: {best['epoch']}. Use it: segcli predict images/ --out masks/ --model {out / name}"
    )
    terminal.document({"run": str(out), "model": str(out / name), "best": best, "epochs": len(history)})


def try_one_batch(task: Any, state: Any, config: TrainConfig, device: Any, terminal: Terminal) -> None:
    """One batch through everything, timed; nothing is written."""
    import resource
    import time

    import torch

    from segcli.data.loading import batches, loader
    from segcli.training.loop import train_step

    order = batches(len(task.names), config.batch_size, config.seed, 0)
    seconds = []
    for images, targets in loader(task.samples, order[:2], 0, pin=False):
        started = time.monotonic()
        loss = train_step(task, state, config, images.to(device), targets.to(device).long())
        seconds.append(time.monotonic() - started)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hours = seconds[-1] * len(order) * config.epochs / 3600
    terminal.say(
        f"One batch of {config.batch_size}: loss {loss:.3f}, {seconds[-1]:.2f} s, {memory:.1f} GiB at most. "
        f"{config.epochs} epochs of {len(order)} batches take about {hours:.1f} h without validation."
    )
    terminal.document({"loss": loss, "seconds_per_batch": seconds[-1], "peak_gib": memory, "hours": hours})


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, once each; a second one ends the process at once."""
    received: list[int] = []

    def on_signal(number: int, _: types.FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for every field of `TrainConfig`; those left out are None."""
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=own_hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    hints = get_type_hints(TrainConfig)
    extra = []
    for field in dataclasses.fields(TrainConfig):
        kind: Any = list[str] if field.name == "notes" else hints[field.name]
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        help_text = field.metadata["help"] + (f" [{shown}]" if shown and kind is not bool else "")
        annotation = Annotated[Optional[kind], typer.Option(help=help_text, show_default=False)]  # noqa: UP045
        extra.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*own, *extra]}
    return command


train = with_config_options(train)
