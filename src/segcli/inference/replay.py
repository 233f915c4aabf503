"""A network on a GPU recorded once for every shape that repeats, and replayed: one call instead of hundreds.

A GPU is asked for every operation by a call of Python, and for each of them this thread waits for its turn
among those that decode, encode and write. Together that takes longer than a GPU needs for a small network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AFTER = 3  # calls with a shape before it is recorded: libraries set themselves up in the first ones
MOST = 8  # shapes that are recorded; what one of them needs in between, all share


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    given: Tensor
    made: Tensor


class Replayed:
    """A function of one tensor on a GPU that makes another one, without asking what is in it.

    What the function reads besides must stay where it is. Sources: CUDA graphs, see `torch.cuda.graph`.

    Args:
        function: Is called in inference mode.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._possible = True

    def __call__(self, given: Tensor) -> Tensor:
        kind = (given.shape, given.stride(), given.dtype)
        recording = self._recordings.get(kind)
        if recording is None:
            self._calls[kind] += 1
            if self._calls[kind] <= AFTER or len(self._recordings) == MOST or not self._possible:
                return self._function(given)
            try:
                recording = self._recordings[kind] = self._record(given)
            except RuntimeError:  # memory is short, most likely
                self._possible = False
                return self._function(given)
        with torch.cuda.device(given.device):
            recording.given.copy_(given)
            recording.graph.replay()
            return recording.made.clone()  # the next call makes it anew

    def _record(self, given: Tensor) -> _Recording:
        pool = next((each.graph.pool() for each in self._recordings.values()), None)
        graph = torch.cuda.CUDAGraph()
        own = given.clone()
        # Other threads may do what is forbidden to this one while it records.
        mode = "thread_local"
        with torch.cuda.device(given.device), torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            made = self._function(own)
        return _Recording(graph, own, made)
