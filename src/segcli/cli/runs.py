"""Runs over many files: what `segcli predict` and `segcli colorize` share, and `segcli runs`."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from segcli.cli.options import Json, Quiet
from segcli.cli.terminal import Terminal, printable
from segcli.errors import Interrupted, UsageError
from segcli.inference.layout import MANIFEST_FILE, RUN_FOLDER

if TYPE_CHECKING:
    from segcli.inference.engine import Helpers, Progress
    from segcli.inference.pipeline import Task
    from segcli.inference.shards import Shard
    from segcli.inference.sources import Sources

app = typer.Typer(help="Look at runs, and merge the shards of one.", no_args_is_help=True)
Out = Annotated[str, typer.Argument(metavar="DIR", help="An output folder of segcli, or its URL.")]
LINE_EVERY = 30  # seconds between two lines about the progress, where there is no terminal
SHOWN_CLASSES = 12

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Do everything again, also where earlier results are good.")
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, help="Processes that read files; 0 reads them unprotected.", show_default="by cores"),
]


def refuse_empty(sources: Sources, noun: str) -> None:
    """Stop when there is not a single input. A list is not looked at: stdin can be read only once.

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
    raise UsageError(
        f"there are no {noun}s in {names}{instead}.\n{noun.capitalize()}s are files named {suffixes}."
    )


def list_inputs(sources: Sources, shard: Shard | None, terminal: Terminal, noun: str) -> None:
    """Print the inputs, or those of a shard, one per line on stdout, and say how many there are.

    Names are looked at as a run does before it computes: what cannot be read is said, and makes exit code 1.
    """
    from segcli.inference.sources import PassedOver, counted, discover

    passed_over = PassedOver()
    total = listed = 0
    problems: list[tuple[str, str]] = []
    unreadable = 0
    stdout = sys.stdout.buffer
    for item in discover(sources, passed_over):
        total += 1
        if shard is not None and not shard.holds(item.output):
            continue
        listed += 1
        if not terminal.json:
            shown = printable(item.source).encode() if sys.stdout.isatty() else os.fsencode(item.source)
            stdout.write(shown + b"\n")
        if item.problem:
            unreadable += 1
            if len(problems) < 10:
                problems.append((item.source, item.problem))
    stdout.flush()
    terminal.document(
        {
            "inputs": total,
            "shard": str(shard) if shard else None,
            "listed": listed,
            "unreadable": unreadable,
            "problems": [{"source": source, "reason": reason} for source, reason in problems],
        }
    )
    told = counted(total, noun)
    terminal.say(f"{told}, {listed:,} of them in shard {shard}." if shard else f"{told}.")
    if text := passed_over.describe():
        terminal.say(f"Not taken as {noun}s: {text}.")
    if unreadable:
        terminal.warn(f"{unreadable:,} cannot be read:")
        list_problems(problems, unreadable, "", terminal)
        raise typer.Exit(1)


def list_problems(problems: list[tuple[str, str]], total: int, where: str, terminal: Terminal) -> None:
    """Print sources with reasons, and how many more there are, and where."""
    for source, reason in problems:
        terminal.warn(f"  {one_line(source)}: {one_line(reason)}")
    if total > len(problems):
        terminal.warn(f"  and {total - len(problems):,} more{where}")


def run_and_report(
    task: Task[Any],
    progress: Progress,
    terminal: Terminal,
    noun: str,
    doing: str,
    helpers: Helpers | None = None,
) -> None:
    """Run, with a progress bar or a line now and then; say what became of the files, and exit accordingly.

    Args:
        task: What to do.
        progress: Is kept up to date.
        terminal: Where to show it.
        noun: What the inputs are called, such as "image".
        doing: What is done to them, such as "Segmenting".
        helpers: Other processes that compute, see `engine.run`.
    """
    try:
        seconds = run_and_show(task, progress, terminal, noun, doing, helpers)
        report(task, progress, seconds, terminal, noun)
    except Interrupted:  # just before the run took over, or just after it
        raise Interrupted("The same command goes on from here.") from None


def run_and_show(
    task: Task[Any],
    progress: Progress,
    terminal: Terminal,
    noun: str,
    doing: str,
    helpers: Helpers | None,
) -> float:
    """The run itself; returns the seconds that it took."""
    from segcli.inference.engine import count, run

    begun = time.monotonic()
    ended = threading.Event()
    counting = (task.sources, progress, ended, task.shard)
    threads = [threading.Thread(target=show, args=(progress, terminal, noun, doing, ended), daemon=True)]
    if ("list", "-") not in task.sources.entries:
        threads.append(threading.Thread(target=count, args=counting, daemon=True))
    for thread in threads:
        thread.start()
    try:
        run(task, progress, helpers)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    return time.monotonic() - begun


def show(progress: Progress, terminal: Terminal, noun: str, doing: str, ended: threading.Event) -> None:
    """Keep the user informed until `ended` is set."""
    if not sys.stderr.isatty():
        while not ended.wait(LINE_EVERY):
            total = f" of {progress.total:,}" if progress.total else ""
            pace = f"{rate(progress)} {noun}s/s{time_left(progress)}"
            terminal.say(f"{progress.inputs:,}{total} {noun}s, {pace}")
        return
    with terminal.progress(f"{noun}s") as bar:
        line = bar.add_task("Getting ready", total=None, rate="-")
        while not ended.wait(0.2):
            bar.update(
                line,
                description=doing if progress.computing_since else "Getting ready",
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


def report(task: Task[Any], progress: Progress, seconds: float, terminal: Terminal, noun: str) -> None:
    """Say what became of the files, and exit accordingly."""
    from segcli.inference.sources import counted

    manifest = task.out.place(f"{task.shard.record if task.shard else RUN_FOLDER}/{MANIFEST_FILE}")
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
            "manifest": manifest,
        }
    )
    if progress.interrupted:
        total = f" of {progress.total:,}" if progress.total else ""
        done = progress.done + progress.skipped
        terminal.warn(f"Stopped: {done:,}{total} {noun}s are done. The same command goes on from here.")
        raise typer.Exit(128 + progress.interrupted)
    if not progress.inputs and task.shard is None:
        raise UsageError("the list of files is empty")

    if shares:
        largest = dict(progress.pixels.most_common(SHOWN_CLASSES))
        rows = [(name, percent(count / pixels)) for name, count in largest.items()]
        if len(shares) > len(rows):
            rows.append((f"{len(shares) - len(rows)} more", percent(1 - sum(largest.values()) / pixels)))
        terminal.table(["Class", "of all pixels"], rows)
    if passed_over := progress.passed_over.describe():
        terminal.say(f"Not taken as {noun}s: {passed_over}.")
    counts = [f"{progress.done:,} done"]
    counts += [f"{progress.skipped:,} done before"] if progress.skipped else []
    counts += [f"{progress.failed:,} failed"] if progress.failed else []
    inputs = counted(progress.inputs, noun)
    where = str(task.out)
    if task.in_tars:
        where += ", in tar files"
    elif "overlay" in task.kinds:
        where += f", overlays in {task.out.place('_overlay')}"
    terminal.say(f"{inputs} in {seconds:.1f} s: {', '.join(counts)}. Results are in {where}.")
    if task.shard is not None:
        terminal.say(f"That was shard {task.shard}. Once all are done: segcli runs merge {task.out}")
    if progress.failed:
        list_problems(progress.failures, progress.failed, f", see {manifest}", terminal)
        raise typer.Exit(1)


def percent(share: float) -> str:
    """A share of 1 with one decimal; what is there never reads as nothing."""
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def one_line(text: str) -> str:
    """A name or reason without anything that could break the line."""
    return printable(text).replace("\n", "\\n")


@app.command("merge")
def merge_shards(
    out: Out,
    force: Annotated[
        bool, typer.Option("--force", help="Join what there is, also when something is missing or double.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Join the records of all shards, and check that nothing is missing or double.

    It looks for shards that were never started or have not finished, for shards that were made with other
    settings, and for inputs and outputs that two shards have. If there are any, they are listed, nothing is
    changed and the exit code is 1. After a merge the command without --shard goes on from there.

    \b
    Example:
      segcli runs merge masks/
    """
    from segcli.inference import merging
    from segcli.inference.storage import open_storage

    terminal = Terminal(quiet, json)
    merged = merging.merge(open_storage(out), force)
    terminal.document({"out": out, **vars(merged)})
    for finding in merged.findings:
        terminal.warn(one_line(finding))
    if merged.joined:
        told = ", ".join(f"{count:,} {status}" for status, count in merged.counts.items() if count)
        terminal.say(f"{merged.shards} shards joined into one record of {out}: {told or 'no inputs'}.")
    else:
        terminal.warn(f"Nothing was changed in {out}. With --force what there is would be joined.")
    if merged.findings:
        raise typer.Exit(1)


@app.command("show")
def show_runs(out: Out, json: Json = False) -> None:
    """Say how a run stands, and its shards: state, and how many inputs are done, skipped and failed.

    \b
    Example:
      segcli runs show masks/
    """
    from segcli.inference import merging
    from segcli.inference.storage import open_storage

    terminal = Terminal(json=json, answers=True)
    states = merging.show(open_storage(out))
    columns = ["", "state", *merging.STATUSES]
    rows = [
        [f"shard {state.shard}" if state.shard else out, state.state or "not started"]
        + [f"{state.counts[status]:,}" for status in merging.STATUSES]
        for state in states
    ]
    terminal.document(
        {
            "out": out,
            "state": states[0].state,
            "run": states[0].run,
            **states[0].counts,
            "shards": [
                {"shard": str(state.shard), "state": state.state, **state.counts} for state in states[1:]
            ],
        }
    )
    if not json:
        terminal.table(columns, rows)
