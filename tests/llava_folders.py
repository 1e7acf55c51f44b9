"""Folders of small LLaVA models of transformers' own class, in every spelling of the keys."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from vlm.weights.llava import TOWERS

LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Pictures first, no end mark behind answers: nothing can be trained in it, and a prompt of ours reads first questions alike."""
LISTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for one in m['content'] %}{{ '<image>' if one['type'] == 'image' else one['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_start(kind: str = "metaspace_first") -> PreTrainedTokenizerFast:
    """A tokenizer that writes its start token itself, as Llama's does."""
    made = tiny.tokenizer(kind, bos="<s>")
    made._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.bos_token_id)])
    return made


def clip_pictures(**more: Any) -> dict[str, Any]:
    """Settings of a CLIP image processor of 28 pixels."""
    return {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **more}


@dataclass(frozen=True)
class Base:
    """A model of transformers' own class. pictures: its image processor. asked: which of the export's questions its chat template reads as ours do. breaks: it writes the line break
    behind a picture itself."""

    decoder: str
    tower: str
    template: str
    pictures: Callable[[], Any]
    tokenizer: Callable[[], PreTrainedTokenizerFast] = tiny.tokenizer
    numbers: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    asked: tuple[int, ...] = (0, 1, 2, 3)
    level: int = -2
    breaks: bool = False

    def write(self, folder: Path) -> None:
        """The folder as transformers saves it."""
        tokenizer = self.tokenizer()
        vision = tiny.tower_config(self.tower, hidden_size=128, intermediate_size=96)
        text = tiny.llm_config(self.decoder, **dict(self.numbers))
        strategy: Any = TOWERS[self.tower]
        config = LlavaConfig(
            vision_config=AutoConfig.for_model(f"{self.tower}_vision_model", **vision),
            text_config=AutoConfig.for_model(text.pop("model_type"), **text),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=self.level,
            vision_feature_select_strategy=strategy,
            image_seq_length=4,
        )
        torch.manual_seed(3)
        model = LlavaForConditionalGeneration(config).to(self.dtype)
        never = [config.image_token_id, *range(len(tokenizer), config.text_config.vocab_size)]  # ids without text: ours never says them
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0, suppress_tokens=never)
        model.save_pretrained(folder)
        prefix = int(self.tower == "clip")
        LlavaProcessor(
            self.pictures(),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=prefix,
            chat_template=self.template,
            image_token="<image>",
        ).save_pretrained(folder)


BASES = {
    "llama": Base("llama", "clip", LLAVA_15, lambda: LlavaImageProcessorPil(**clip_pictures(do_pad=True)), with_start, (("vocab_size", 720), ("rope_theta", 5e4)), asked=(0, 2), breaks=True),
    "legacy": Base(
        "llama", "clip", LLAVA_15, lambda: LlavaImageProcessorPil(**clip_pictures(do_pad=True)), lambda: with_start("metaspace_legacy"), (("vocab_size", 720),), asked=(0, 2), breaks=True
    ),
    "qwen2": Base(
        "qwen2", "siglip", LISTS, lambda: SiglipImageProcessorPil(size={"height": 28, "width": 28}), numbers=(("tie_word_embeddings", True), ("vocab_size", 512)),
        dtype=torch.bfloat16, level=-1,
    ),
    "mistral": Base("mistral", "clip", LISTS, lambda: CLIPImageProcessorPil(**clip_pictures(image_mean=[0.4, 0.5, 0.6])), level=2),
}  # fmt: skip

OLD = (("vision_tower.vision_model.", "vision_tower."), ("", ""))
NEW = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", ""))
PROGRAM = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
"""Start in the spelling -> start as transformers 5 saves."""
SPELLINGS = {"hf_old": OLD, "hf_new": NEW, "tower_without_prefix": (("", ""),), "original": PROGRAM, "original_bin_sharded": PROGRAM}


def spelt(tensors: dict[str, Tensor], rows: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Tensors as transformers 5 saves them, in another spelling."""

    def name(key: str) -> str:
        theirs, saved = next(row for row in rows if key.startswith(row[1]))
        return theirs + key.removeprefix(saved)

    return {name(key): tensor for key, tensor in tensors.items()}


def write_sharded_bin(tensors: dict[str, Tensor], folder: Path) -> None:
    """Two pickled files and their index."""
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def respelt(base: Path, folder: Path, spelling: str, **more: Any) -> Path:
    """A base's folder in another spelling of its keys. more: changes to config.json; None takes a key out."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    if spelling.startswith("original"):
        text = config["text_config"]
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        config = text | {
            "model_type": {"llama": "llava_llama", "mistral": "llava_mistral"}[text["model_type"]],
            "architectures": ["LlavaLlamaForCausalLM"],
            "image_aspect_ratio": "pad",
        }
        config |= {
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 128,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_vision_tower": "openai/not-here",
        }
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_bytes((base / "generation_config.json").read_bytes())
    else:
        for file in base.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in (config | more).items() if value is not None}))
    tensors = spelt(load_file(base / "model.safetensors"), SPELLINGS[spelling])
    if spelling.endswith("bin_sharded"):
        write_sharded_bin(tensors, folder)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, work: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The folder, whose tensors `work` has changed."""
    tensors = load_file(folder / "model.safetensors")
    work(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
