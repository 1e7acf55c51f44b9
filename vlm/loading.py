"""First weights: towers and decoders from disk, an earlier stage, a finished run. Strict, and aware of ZeRO 3's partitioning."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlm.config import LLMSpec, ModelSpec, links
from vlm.errors import CheckpointError, ConfigurationError
from vlm.initial import draw, first_values
from vlm.weights.files import find_folder, read_file, read_json, read_shapes, read_tensors
from vlm.weights.strict import load_tensors

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["build", "first_model", "form", "load", "load_connector", "model_folder", "read_generation", "saved_model", "tables", "text_config"]


def text_config(model: ModelSpec) -> Any:
    """The decoder's transformers config, from the numbers in the YAML or from config.json beside the weights. Raises ConfigurationError, CheckpointError."""
    from vlm.llm.decoder import decoder_config

    if model.llm.config is not None:
        return decoder_config(model.llm.config)
    if model.llm.path is None:
        raise ConfigurationError("the decoder has neither a path nor a config", cure="name a configuration of configs/llm, or give llm.path or llm.config")
    file = find_folder(model.llm.path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no config.json", cure="give the folder of a whole checkpoint, or the numbers as llm.config")
    numbers = read_json(file)
    return decoder_config(numbers["text_config"] if numbers.get("model_type") == "vlm" else numbers)


def build(config: Any, zero: Mapping[str, Any] | None = None) -> "VLM":
    """The structure, without first values. zero: a DeepSpeed configuration; at stage 3 parameters are partitioned while they are made."""
    from transformers.initialization import no_init_weights

    from vlm.model import VLM

    partition: AbstractContextManager[Any] = nullcontext()
    if zero is not None and zero["zero_optimization"]["stage"] == 3:
        import deepspeed

        partition = deepspeed.zero.Init(config_dict_or_path=dict(zero))
    with partition, no_init_weights():
        model = VLM(config)
    model.tie_weights()
    return model


def form(spec: ModelSpec, image_token_id: int, vocabulary: int = 0) -> Any:
    """config.json of a model: the parts, and the decoder's numbers with room for the placeholder and the tokenizer's `vocabulary`. A padded vocabulary keeps its size."""
    from vlm.configuration import VLMConfig
    from vlm.llm.decoder import check_attention

    numbers = text_config(spec)
    check_attention(numbers, spec.llm.attention)
    numbers.vocab_size = max(numbers.vocab_size, image_token_id + 1, vocabulary)
    return VLMConfig.of(spec, numbers, image_token_id)


def first_model(spec: ModelSpec, image_token_id: int, zero: Mapping[str, Any] | None = None, vocabulary: int = 0) -> "VLM":
    """A model at the start of its first stage: the encoder's and the decoder's weights loaded or drawn, the connector initialised from the encoder, adaptations built and initialised.

    Draws from torch's default generator in a fixed order: the same values at every ZeRO stage and number of ranks.
    """
    from vlm.llm.decoder import file_key

    model = build(form(replace(spec, adapt={}), image_token_id, vocabulary), zero)
    _first_values(model.encoder, spec.encoder.path, spec.encoder.weights, model.encoder.initialise, model.encoder.weights_key, read=model.encoder.tensors)
    for part, (link, _) in zip(model.parts(), links(spec.encoder, spec.connector, model.config.text_config.hidden_size), strict=True):
        if link.path is not None:
            load_connector(part, link.use, link.path)
        else:
            first_values(part, partial(part.initialise, model.encoder), reads=model.encoder)
    _first_values(model.llm, spec.llm.path, spec.llm.weights, lambda: draw(model.llm), partial(file_key, model.llm), tables(model))
    if model.newline is not None:
        first_values(model.newline, model.newline.reset_parameters)
    read_generation(model, spec.llm)
    model.add_all(spec.adapt)
    return model


def tables(model: "VLM") -> list[str]:
    """Names in the decoder of what has a row per token: embedding and head."""
    found = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    return [name for name, parameter in model.llm.named_parameters(remove_duplicate=False) if any(parameter is table for table in found)]


def load_connector(part: nn.Module, use: str, path: str) -> None:
    """Weights of a connector from a file of its own: LLaVA's `mm_projector` in any spelling for mlp and linear, else our names. Raises CheckpointError."""
    from vlm.weights.llava import projector_key

    tensors = dict(read_file(path))
    own = f"connector.{use}."
    names = {name: projector_key(name) if use in ("mlp", "linear") and not name.startswith(own) else name for name in tensors}
    other = {name: key.split(".")[1] for name, key in names.items() if key.startswith("connector.") and not key.startswith(own)}
    if other:
        name, kind = next(iter(other.items()))
        raise CheckpointError(f"{path} holds another projector than the model", got=f"{kind} ({name}, ...)", expected=use, cure=f"set connector.use={kind}, or give another file")
    load_tensors(part, tensors.items(), source=path, key=lambda name: names[name].removeprefix(own))


def read_generation(model: "VLM", llm: LLMSpec) -> None:
    """End, start and padding ids that the decoder's folder names. Its sampling settings stay behind: answers are greedy unless somebody asks, and released files hold invalid ones."""
    from transformers import GenerationConfig

    if llm.weights != "path" or llm.path is None or not (file := find_folder(llm.path) / "generation_config.json").is_file():
        return
    model.generation_config = GenerationConfig(**_token_ids(file))
    model.generation_config._from_model_config = False


def _token_ids(file: Path) -> dict[str, Any]:
    """The start, end and padding ids of a generation_config.json. Raises CheckpointError."""
    written = read_json(file)
    found = {name: written.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in found.items():
        if not all(isinstance(index, int | None) for index in (value if isinstance(value, list) else [value])):
            raise CheckpointError(f"{file}: {name} is no id of a token", got=repr(value), expected="a number, or a list of them", cure="write the token's number there")
    return found


def _first_values(
    module: nn.Module,
    path: str | None,
    weights: str,
    drawing: Callable[[], None],
    key: Callable[[str], str | None],
    grow: Iterable[str] = (),
    read: Callable[[Path], Iterable[tuple[str, Tensor]]] = read_tensors,
) -> None:
    if weights == "random":
        first_values(module, drawing)
        return
    if path is None:
        raise ConfigurationError("first weights are wanted, but no path is given", cure="set path to a folder with weights, or weights: random")
    load_tensors(module, read(find_folder(path)), source=path, key=key, grow=grow)


def saved_model(folder: Path, zero: Mapping[str, Any] | None = None) -> "VLM":
    """The model of a stage's or export's folder, ZeRO-aware. Raises CheckpointError."""
    from vlm.configuration import VLMConfig

    model = build(VLMConfig.read(folder), zero)
    load_tensors(model, read_tensors(folder), source=str(folder))
    return model


def model_folder(folder: str | Path) -> Path:
    """Where the model of a finished run, a stage, an export or an import lies. Raises CheckpointError."""
    folder = Path(folder)
    if (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no model", expected="config.json and model.safetensors, or a run folder with export/", cure="give the folder of a finished run or of one of its stages"
        )
    return folder


def load(folder: str | Path) -> "tuple[VLM, VLMProcessor]":
    """A finished model with its processor, in evaluation mode: from a run's folder (its export), a stage's folder, or any folder that `save_pretrained` wrote.

    Raises CheckpointError for a file that is missing, cut or damaged: transformers would end in an error of its own, or do without the file.
    """
    import vlm.auto  # noqa: F401  registers with the Auto classes
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

    folder = model_folder(folder)
    processor = VLMProcessor.from_pretrained(folder)
    read_shapes(folder)
    if (generation := folder / "generation_config.json").is_file():
        _token_ids(generation)
    return VLM.from_pretrained(folder).eval(), processor
