"""Vision Transformers of transformers (CLIP, SigLIP), described by `config` numbers, with all levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.encoders.base import BlockWeights, Encoder, FixedSizeSpec, Triple
from vlm.encoders.beside import beside_weights
from vlm.errors import ConfigurationError
from vlm.features import Features, ImageInput, Level, Stream

__all__ = ["CLIP_MEAN", "CLIP_STD", "Described", "TowerEncoder", "TowerSpec"]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, of the pictures that CLIP was trained on."""


class Described:
    """What is described by `config`, fields of one of transformers' classes; where it is None, by the config.json beside the weights."""

    path: str | None
    config: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if self.config is None and self.path is not None:
            object.__setattr__(self, "config", beside_weights(self.path))

    def config_class(self) -> Any:
        """transformers' class of `config`."""
        raise NotImplementedError

    def whole_config(self) -> Any:
        """transformers' own config, the class's defaults filled in; raises ConfigurationError where transformers does not accept the numbers."""
        try:
            return self.config_class()(**dict(self.config or {}))
        except Exception as problem:  # transformers' strict configs raise several kinds
            raise ConfigurationError(f"transformers does not accept the encoder's config: {' '.join(str(problem).split()).rstrip('.')}", cure="mend encoder.config") from problem

    def numbers(self) -> Mapping[str, Any]:
        """The architecture numbers, the class's defaults filled in; raises ConfigurationError."""
        return self.whole_config().to_dict()


@dataclass(frozen=True, kw_only=True)
class TowerSpec(Described, FixedSizeSpec):
    """A Vision Transformer of transformers that is described by its `config` numbers (CLIP, SigLIP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = self.numbers()
        for name, key in (("size", "image_size"), ("patch", "patch_size"), ("width", "hidden_size"), ("depth", "num_hidden_layers")):
            object.__setattr__(self, name, numbers[key])
        if self.depth < 1:
            raise ConfigurationError(f"encoder {self.use} needs at least one block", got=f"num_hidden_layers {self.depth}", expected="1 or more", cure="mend encoder.config")


class TowerEncoder(Encoder):
    """Levels 0..L of a transformers tower: level i is the input of block i, level L the output of the last block, never normed."""

    tower: nn.Module
    spec: TowerSpec

    def forward(self, images: Sequence[ImageInput], levels: Mapping[str, Sequence[Level]]) -> Features:
        pixels = torch.stack([image.views["pixels"] for image in images])
        wanted = levels["image"]
        hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        side = self.spec.size // self.spec.patch
        length = side * side + self.spec.prefix
        found = {level: self._level(hidden, level).reshape(-1, self.spec.width) for level in wanted}
        return Features({"image": Stream(found, (length,) * len(images), ((side, side),) * len(images), self.spec.prefix)})

    def _level(self, hidden: tuple[Tensor, ...], level: Level) -> Tensor:
        """(n, T, D) of one level."""
        return self.final_norm(hidden[-1]) if level == "final" else hidden[int(level)]

    def unused(self, levels: Mapping[str, Sequence[Level]]) -> list[nn.Parameter]:
        wanted = levels["image"]
        depth = self.spec.depth
        highest = max(depth if level == "final" else int(level) % (depth + 1) for level in wanted)
        idle = [p for block in self.blocks()[highest:] for p in block.parameters()]
        if "final" not in wanted:
            idle += self.final_norm.parameters()
        return idle + self.never_read()

    def weights_key(self, name: str) -> str | None:
        """Released files hold the tower as `vision_model.`, most of them beside a text tower."""
        if name.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale", "logit_bias")):
            return None
        return "tower." + name.removeprefix("vision_model.")

    @property
    def final_norm(self) -> nn.Module:
        return self.tower.post_layernorm  # type: ignore[return-value]

    def blocks(self) -> nn.ModuleList:
        return self.tower.encoder.layers  # type: ignore[return-value,union-attr]

    def never_read(self) -> list[nn.Parameter]:
        """What the files carry and no level needs (a pooling head)."""
        return []

    def block(self, index: int) -> BlockWeights | None:
        block: Any = self.blocks()[index]
        attention, config = block.self_attn, block.self_attn.config
        return BlockWeights(
            config.hidden_size, config.num_attention_heads, config.intermediate_size, config.hidden_act, config.layer_norm_eps,
            attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, block.layer_norm1, block.layer_norm2, block.mlp.fc1, block.mlp.fc2,
            dropout=config.attention_dropout,
        )  # fmt: skip
