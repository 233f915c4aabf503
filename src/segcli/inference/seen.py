"""Which names were met before, for millions of them in little memory."""

from __future__ import annotations

from array import array


class Seen:
    """A set of texts that keeps 8 bytes of each, in a table of at most four times that.

    A Python set takes about 130 bytes per name. Two names among ten million are taken for one with a
    probability of 3e-6 (64 bits of hash).
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))  # 0: free; a power of two of them
        self._count = 0

    def add(self, text: str) -> bool:
        """Note a text; False when it was noted before."""
        key = hash(text) % (1 << 64) or 1
        if not self._place(key):
            return False
        self._count += 1
        if 2 * self._count > len(self._slots):
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for key in filter(None, old):
                self._place(key)
        return True

    def _place(self, key: int) -> bool:
        slots = self._slots
        last = len(slots) - 1
        place = key & last
        while found := slots[place]:
            if found == key:
                return False
            place = (place + 1) & last
        slots[place] = key
        return True
