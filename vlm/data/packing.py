"""Documents -> rows of at most `pack` tokens, equally many on every rank. A pure function of their lengths, so that every rank comes to the same plan without asking."""

from collections.abc import Sequence

from vlm.errors import DataError

__all__ = ["pack_rows"]

SEARCHED = 20_000
"""Placements that are tried before a number of rows counts as too small."""


def pack_rows(lengths: Sequence[int], vision: Sequence[int], pack: int, ranks: int) -> list[list[list[int]]]:
    """Ranks x k rows of document numbers, k the least that holds them all; a row may be empty.

    The rows are filled evenly and dealt so that no rank has much more text or many more pictures than another.

    Args:
        lengths: tokens per document. vision: how many of them are of pictures. pack: tokens per row, at most.

    Raises DataError for a document that is longer than a row.
    """
    if lengths and max(lengths) > pack:
        raise DataError("a document is longer than a packed row", got=f"{max(lengths)} tokens", expected=f"at most pack {pack}", cure="lower max_length, or raise pack")
    largest_first = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
    per_rank = max(1, -(-sum(lengths) // (pack * ranks)))
    rows = None
    while rows is None:
        rows = _even(largest_first, lengths, vision, pack, per_rank * ranks) or _tight(largest_first, lengths, pack, per_rank * ranks)
        per_rank += 1
    return _deal(rows, lengths, vision, ranks)


def _even(documents: Sequence[int], lengths: Sequence[int], vision: Sequence[int], pack: int, count: int) -> list[list[int]] | None:
    """`count` rows, each document into the emptiest one that still has room. None where that does not come out."""
    rows: list[list[int]] = [[] for _ in range(count)]
    full, seen = [0] * count, [0] * count
    for document in documents:
        open_rows = [row for row in range(count) if full[row] + lengths[document] <= pack]
        if not open_rows:
            return None
        row = min(open_rows, key=lambda row: (full[row] + (seen[row] if vision[document] else 0), row))
        rows[row].append(document)
        full[row] += lengths[document]
        seen[row] += vision[document]
    return rows


def _tight(documents: Sequence[int], lengths: Sequence[int], pack: int, count: int) -> list[list[int]] | None:
    """`count` rows, the fullest that has room first, going back where a document is left over. None where none of the placements that were tried holds all."""
    rows: list[list[int]] = [[] for _ in range(count)]
    room = [pack] * count
    tries = SEARCHED
    choices: list[list[int]] = []  # per placed document: rows that are left to try, the last one is the current
    while len(choices) < len(documents):
        length = lengths[documents[len(choices)]]
        by_room = {room[row]: row for row in reversed(range(count)) if room[row] >= length}  # rows with equal room are one choice
        choices.append([by_room[space] for space in sorted(by_room, reverse=True)])
        while choices and not choices[-1]:  # go back to the last document with another choice
            choices.pop()
            if choices:
                row = choices[-1].pop()
                room[row] += lengths[rows[row].pop()]
        tries -= 1
        if not choices or not tries:
            return None
        row = choices[-1][-1]
        document = documents[len(choices) - 1]
        rows[row].append(document)
        room[row] -= lengths[document]
    return rows


def _deal(rows: list[list[int]], lengths: Sequence[int], vision: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Equally many rows to each rank, the heaviest first, each to the rank that has least of what the row has much of."""
    total, seen = max(1, sum(lengths)), max(1, sum(vision))
    loads = {index: (sum(lengths[document] for document in row) / total, sum(vision[document] for document in row) / seen) for index, row in enumerate(rows)}
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    carried = [(0.0, 0.0)] * ranks
    for index in sorted(loads, key=lambda index: (-max(loads[index]), index)):
        text, pictures = loads[index]
        open_ranks = [rank for rank in range(ranks) if len(dealt[rank]) < len(rows) // ranks]
        rank = min(open_ranks, key=lambda rank: (max(carried[rank][0] + text, carried[rank][1] + pictures), sum(carried[rank]), rank))
        dealt[rank].append(sorted(rows[index]))
        carried[rank] = carried[rank][0] + text, carried[rank][1] + pictures
    return dealt
