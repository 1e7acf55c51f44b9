"""Documents into rows: none lost, none too long, the least rows, ranks balanced."""

import itertools
import random

import pytest

from vlm.data.packing import pack_rows
from vlm.errors import DataError


def documents(seed: int, count: int, longest: int) -> tuple[list[int], list[int]]:
    """Lengths, and how much of each is pictures."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, longest) for _ in range(count)]
    return lengths, [draw.choice([0, length // 2]) for length in lengths]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count, longest, pack", [(0, 1, 10), (1, 10, 10), (7, 10, 10), (64, 50, 64), (128, 300, 2048), (40, 90, 100)])
def test_every_document_once_in_equally_many_rows(ranks: int, count: int, longest: int, pack: int) -> None:
    lengths, vision = documents(count, count, longest)
    plan = pack_rows(lengths, vision, pack, ranks)
    assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
    assert sorted(document for rows in plan for row in rows for document in row) == list(range(count))
    assert all(sum(lengths[document] for document in row) <= pack for rows in plan for row in rows)
    assert plan == pack_rows(lengths, vision, pack, ranks)


def least_rows(lengths: list[int], pack: int, ranks: int) -> int:
    """The least k by trying every placement."""
    for k in itertools.count(1):
        for rows in itertools.product(range(k * ranks), repeat=len(lengths)):
            if all(sum(length for length, row in zip(lengths, rows, strict=True) if row == one) <= pack for one in range(k * ranks)):
                return k
    raise AssertionError


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_no_placement_needs_fewer_rows(seed: int, ranks: int) -> None:
    lengths, vision = documents(seed, 6, 12)
    assert len(pack_rows(lengths, vision, 14, ranks)[0]) == least_rows(lengths, 14, ranks)


def test_rows_that_only_a_search_fills() -> None:
    """8 + 2 + 2 and 3 + 3 + 3 + 3: the largest first into the fullest row or into the emptiest, both leave one over."""
    assert len(pack_rows([3, 3, 3, 8, 3, 2, 2], [0] * 7, 12, 1)[0]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_ranks_share_text_and_pictures(seed: int) -> None:
    lengths, vision = documents(seed, 128, 200)
    for loads in (lengths, vision):
        per_rank = [sum(loads[document] for row in rows for document in row) for rows in pack_rows(lengths, vision, 2048, 4)]
        assert max(per_rank) <= 1.15 * sum(per_rank) / 4


def test_rows_of_pictures_are_dealt_to_all_ranks() -> None:
    """Four full rows, two of them of pictures."""
    vision = [9, 9, 0, 0]
    assert [sum(vision[document] for row in rows for document in row) for rows in pack_rows([10] * 4, vision, 10, 2)] == [9, 9]


def test_a_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match="got 11 tokens; expected at most pack 10"):
        pack_rows([3, 11], [0, 0], 10, 1)
