"""The head alone: loss of the supervised positions only, in chunks, against whole logits. Forward and backward, and what both need at their peak."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from _memory import peak
from _paired import Block, Result, compare, noise, run


@dataclass(frozen=True)
class Sizes:
    """shares: of the tokens that are supervised; an instruction mix has few of them, a captioning stage up to all text."""

    tokens: int = 2048
    width: int = 256
    vocabulary: int = 32_000
    shares: tuple[float, ...] = (0.06, 0.25, 1.0)
    pairs: int = 7


TINY = Sizes(tokens=256, width=16, vocabulary=500, shares=(0.25, 1.0), pairs=1)


def measure(sizes: Sizes) -> Iterator[Result]:
    for share in sizes.shares:
        supervised, whole = heads(sizes, share)
        ours, theirs = supervised(), whole()
        assert abs(ours - theirs) < 1e-4 * abs(theirs), f"loss of supervised positions {ours}, of whole logits {theirs}"
        if share == sizes.shares[0]:
            yield noise(_timed(supervised), pairs=sizes.pairs)
        claim = f"head on supervised positions against whole logits, {share:.0%} supervised"
        yield compare(claim, _timed(supervised), _timed(whole), pairs=sizes.pairs)
    for share in sizes.shares:
        needed = [peak(block) for block in heads(sizes, share)]
        facts = {"whole logits": _size(4 * sizes.tokens * sizes.vocabulary), "peak": f"{_size(needed[0])} against {_size(needed[1])}"}
        yield Result(f"peak memory of the head as a share of that with whole logits, {share:.0%} supervised", needed[0] / needed[1], facts=facts)


def _size(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def heads(sizes: Sizes, share: float) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both ways to the mean loss and its gradients, over the same hidden states and labels."""
    import torch
    import torch.nn.functional as F

    from vlm.llm.head import adapt_head

    torch.manual_seed(0)
    head = torch.nn.Linear(sizes.width, sizes.vocabulary, bias=False)
    plain = torch.nn.Linear(sizes.width, sizes.vocabulary, bias=False)
    plain.weight = head.weight
    adapt_head(head, SimpleNamespace(vocab_size=sizes.vocabulary))
    hidden = torch.randn(sizes.tokens, sizes.width, requires_grad=True)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,))
    labels[torch.randperm(sizes.tokens)[max(1, round(share * sizes.tokens)) :]] = -100

    def through(loss: torch.Tensor) -> float:
        head.weight.grad = hidden.grad = None
        loss.backward()
        return float(loss.detach())

    def supervised() -> float:
        chosen = labels != -100
        return through(head(hidden[chosen], labels[chosen]).mean())

    def whole() -> float:
        return through(F.cross_entropy(plain(hidden).float(), labels, ignore_index=-100))

    return supervised, whole


def _timed(head: Callable[[], float]) -> Block:
    def block(number: int) -> None:
        head()

    return block


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
