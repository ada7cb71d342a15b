"""A grid of learning rates and a second hyperparameter that grows until its best is inside.

Everything happens on a lattice: learning rates are ``middle * step**i``, the others a ladder of
values. An optimizer with a rate alone has a lattice three times as fine, so that all get the same
number of trials: first 12, then 6 at a time around the best, until all six around it are known.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

CHUNK = 6  # trials that run at once
FIRST = 6  # learning rates of the first grid, each four times the one before


class Point(NamedTuple):
    i: int  # power of the step
    j: int  # position on the ladder


class Lattice(NamedTuple):
    middle: float
    step: float
    ladder: tuple[float, ...]
    first: tuple[int, ...]

    def values(self, point: Point) -> tuple[float, float]:
        return self.middle * self.step**point.i, self.ladder[point.j]

    def start(self) -> list[Point]:
        """The first 12 trials."""
        per_octave = round(math.log(2) / math.log(self.step))
        if len(self.ladder) == 1:  # rates at a factor of 2
            return [Point(per_octave * i, 0) for i in range(-FIRST, FIRST)]
        rates = range(-FIRST // 2, FIRST // 2)
        return [Point(2 * per_octave * i, j) for j in self.first for i in rates]

    def around(self, best: Point) -> list[Point]:
        """The trials that must be worse for ``best`` to be inside."""
        i, j = best
        if len(self.ladder) == 1:
            return [Point(i + d, j) for d in (-3, -2, -1, 1, 2, 3)]
        # Momentum and rate trade: more of the one wants less of the other.
        moves = ((1, 0), (-1, 0), (0, 1), (0, -1), (-1, 1), (1, -1))
        near = [Point(i + a, j + b) for a, b in moves]
        return [point for point in near if 0 <= point.j < len(self.ladder)]


class Found(NamedTuple):
    tried: dict[Point, tuple[float, ...]]  # what the objective returned, the smallest is the best
    best: Point
    inside: bool  # all around the best were tried


def search(
    lattice: Lattice,
    objective: Callable[[list[Point]], list[tuple[float, ...]]],
    most: int = 60,
) -> Found:
    """Tries chunks of points until the best is inside, or ``most`` were tried."""
    tried: dict[Point, tuple[float, ...]] = {}
    wanted = lattice.start()
    while True:
        for begin in range(0, len(wanted), CHUNK):
            points = wanted[begin : begin + CHUNK]
            tried |= dict(zip(points, objective(points), strict=True))
        best = min(tried, key=lambda point: (tried[point], point))
        wanted = [point for point in lattice.around(best) if point not in tried]
        if not wanted or len(tried) + len(wanted) > most:
            return Found(tried, best, not wanted)
