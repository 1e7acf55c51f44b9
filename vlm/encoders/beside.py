"""Numbers of an encoder in the JSON files beside its weights."""

from collections.abc import Mapping
from typing import Any

from vlm.errors import CheckpointError
from vlm.weights.files import find_folder, read_json

__all__ = ["beside_weights", "config_beside", "own_encoder"]


def config_beside(path: str, file: str) -> dict[str, Any] | None:
    """JSON file beside weights (`path`: their folder, the cached snapshot of a hub repository, or the weights file), None where there is none. Raises CheckpointError."""
    place = find_folder(path)
    found = (place if place.is_dir() else place.parent) / file
    return read_json(found) if found.is_file() else None


def own_encoder(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the config.json of one of our own folders says of its encoder, None for a folder of others."""
    return config["encoder"] if config.get("model_type") == "vlm" else None


def beside_weights(path: str) -> Mapping[str, Any]:
    """A tower's numbers from the config.json beside its weights (`vision_config` of a two-tower file, the encoder's of one of our own folders). Raises CheckpointError."""
    file = find_folder(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no config.json", cure="give the folder of a whole checkpoint, or the numbers as encoder.config")
    config = read_json(file)
    own = own_encoder(config)
    return config.get("vision_config", config) if own is None else own["config"]
