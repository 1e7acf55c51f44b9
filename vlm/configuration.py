"""config.json of a VLM: the parts by name with their numbers, and the decoder's own transformers config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from vlm.composition import from_plain, to_plain
from vlm.config import LLMSpec, ModelSpec
from vlm.errors import CheckpointError, VLMError
from vlm.weights.files import read_json

__all__ = ["VLMConfig"]


class VLMConfig(PreTrainedConfig):
    """Model type "vlm"."""

    model_type = "vlm"
    sub_configs = {"text_config": AutoConfig}  # type: ignore[assignment]  # a class attribute in every subclass of transformers, too
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        connector: Mapping[str, Any] | None = None,
        adapt: Mapping[str, Any] | None = None,
        text_config: Any = None,
        image_token_id: int | None = None,
        newline: bool = False,
        **kwargs: Any,
    ):
        self.encoder, self.connector, self.adapt = dict(encoder or {}), dict(connector or {}), dict(adapt or {})
        if isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.newline = newline
        kwargs.setdefault("tie_word_embeddings", False)  # the decoder ties its own
        super().__init__(**kwargs)

    @classmethod
    def of(cls, model: ModelSpec, text_config: Any, image_token_id: int) -> "VLMConfig":
        """From a composed model and the decoder's transformers config. Where first weights came from stays behind."""
        adapt = {name: to_plain(spec.form()) for name, spec in model.adapt.items()}
        return cls(
            encoder=to_plain(model.encoder.form()),
            connector=to_plain(model.connector.form()),
            adapt=adapt,
            text_config=text_config,
            image_token_id=image_token_id,
            newline=model.newline,
        )

    @classmethod
    def read(cls, folder: Path) -> "VLMConfig":
        """config.json of a folder that vlm wrote, once it is known to describe a model. Raises CheckpointError."""
        file = folder / "config.json"
        kind = read_json(file).get("model_type")
        if kind != cls.model_type:
            cure = "give a folder that vlm wrote, or turn this one into such with `vlm import`"
            raise CheckpointError(f"{file} describes no model of vlm", got=f"model_type {kind!r}", expected=repr(cls.model_type), cure=cure)
        try:
            config = cls.from_pretrained(folder)
            config.spec()
        except VLMError as problem:
            raise CheckpointError(f"{file} describes no model that can be built: {problem}", cure="fetch it again; parts of your own are named by --import") from problem
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise CheckpointError(f"{file} is damaged: {problem!r}", cure="fetch it again") from problem
        return config

    def spec(self) -> ModelSpec:
        """The parts' Specs; raises ConfigurationError for a part that nobody registered. No code is imported because a checkpoint names it."""
        from vlm import connectors, encoders, llm

        return ModelSpec(
            encoder=from_plain(encoders.registry, self.encoder),
            connector=from_plain(connectors.registry, self.connector),
            llm=LLMSpec(config=self.text_config.to_dict()),
            adapt={name: from_plain(llm.registry, {"use": name, **part}) for name, part in self.adapt.items()},
            newline=self.newline,
        )
