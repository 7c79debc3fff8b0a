"""Panels: tokens sorted by expert, cut into pieces that go through a layer one after the other.

An expert with many tokens makes a panel by itself, which stays in the cache from one product to the next. Those with
few share one, because a weight that all experts share is read once a panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

MIN_ROWS = 400
MAX_ROWS = 1024
ALONE_ROWS = 200


@dataclass(frozen=True)
class Panel:
    """Rows of a sorted batch that are taken together.

    Attributes:
        segments: The experts in it, each with its rows of the batch, in order.
    """

    segments: tuple[tuple[int, slice], ...]

    @property
    def rows(self) -> slice:
        """Its rows of the batch."""
        return slice(self.segments[0][1].start, self.segments[-1][1].stop)

    @property
    def size(self) -> int:
        """Rows, count."""
        return self.rows.stop - self.rows.start

    def split(self, *rows_Pr: Tensor) -> Iterator[tuple[int, *tuple[Tensor, ...]]]:
        """Every expert with its part of some tensors, each of them flattened to one vector a row.

        Args:
            rows_Pr: Of the panel's rows, each with r vectors: (rows, r, any).
        """
        sizes = [rows.stop - rows.start for _, rows in self.segments]
        parts = (t.flatten(0, 1).split([n * t.shape[1] for n in sizes]) for t in rows_Pr)
        return zip((expert for expert, _ in self.segments), *parts, strict=True)

    def counts(self, num_experts: int) -> list[int]:
        """Rows of every expert, as for a batch of its own."""
        counts = [0] * num_experts
        for expert, rows in self.segments:
            counts[expert] += rows.stop - rows.start
        return counts


def panels(counts: Sequence[int]) -> list[Panel]:
    """Cut a batch into panels.

    An expert with at least `ALONE_ROWS` rows shares its panel with few rows of others, if at all; one with more than
    `MAX_ROWS` has several. The rest share panels of at least `MIN_ROWS`, if there are so many.

    Args:
        counts: Rows of every expert; those without rows are left out.
    """
    found: list[list[tuple[int, slice]]] = []
    size, first = MIN_ROWS, 0  # of the last panel; full, so that the first segment opens one
    for expert, count in enumerate(counts):
        pieces = -(-count // MAX_ROWS)
        for n in range(pieces):
            rows = slice(first + count * n // pieces, first + count * (n + 1) // pieces)
            if size >= MIN_ROWS or (size >= ALONE_ROWS // 2 and count >= ALONE_ROWS):
                found.append([])
                size = 0
            found[-1].append((expert, rows))
            size += rows.stop - rows.start
            if count >= ALONE_ROWS:
                size = max(size, MIN_ROWS)
        first += count
    if len(found) > 1 and size < MIN_ROWS // 2:  # too few for a panel of their own
        found[-2:] = [found[-2] + found[-1]]
    return [Panel(tuple(segments)) for segments in found]


def whole(counts: Sequence[int]) -> list[Panel]:
    """All rows as one panel; none if there are no rows."""
    ends = list(accumulate(counts, initial=0))
    segments = tuple((expert, slice(ends[expert], ends[expert + 1])) for expert, count in enumerate(counts) if count)
    return [Panel(segments)] if segments else []
