"""Export as transformers' own `DeepseekVLForConditionalGeneration` and `DeepseekVLHybridForConditionalGeneration` (deepseek_read.py reads their folders; systems/deepseek_vl.md, section 2.7)."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlm.config import ModelSpec
from vlm.encoders.hybrid import HybridSpec
from vlm.errors import ConfigurationError
from vlm.weights.deepseek_keys import native_name
from vlm.weights.public import Obstacle, chat_template, common_obstacles, mlp_obstacles, public_tokenizer, save, sentences, single_connector, unadapted

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["HYBRID", "SINGLE", "Family", "picture_rule"]


@dataclass(frozen=True)
class Family:
    """One of the two classes. name: after `--to`."""

    name: str
    hybrid: bool
    model_class: str
    POLICIES: tuple[str, ...] = ("native",)

    @property
    def WRITES(self) -> str:
        return f"transformers' {self.model_class}"

    def obstacles(self, model: ModelSpec, text_config: Any) -> list[str]:
        """All that keeps a model from being one; empty where nothing does."""
        encoder, connector = model.encoder, model.connector
        use, projector = ("hybrid", "hybrid_mlp") if self.hybrid else ("siglip", "mlp")
        rows: list[Obstacle] = [
            (encoder.use != use, "model.encoder", encoder.use, use),
            (connector.use != projector, "model.connector", connector.use, projector),
            *common_obstacles(model, text_config),
            unadapted(model),
            (connector.level != "final", "model.connector.level", connector.level, "final"),
            single_connector(connector),
            *(mlp_obstacles(connector, text_config.hidden_size) if connector.use == projector else ()),
        ]
        if isinstance(encoder, HybridSpec):
            rows += _pair(encoder)
        elif encoder.use == "siglip":
            fit = cast(Any, encoder).fit
            rows.append((fit != "letterbox", "model.encoder.fit", fit, "letterbox"))
        return sentences(rows, self.name)

    def as_written(self, processor: "VLMProcessor") -> "tuple[VLMProcessor, str]":
        """The processor with the class's own rule for pictures, and what that changes."""
        return picture_rule(processor, official=False)

    def write(self, model: "VLM", processor: "VLMProcessor", folder: Path) -> None:
        """Model, configuration, processor and generation settings into `folder`, dtypes kept. processor: as `as_written` gives it.

        Raises ConfigurationError where a part, the picture policy or the tokenizer cannot be expressed.
        """
        if found := self.obstacles(model.spec, model.config.text_config):
            raise ConfigurationError(f"this model cannot be exported as {self.name}: {'; '.join(found)}", cure="export a model of these parts, or load it through vlm")
        if processor.policy not in self.POLICIES:
            raise ConfigurationError(f"{self.name}'s image processor cannot express the picture policy {processor.policy!r}", expected="native")
        save(model, processor, folder, rename=native_name, config=self._config(model), exported=self._processor(processor))

    def _config(self, model: "VLM") -> Any:
        from transformers import DeepseekVLConfig, DeepseekVLHybridConfig

        encoder: Any = model.encoder
        text = copy.deepcopy(model.config.text_config)
        settings: dict[str, Any] = {"text_config": text, "image_token_id": model.config.image_token_id, "tie_word_embeddings": text.tie_word_embeddings, "dtype": model.dtype}
        settings["architectures"] = [self.model_class]
        if not self.hybrid:
            return DeepseekVLConfig(vision_config=copy.deepcopy(encoder.tower.config), **settings)
        return DeepseekVLHybridConfig(vision_config=copy.deepcopy(encoder.low.tower.config), high_res_vision_config=copy.deepcopy(encoder.high.trunk.config), **settings)

    def _processor(self, processor: "VLMProcessor") -> Any:
        from transformers import DeepseekVLHybridProcessor, DeepseekVLProcessor

        token = cast(str, processor.tokenizer.convert_ids_to_tokens(processor.image_token_id))
        tokenizer = public_tokenizer(processor.prompt, image_token=token)
        tokenizer.chat_template = chat_template(processor.prompt, token)
        kind = DeepseekVLHybridProcessor if self.hybrid else DeepseekVLProcessor
        count = processor.layout(1, 1).count
        return kind(_image_processor(processor.model.encoder), tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=count)


def picture_rule(processor: "VLMProcessor", official: bool) -> "tuple[VLMProcessor, str]":
    """The processor with one of both rules for pictures, and what that changes: the official program cuts sizes off and makes the low view before 8-bit rounding, transformers does neither."""
    from vlm.processor import VLMProcessor

    encoder: Any = processor.model.encoder
    fields = {"rounding": "trunc" if official else "round"} if isinstance(encoder, HybridSpec) else {"official": official}
    if all(getattr(encoder, name) == rule for name, rule in fields.items()):
        return processor, ""
    model = replace(processor.model, encoder=replace(encoder, **fields))
    changed = "pictures are brought to size by " + (
        "the official program's rule instead of transformers': short sides are cut off, where they were rounded"
        if official
        else "transformers' rule instead of the official program's: short sides are rounded, where they were cut off"
    )
    return VLMProcessor(model, processor.width, processor.tokenizer, processor.prompt.spec, processor.policy, processor.official_pictures, processor.tiling), changed


def _pair(encoder: HybridSpec) -> list[Obstacle]:
    """What the class fixes of both towers."""
    low, channels = encoder.low_layout(), encoder.high.numbers()["output_channels"]
    grid, widths = (4 * low.rows, 4 * low.columns), (2 * channels, 4 * channels)
    return [
        (encoder.low.use != "siglip", "model.encoder.low", encoder.low.use, "siglip"),
        (encoder.concat != "tuple", "model.encoder.concat", encoder.concat, "tuple"),
        (encoder.interpolated() != grid, "model.encoder.high.interpolate", encoder.interpolated(), f"four times the low grid, {grid}"),
        (encoder.high.downsample_channels != widths, "model.encoder.high.downsample_channels", encoder.high.downsample_channels, widths),
    ]


def _image_processor(encoder: Any) -> Any:
    """Pixels are Pillow's: load with `backend="pil"` where they must be reproduced to the last bit."""
    from transformers import DeepseekVLHybridImageProcessorPil, DeepseekVLImageProcessorPil

    if not isinstance(encoder, HybridSpec):
        return DeepseekVLImageProcessorPil(size=_square(encoder.size), image_mean=list(encoder.mean), image_std=list(encoder.std))
    low = encoder.low_tower
    return DeepseekVLHybridImageProcessorPil(
        size=_square(low.size),
        high_res_size=_square(encoder.size),
        resample={"bilinear": 2, "bicubic": 3}[encoder.resample],
        min_size=encoder.min_size,
        image_mean=list(low.mean),
        image_std=list(low.std),
        high_res_image_mean=list(encoder.high.mean),
        high_res_image_std=list(encoder.high.std),
    )


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


SINGLE = Family("deepseek_vl", False, "DeepseekVLForConditionalGeneration")
HYBRID = Family("deepseek_vl_hybrid", True, "DeepseekVLHybridForConditionalGeneration")
