"""Pictures that a device computes together: those that wait for others of their size, and those that went."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from segcli.errors import ImageError
from segcli.inference.classification import Classes
from segcli.inference.decoders import Decoded
from segcli.inference.products import Segmentation


class Waiting:
    """Pictures that wait for others that the network sees at the same size."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], deque[Decoded]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, picture: Decoded, seen: tuple[int, int]) -> None:
        """Let a picture wait that is seen at that size (H, W)."""
        alone = id(picture) if picture.room else 0
        self._groups.setdefault((alone, *seen), deque()).append(picture)

    def take(self, count: int, any_size: bool) -> list[Decoded]:
        """The pictures that are computed next, `count` at most; none if they had better wait.

        What holds room in memory goes alone and at once: the next picture may be waiting for that room.

        Args:
            count: How many fill a batch.
            any_size: Take also what fills none, of the size of which there are most.
        """
        ready = (key for key, group in self._groups.items() if len(group) >= count or group[0].room)
        key = next(ready, None)
        if key is None:
            if not any_size or not self._groups:
                return []
            key = max(self._groups, key=lambda key: len(self._groups[key]))
        group = self._groups[key]
        taken = [group.popleft() for _ in range(min(len(group), count))]
        if not group:
            del self._groups[key]
        return taken


class Event(Protocol):
    """Says whether a device has come to a point: `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has."""

    def synchronize(self) -> None:
        """Wait until it has."""


@dataclass(frozen=True)
class Batch:
    """Pictures that a device was asked to compute, maybe before it is done.

    Attributes:
        found: Of every picture what was found by every head, and its number there; or why there is nothing.
        done: Set by a GPU once all is there.
        begun: time.perf_counter() when it was asked.
    """

    pictures: Sequence[Decoded]
    found: Sequence[tuple[Sequence[Classes], int] | ImageError]
    done: Event | None
    begun: float

    def is_done(self) -> bool:
        return self.done is None or self.done.query()

    def results(self) -> list[Segmentation | ImageError]:
        """What was found in every picture; waits for it."""
        if self.done is not None:
            self.done.synchronize()
        return [each if isinstance(each, ImageError) else _segmentation(*each) for each in self.found]


def _segmentation(heads: Sequence[Classes], number: int) -> Segmentation | ImageError:
    try:
        first, *others = (head.of(number) for head in heads)
    except ImageError as error:
        return error
    return replace(first, second=others[0].labels) if others else first
