"""How many streams are open in this process, and whether there is room for one more.

A seat is taken before a stream is promised, and before the run is made that it would follow; so who is refused has started
nothing. It is given up when the stream has ended, or was never begun.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable

from runs.conf import settings


class NoSeat(Exception):
    """There is no room. `own`: the owner has as many as they may have; else the process has."""

    def __init__(self, own: bool, most: int) -> None:
        super().__init__(own, most)
        self.own, self.most = own, most


class Seat:
    """Room for one stream. To `leave` it twice is once, from whatever threads."""

    __slots__ = ("_seats", "is_left", "owner")

    def __init__(self, seats: Seats, owner: Hashable) -> None:
        self._seats = seats
        self.owner = owner
        self.is_left = False

    def leave(self) -> None:
        self._seats.leave(self)


class Seats:
    """The seats of one process. Views take them in threads, and loops give them up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0
        self._owned: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return self._taken

    def take(self, owner: Hashable) -> Seat:
        """Take a seat for a user. Raises NoSeat."""
        most, own = settings().max_streams, settings().streams_per_owner
        with self._lock:
            if own is not None and self._owned[owner] >= own:
                raise NoSeat(True, own)
            if most is not None and self._taken >= most:
                raise NoSeat(False, most)
            self._owned[owner] += 1
            self._taken += 1
        return Seat(self, owner)

    def leave(self, seat: Seat) -> None:
        with self._lock:
            if seat.is_left:
                return
            seat.is_left = True
            self._taken -= 1
            self._owned[seat.owner] -= 1
            if not self._owned[seat.owner]:
                del self._owned[seat.owner]


here = Seats()
