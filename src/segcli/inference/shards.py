"""One part of the inputs: what a task of a job array does.

Which shard an input belongs to follows from the name of its mask, by a hash. So it depends neither on the
order of a listing nor on the other files: shards may list at different times, on different machines, and
files that are added later do not move others. Two inputs that want the same mask, also on a file system that
ignores case, are in one shard, which sees that.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from segcli.errors import UsageError
from segcli.inference.layout import SHARDS_FOLDER
from segcli.inference.sources import Input, PassedOver, Sources, discover, folded


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def record(self) -> str:
        """The folder of its lock, manifest and run.json, below the output folder."""
        return f"{SHARDS_FOLDER}{self.count}/{self.number}"

    def holds(self, output: str) -> bool:
        """Whether the input with that mask belongs to it."""
        name = hashlib.blake2b(os.fsencode(folded(output)), digest_size=8).digest()
        return int.from_bytes(name) % self.count == self.number - 1


def parse_shard(text: str) -> Shard:
    """The shard of `--shard I/N`.

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text, re.ASCII)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--shard {text!r}: give I/N, such as 1/16 to 16/16; the first is 1")
    return Shard(int(match[1]), int(match[2]))


def inputs(sources: Sources, passed_over: PassedOver, shard: Shard | None) -> Iterator[Input]:
    """The inputs, or those of one shard, in the order of `discover`."""
    found = discover(sources, passed_over)
    return found if shard is None else (item for item in found if shard.holds(item.output))
