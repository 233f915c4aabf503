"""The set of names that were met before."""

from __future__ import annotations

import random

from segcli.inference.seen import Seen


def test_it_answers_as_a_set_does() -> None:
    seen, known = Seen(), set[str]()
    numbers = random.Random(0)
    for _ in range(30_000):
        name = f"photos/{numbers.randrange(20_000)}.jpg"
        assert seen.add(name) == (name not in known)
        known.add(name)
    assert 15_000 < len(known) < 20_000  # many came again


def test_undecodable_and_empty_names() -> None:
    seen = Seen()
    assert seen.add("")
    assert seen.add("\udcff.jpg")
    assert not seen.add("")
    assert not seen.add("\udcff.jpg")


def test_a_name_takes_at_most_32_bytes() -> None:
    seen = Seen()
    for number in range(100_000):
        seen.add(str(number))
    assert seen._slots.itemsize * len(seen._slots) <= 32 * 100_000
