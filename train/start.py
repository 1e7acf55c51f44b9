"""A run that goes on from a finished model (`start: FOLDER`): an import, an export, a stage of another run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.composition import to_plain
from vlm.config import ModelSpec, links
from vlm.configuration import VLMConfig
from vlm.connectors.base import ConnectorSpec
from vlm.encoders.base import EncoderSpec
from vlm.errors import ConfigurationError
from vlm.llm.base import AdaptationSpec
from vlm.loading import build, form, model_folder
from vlm.structure import hollow
from vlm.weights.files import read_tensors
from vlm.weights.strict import load_tensors

if TYPE_CHECKING:
    from vlm.model import VLM

__all__ = ["check_start", "left_out", "started_model"]

_FREE = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "vocab_size", "max_position_embeddings", "projection_dim"}
"""Of a transformers config: what changes no answer (ids, dropout and first values neither), and the vocabulary, which is looked at apart."""


def check_start(start: str, spec: ModelSpec, image_token_id: int, vocabulary: int = 0) -> VLMConfig:
    """config.json of the folder that a run starts from, once it is known to be of the run's parts.

    Args:
        spec: the model in the first stage. image_token_id, vocabulary: of the run's tokenizer.

    Raises CheckpointError for a folder without a whole model, ConfigurationError naming every part that differs.
    """
    folder = model_folder(start)
    written: Any = VLMConfig.read(folder)
    wanted: Any = form(spec, image_token_id, vocabulary)
    found = list(_differences(written, spec, wanted))
    if written.image_token_id != image_token_id or written.text_config.vocab_size < wanted.text_config.vocab_size:
        got = f"pictures at id {written.image_token_id} of {written.text_config.vocab_size:,}"
        found.append(f"tokenizer ({got} there, {image_token_id} of {wanted.text_config.vocab_size:,} here; set model.llm.tokenizer={folder})")
    found = found or list(_not_there(written, spec))
    if found:
        raise ConfigurationError(
            f"{folder} is of another model than the run describes",
            got="; ".join(found),
            expected="the same parts",
            cure="let `model` say what the folder holds, or start from another",
        )
    return written


def _differences(written: Any, spec: ModelSpec, wanted: Any) -> Iterator[str]:
    """Every value that differs: PATH (there ..., here ...)."""
    there = written.spec()
    yield from _differing("model.encoder", _encoder(there.encoder), _encoder(spec.encoder))
    yield from _differing("model.connector", _connector(there.connector.trimmed()), _connector(spec.connector.trimmed()))
    yield from _differing("model.llm", _numbers(written.text_config), _numbers(wanted.text_config))
    if there.newline and not spec.newline:
        yield "model.newline (there, not in the first stage here)"
    for name, adaptation in there.adapt.items():
        if name not in spec.adapt:
            yield f"model.adapt.{name} (there, not in the first stage here)"
        else:
            yield from _differing(f"model.adapt.{name}", _adaptation(adaptation), _adaptation(spec.adapt[name]))


def _differing(path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*there, *here}):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differing(f"{path}.{key}", one, other)
        elif one != other:
            yield f"{path}.{key} ({one!r} there, {other!r} here)"


def _encoder(spec: EncoderSpec) -> dict[str, Any]:
    """What it computes: not where its first weights came from; of a tower of transformers every number, the class's defaults filled in."""
    plain = to_plain(spec.with_towers(lambda tower: replace(tower, path=None, weights="path")))
    numbers = getattr(spec, "numbers", None)
    return plain | ({"config": _free(numbers())} if numbers is not None else {})


def _connector(spec: ConnectorSpec) -> dict[str, Any]:
    return to_plain(replace(spec, path=None)) | ({} if spec.then is None else {"then": _connector(spec.then)})


def _adaptation(spec: AdaptationSpec) -> dict[str, Any]:
    """What it is: not when it entered, nor where its first values came from."""
    return {key: value for key, value in to_plain(spec).items() if key not in ("since", "path")}


def _numbers(config: Any) -> dict[str, Any]:
    return _free(config.to_dict())


def _free(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in numbers.items() if key not in _FREE and not key.endswith(("_token_id", "dropout")) and not key.startswith(("initializer", "_"))}


def left_out(written: VLMConfig, spec: ModelSpec) -> list[str]:
    """Tensors that the folder keeps for a checkpoint's sake and the run's model does not have. written: config.json of the folder, of the run's parts."""
    return _only_first(written.spec(), spec, written)


def _not_there(written: VLMConfig, spec: ModelSpec) -> Iterator[str]:
    """The other way round, which nothing can make up for, in a sentence."""
    if missing := _only_first(spec, written.spec(), written):
        settings = ", ".join(_settings("model.connector", _connector(spec.connector.trimmed()), _connector(spec.connector)))
        yield f"model.connector ({len(missing)} tensors that nothing reads are missing there, such as {missing[0]}; set {settings})"


def _only_first(one: ModelSpec, other: ModelSpec, config: Any) -> list[str]:
    """Tensors of connectors that compute the same which only the first has. config: VLMConfig with the decoder's width."""
    if _connector(one.connector) == _connector(other.connector):
        return []
    first, second = (_tensors(spec, config.text_config.hidden_size) for spec in (one, other))
    return sorted(first - second)


def _tensors(spec: ModelSpec, width: int) -> set[str]:
    from vlm.model import link_name

    with hollow():
        parts = {link_name(index, part.use): part.build(spec.encoder, link) for index, (part, link) in enumerate(links(spec.encoder, spec.connector, width))}
    return {f"connector.{part}.{name}" for part, module in parts.items() for name in module.state_dict()}


def _settings(path: str, wanted: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Overrides that make of a connector what is wanted."""
    for key, value in wanted.items():
        if key == "then" and value is not None:
            yield from _settings(f"{path}.then", value, here["then"])
        elif value != here[key]:
            yield f"{path}.{key}={json.dumps(value)}"


def started_model(start: str, spec: ModelSpec, image_token_id: int, zero: Mapping[str, Any] | None = None, vocabulary: int = 0) -> "VLM":
    """The first stage's model with the folder's weights, every tensor once but for those `left_out`; adaptations that the folder does not have are added as at a later stage.

    Raises as `check_start`, CheckpointError.
    """
    written = check_start(start, spec, image_token_id, vocabulary)
    folder: Path = model_folder(start)
    present = {name: adaptation for name, adaptation in spec.adapt.items() if name in written.adapt}
    model = build(form(replace(spec, adapt=present, newline=written.newline), image_token_id, written.text_config.vocab_size), zero)
    idle = frozenset(left_out(written, spec))
    load_tensors(model, read_tensors(folder), source=str(folder), key=lambda name: None if name in idle else name)
    if spec.newline:
        model.add_newline()
    model.add_all({name: adaptation for name, adaptation in spec.adapt.items() if name not in present})
    return model
