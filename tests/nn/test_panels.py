import random

import pytest
import torch

from mpoe.nn.panels import ALONE_ROWS, MAX_ROWS, MIN_ROWS, panels, whole

CASES = [
    [],
    [0, 0],
    [1],
    [0, 3, 0],
    [50] * 8,
    [MIN_ROWS, 1],
    [5000, 3, 0, 700],
    [1, MAX_ROWS + 1, 1],
    [ALONE_ROWS] * 5,
    *([random.Random(n).choice([0, 3, 90, 300, 2000]) for _ in range(9)] for n in range(20)),
]


def rows_of(found):
    return [(expert, row) for panel in found for expert, rows in panel.segments for row in range(rows.start, rows.stop)]


@pytest.mark.parametrize("cut", [panels, whole])
@pytest.mark.parametrize("counts", CASES, ids=str)
def test_every_row_is_in_one_panel_with_its_expert(counts, cut):
    found = cut(counts)
    expert_of_row = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert rows_of(found) == list(zip(expert_of_row, range(sum(counts)), strict=True))
    for panel in found:
        assert panel.size == sum(panel.counts(len(counts))) > 0
        rows = torch.arange(panel.rows.start, panel.rows.stop)
        for n, (expert, one, two) in enumerate(panel.split(rows[:, None], rows[:, None].expand(-1, 2))):
            assert expert == panel.segments[n][0]
            assert one.tolist() == list(range(sum(counts)))[panel.segments[n][1]]
            assert two.tolist() == [row for row in one.tolist() for _ in range(2)]
    assert cut is panels or len(found) <= 1


@pytest.mark.parametrize("counts", CASES, ids=str)
def test_panels_are_neither_tiny_nor_huge(counts):
    found = panels(counts)
    assert all(rows.stop - rows.start <= MAX_ROWS for panel in found for _, rows in panel.segments)
    assert all(panel.size >= MIN_ROWS // 4 for panel in found) or len(found) == 1


def test_an_expert_with_many_rows_is_alone():
    assert [len(panel.segments) for panel in panels([600, 600, 600])] == [1, 1, 1]
    assert [len(panel.segments) for panel in panels([60] * 8)] == [8]
