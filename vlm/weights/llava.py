"""LLaVA: the names of its tensors, read and written, and export as transformers' own `LlavaForConditionalGeneration` (llava_read.py reads its folders)."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config import ModelSpec
from vlm.data.sample import Turn
from vlm.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor
    from vlm.prompt import Prompt

__all__ = [
    "DECODERS", "KEYS", "PLACEHOLDER", "TOWERS", "Obstacle", "as_written", "chat_template", "from_llava", "generation_settings", "obstacles", "projector_key",
    "public_tokenizer", "row_of", "starts_row", "supports", "to_llava", "write",
]  # fmt: skip

KEYS = (
    ("encoder.tower.", "vision_tower.vision_model."),
    ("connector.mlp.layers.0.", "multi_modal_projector.linear_1."),
    ("connector.mlp.layers.2.", "multi_modal_projector.linear_2."),
    ("llm.model.", "language_model.model."),
    ("llm.lm_head.", "language_model.lm_head."),
    # transformers 5 saves the tower so
    ("encoder.tower.", "vision_tower."),
    # transformers 4.52 and later in memory
    ("encoder.tower.", "model.vision_tower.vision_model."),
    ("encoder.tower.", "model.vision_tower."),
    ("connector.mlp.layers.0.", "model.multi_modal_projector.linear_1."),
    ("connector.mlp.layers.2.", "model.multi_modal_projector.linear_2."),
    ("llm.model.", "model.language_model."),
    ("llm.lm_head.", "lm_head."),
    # LLaVA's own program
    ("encoder.tower.", "model.vision_tower.vision_tower.vision_model."),
    ("encoder.tower.", "model.vision_tower.vision_tower."),
    ("connector.linear.layers.0.weight", "model.mm_projector.weight"),
    ("connector.linear.layers.0.bias", "model.mm_projector.bias"),
    ("connector.mlp.layers.", "model.mm_projector."),
    ("llm.model.", "model."),
)
"""Start of our names -> start of the names in files. Written in the first row that fits, which is how released files are spelt; read in any, by the longest start that fits."""

PROJECTORS = ("base_model.model.model.mm_projector.", "model.mm_projector.", "mm_projector.", "model.multi_modal_projector.", "multi_modal_projector.")
"""Starts of the names in files that hold a projector alone; some have none."""

TOWERS = {"clip": "default", "siglip": "full"}
"""Encoder -> `vision_feature_select_strategy`: "default" drops the class token, "full" keeps every token."""

DECODERS = ("llama", "mistral", "qwen2")
"""Decoder families (`model_type`) that go both ways. LlavaForConditionalGeneration has a plain linear head without bias: a family that scales or caps its logits cannot join."""

PLACEHOLDER = "<image>"


def to_llava(name: str) -> str:
    """Name of a parameter of VLM -> its name in a LLaVA file. Raises CheckpointError for a part that LLaVA does not have."""
    for ours, theirs in KEYS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise CheckpointError(f"LLaVA has no place for the parameter {name}", expected=f"names that start with {', '.join(dict(KEYS))}")


def from_llava(name: str) -> str:
    """Name in a LLaVA file -> name in VLM; a name that LLaVA does not have comes back as it is, for the loader to report."""
    row = row_of(name)
    return row[0] + name.removeprefix(row[1]) if row else name


def row_of(name: str) -> tuple[str, str] | None:
    """The row of KEYS by which a file's name is read."""
    return max((row for row in KEYS if name.startswith(row[1])), key=lambda row: len(row[1]), default=None)


def projector_key(name: str) -> str:
    """Name in a projector's file, whatever stands in front of it -> name in VLM."""
    start = next((start for start in PROJECTORS if name.startswith(start)), "")
    own = name.removeprefix(start)
    return from_llava(("multi_modal_projector." if own.startswith("linear_") else "model.mm_projector.") + own)


# ---- what can be exported ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Obstacle:
    """part: what cannot be expressed, by its path. got, expected: what it is, what would work."""

    part: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"{self.part} is {self.got}, LLaVA has {self.expected}"


def obstacles(model: ModelSpec, text_config: Any) -> list[Obstacle]:
    """All that keeps a model from being a LlavaForConditionalGeneration; empty where nothing does."""
    encoder, connector = model.encoder, model.connector
    kept = [name for name, spec in model.adapt.items() if not spec.mergeable]  # the others are merged before they are written
    found = [
        (encoder.use not in TOWERS, "model.encoder", encoder.use, " or ".join(TOWERS)),
        (text_config.model_type not in DECODERS, "model.llm", text_config.model_type, " or ".join(DECODERS)),
        (bool(kept), "model.adapt", ", ".join(kept), "a decoder without adaptations"),
        (model.newline, "model.newline", "the token that ends a row of tiles", "one square picture each (tiles are LLaVA-NeXT's)"),
        (not isinstance(connector.level, int), "model.connector.level", connector.level, "a numbered hidden state, such as -2"),
    ]
    if connector.use != "mlp":
        found.append((True, "model.connector", connector.use, "mlp with depth 2"))
    else:
        depth, hidden = connector.depth, connector.hidden  # type: ignore[attr-defined]
        width = text_config.hidden_size
        found.append((depth != 2, "model.connector.depth", depth, "2"))
        found.append((hidden not in (None, width), "model.connector.hidden", hidden, f"the decoder's width, {width}"))
    if connector.then is not None:
        found.append((True, "model.connector.then", connector.then.use, "a single connector"))
    return [Obstacle(part, str(got), expected) for bad, part, got, expected in found if bad]


def supports(model: ModelSpec, text_config: Any) -> bool:
    """Can this model be exported as LLaVA?"""
    return not obstacles(model, text_config)


# ---- files ---------------------------------------------------------------------------------------------------------------


def as_written(processor: "VLMProcessor") -> "tuple[VLMProcessor, str]":
    """The processor as the exported one computes, and what that changes: nothing, LLaVA's expresses ours or is refused."""
    return processor, ""


def write(model: "VLM", processor: "VLMProcessor", folder: Path) -> None:
    """Model, configuration, processor and generation settings into `folder`, dtypes kept.

    Raises ConfigurationError where a part, the picture policy or the tokenizer cannot be expressed.
    """
    from huggingface_hub import save_torch_state_dict

    if found := obstacles(model.spec, model.config.text_config):
        raise ConfigurationError(
            f"this model cannot be exported as LLaVA: {'; '.join(map(str, found))}", cure="export a model of these parts, or load it through vlm or the Auto classes"
        )
    assert not model.spec.adapt, "merge_lora comes first"
    exported = _processor(processor)
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(model._tied_weights_keys or ())
    tensors = {to_llava(name): tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    _config(model).save_pretrained(folder)
    generation_settings(model, processor).save_pretrained(folder)
    exported.save_pretrained(folder)


def _config(model: "VLM") -> Any:
    from transformers import LlavaConfig

    encoder: Any = model.spec.encoder
    level: Any = model.spec.connector.level
    strategy: Any = TOWERS[encoder.use]
    return LlavaConfig(
        vision_config=copy.deepcopy(model.encoder.tower.config),  # type: ignore[union-attr]
        text_config=copy.deepcopy(model.config.text_config),
        image_token_index=model.config.image_token_id,
        image_seq_length=(encoder.size // encoder.patch) ** 2,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=level or -encoder.depth - 1,  # transformers 5.23 takes 0 for "no hidden states wanted"
        vision_feature_select_strategy=strategy,
        architectures=["LlavaForConditionalGeneration"],
        dtype=model.dtype,
    )


def generation_settings(model: "VLM", processor: "VLMProcessor") -> Any:
    """The model's own settings, with how an answer ends and what is never said."""
    from vlm.generate import prepare

    prepare(model, processor)
    config: Any = copy.deepcopy(model.generation_config)
    config.bos_token_id = processor.tokenizer.bos_token_id
    return config


# ---- processor -----------------------------------------------------------------------------------------------------------


def _processor(processor: "VLMProcessor") -> Any:
    from transformers import LlavaProcessor

    encoder: Any = processor.model.encoder
    tokenizer = public_tokenizer(processor.tokenizer, starts_row(processor.prompt))
    token = str(processor.tokenizer.convert_ids_to_tokens(processor.image_token_id))
    tokenizer.chat_template = chat_template(processor.prompt, token)
    return LlavaProcessor(
        image_processor=_image_processor(processor),
        tokenizer=tokenizer,
        patch_size=encoder.patch,
        vision_feature_select_strategy=TOWERS[encoder.use],
        num_additional_image_tokens=encoder.prefix,
        chat_template=tokenizer.chat_template,
        image_token=token,
    )


def _image_processor(processor: "VLMProcessor") -> Any:
    """The picture policy and the encoder's own fitting as settings of a public class: pad is LLaVA's, crop is CLIP's, squash is SigLIP's.

    Our pixels are Pillow's: load with `backend="pil"` where they must be reproduced to the last bit. Pictures 3 pixels high of an `official` encoder are the one exception.
    """
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

    encoder: Any = processor.model.encoder
    shape = encoder.fit if processor.policy in ("native", "pad") else processor.policy
    if shape not in ("crop", "squash"):
        raise ConfigurationError(f"LLaVA's image processors cannot express the picture policy {shape!r}", expected="native, pad, crop or squash")
    settings: dict[str, Any] = {
        "size": {"shortest_edge": encoder.size} if shape == "crop" else {"height": encoder.size, "width": encoder.size},
        "crop_size": {"height": encoder.size, "width": encoder.size},
        "do_center_crop": shape == "crop",
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    if processor.policy == "pad":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    return CLIPImageProcessorPil(**settings) if shape == "crop" else SiglipImageProcessorPil(**settings)


def public_tokenizer(tokenizer: Any, starts: bool, **names: str) -> Any:
    """A tokenizer that reads a rendered conversation as training does: it puts the start token in front where the prompt has one, and no word mark behind a control token.

    names: more special tokens, such as `image_token`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigurationError(
            f"a {type(tokenizer).__name__} cannot be written as tokenizer.json",
            expected="a tokenizer of the tokenizers library",
            cure="convert it, and train with the converted one",
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = _start_token(tokenizer) if starts else None
    content["truncation"] = content["padding"] = None
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
{%- for m in exported.turns if m['role'] == 'system' -%}{%- set held.system = held.system + m['content'] -%}{%- endfor -%}
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
_NO_DATE = "{%- macro strftime_now(form) -%}{%- endmacro -%}\n"


def chat_template(prompt: "Prompt", placeholder: str = PLACEHOLDER) -> str:
    """The prompt's own Jinja text behind a preamble: content lists become strings ({"type": "image"} becomes the placeholder), and the system text is treated as in training."""
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
    if starts_row(prompt):
        preamble += "{%- set bos_token = '' -%}\n"
    if "strftime_now" in template.chat:
        preamble += _NO_DATE  # training shows no date
    # The line break behind the last tag is eaten by trim_blocks, under which transformers and we render.
    return preamble + "{%- set messages = exported.turns %}\n" + template.chat
