"""Which pictures are computed together."""

from __future__ import annotations

from segcli.inference.batches import Waiting
from segcli.inference.decoders import Decoded
from segcli.inference.sources import Input


def picture(name: str, room: int = 0) -> Decoded:
    return Decoded(Input(name, name), None, room=room)


def taken(waiting: Waiting, count: int, any_size: bool) -> list[str]:
    return [each.item.source for each in waiting.take(count, any_size)]


def test_a_batch_goes_once_it_is_full() -> None:
    waiting = Waiting()
    assert taken(waiting, 2, any_size=True) == []
    for name, seen in [("a", (10, 20)), ("b", (20, 10)), ("c", (20, 10)), ("d", (20, 10))]:
        waiting.add(picture(name), seen)
    assert taken(waiting, 2, any_size=False) == ["b", "c"]
    assert taken(waiting, 2, any_size=False) == []  # one of either size is left
    assert len(waiting) == 2
    assert sorted(taken(waiting, 2, any_size=True) + taken(waiting, 2, any_size=True)) == ["a", "d"]
    assert len(waiting) == 0


def test_what_fills_no_batch_is_taken_of_the_size_of_which_there_are_most() -> None:
    waiting = Waiting()
    for name, seen in [("a", (10, 20)), ("b", (20, 10)), ("c", (20, 10))]:
        waiting.add(picture(name), seen)
    assert taken(waiting, 3, any_size=True) == ["b", "c"]
    assert taken(waiting, 3, any_size=True) == ["a"]


def test_a_picture_that_holds_room_goes_alone_and_at_once() -> None:
    waiting = Waiting()
    waiting.add(picture("a"), (10, 20))
    waiting.add(picture("large", room=100), (10, 20))
    waiting.add(picture("b"), (10, 20))
    assert taken(waiting, 16, any_size=False) == ["large"]
    assert taken(waiting, 2, any_size=False) == ["a", "b"]
