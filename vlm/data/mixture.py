"""Which samples make a step: a pure function of (seed, stage, step), whatever the ranks, workers and restarts."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vlm.errors import ConfigurationError

__all__ = ["WINDOW", "Mixture"]

WINDOW = 4
"""Blocks from which a source with blocks gives samples at a time."""


class Mixture:
    """Steps of `batch` samples drawn from one or several sources.

    Without weights all sources are shuffled together, and an epoch holds every sample once. With weights the sources take turns by share (see `_take_turns`),
    each walking its own epochs; the length of an epoch is then the sum of all sizes. Each epoch has an order of its own, from a counter-based generator,
    so that no earlier epoch or step need be known.

    A source with blocks (streamed shards, of which only a few fit into memory) is walked block by block: the order of the blocks is drawn, and within it samples are shuffled over WINDOW blocks
    (see `_block_order`). Without weights it cannot be shuffled together with others; then all sources take turns by size, which also gives every sample once per epoch.

    Args:
        sizes: samples per source.
        weights: shares per source, any positive scale; None: by size.
        batch: samples per step, over all ranks.
        seed, stage: what the order depends on, besides epoch and source.
        epochs, steps: the length, one of the two. By epochs the last step may be smaller.
        blocks: of the sources that have them, the sizes of the runs of samples that lie together.

    Raises ConfigurationError for an empty source, weights or blocks that do not fit the sources, no length or two.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None,
        batch: int,
        seed: int,
        stage: int,
        epochs: float | Fraction | None = None,
        steps: int | None = None,
        blocks: Mapping[str, Sequence[int]] | None = None,
    ):
        blocks = blocks or {}
        _check(sizes, weights, batch, seed, epochs, steps)
        _check_blocks(sizes, blocks)
        self.names, self.batch, self.seed, self.stage = tuple(sizes), batch, seed, stage
        self._sizes = np.array([sizes[name] for name in self.names], dtype=np.int64)
        weights = sizes if blocks and weights is None else weights
        self._weights = None if weights is None else np.array([weights[name] for name in self.names]) / sum(weights.values())
        self._blocks = {self.names.index(name): np.array(runs, dtype=np.int64) for name, runs in blocks.items()}
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        # str: 0.1 epochs are meant as a tenth, not as the double above it.
        self.samples = steps * batch if steps is not None else math.ceil(Fraction(str(epochs)) * int(self._sizes.sum()))
        self.steps = -(-self.samples // batch)

    def step(self, k: int) -> list[tuple[str, int]]:
        """The samples of step `k`, from 0, as (source, index). Raises IndexError outside of 0 <= k < steps."""
        if not 0 <= k < self.steps:
            raise IndexError(f"step {k} of {self.steps}")
        first, stop = k * self.batch, min((k + 1) * self.batch, self.samples)
        if self._weights is None:
            sources, indices = self._pooled(np.arange(first, stop))
        else:
            sources, draws = _take_turns(self._weights, first, stop)
            indices = np.empty_like(draws)
            for source in np.unique(sources).tolist():
                mine = sources == source
                indices[mine] = self._walk(source, int(self._sizes[source]), draws[mine])
        return [(self.names[source], index) for source, index in zip(sources.tolist(), indices.tolist(), strict=True)]

    def _pooled(self, draws: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ends = np.cumsum(self._sizes)
        places = self._walk(0, int(ends[-1]), draws)
        sources = np.searchsorted(ends, places, side="right")
        return sources, places - (ends - self._sizes)[sources]

    def _walk(self, source: int, size: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places `draws` of the endless walk through one epoch after another."""
        epochs, places = np.divmod(draws, size)
        samples = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            samples[epochs == epoch] = self._order(source, size, epoch)[places[epochs == epoch]]
        return samples

    def _order(self, source: int, size: int, epoch: int) -> NDArray[np.int64]:
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            bits = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(self.stage, source, epoch)))
            blocks = self._blocks.get(source)
            kept = self._orders[source] = epoch, _drawn_order(bits, size) if blocks is None else _block_order(bits, blocks)
        return kept[1]


def _drawn_order(bits: np.random.Philox, size: int) -> NDArray[np.int64]:
    # Sorting raw bits: NumPy promises the bits for all versions, not what permutation() makes of them.
    return np.argsort(bits.random_raw(size), kind="stable")


def _block_order(bits: np.random.Philox, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order of all samples that never has more than WINDOW blocks under way.

    The blocks get their turns in a drawn order; a sample of the block with turn t falls due at time t + WINDOW u, u drawn from [0, 1). So at time T only blocks with T - WINDOW < t <= T are under way, and
    one after another is begun and finished: a reader fetches them singly, not WINDOW at once.
    """
    turns = np.empty(len(blocks), dtype=np.uint64)
    turns[_drawn_order(bits, len(blocks))] = np.arange(len(blocks), dtype=np.uint64)
    # Whole numbers of 2 ** -32, which compare alike everywhere.
    late = (bits.random_raw(int(blocks.sum())) >> np.uint64(32)) * np.uint64(WINDOW)
    return np.argsort((np.repeat(turns, blocks) << np.uint64(32)) + late, kind="stable")


def _take_turns(weights: NDArray[np.float64], first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sources at positions first <= p < stop, and how often each had been drawn before.

    Draw k of source s is due at time (k + 1/2) / weights[s], and draws happen as they fall due (the divisor method of Webster and Sainte-Lague). By time t
    source s was drawn round(weights[s] t) times; with S sources the p-th draw therefore falls due at |t - p| <= S/2, so the draws due around the positions
    tell who has them, and no count is ever further from its share than 1/2 + weights[s] S/2.
    """
    margin = len(weights) + 1
    begin = np.maximum(0, np.floor(weights * (first - margin)).astype(np.int64))
    end = np.ceil(weights * (stop + margin)).astype(np.int64) + 1
    sources = np.repeat(np.arange(len(weights)), end - begin)
    draws = np.concatenate([np.arange(low, high) for low, high in zip(begin, end, strict=True)])
    order = np.lexsort((sources, (draws + 0.5) / weights[sources]))[first - int(begin.sum()) :][: stop - first]
    return sources[order], draws[order]


def _check(sizes: Mapping[str, int], weights: Mapping[str, float] | None, batch: int, seed: int, epochs: float | Fraction | None, steps: int | None) -> None:
    if empty := [name for name, size in sizes.items() if size < 1]:
        raise ConfigurationError(f"the data sources {', '.join(empty)} hold no samples", cure="leave them out")
    if not sizes:
        raise ConfigurationError("a stage has no data source", cure="name one under `data:`")
    if weights is not None and set(weights) != set(sizes):
        raise ConfigurationError("weights and data sources differ", got=f"weights of {', '.join(sorted(weights))}", expected=", ".join(sorted(sizes)))
    for name, weight in (weights or {}).items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigurationError(f"the weight of the data source {name} is not a positive number", got=weight, cure="leave a source out rather than give it no weight")
    if batch < 1 or seed < 0:
        raise ConfigurationError("batch must be at least 1, seed at least 0", got=f"batch {batch}, seed {seed}")
    if (epochs is None) == (steps is None):
        raise ConfigurationError("a stage's length is not clear", got=f"epochs {epochs}, steps {steps}", expected="epochs or steps", cure="set one of the two")
    length = epochs if steps is None else steps
    if length is None or not (math.isfinite(length) and length > 0):
        raise ConfigurationError("a stage's length is not a positive number", got=f"epochs {epochs}, steps {steps}")


def _check_blocks(sizes: Mapping[str, int], blocks: Mapping[str, Sequence[int]]) -> None:
    for name, runs in blocks.items():
        if name not in sizes or min(runs, default=0) < 0 or sum(runs) != sizes[name]:
            got = f"{len(runs)} blocks of {sum(runs)} samples together"
            raise ConfigurationError(f"the blocks of the data source {name} do not make up its samples", got=got, expected=f"{sizes.get(name, 'no such source')}")
