"""Small tokenizers, towers, decoders, pictures and checkpoints, made in code. Nothing is fetched."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEXT = [
    "What colour is the picture? It is red, green or blue.",
    "USER: How many objects are there? ASSISTANT: There are two objects on the left.",
    "system user assistant describe the picture a red square on the left of a blue disk",
    "Hello! I can't see größe 图片. Two spaces.  Indented\n\tcode <image> data:image/png;base64",
]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 12},
    "phi": {"model_type": "phi", "num_key_value_heads": 2, "qk_layernorm": True},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2, "sliding_window": 12, "partial_rotary_factor": 0.5},
    "stablelm": {"model_type": "stablelm", "num_key_value_heads": 2, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "stablelm_parallel": {"model_type": "stablelm", "num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 12,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
}
"""Decoder families by name: the numbers that differ from `llm_config`'s."""
WINDOWED = ("qwen3", "mistral", "phi3", "gemma2", "gemma3")
"""Families with a sliding window of 12 tokens in at least one layer."""
TIED = ("gemma2", "gemma3")
"""Families whose head is the embedding."""


def llm_config(family: str = "llama", **numbers: Any) -> dict[str, Any]:
    """Architecture numbers of a decoder of a few thousand parameters."""
    base = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 400,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return base | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | FAMILIES[family] | numbers


def tower_config(kind: str = "clip", **numbers: Any) -> dict[str, Any]:
    """Numbers of a CLIP or SigLIP tower: 28 pixels, patch 14, four patches."""
    base = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return base | ({"projection_dim": 16} if kind == "clip" else {"vision_use_head": True}) | numbers


def open_clip_config(**vision: Any) -> dict[str, Any]:
    """Numbers of a visual tower of open_clip: 28 pixels, patch 14, four patches."""
    return {"embed_dim": 24, "vision_cfg": {"image_size": 28, "patch_size": 14, "width": 16, "head_width": 8, "layers": 3, "mlp_ratio": 2.0} | vision}


def hybrid_arguments(low: str = "siglip", **fields: Any) -> dict[str, Any]:
    """Fields of a `hybrid` encoder: SAM at 32 pixels with padded windows and one global block, a low tower of four patches; both streams are 2 x 2 tokens of width 16."""
    from vlm import encoders
    from vlm.encoders.hybrid import SAMSpec

    numbers = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 24, "output_channels": 8}
    geometry = {"image_size": 32, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1]}
    high = SAMSpec(config=numbers | geometry, weights="random", downsample_channels=(12, 16))
    return {"high": high, "low": encoders.registry.get(low)(config=tower_config(low), weights="random")} | fields


@cache
def _byte_level(prefix_space: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]))
    return tokenizer.to_str()


@cache
def _metaspace(scheme: str) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = sorted(set("".join(TEXT)) - set("größe图片") | {"▁"})
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<unk>"]
    return json.dumps(content)


def tokenizer(
    kind: str = "byte_level", *, chat: str | None = CHATML, pad: str | None = "<|endoftext|>", eos: str | None = "<|im_end|>", bos: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of about 330 tokens with ChatML marks. kind: byte_level, byte_level_prefix_space, metaspace_legacy, metaspace_first."""
    text = _byte_level(kind.endswith("prefix_space")) if kind.startswith("byte_level") else _metaspace(kind.removeprefix("metaspace_"))
    raw = Tokenizer.from_str(text)
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", *((bos,) if bos else ()))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=pad, bos_token=bos, clean_up_tokenization_spaces=False)
    made.chat_template = chat
    return made


def picture(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30), seed: int | None = None) -> Image.Image:
    """A plain picture, or noise of a seed."""
    if seed is None:
        return Image.new("RGB", size, color)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_bytes(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def mixed_root(folder: Path, samples: int = 12) -> Path:
    """A data root whose questions lie as Parquet and as two tar shards too."""
    from vlm.data.convert import convert_data

    root = data_root(folder, samples)
    for form in ("parquet", "tar"):
        convert_data(str(root / "instruct.json"), root / form, to=form, images=root, per_shard=samples // 2)
    return root


MIXED = (
    "data.questions={reader: hf, file: '${data_root}/parquet/instruct.parquet'}",
    "data.captions={reader: tar, file: '${data_root}/tar/instruct-*.tar'}",
    "stages.instruct.data={questions: 0.7, captions: 0.3}",
    "stages.align.data=captions",
    "stages.align.prompt=chatml",
)
"""Overrides of llava_tiny: Parquet and tar mixed by weight."""


def data_root(folder: Path, samples: int = 12) -> Path:
    """A LLaVA-format data root: align.json, instruct.json, heldout.json (pictures, text-only, several pictures, independent questions) and tokenizer/."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    colors = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    names = list(colors)
    for index in range(samples):
        picture(colors[names[index % 3]], (28 + index, 28)).save(folder / "img" / f"{index}.png")
    ask = "What colour is the picture?"

    def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"from": role, "value": text} for role, text in turns]

    align = [{"id": f"a{i}", "image": f"{i}.png", "conversations": talk(("human", "<image>\nDescribe the picture."), ("gpt", f"a {names[i % 3]} picture"))} for i in range(samples)]
    instruct: list[dict[str, Any]] = []
    for i in range(samples):
        other = (i + 1) % samples
        forms = (
            {"image": f"{i}.png", "conversations": talk(("human", f"<image>\n{ask}"), ("gpt", names[i % 3]))},
            {"conversations": talk(("human", f"How many is {i}?"), ("gpt", f"It is {i}."), ("human", "Hello!"), ("gpt", "Hello!"))},
            {"image": [f"{i}.png", f"{other}.png"], "conversations": talk(("human", "<image> and <image>\nColours?"), ("gpt", f"{names[i % 3]} and {names[other % 3]}"))},
            {
                "image": f"{i}.png",
                "independent": True,
                "conversations": talk(("human", f"<image>\n{ask}"), ("gpt", names[i % 3]), ("human", "How many objects are there?"), ("gpt", "one")),
            },
        )
        instruct.append({"id": f"i{i}", **forms[i % 4]})
    heldout = [{"id": f"h{i}", "image": f"{i}.png", "kind": "colour", "conversations": talk(("human", f"<image>\n{ask}"), ("gpt", names[i % 3]))} for i in range(min(samples, 6))]
    for name, rows in (("align", align), ("instruct", instruct), ("heldout", heldout)):
        for row in rows:
            if isinstance(row.get("image"), str):
                row["image"] = "img/" + row["image"]
            elif "image" in row:
                row["image"] = ["img/" + name for name in row["image"]]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def seed(number: int = 0) -> None:
    torch.manual_seed(number)
