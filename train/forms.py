"""What a run means in one of its stages: its sources in which order, the model's form, and who makes its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from vlm.config import ModelSpec
from vlm.data.mixture import Mixture
from vlm.processor import VLMProcessor
from vlm.train.config import RunSpec, StageSpec

__all__ = ["blocks_of", "model_at", "stage_mixture", "stage_processor"]

P = TypeVar("P", bound=VLMProcessor)


def stage_mixture(run: RunSpec, index: int, sizes: Mapping[str, int], blocks: Mapping[str, Sequence[int]] | None = None) -> Mixture:
    """The order of samples of a stage. sizes: samples per source that the stage names. blocks: of streamed sources, samples per shard (`blocks_of`)."""
    stage = list(run.stages.values())[index]
    weights = None if isinstance(stage.data, str) else dict(stage.data)
    epochs = stage.epochs if stage.epochs is not None or stage.steps is not None else 1.0
    return Mixture(sizes, weights, stage.batch, run.seed, index, epochs=epochs, steps=stage.steps, blocks=blocks)


def blocks_of(readers: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Samples per shard of those readers that are streamed."""
    return {name: reader.blocks for name, reader in readers.items() if reader.blocks is not None}


def stage_processor(kind: type[P], stage: StageSpec, model: ModelSpec, width: int, tokenizer: PreTrainedTokenizerBase) -> P:
    """The processor of a stage. kind: whether it makes rows or only sizes them. width: the decoder's hidden size."""
    return kind(model, width, tokenizer, stage.prompt, stage.images.use, stage.images.official, stage.images.tiling)


def model_at(run: RunSpec, index: int) -> ModelSpec:
    """The model's form in a stage: with the adaptations that have entered by then, and a newline once a stage has cut pictures into tiles whose rows end in one."""
    names = list(run.stages)
    entered = {name: spec for name, spec in run.model.adapt.items() if names.index(spec.since or names[0]) <= index}
    cut = [stage.images.tiling for stage in list(run.stages.values())[: index + 1]]
    return replace(run.model, adapt=entered, newline=run.model.newline or any(tiling is not None and tiling.newline for tiling in cut))
