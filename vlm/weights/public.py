"""What every folder for classes of others shares: what no such class has, the files written, the prompt as a chat template and the tokenizer that goes with it."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config import ModelSpec
from vlm.data.sample import Turn
from vlm.errors import ConfigurationError

if TYPE_CHECKING:
    from vlm.llm.base import AdaptationSpec
    from vlm.model import VLM
    from vlm.processor import VLMProcessor
    from vlm.prompt import Prompt

__all__ = [
    "DECODERS", "Obstacle", "chat_template", "common_obstacles", "generation_settings", "kept", "mlp_obstacles", "own_tensors", "public_tokenizer", "save", "sentences",
    "single_connector", "starts_row", "unadapted",
]  # fmt: skip

DECODERS = ("llama", "mistral", "qwen2")
"""Decoder families (`model_type`) that go both ways. Those classes have a plain linear head without bias: a family that scales or caps its logits cannot join."""

PLACEHOLDER = "<image>"

Obstacle = tuple[bool, str, Any, Any]
"""Whether a part keeps a model from being exported, the part by its path, what it is, what would work."""


def sentences(rows: Iterable[Obstacle], whose: str) -> list[str]:
    """The obstacles that are there, each a sentence. whose: what the class or program that would work is called."""
    return [f"{part} is {got}, {whose} has {expected}" for bad, part, got, expected in rows if bad]


def common_obstacles(model: ModelSpec, text_config: Any, decoders: tuple[str, ...] = DECODERS) -> list[Obstacle]:
    """Of the decoder, whose family is to be one of `decoders`, and of pictures in tiles, which no such class has."""
    return [
        (text_config.model_type not in decoders, "model.llm", text_config.model_type, " or ".join(decoders)),
        (model.newline, "model.newline", "the token that ends a row of tiles", "one square picture each"),
    ]


def kept(model: ModelSpec) -> "dict[str, AdaptationSpec]":
    """The adaptations that are still there when a model is written: the others are merged before."""
    return {name: spec for name, spec in model.adapt.items() if not spec.mergeable}


def unadapted(model: ModelSpec) -> Obstacle:
    """Of adaptations, for classes that have none."""
    return bool(kept(model)), "model.adapt", ", ".join(kept(model)), "a decoder without adaptations"


def single_connector(connector: Any) -> Obstacle:
    """Of a second connector."""
    return connector.then is not None, "model.connector.then", connector.then and connector.then.use, "a single connector"


def mlp_obstacles(connector: Any, width: int) -> list[Obstacle]:
    """Of an MLP, whose sizes those classes fix. width: the decoder's."""
    return [
        (connector.depth != 2, "model.connector.depth", connector.depth, "2"),
        (connector.hidden not in (None, width), "model.connector.hidden", connector.hidden, f"the decoder's width, {width}"),
    ]


# ---- files ----------------------------------------------------------------------------------------------------------------


def save(model: "VLM", processor: "VLMProcessor", folder: Path, *, rename: Callable[[str], str], config: Any, exported: Any) -> None:
    """Tensors (dtypes kept), configuration, generation settings and processor into `folder`.

    Args:
        rename: name of a parameter of VLM -> its name in the file. config, exported: the configuration and the processor of the class.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {rename(name): tensor for name, tensor in own_tensors(model).items()}
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    config.save_pretrained(folder)
    generation_settings(model, processor).save_pretrained(folder)
    exported.save_pretrained(folder)


def own_tensors(model: "VLM") -> dict[str, Any]:
    """The model's tensors by name, one that is tied to another only once."""
    tied = set(model._tied_weights_keys or ())
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}


def generation_settings(model: "VLM", processor: "VLMProcessor") -> Any:
    """The model's own settings, with how an answer ends and what is never said."""
    from vlm.generate import prepare

    prepare(model, processor)
    config: Any = copy.deepcopy(model.generation_config)
    config.bos_token_id = processor.tokenizer.bos_token_id
    return config


# ---- tokenizer ------------------------------------------------------------------------------------------------------------


def public_tokenizer(prompt: "Prompt", *, without: int | None = None, **names: str) -> Any:
    """The prompt's tokenizer, so that it reads a rendered conversation as training does: it puts the start token in front where the prompt has one, and word marks where the prompt has them.

    names: more special tokens, such as `image_token`. without: id of an added token that is left out.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = prompt.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigurationError(
            f"a {type(tokenizer).__name__} cannot be written as tokenizer.json",
            expected="a tokenizer of the tokenizers library",
            cure="convert it, and train with the converted one",
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = _start_token(tokenizer) if starts_row(prompt) else None
    content["truncation"] = content["padding"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != without]
    if not prompt.marked:
        _mark_first_word_only(content)
    names |= {name: str(value) for name in ("bos_token", "eos_token", "unk_token", "pad_token") if (value := getattr(tokenizer, name)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), clean_up_tokenization_spaces=False, padding_side="left", model_max_length=tokenizer.model_max_length, **names
    )


def _start_token(tokenizer: Any) -> dict[str, Any]:
    """The step of the tokenizers library that writes the start token."""
    token, first = str(tokenizer.bos_token), {"id": "A", "type_id": 0}
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": first}],
        "pair": [start, {"Sequence": first}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [tokenizer.bos_token_id], "tokens": [token]}},
    }


def starts_row(prompt: "Prompt") -> bool:
    """Whether rows of this prompt begin with the start token. The exported tokenizer writes it, so that what follows has the word mark of a text's beginning, as in training."""
    encoded = prompt.encode((Turn("user", ("q",)), Turn("assistant", ("a",), supervised=True)))
    return prompt.tokenizer.bos_token_id is not None and encoded.ids[0] == prompt.tokenizer.bos_token_id


def _mark_first_word_only(content: dict[str, Any]) -> None:
    """SentencePiece-like tokenizers that put a mark in front of every piece do so at the very beginning only."""
    steps = content["normalizer"]["normalizers"] if (content["normalizer"] or {}).get("type") == "Sequence" else []
    if content["pre_tokenizer"] is None and any(step["type"] == "Prepend" for step in steps):
        kept = [step for step in steps if step["type"] != "Prepend" and not (step["type"] == "Replace" and step["content"] == "▁")]
        content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    elif content["pre_tokenizer"] is not None and content["pre_tokenizer"].get("prepend_scheme") == "always":
        content["pre_tokenizer"]["prepend_scheme"] = "first"


# ---- chat template --------------------------------------------------------------------------------------------------------

_FLATTEN = r"""{%- set exported = namespace(turns=[], has_system=false) -%}
{%- for m in messages -%}
{%- set part = namespace(text='') -%}
{%- if m['content'] is string or m['content'] is not iterable -%}{%- set part.text = m['content'] -%}
{%- else -%}{%- for one in m['content'] -%}{%- set part.text = part.text + ('<image>' if one['type'] == 'image' else one['text']) -%}{%- endfor -%}{%- endif -%}
{%- set exported.turns = exported.turns + [dict(m, content=part.text)] -%}
{%- if m['role'] == 'system' -%}{%- set exported.has_system = true -%}{%- endif -%}
{%- endfor -%}
"""
_SYSTEM = r"""{%- if not exported.has_system -%}{%- set exported.turns = [{'role': 'system', 'content': SYSTEM}] + exported.turns -%}{%- endif -%}
"""
_FOLD = r"""{%- set held = namespace(turns=[], system='') -%}
{%- for m in exported.turns if m['role'] == 'system' -%}{%- set held.system = held.system + ('\n\n' if held.system else '') + m['content'] -%}{%- endfor -%}
{%- for m in exported.turns if m['role'] != 'system' -%}
{%- if m['role'] == 'user' and held.system -%}
{%- set held.turns = held.turns + [dict(m, content=held.system + '\n\n' + m['content'])] -%}{%- set held.system = '' -%}
{%- else -%}{%- set held.turns = held.turns + [m] -%}{%- endif -%}
{%- endfor -%}
{%- set exported.turns = held.turns -%}
"""
_PICTURES_ONLY = r"""{%- set held = namespace(turns=[]) -%}
{%- for m in exported.turns if m['role'] != 'system' -%}
{%- set held.turns = held.turns + [dict(m, content='<image>' * (m['content'].split('<image>') | length - 1)) if m['role'] == 'user' else m] -%}
{%- endfor -%}
{%- set exported.turns = held.turns -%}
"""
_BLANKS = r"""{%- set held = namespace(turns=[]) -%}
{%- for m in exported.turns -%}{%- set part = namespace(text='') -%}
{%- for piece in m['content'].split('<image>') -%}
{%- set part.text = part.text + (piece if loop.first else '<image>' + (' ' if piece and piece[0] != ' ' else '') + piece) -%}
{%- endfor -%}{%- set held.turns = held.turns + [dict(m, content=part.text)] -%}{%- endfor -%}
{%- set exported.turns = held.turns -%}
"""
_NO_DATE = "{%- macro strftime_now(form) -%}{%- endmacro -%}\n"


def chat_template(prompt: "Prompt", placeholder: str = PLACEHOLDER) -> str:
    """The prompt's own Jinja text behind a preamble: content lists become strings ({"type": "image"} becomes the placeholder), and the system text is treated as in training.

    Where a tokenizer writes no word mark behind a picture and the prompt has one, it is written as a blank, whose token it is.
    """
    template, spec = prompt.template, prompt.spec
    system = template.system if spec.system is None else spec.system
    preamble = _FLATTEN.replace(PLACEHOLDER, placeholder)
    if template.pictures_only:
        preamble += _PICTURES_ONLY.replace(PLACEHOLDER, placeholder)
    else:
        if spec.fold_system == "fold" and not prompt.keeps_system:
            preamble += _FOLD
        if system:
            preamble += _SYSTEM.replace("SYSTEM", json.dumps(system, ensure_ascii=False))  # JSON's escapes are Jinja's
        if prompt.marked and not prompt.text.marks_control:
            preamble += _BLANKS.replace(PLACEHOLDER, placeholder)
    if starts_row(prompt):
        preamble += "{%- set bos_token = '' -%}\n"
    if "strftime_now" in template.chat:
        preamble += _NO_DATE  # training shows no date
    # The line break behind the last tag is eaten by trim_blocks, under which transformers and we render.
    return preamble + "{%- set messages = exported.turns %}\n" + template.chat
