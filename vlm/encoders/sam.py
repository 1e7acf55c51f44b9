"""The high-resolution tower of DeepSeek-VL: SAM's ViTDet (Kirillov et al. 2023, Li et al. 2022) with two necks, an interpolation and strided convolutions (Lu et al. 2024)."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder, SamVisionNeck

from vlm.errors import ConfigurationError
from vlm.weights.deepseek_keys import sam_key

__all__ = ["GlobalAttention", "SAMTower", "Trunk"]


class GlobalAttention(SamVisionAttention):
    """Attention over the whole grid with decomposed relative positions, without any N x N tensor.

    The logits are d^-1/2 q.k + q.Rh[h - h'] + q.Rw[w - w']. Each table term is a dot product with the key's one-hot row or column, so they become H + W more channels of q and k,
    and one plain call of scaled dot-product attention gives the same (systems/deepseek_vl.md, section 2.8).
    """

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        """(B, H, W, D) -> the same shape."""
        batch, height, width, _ = hidden_states.shape
        heads = self.num_attention_heads
        query, key, value = self.qkv(hidden_states).view(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        grid = query.reshape(batch, heads, height, width, -1)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, distances(self.rel_pos_h, height)).flatten(2, 3)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, distances(self.rel_pos_w, width)).flatten(2, 3)
        places = one_hot_places(height, width, key).expand(batch, heads, -1, -1)
        channels = query.shape[-1]
        room = -(channels + height + width) % 8
        query = pad(torch.cat([query * self.scale, rows, columns], -1), (0, room))
        key = pad(torch.cat([key, places], -1), (0, room))
        # the fused kernels want one width for all three; with another one for v, the CPU falls back to N x N
        value = pad(value, (0, height + width + room))
        mixed = scaled_dot_product_attention(query, key, value, scale=1.0)[..., :channels]
        return self.proj(mixed.transpose(1, 2).reshape(batch, height, width, -1)), None


def distances(table: Tensor, side: int) -> Tensor:
    """Relative positions (L, d) -> (side, side, d), entry [q, k] for the distance q - k. A table for another side is resized linearly."""
    if len(table) != 2 * side - 1:
        table = interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    index = torch.arange(side, device=table.device)
    return table[index[:, None] - index + side - 1]


def one_hot_places(height: int, width: int, like: Tensor) -> Tensor:
    """(H * W, H + W): the row and the column of every place, one-hot."""
    rows, columns = torch.eye(height, dtype=like.dtype, device=like.device), torch.eye(width, dtype=like.dtype, device=like.device)
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], -1)


class Trunk(SamVisionEncoder):
    """transformers' SAM encoder of any input size; global blocks hold no N x N tensor. `neck` is called by the tower, which needs it beside a second one."""

    def __init__(self, config: SamVisionConfig):
        super().__init__(config)
        whole = [index for index, layer in enumerate(self.layers) if layer.window_size == 0]
        if not whole:
            raise ConfigurationError("the SAM tower has no global block, whose output its second neck reads", got=f"global_attn_indexes {config.global_attn_indexes}")
        self.first_global = whole[0]
        if config.use_rel_pos:
            for index in whole:
                self.layers[index].attn = GlobalAttention(config, 0)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalised pixels (B, 3, S, S) -> outputs (B, H, W, D) of the last block and of the first global one."""
        hidden = self.patch_embed.projection(pixel_values).permute(0, 2, 3, 1)  # patch_embed itself refuses every size but the built one
        if self.pos_embed is not None:
            check_grid(hidden, self.pos_embed)
            hidden = hidden + self.pos_embed
        first = hidden
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index == self.first_global:
                first = hidden
        return hidden, first


def check_grid(patches: Tensor, positions: Tensor) -> None:
    """Both (?, H, W, D). Raises ConfigurationError: positions are never interpolated."""
    (rows, columns), (high, wide) = patches.shape[1:3], positions.shape[1:3]
    if (rows, columns) != (high, wide):
        got, expected = f"{rows} x {columns} patches", f"{high} x {wide}"
        raise ConfigurationError("the SAM tower has positions for one size of pictures", got=got, expected=expected, cure="set config.image_size")


class SAMTower(nn.Module):
    """SAM's trunk -> (neck of the last block + alpha x neck of the first global one) -> interpolation to `grid` -> convolutions of stride 2.

    channels: widths of the convolutions, which have no bias and nothing between them; () leaves the neck's width.
    """

    def __init__(self, config: SamVisionConfig, channels: Iterable[int], grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.trunk = Trunk(config)
        self.neck_hd = SamVisionNeck(config)
        widths = [config.output_channels, *channels]
        self.downsamples = nn.Sequential(*(nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False) for into, out in pairwise(widths)))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, C, h, w)."""
        last, first = self.trunk(pixels)
        # what follows is linear without offsets, so that both paths go through it as one sum
        merged = self.trunk.neck(last) + self.alpha * self.neck_hd(first)
        resized = interpolate(merged.float(), size=self.grid, mode="bilinear", align_corners=False).to(merged.dtype)
        return self.downsamples(resized)

    def initialise(self) -> None:
        """PyTorch's first values, as DeepSeek-VL builds it; the second neck is a copy behind a gate of zero. transformers' own rule (std 1e-10) would leave it dead."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w", "alpha")):
                nn.init.zeros_(parameter)
        self.neck_hd.load_state_dict(self.trunk.neck.state_dict())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trunk has no name of its own; `neck` holds both necks and the gate between them."""
        neck = [*self.trunk.neck.parameters(), *self.neck_hd.parameters(), self.alpha]
        named = {id(parameter) for parameter in neck}
        return {"": [p for p in self.trunk.parameters() if id(p) not in named], "neck": neck, "downsamples": list(self.downsamples.parameters())}

    @staticmethod
    def weights_key(name: str) -> str | None:
        """Name in SAM's own file, in transformers' form of it, or in DeepSeek-VL's tower -> name here; None for what is no encoder."""
        name = name.removeprefix("image_encoder.").removeprefix("vision_encoder.")
        if name.startswith(("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")) or name in ("pixel_mean", "pixel_std"):
            return None
        return sam_key(name) or f"trunk.{name}"

    def completed(self, tensors: Mapping[str, Tensor], copy_neck: bool = True) -> dict[str, Tensor]:
        """The tensors, and for a plain SAM what it does not have: a second neck equal to its own, alpha 0, convolutions as they were drawn.

        A file that has some tensors of one of these three and lacks others gets none of them added, so that loading names what is missing.
        copy_neck: False keeps the second neck as it was drawn, as the official program does, which copies before it loads.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("trunk.")}
        if copy_neck:
            own |= {name.removeprefix("trunk.").replace("neck.", "neck_hd."): tensor for name, tensor in tensors.items() if name.startswith("trunk.neck.")}
        absent = [part for part in ("neck_hd.", "downsamples.", "alpha") if not any(name.startswith(part) for name in tensors)]
        return {**{name: tensor for name, tensor in own.items() if name.startswith(tuple(absent))}, **tensors}
