"""What reading folders of others shares: what was found in one, its files, and how it is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.connectors.base import ConnectorSpec
from vlm.encoders.base import EncoderSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.llm.base import AdaptationSpec
from vlm.llm.decoder import decoder_config
from vlm.prompt import PromptSpec
from vlm.weights.files import read_json, read_tensors

__all__ = ["Found", "Row", "accepted", "flat_text", "image_processor", "numbers", "read_config", "refuse", "said"]

METADATA = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"}
"""What a config.json says of files and programs, not of the model."""


Row = tuple[bool, str, Any, Any]
"""Whether something keeps a folder from being imported, its key, what it is, what would work."""


@dataclass(frozen=True)
class Found:
    """A folder of others in our terms.

    shapes: name in the file -> tensor on the meta device. text: the decoder's transformers config. policy: what happens to pictures first. tower: the folder whose tensors are the tower's
    where the file has none. image_id: the picture token's id, where the folder says one. prompt: the one in which the model was trained, where that is known. splits: whether its program cuts
    the text at pictures and tokenises each piece by itself. notes: what has to be said. adapt: the decoder's adaptations by name.
    """

    folder: Path
    shapes: Mapping[str, Tensor]
    encoder: EncoderSpec
    connector: ConnectorSpec
    text: Any
    policy: str
    tower: Path | None = None
    image_id: int | None = None
    prompt: PromptSpec | None = None
    splits: bool = False
    notes: tuple[str, ...] = ()
    adapt: Mapping[str, AdaptationSpec] = field(default_factory=dict)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """All tensors of the folder; `key` says what a name is here."""
        return read_tensors(self.folder)

    def key(self, name: str) -> str:
        """Name of a tensor of `tensors` -> name in VLM; what has none there comes back as it is."""
        return name

    def spelt(self, name: str) -> str:
        """Name in VLM -> as this file spells it, for messages."""
        return name


# ---- config.json ---------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises CheckpointError."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json", cure="give the folder of a whole checkpoint")
    return read_json(file)


def accepted(config_class: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """config.json as a class of transformers. Raises CheckpointError."""
    try:
        return config_class(**config)
    except Exception as problem:  # transformers' strict configs raise several kinds
        raise CheckpointError(f"transformers does not accept the config.json of {folder}: {problem}", cure="fetch it again") from problem


def numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tower's config says of the model."""
    return {key: value for key, value in config.items() if key not in METADATA | {"model_type"}}


def flat_text(family: str, config: Mapping[str, Any]) -> Any:
    """The decoder's config from the flat one, without what LLaVA added to it."""
    from transformers import AutoConfig

    known = {*AutoConfig.for_model(family).to_dict(), "rope_theta", "rope_scaling"} - METADATA
    return decoder_config({key: value for key, value in config.items() if key in known} | {"model_type": family})


def image_processor(folder: Path) -> Mapping[str, Any] | None:
    """Its settings: in a file of their own, or in the processor's (transformers 5)."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            content = read_json(folder / name)
            found = content.get(key) if key else content
            if found:
                return found
    return None


# ---- refusals ------------------------------------------------------------------------------------------------------------


def refuse(folder: Path, rows: Iterable[Row], whose: str = "") -> None:
    """Raises ConfigurationError with everything that ours cannot express, if there is any.

    Args:
        rows: whether it is wrong, the key, what it is, what it can be. whose: stands before every key.
    """
    problems = [f"{whose}{key} is {got}, and can be {expected}" for bad, key, got, expected in rows if bad]
    if problems:
        raise ConfigurationError(f"{folder} cannot be imported: {'; '.join(problems)}", cure="import a checkpoint of these parts")


def said(settings: Mapping[str, Any], rows: Iterable[tuple[bool, str, str]]) -> list[Row]:
    """Rows for `refuse` of those without what the key is, which the settings say."""
    return [(bad, key, repr(settings.get(key)), expected) for bad, key, expected in rows]
