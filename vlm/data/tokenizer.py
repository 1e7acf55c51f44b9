"""A small tokenizer made of the data's own text, for decoders that start from random weights."""

import json
from collections.abc import Iterable
from pathlib import Path

from vlm.folders import free

__all__ = ["CHAT_TEMPLATE", "SPECIAL", "write_tokenizer"]

SPECIAL = {"image_token": "<image>", "start_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, texts: Iterable[str], size: int = 512) -> int:
    """Train a byte-level BPE of at most `size` tokens, with picture placeholder, ChatML marks and chat template, in the files that AutoTokenizer reads. Returns its length.

    Raises ConfigurationError where `folder` holds something.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    free(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL.values()), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    texts = list(texts)
    roles = [f"{role}\n" for role in ("system", "user", "assistant")] * len(texts)  # often enough to become tokens
    tokenizer.train_from_iterator([*texts, *roles], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL["eos_token"],
        "pad_token": SPECIAL["pad_token"],
        "extra_special_tokens": {name: SPECIAL[name] for name in ("image_token", "start_token")},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
