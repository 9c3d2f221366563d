"""What the model says where its chunks are followed to their readers: each carries its number and the moment it was said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, overload

from agents_project.demo.model_server import Action, ModelCall, Pause, Reply, Text


class Stamped(Sequence[Action]):
    """So many chunks, so many a second, after a pause. Each is made when it is asked for, which is when it is sent."""

    def __init__(self, lead: float, rate: float, chunks: int) -> None:
        self._lead, self._delay, self._chunks = lead, 1 / rate, chunks

    def __len__(self) -> int:
        return 2 * self._chunks

    @overload
    def __getitem__(self, place: int) -> Action: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Action]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if place >= len(self):
            raise IndexError
        number, spoken = divmod(place, 2)
        if spoken:
            return Text(f"{number}@{time.monotonic_ns()} ")
        return Pause(self._delay if number else self._lead)


def stamped(call: ModelCall) -> Reply:
    """Do what the last prompt says: `chunks COUNT RATE LEAD`."""
    _, count, rate, lead = str(call.messages[-1]["content"]).split()
    return Stamped(float(lead), float(rate), int(count))
