"""MM-LoRA's training step against one LoRA of equal total rank, against the decoder without either, and against the form that one writes first: both updates for all tokens, then a choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from _paired import Block, Result, compare, noise, run


@dataclass(frozen=True)
class Sizes:
    """vision, text: tokens of a row. vision_rank, language_rank: a quarter and three quarters, as Arcana has them."""

    rows: int = 1
    vision: int = 576
    text: int = 128
    width: int = 256
    layers: int = 4
    ffn: int = 688
    vision_rank: int = 16
    language_rank: int = 48
    dropout: float = 0.05
    pairs: int = 21


TINY = Sizes(vision=12, text=6, width=16, layers=2, ffn=24, vision_rank=2, language_rank=4, pairs=1)


def measure(sizes: Sizes) -> Iterator[Result]:
    from vlm.llm.lora import LoRASpec
    from vlm.llm.mm_lora import MMLoRASpec

    ranks = {"vision": sizes.vision_rank, "language": sizes.language_rank}
    routed = decoder(sizes, MMLoRASpec(rank=ranks, dropout=0.0))
    naive = decoder(sizes, MMLoRASpec(rank=ranks, dropout=0.0))
    naive.load_state_dict(routed.state_dict())
    choose_afterwards(naive)
    ours, theirs = (step(sizes, model)(0) for model in (routed, naive))
    assert abs(ours - theirs) < 1e-5 * abs(theirs), f"loss {ours} of the routed form, {theirs} of the naive one"

    def train(adaptation: Any) -> Callable[[int], float]:
        return step(sizes, decoder(sizes, adaptation))

    dropped = {"dropout": sizes.dropout}
    mm_lora = train(MMLoRASpec(rank=ranks, **dropped))
    written_first = decoder(sizes, MMLoRASpec(rank=ranks, **dropped))
    choose_afterwards(written_first)
    total = sum(ranks.values())
    yield noise(_timed(mm_lora), pairs=sizes.pairs)
    for claim, other, limit in (
        (f"time of a step with MM-LoRA {sizes.vision_rank} + {sizes.language_rank} against LoRA {total}", train(LoRASpec(rank=total, **dropped)), 1.10),
        ("time of a step with both updates for all tokens, then a choice, against MM-LoRA", None, None),
        ("time of a step with MM-LoRA against the frozen decoder alone", train(None), None),
    ):
        sides = (mm_lora, other) if other is not None else (step(sizes, written_first), mm_lora)
        yield compare(claim, _timed(sides[1]), _timed(sides[0]), pairs=sizes.pairs, warm=3, wanted=None if limit is None else ("<=", limit))


def decoder(sizes: Sizes, adaptation: Any) -> Any:
    """A VLM whose decoder is frozen but for what the adaptation adds; the embeddings that it is handed are trained, so that every backward pass goes through all layers."""
    import torch

    from vlm.config import LLMSpec, ModelSpec
    from vlm.connectors.linear import LinearSpec
    from vlm.encoders.clip import CLIPSpec
    from vlm.loading import first_model

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 8}
    numbers = {"model_type": "llama", "vocab_size": 512, "hidden_size": sizes.width, "intermediate_size": sizes.ffn, "num_hidden_layers": sizes.layers, "num_attention_heads": 4}
    llm = LLMSpec(config=numbers, weights="random")
    torch.manual_seed(0)
    adapt = {} if adaptation is None else {"added": adaptation}
    model = first_model(ModelSpec(encoder=CLIPSpec(config=tower, weights="random"), connector=LinearSpec(), llm=llm, adapt=adapt), 511)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def step(sizes: Sizes, model: Any) -> Callable[[int], float]:
    """Forward, backward and update on rows that begin with a picture; all text is supervised."""
    import torch

    length = sizes.vision + sizes.text
    embeddings = torch.randn(sizes.rows, length, sizes.width, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    types = (torch.arange(length) < sizes.vision).long().expand(sizes.rows, -1)
    labels = torch.arange(length).remainder(512).expand(sizes.rows, -1).masked_fill(types.bool(), -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained or [embeddings], lr=1e-4)

    def run_step(number: int) -> float:
        loss = model(inputs_embeds=embeddings, mm_token_type_ids=types, labels=labels, plain=True).loss
        loss.backward()
        if trained:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        embeddings.grad = None
        return float(loss.detach())

    return run_step


def choose_afterwards(model: Any) -> None:
    """Give every layer of MM-LoRA the form that one writes first."""
    import torch

    from vlm.llm.mm_lora import MMLoRALinear

    def forward(layer: Any, x: Any) -> Any:
        updates = [layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name] for name in ("vision", "language")]
        return layer.base_layer(x) + torch.where(layer.scope.context.vision[..., None], *updates)

    for module in model.modules():
        if isinstance(module, MMLoRALinear):
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _timed(train: Callable[[int], float]) -> Block:
    def block(number: int) -> None:
        train(number)

    return block


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
