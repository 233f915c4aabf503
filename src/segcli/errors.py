"""What can go wrong, as exceptions that carry their exit code.

    SegcliError
    ├── UsageError         2  an option, a path or a configuration is wrong
    │   └── CheckpointError 2  a model file is damaged, foreign or does not fit
    ├── ImageError         1  one input cannot be read; it is reported and the run goes on
    └── MachineError       3  disk full, no permission, no memory, download failed
    Interrupted          130  Ctrl-C where nothing else was to be done about it

Messages are one or two lines: what (file or option), why, and how to fix it.
They are turned into text and an exit code once, in `segcli.cli.main`.
"""

from __future__ import annotations


class SegcliError(Exception):
    """Base of all errors that segcli raises on purpose."""

    exit_code = 1


class UsageError(SegcliError):
    """Wrong option, path, configuration or data description."""

    exit_code = 2


class CheckpointError(UsageError):
    """A model file that cannot be used: damaged, foreign, or of another architecture."""


class ImageError(SegcliError):
    """One input that cannot be decoded. The message is the reason, without the file's name."""

    exit_code = 1


class MachineError(SegcliError):
    """The machine, not the user: disk full, no permission, no memory, no network."""

    exit_code = 3


class Interrupted(BaseException):
    """Ctrl-C, in place of a KeyboardInterrupt, which typer would turn into an exit without a word."""

    exit_code = 130
