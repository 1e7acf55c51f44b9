"""How hidden states are read of foreign backbones: the contract of a reader, that of timm, which open_clip's trunks share, and what they make a BlockWeights of."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlm.encoders.base import BlockWeights

__all__ = ["Reader", "TimmReader", "activation_name", "part_of_linear"]


class Reader:
    """How hidden states are read of one kind of backbone. Its methods run inside the call of `trunk`, so that ZeRO 3 has gathered the trunk's own parameters."""

    def __init__(self, trunk: Any):
        self.trunk = trunk

    def blocks(self) -> Sequence[nn.Module]:
        """Blocks that may be those of a vision transformer: each reads tokens as its first argument and returns tokens."""
        return ()

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        raise NotImplementedError

    def final(self, pixels: Tensor) -> Tensor:
        """The tokens that the library hands to its pooling: after the final norm, where it has one before the pooling."""
        raise NotImplementedError

    def stages(self, pixels: Tensor, numbers: Sequence[int] | None, final: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The final map, where it is wanted, and those of the stages `numbers` (None: all) as (n, C, rows, columns)."""
        raise NotImplementedError

    def pool(self, tokens: Tensor) -> Tensor | None:
        """Tokens (n, Q, D) that queries draw from the last hidden state, where the library trained such a pooler for captions."""
        return None

    def pooled_prefix(self) -> int:
        """How many of the pooled tokens are a summary."""
        return 0

    def block(self, index: int) -> BlockWeights | None:
        """Block `index` for a ladder, None where it is not a plain pre-norm block."""
        return None

    def channels_last(self) -> bool:
        """Whether the final map is (n, rows, columns, C)."""
        return False


class TimmReader(Reader):
    """timm's common methods: forward_features, forward_intermediates."""

    def blocks(self) -> Sequence[nn.Module]:
        found = getattr(self.trunk, "blocks", None)
        return list(found) if isinstance(found, nn.Sequential | nn.ModuleList) else ()

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        rows, columns = self.stages(pixels, [0], False)[1][0].shape[2:]
        return rows, columns

    def final(self, pixels: Tensor) -> Tensor:
        return self.trunk.forward_features(pixels)

    def stages(self, pixels: Tensor, numbers: Sequence[int] | None, final: bool) -> tuple[Tensor | None, list[Tensor]]:
        indices = None if numbers is None else list(numbers)
        if indices == []:
            return self.trunk.forward_features(pixels), []
        found = self.trunk.forward_intermediates(pixels, indices=indices, output_fmt="NCHW", intermediates_only=not final, stop_early=not final)
        return found if final else (None, found)

    def channels_last(self) -> bool:
        return str(getattr(self.trunk, "output_fmt", "")) == "NHWC"

    def block(self, index: int) -> BlockWeights | None:
        from timm.layers.attention import Attention
        from timm.layers.mlp import Mlp
        from timm.models.vision_transformer import Block

        block: Any = self.blocks()[index]
        if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
            return None
        attention: Any = block.attn
        mlp: Any = block.mlp
        norm1, norm2 = block.norm1, block.norm2
        plain = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
        activation = activation_name(mlp.act)
        if activation is None or attention.gate is not None or not all(isinstance(one, nn.Identity) for one in plain):
            return None
        if not isinstance(norm1, nn.LayerNorm) or not isinstance(norm2, nn.LayerNorm):
            return None
        query, key, value = (part_of_linear(attention.qkv.weight, attention.qkv.bias, part) for part in range(3))
        return BlockWeights(
            mlp.fc1.in_features, attention.num_heads, mlp.fc1.out_features, activation, norm1.eps,
            query, key, value, attention.proj, norm1, norm2, mlp.fc1, mlp.fc2,
        )  # fmt: skip


def activation_name(module: nn.Module) -> str | None:
    """Name by which transformers knows an activation module, None for one that it has not."""
    names = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu", "ReLU": "relu"}
    if isinstance(module, nn.GELU):
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    return "gelu" if type(module).__name__ == "GELU" else names.get(type(module).__name__)


def part_of_linear(weight: Tensor, bias: Tensor | None, part: int, parts: int = 3) -> nn.Linear:
    """One of the `parts` linears that are stored as one (query, key, value): a view of them, without gradients."""
    rows = len(weight) // parts
    linear = nn.Linear(weight.shape[1], rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach()[part * rows : (part + 1) * rows], requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[part * rows : (part + 1) * rows], requires_grad=False)
    return linear
