"""One global block of DeepSeek-VL's high-resolution tower: attention with its relative positions folded into the channels against transformers' explicit N x N scores. Peak memory and time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from _memory import peak
from _paired import Block, Result, compare, noise, run


@dataclass(frozen=True)
class Sizes:
    """side: tokens per row and column of the grid; 64 is a picture of 1,024 pixels."""

    side: int = 64
    heads: int = 12
    channels: int = 64
    pairs: int = 3


TINY = Sizes(side=12, heads=2, channels=8, pairs=1)
LIMIT = 0.25
TOLERANCE = 1e-5


def measure(sizes: Sizes) -> Iterator[Result]:
    folded, explicit, largest = blocks(sizes)
    assert largest <= TOLERANCE, f"outputs and gradients of both forms differ by {largest}, relative to the largest of each"
    for name, backward in (("forward", False), ("forward and backward", True)):
        ours, theirs = (peak(lambda block=block, backward=backward: block(backward)) for block in (folded, explicit))
        facts = {"scores of all heads": _size(4 * sizes.heads * sizes.side**4), "peak": f"{_size(ours)} against {_size(theirs)}"}
        yield Result(f"peak memory of a global block as a share of that with explicit scores, {name}", ours / theirs, wanted=("<=", LIMIT), facts=facts)
    yield noise(_timed(folded, True), pairs=sizes.pairs)
    for name, backward in (("forward", False), ("forward and backward", True)):
        yield compare(f"a global block against explicit scores, {name}", _timed(folded, backward), _timed(explicit, backward), pairs=sizes.pairs, warm=1)


def blocks(sizes: Sizes) -> tuple[Callable[[bool], object], Callable[[bool], object], float]:
    """Both forms over the same weights and input, and their largest difference in output or any gradient. With False the backward pass is left out."""
    import torch
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionAttention

    from vlm.encoders.sam import GlobalAttention

    width = sizes.heads * sizes.channels
    config = SamVisionConfig(hidden_size=width, num_attention_heads=sizes.heads, image_size=16 * sizes.side, patch_size=16)
    torch.manual_seed(0)
    modules = [kind(config, 0) for kind in (GlobalAttention, SamVisionAttention)]
    for parameter in modules[0].parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(1, sizes.side, sizes.side, width, requires_grad=True)
    direction = torch.randn(1, sizes.side, sizes.side, width)

    def through(module: Any, backward: bool) -> Any:
        module.zero_grad(set_to_none=True)
        x.grad = None
        output = module(x)[0]
        if backward:
            output.backward(direction)
        return output.detach()

    def results(module: Any) -> list[Any]:
        output = through(module, True)
        weights = [parameter.grad for name, parameter in module.named_parameters() if name != "qkv.bias"]  # a key's bias has no gradient but noise
        return [output, x.grad, *weights]

    pairs = zip(*map(results, modules), strict=True)
    largest = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
    folded, explicit = (partial(through, module) for module in modules)
    return folded, explicit, largest


def _timed(block: Callable[[bool], object], backward: bool) -> Block:
    def timed(number: int) -> None:
        block(backward)

    return timed


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
