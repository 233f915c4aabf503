"""The command line as a whole: start-up, help, errors and exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer.main

from segcli import __version__
from segcli.cli import app, main
from segcli.cli.terminal import printable

HEAVY = ("torch", "torchvision", "numpy", "cv2", "PIL", "rich", "safetensors")


def commands() -> list[list[str]]:
    """Every command and sub-command, as arguments."""

    def below(command: object, path: list[str]) -> list[list[str]]:
        found = [path]
        for name, child in getattr(command, "commands", {}).items():
            found += below(child, [*path, name])
        return found

    return below(typer.main.get_command(app), [])


def segcli(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segcli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"], ["train", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "segcli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported.isdisjoint(HEAVY)


def test_networks_of_bundled_and_released_models_need_no_torchvision() -> None:
    # It takes longer to import than torch, because its ops import PyTorch's compiler; sympy takes a second.
    script = """
import sys, torch, segcli.inference.segmentation
from segcli.models.networks import get, get_empty
from segcli.models.prepared import prepare
for name in ("fcn8s-mobilenet_v3_large", "fcn8s-resnet18", "fcn8s"):
    get_empty(name, 2)
prepare(get("fcn8s-resnet18", 2), torch.device("cpu"))(torch.zeros(1, 3, 32, 32))
print([name for name in ("torchvision", "torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_ctrl_c_is_answered() -> None:
    script = """
import os, signal
import segcli.cli.models
from segcli.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
segcli.cli.models.Terminal = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
main(["models", "list"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_main_leaves_the_handling_of_ctrl_c_as_it_was_and_works_in_any_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    codes: list[object] = []

    def run() -> None:
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        codes.append(stop.value.code)

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0, 0]
    assert signal.getsignal(signal.SIGINT) is before


def test_version() -> None:
    assert segcli("--version").stdout == f"segcli {__version__}\n"


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself_in_80_columns(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "segcli" in text
    if len(command) == 1 and not text.count("Commands:"):
        assert re.search(r"Examples?:", text)
    options = text.partition("\nOptions:\n")[2]
    for option in re.findall(r"^  (?:-[a-z], )?(--[a-z-]+)", options, re.M):
        block = options.split(f"{option} ", 1)[-1].split("\n  -", 1)[0]
        assert re.search(r"[a-z]{3,}.*[.)\]]", block, re.S), f"{option} of {command} has no help"


def test_no_arguments_shows_help() -> None:
    done = segcli()
    assert done.returncode == 2
    assert "predict" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments", [["predic"], ["predict", "--no-such-option"], ["predict", "x.jpg", "--size", "many"]]
)
def test_wrong_usage_exits_with_2_and_no_traceback(arguments: list[str]) -> None:
    done = segcli(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_is_one_line_and_a_traceback_only_with_verbose(tmp_path: Path) -> None:
    arguments = ["inspect", str(tmp_path / "none.jpg")]
    done = segcli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: there is no image {tmp_path / 'none.jpg'}\n"
    assert "Traceback" in segcli(*arguments, "--verbose").stderr


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "segcli", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr


def test_printable_text_cannot_disturb_the_terminal() -> None:
    assert printable("a\x1b[31mb\tc\n") == "a\\x1b[31mb\\tc\n"
    assert printable("\udcff.jpg") == "\\udcff.jpg"
    assert printable("naïve [red] 図") == "naïve [red] 図"
