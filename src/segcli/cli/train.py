"""`segcli train`: from a data set with labels to a model file."""

from __future__ import annotations

import dataclasses
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

import typer

from segcli.cli.downloading import Downloading
from segcli.cli.options import Device, Json, Quiet, Verbose
from segcli.cli.terminal import Terminal
from segcli.cli.train_display import Display, duration
from segcli.errors import SegcliError, UsageError
from segcli.training.config import MACHINE_OPTIONS, RECIPES, TrainConfig, read_config, resolve, to_toml

if TYPE_CHECKING:
    import torch

    from segcli.training.loop import State
    from segcli.training.tasks import Task

SHOWN_FINDINGS = 100
LOST = "Another process of this training has ended. The same command goes on from the last checkpoint."

Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder: model files, checkpoint, log, curves.")]
Config = Annotated[Optional[Path], typer.Option(help="TOML file with any of the options below.")]  # noqa: UP045
Recipe = Annotated[str, typer.Option(help=f"A named set of options: {', '.join(RECIPES)}.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew in a run folder of another training.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Try one batch; print memory and an estimate of the time.")
]
SkipCheck = Annotated[
    bool, typer.Option("--skip-check", help="Start without reading every image and label of the data once.")
]


def train(
    out: Out = Path("runs/train"),
    config: Config = None,
    recipe: Recipe = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    skip_check: SkipCheck = False,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Train or fine-tune an FCN; the result is a model file for `segcli predict --model`.

    The run folder gets best.safetensors, last.safetensors, log.jsonl, samples/ and checkpoint.pt; with the
    extra segcli[train] also curves.png and TensorBoard events. The same command again goes on where an
    interrupted one stopped.

    Later sources of options win: defaults, --recipe, --config, the command line.

    \b
    Examples:
      segcli train --data camvid --root CamVid/ --out runs/camvid
      segcli train --data my/ --model fcn8s-voc --epochs 40 --out runs/my
      segcli train --config recipes/fcn8s-voc.toml --out runs/voc
      torchrun --nproc-per-node 4 -m segcli train --data voc --out runs/voc
    """
    with one_voice():
        if recipe and recipe not in RECIPES:
            raise UsageError(f"--recipe {recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
        given = {name: value for name, value in options.items() if value not in (None, ())}
        resolved = resolve(RECIPES.get(recipe, {}), read_config(config) if config else {}, given)
        terminal = Terminal(quiet, json)
        run_training(out, resolved, device, overwrite, dry_run, skip_check, terminal)


@contextmanager
def one_voice() -> Iterator[None]:
    """Under torchrun: join the other processes first; of an error that all have, one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from segcli.training import distributed
    from segcli.training.loop import NonFinite

    distributed.start()
    try:
        yield
    except distributed.FailedElsewhere as error:
        raise typer.Exit(error.exit_code) from None
    except SegcliError as error:
        if isinstance(error, NonFinite) and distributed.rank() != 0:  # all know it
            raise typer.Exit(error.exit_code) from None
        distributed.tell_torchrun(error)
        raise
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        if distributed.rank() == 0:
            typer.echo(LOST, err=True)
        raise typer.Exit(1) from None
    distributed.finish()


def run_training(
    out: Path,
    config: TrainConfig,
    device_name: str,
    overwrite: bool,
    dry_run: bool,
    skip_check: bool,
    terminal: Terminal,
) -> None:
    """Set up, train, report."""
    from segcli.device import pick_device
    from segcli.files import locked, remove_leftovers, require_writable, write_atomic
    from segcli.memory import keep_freed_memory
    from segcli.training import distributed, loop
    from segcli.training.setup import make_task

    first = distributed.rank() == 0
    writes = first and not dry_run
    terminal.quiet |= not first
    terminal.json &= first
    with ExitStack() as held:
        with distributed.together():
            device = distributed.own_device(pick_device(device_name))
            config = settled(config, device)
            if device.type == "cpu":
                keep_freed_memory()
            if writes:
                check_run_folder(out, config, overwrite)
            with Downloading(terminal) as watch:
                task = make_task(config, device, watch)
            state = loop.new_state(task, config, device)
            announce(task, config, device, terminal)
            if writes:
                require_writable(out)
                held.enter_context(locked(out, out / "lock"))
                remove_leftovers(out)
            resumed = not dry_run and loop.load_state(out, state)
            if not (resumed or skip_check):
                distributed.from_first(lambda: check_data(task, config, terminal))
        if dry_run:
            try_one_batch(task, state, config, device, terminal)
            return
        if resumed and not loop.is_finished(state, config):
            terminal.say(f"Going on in {out} at epoch {state.epoch + 1}, batch {state.batch + 1}.")
        if writes:
            write_atomic(out / "config.toml", to_toml(config).encode())
        interrupted = train_and_show(task, state, config, out, device, terminal)
        if interrupted is not None:
            if first:
                where = f"epoch {state.epoch + 1} after batch {state.batch}"
                terminal.warn(f"Stopped in {where}. The same command goes on from there.")
            raise typer.Exit(128 + interrupted if interrupted else 1)
        if first:
            report(out, config, state.history, task.score, terminal)


def settled(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration with what depends on the machine filled in."""
    from segcli.device import pick_precision
    from segcli.training.setup import available_workers

    workers = available_workers() if config.workers < 0 else config.workers
    return dataclasses.replace(config, precision=pick_precision(config.precision, device), workers=workers)


def announce(task: Task, config: TrainConfig, device: torch.device, terminal: Terminal) -> None:
    """Say what will be trained on what."""
    from segcli.device import describe
    from segcli.training import distributed

    for line in task.about:
        terminal.say(line)
    together = f"{distributed.processes()} processes, " if distributed.processes() > 1 else ""
    terminal.say(f"On {together}{describe(device)}, in {config.precision}.")


def train_and_show(
    task: Task, state: State, config: TrainConfig, out: Path, device: torch.device, terminal: Terminal
) -> int | None:
    """Train with a live display and a record in the run folder.

    Returns:
        None at the end of the training; the signal that stopped it, or 0 if another process got that.
    """
    import multiprocessing

    from segcli.inference.interrupts import Interrupts
    from segcli.training import distributed, loop, record

    first = distributed.rank() == 0
    events = record.Events(out, state.epoch) if first else None
    stop = threading.Event()

    def end_workers() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    def after_epoch(entry: dict[str, Any]) -> None:
        display.finished_epoch(entry)
        if events is not None:
            events.epoch(entry)

    def after_save() -> None:
        record.draw_curves(out, state.history, task.score)

    display = Display(terminal, config.epochs, state.history, task.score)
    watcher = loop.Watcher(display.trained, display.validated, after_epoch, after_save, stop.is_set)
    training = loop.Training(task, state, config, out, device, watcher)
    copies = distributed.signal_copies()
    with Interrupts(stop, end_workers, copies, first, training.dismissal.give) as interrupts, display:
        finished = loop.train(training)
    if events is not None:
        events.close()
    return None if finished else interrupts.number


def check_run_folder(out: Path, config: TrainConfig, overwrite: bool) -> None:
    """Refuse a folder of another training, unless it may be overwritten.

    Raises:
        UsageError: The folder holds a training with other options.
    """
    saved = out / "config.toml"
    if not saved.is_file():
        return
    if overwrite:
        for name in ("checkpoint.pt", "config.toml", "log.jsonl"):
            (out / name).unlink(missing_ok=True)
        return
    before, now = dataclasses.asdict(resolve(read_config(saved))), dataclasses.asdict(config)
    changed = [name for name in now if before[name] != now[name] and name not in MACHINE_OPTIONS]
    if changed:
        shown = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed[:3])
        raise UsageError(
            f"{out} holds a training with other options ({shown}).\n"
            "Choose another --out, or add --overwrite to start anew."
        )


def check_data(task: Task, config: TrainConfig, terminal: Terminal) -> None:
    """Look at every file that will be trained on, before anything is.

    Raises:
        UsageError: Some cannot be used; a line for each has been printed.
    """
    with Display(terminal, config.epochs, [], task.score) as display:
        findings = task.check(display.checked)
    serious = [finding for finding in findings if finding.serious]
    for finding in serious[:SHOWN_FINDINGS]:
        terminal.warn(str(finding))
    if len(serious) > SHOWN_FINDINGS:
        terminal.warn(f"and {len(serious) - SHOWN_FINDINGS} more, which `segcli data verify` lists")
    if serious:
        terminal.document({"findings": [str(finding) for finding in serious]})
        raise UsageError("nothing was trained: these files of the data cannot be used as they are")
    if findings:
        terminal.say(
            f"{len(findings)} files are not used, such as {findings[0].path}, which {findings[0].problem}."
        )


def report(
    out: Path, config: TrainConfig, history: list[dict[str, Any]], score: str, terminal: Terminal
) -> None:
    """The result: the best epoch, its scores per class, and how to use it."""
    scored = [entry for entry in history if score in entry]
    best = max(scored, key=lambda entry: entry[score]) if scored else history[-1]
    if "per_class" in best:
        rows = [[name, f"{100 * iou:.1f}"] for name, iou in best["per_class"].items()]
        terminal.table(["class", "IoU"], [*rows, ["mean", f"{100 * best['mean_iou']:.1f}"]])
    model = out / ("best.safetensors" if scored else "last.safetensors")
    seconds = sum(entry["seconds"] for entry in history)
    early = (
        ""
        if len(history) == config.epochs
        else f" (stopped early, no better score in {config.patience} validations)"
    )
    terminal.say(f"{len(history)} epochs in {duration(seconds)}{early}; the best is epoch {best['epoch']}.")
    if config.task == "classify":
        terminal.say(f"Use it: segcli train --encoder {config.encoder} --encoder-weights {model} --data ...")
    else:
        terminal.say(f"Use it: segcli predict images/ --out masks/ --model {model}")
    terminal.document({"run": str(out), "model": str(model), "best": best, "epochs": len(history)})


def try_one_batch(
    task: Task, state: State, config: TrainConfig, device: torch.device, terminal: Terminal
) -> None:
    """One batch and one validated image through everything, timed; nothing is written."""
    import resource
    import time

    import torch

    from segcli.data.loading import batches, loader
    from segcli.training import distributed
    from segcli.training.loop import train_step

    order = batches(len(task.names), config.batch_size, config.seed, 0)
    own = [distributed.share(batch) for batch in order[:2]]
    seconds, validation, count = [], 0.0, 0
    for images, targets in loader(task.samples, own, 0, pin=False):  # the first one pays for getting ready
        began = time.monotonic()
        loss = train_step(task, state, config, images.to(device), targets.to(device).long())
        seconds.append(time.monotonic() - began)
    if task.validate is not None:
        began = time.monotonic()

        def stop_after_one(done: int, of: int) -> bool:
            nonlocal validation, count
            validation, count = time.monotonic() - began, of
            return False

        task.validate(state.result.eval(), stop_after_one)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hours = config.epochs * (seconds[-1] * len(order) + validation * count / config.validate_every) / 3600
    terminal.say(
        f"One batch of {config.batch_size}: loss {loss:.3f}, {seconds[-1]:.2f} s, {memory:.1f} GiB at most."
    )
    terminal.say(
        f"{config.epochs} epochs of {len(order)} batches, with validation, take about "
        f"{duration(3600 * hours)}, if images load as fast."
    )
    terminal.document({"loss": loss, "seconds_per_batch": seconds[-1], "peak_gib": memory, "hours": hours})


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
