"""QLadder (Arcana, arXiv 2410.13733): learned queries climb beside the tower's blocks; layer i reads the hidden state that block i reads. Their tokens stand behind the patches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.connectors import register
from vlm.connectors.base import Connector, ConnectorSpec, Link
from vlm.errors import ConfigurationError
from vlm.features import EXTRA, OUT, SUMMARY, Features, Layouts, Level, Stream, TokenLayout
from vlm.figures import Figure, Seen
from vlm.structure import hollow

__all__ = ["QLadder", "QLadderSpec"]


@register("qladder")
@dataclass(frozen=True, kw_only=True)
class QLadderSpec(ConnectorSpec):
    """Reads every hidden state up to the last layer that is used, summary tokens included, and the patches of `level`.

    queries: tokens that are added to each picture. select: which ladder layer gives them: `same`, the one of the number `level`, counted from the ladder's own end where that is negative (Arcana's
    main tree; level -2 of 24 blocks: layer 22, which reads one state less than the patches come from), or `last` (its archive).
    all_layers: build the layers that are never read too, as released files hold them; default: what `official` says. Of an encoder with several streams the link behind may read others too: they
    are handed on, with zeros in the places of the queries.
    """

    queries: int = 64
    select: Literal["same", "last"] = "same"
    all_layers: bool | None = None

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ConfigurationError("connector qladder needs queries", got=f"queries {self.queries}", expected="1 or more", cure="set connector.queries: 64, or use mlp")

    def used(self, depth: int) -> int:
        """How many layers are computed, of a tower of `depth` blocks. Raises ConfigurationError where `level` names no layer."""
        if self.select == "last" or not isinstance(self.level, int):
            return depth
        index = self.level if self.level >= 0 else depth + self.level
        if not 0 <= index < depth:
            raise ConfigurationError(
                "connector qladder has no layer of this number",
                got=f"level {self.level}",
                expected=f"{-depth} to {depth - 1}",
                cure="set connector.level, or connector.select: last",
            )
        return index + 1

    def built(self, depth: int) -> int:
        """How many layers there are."""
        return depth if (self.official if self.all_layers is None else self.all_layers) else self.used(depth)

    def trimmed(self) -> Self:
        return replace(super().trimmed(), official=False, all_layers=None)

    def depth(self, link: Link) -> int:
        """Blocks of the tower. Raises ConfigurationError where there are none to climb beside."""
        depth = link.levels[self.stream_in(link)]
        if not depth:
            raise ConfigurationError(
                "connector qladder climbs beside the blocks of a vision transformer",
                got=f"stream {self.stream_in(link)} without hidden states",
                expected="an encoder such as clip or siglip, right behind it",
                cure="make it the first link of the chain, set stream: low of a hybrid encoder, or use mlp",
            )
        return depth

    def others(self, link: Link) -> list[str]:
        """Streams besides its own that the link behind reads."""
        own = self.stream_in(link)
        if self.then is None or len(link.widths) == 1:
            return []
        widths = {own: link.widths[own], **link.widths}
        return [name for name in self.then.reads(Link(widths, dict.fromkeys(widths, 0), None)) if name != own]

    def reads(self, link: Link) -> Mapping[str, Sequence[Level]]:
        own = tuple(dict.fromkeys([*range(self.used(self.depth(link))), self.level]))
        return {self.stream_in(link): own} | {name: (self.level if link.levels[name] else 0,) for name in self.others(link)}

    def width(self, link: Link) -> int:
        width = link.widths[self.stream_in(link)]
        if link.out not in (None, width):
            raise ConfigurationError(
                "connector qladder does not change widths", got=f"tokens of {width}, a decoder of {link.out}", cure="put a projector behind it: connector.then: {use: mlp}"
            )
        return width

    def widths(self, link: Link) -> Mapping[str, int]:
        return {self.stream_in(link): self.width(link)} | {name: link.widths[name] for name in self.others(link)}

    def layouts(self, layouts: Layouts) -> Layouts:
        own = self.stream or next(iter(layouts))
        return {name: self._with_queries(layouts[name]) for name in (own, *layouts)}

    def _with_queries(self, layout: TokenLayout) -> TokenLayout:
        patches = layout.without(SUMMARY)
        return TokenLayout(patches.roles + (EXTRA,) * self.queries, patches.rows, patches.columns)

    def build(self, encoder: Any, link: Link) -> "QLadder":
        return QLadder(self, encoder, link)

    def figures(self, module: nn.Module, seen: Seen) -> Iterable[Figure]:
        """Per picture, where the queries look."""
        assert isinstance(module, QLadder)
        stream = seen.features.stream(module.own)
        weights, summary = module.looks(stream)
        for name, picture, weight, share, grid in zip(seen.names, seen.pictures, weights, summary.tolist(), stream.grids, strict=True):
            if grid[0] * grid[1] == weight.shape[1]:
                yield _heat_maps(name, picture, weight.float().cpu().unflatten(1, grid), share, module.used)


class QLadder(Connector):
    """Features of a tower whose pictures all have the same number of tokens -> patches, then queries."""

    def __init__(self, spec: QLadderSpec, encoder: Any, link: Link):
        super().__init__()
        depth, width = spec.depth(link), spec.width(link)
        self.used = spec.used(depth)
        self.own, self.level = spec.stream_in(link), spec.level
        self.others = {name: levels[0] for name, levels in spec.reads(link).items() if name != self.own}
        with hollow():
            tower = encoder.build()
            blocks = [tower.block(index) for index in range(spec.built(depth))]
        self.queries = nn.Parameter(torch.empty(1, spec.queries, width))
        self.layers = nn.ModuleList(LadderLayer(width, block) for block in blocks)

    def forward(self, features: Features) -> Features:
        stream = features.stream(self.own)
        climbed = self.climb(stream)
        patches, lengths = stream.patches(self.level)
        streams = {self.own: _behind(patches, climbed, lengths, stream.grids)}
        for name, level in self.others.items():
            patches, lengths = features.stream(name).patches(level)
            zeros = patches.new_zeros(len(lengths), climbed.shape[1], patches.shape[-1])
            streams[name] = _behind(patches, zeros, lengths, features.stream(name).grids)
        return Features(streams)

    def climb(self, stream: Stream) -> Tensor:
        """The queries (n, Q, D) of n pictures behind the last layer that is used."""
        return self._climbed(stream, self.used)

    def looks(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Of the last layer that is used, the mean over its heads: attention weights (n, Q, P) to the patches of n pictures, and (n,) the share of all queries' weight that goes to summary tokens."""
        last: Any = self.layers[self.used - 1]
        queries = self._climbed(stream, self.used - 1)
        weights = last.looks(queries, self._states(stream, self.used - 1)).mean(1)
        return weights[..., stream.prefix :], weights[..., : stream.prefix].sum(-1).mean(-1)

    def _climbed(self, stream: Stream, layers: int) -> Tensor:
        """The queries (n, Q, D) behind the first layers."""
        queries = self.queries.expand(len(stream.lengths), -1, -1)
        for index, layer in enumerate(self.layers[:layers]):
            queries = layer(queries, self._states(stream, index))
        return queries

    def _states(self, stream: Stream, layer: int) -> Tensor:
        """The hidden states (n, S, D) that a layer reads."""
        return stream.levels[layer].view(len(stream.lengths), -1, self.queries.shape[-1])

    def unused(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers[self.used :] for parameter in layer.parameters()]

    def initialise(self, encoder: Any) -> None:
        """Queries from N(0, 1); every layer a copy of its block."""
        nn.init.normal_(self.queries)
        for index, layer in enumerate(self.layers):
            layer.initialise(encoder.block(index))  # type: ignore[operator]


def _behind(patches: Tensor, queries: Tensor, lengths: Sequence[int], grids: Sequence[tuple[int, int]]) -> Stream:
    """Patches (N, D) of n pictures, each with its queries (n, Q, D) behind."""
    together = torch.cat([patches.view(len(lengths), -1, patches.shape[-1]), queries.to(patches.dtype)], 1)
    return Stream({OUT: together.flatten(0, 1)}, (together.shape[1],) * len(lengths), tuple(grids))


class LadderLayer(nn.Module):
    """Cross-attention and MLP, each behind a norm, with the sizes of a block. Where the tower has none that could be read (block None): heads of 64 or a little more, a MLP of four widths."""

    def __init__(self, width: int, block: Any):
        super().__init__()
        from transformers.activations import ACT2FN

        heads, mlp, activation, eps, dropout = max(n for n in range(1, max(1, width // 64) + 1) if width % n == 0), 4 * width, "gelu", 1e-6, 0.0
        if block is not None:
            heads, mlp, activation, eps, dropout = block.heads, block.mlp_width, block.activation, block.eps, block.dropout
        self.heads, self.dropout = heads, dropout
        self.query_norm, self.key_norm, self.mlp_norm = (nn.LayerNorm(width, eps=eps) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.activation = ACT2FN[activation]

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        """(n, Q, D), (n, S, D) -> (n, Q, D)"""
        keys = self.key_norm(states)
        query, key, value = self._headed(self.q_proj(self.query_norm(queries))), self._headed(self.k_proj(keys)), self._headed(self.v_proj(keys))
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        queries = queries + self.out_proj(seen.transpose(1, 2).flatten(2))
        return queries + self.fc2(self.activation(self.fc1(self.mlp_norm(queries))))

    def looks(self, queries: Tensor, states: Tensor) -> Tensor:
        """Where each query looks: attention weights (n, heads, Q, S)."""
        query, key = self._headed(self.q_proj(self.query_norm(queries))), self._headed(self.k_proj(self.key_norm(states)))
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)

    def _headed(self, tokens: Tensor) -> Tensor:
        """(n, T, D) -> (n, heads, T, D / heads)"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def initialise(self, block: Any) -> None:
        """A copy of the block, whose linears may have no bias; where there is none, projections by Xavier and Glorot. The norm of the queries, which no block has, begins as (1, 0)."""
        self.query_norm.reset_parameters()
        for own, source in COPIED.items():
            module: Any = self.get_submodule(own)
            if block is None:
                _draw(module)
                continue
            given = getattr(block, source)
            module.weight.copy_(given.weight)
            module.bias.zero_() if given.bias is None else module.bias.copy_(given.bias)


COPIED = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out", "key_norm": "norm1", "mlp_norm": "norm2", "fc1": "fc1", "fc2": "fc2"}
"""Module of a ladder layer -> what it is a copy of in a BlockWeights."""


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    else:
        module.reset_parameters()  # type: ignore[operator]


# ---- in a report ---------------------------------------------------------------------------------------------------------


SHOWN = 16
"""Queries whose heat maps a report shows."""
COLOUR = (1.0, 0.35, 0.1)
"""Red, green, blue of what a query looks at."""


def _heat_maps(name: str, picture: Any, weights: Tensor, summary: float, layer: int) -> Figure:
    """A panel per query over the picture (H, W, 3). weights: (Q, rows, columns) on the patches; summary: share of the queries' weight that is not in them."""
    maps = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-12)
    places = torch.special.entr(maps).sum((1, 2)).exp()
    chosen = places.argsort()[:SHOWN].tolist()
    across = min(6, len(chosen) + 1)
    lines = -(-(len(chosen) + 1) // across)

    def draw(figure: Any) -> None:
        panels = figure.subplots(lines, across, squeeze=False).flatten()
        height, width = picture.shape[:2]
        for panel in panels:
            panel.axis("off")
        panels[0].imshow(picture)
        panels[0].set_title("the picture", fontsize=8)
        for panel, query in zip(panels[1:], chosen, strict=False):
            panel.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=255)
            strength = (0.8 * maps[query] / maps[query].max())[..., None]
            covered = torch.cat([torch.tensor(COLOUR).expand(*strength.shape[:2], 3), strength], -1)
            panel.imshow(covered.numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
            panel.set_title(f"query {query}: {places[query]:.1f}", fontsize=8)

    which = f"All {len(maps)} queries" if len(chosen) == len(maps) else f"The {len(chosen)} of {len(maps)} queries that look at the fewest patches"
    caption = (
        f"{which}, with how many of the {maps.shape[1]} x {maps.shape[2]} patches they look at (the exponential of the entropy). Strong colour: the patch to which the query gives most, in layer {layer} "
        f"of the ladder, mean over its heads. Summary tokens, which have no place here, get {100 * summary:.0f} % of all weight."
    )
    return Figure(f"Where the queries look: {name}", caption, draw, size=(1.5 * across, 0.2 + 1.65 * lines))
