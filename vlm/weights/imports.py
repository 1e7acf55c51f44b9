"""Import of a model of others: a folder of theirs -> a folder that `vlm.load` opens, every tensor once, dtype and vocabulary kept."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm.config import LLMSpec, ModelSpec
from vlm.configuration import VLMConfig
from vlm.errors import CheckpointError, ConfigurationError, VLMError, listed
from vlm.folders import free, new_folder
from vlm.generate import prepare
from vlm.loading import build, read_generation, tables
from vlm.plain_text import PlainText
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.prompt import TEMPLATES, Prompt, PromptSpec
from vlm.weights import arcana_read, deepseek_read, llava_read
from vlm.weights.files import find_folder, read_json, read_tensors
from vlm.weights.public import chat_template, starts_row
from vlm.weights.strict import DERIVED, load_tensors

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.weights.found import Found

__all__ = ["Imported", "choose_prompt", "families", "import_model", "read_model"]

SHARD = "5GB"
REPORT = "import.json"


@dataclass(frozen=True)
class Imported:
    """What was written. notes: what was chosen or changed, one sentence each."""

    folder: str
    source: str
    family: str
    parts: str
    dtype: str
    prompt: str
    images: str
    notes: tuple[str, ...] = ()


def families() -> dict[str, ModuleType]:
    """Name after `--family` -> the module that reads its folders, with `read(folder, tower) -> Found`."""
    return {"llava": llava_read, "deepseek_vl": deepseek_read, "arcana": arcana_read}


def import_model(path: str, out: str | Path | None = None, family: str = "llava", *, tower: str | None = None, tokenizer: str | None = None, prompt: str | None = None) -> Imported:
    """Write a model of others as a folder of ours; it appears under its name once it is whole.

    Args:
        path: local folder, or cached snapshot of a hub repository. out: default NAME-vlm in the working directory.
        tower: see `llava_read.read`. tokenizer: a folder, for a checkpoint without one. prompt: a name of TEMPLATES or "tokenizer"; default: the one in which the family was trained, else
            the one that reads questions as the checkpoint's own chat template does, vicuna_v1 where it has none.

    Raises:
        ConfigurationError: a setting or a part that ours cannot express; no prompt fits; `out` holds something.
        CheckpointError: no such folder; keys that are missing, left over, given twice, or of another shape.
    """
    if family not in families():
        raise ConfigurationError(f"no import is called {family!r}", expected=f"one of {', '.join(families())}")
    source = find_folder(path)
    out = free(Path(out) if out is not None else Path(f"{Path(path).name}-vlm"))
    found = families()[family].read(source, tower)
    spec = ModelSpec(encoder=found.encoder, connector=found.connector, llm=LLMSpec(path=str(source), tokenizer=tokenizer), adapt=found.adapt)
    words = _tokenizer(spec)
    known = found.prompt if prompt is None else None
    chosen, notes = (known, ()) if known else choose_prompt(words, _chat_template(source, words), prompt)
    text = PlainText(words)
    if text.marks_control or (found.splits and text.marks_start):
        chosen, notes = replace(chosen, word_marks=True), (*notes, "what follows a picture begins with a word mark, as the source tokenises it")
    processor = VLMProcessor(spec, found.text.hidden_size, words, chosen, found.policy)
    model, more = read_model(found, processor.image_token_id, processor.vocabulary)
    prepare(model, processor)
    chain = " -> ".join(part.use for part, _ in model.chain)
    parts = f"{found.encoder.use}, {chain}, {' + '.join([found.text.model_type, *found.adapt])}"
    report = Imported(str(out), str(source), family, parts, str(model.dtype).removeprefix("torch."), chosen.use, found.policy, (*found.notes, *notes, *more))
    _write(model, processor, report)
    return report


def _tokenizer(spec: ModelSpec) -> Any:
    try:
        return load_tokenizer(spec)
    except CheckpointError as problem:
        raise problem.changed(expected="tokenizer.json, or tokenizer.model", cure="give a folder with the tokenizer with --tokenizer") from problem


def _write(model: "VLM", processor: VLMProcessor, report: Imported) -> None:
    with new_folder(Path(report.folder)) as partial:
        model.save_pretrained(partial, max_shard_size=SHARD)
        processor.save_pretrained(partial)
        (partial / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


# ---- weights -------------------------------------------------------------------------------------------------------------


def read_model(found: "Found", image_token_id: int, vocabulary: int = 0) -> "tuple[VLM, tuple[str, ...]]":
    """The model with all its weights, in the file's dtype, and what had to be decided.

    image_token_id, vocabulary: the embedding gets rows for them where it has too few; one that has more keeps them all. Raises CheckpointError.
    """
    notes = [*_untie(found)]
    text, rows = found.text, found.text.vocab_size
    text.vocab_size = max(rows, image_token_id + 1, vocabulary)
    if text.vocab_size > rows:
        notes.append(f"the vocabulary of {rows:,} rows got {text.vocab_size - rows} more, for the picture token and the tokenizer")
    if found.image_id not in (None, image_token_id):
        notes.append(f"pictures stand at token {image_token_id}, in the source at {found.image_id}; its embedding is never read")
    if small := [name for name, tensor in found.shapes.items() if tensor.dtype.itemsize < 2 and not DERIVED.search(name)]:
        got = f"{len(small)} tensors of {found.shapes[small[0]].dtype} and the like ({listed(small)})".replace("torch.", "")
        raise CheckpointError(
            f"{found.folder} is quantised, and only whole weights are read", got=got, expected="16 or 32 bits", cure="import the checkpoint that it was made from"
        )
    dtypes = {tensor.dtype for name, tensor in found.shapes.items() if tensor.is_floating_point() and not DERIVED.search(name)}
    dtype = reduce(torch.promote_types, dtypes)
    if len(dtypes) > 1:
        notes.append(f"the file mixes {', '.join(sorted(str(one).removeprefix('torch.') for one in dtypes))}; all became {str(dtype).removeprefix('torch.')}")
    with _default(dtype):
        model = build(VLMConfig.of(ModelSpec(encoder=found.encoder, connector=found.connector, llm=LLMSpec(), adapt=found.adapt), text, image_token_id))
    tower = ((f"encoder.{name}", tensor) for name, tensor in _tower(found, model))
    grow = [f"llm.{name}" for name in tables(model)] if text.vocab_size > rows else []
    load_tensors(model, chain(found.tensors(), tower), source=str(found.folder), key=found.key, grow=grow, spell=found.spelt)
    read_generation(model, LLMSpec(path=str(found.folder)))
    return model.eval(), tuple(notes)


def _tower(found: "Found", model: "VLM") -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_tensors(found.tower) if found.tower else ():
        if (key := model.encoder.weights_key(name)) is not None:
            yield key, tensor


def _untie(found: "Found") -> Iterator[str]:
    """A head that differs from the embedding it is said to be: kept, as transformers keeps it."""
    if not found.text.tie_word_embeddings:
        return
    both = {name for name in found.shapes if found.key(name) in ("llm.model.embed_tokens.weight", "llm.lm_head.weight")}
    if len(both) < 2:
        return
    first, *others = [tensor for name, tensor in found.tensors() if name in both]
    if not all(torch.equal(first, other) for other in others):
        found.text.tie_word_embeddings = False
        yield "config.json ties the head to the embedding, but the file holds another head: untied"


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---- the prompt ----------------------------------------------------------------------------------------------------------

_FIRST = ([("user", "<image>\nWhat is it?")], [("user", "How many days has a week?")])
_TALK = [("user", "<image>\nWhat is it?"), ("assistant", "A dog."), ("user", "And now?")]


def choose_prompt(tokenizer: Any, template: str | None, asked: str | None = None) -> tuple[PromptSpec, tuple[str, ...]]:
    """The prompt that reads a first question as the checkpoint's own chat template does, and a whole talk too where one does that; with what has to be said about it.

    Raises ConfigurationError where no prompt does, or the one that is asked for does not fit the tokenizer.
    """
    tokenizer.chat_template = _starting(tokenizer, template)
    if asked is not None:
        Prompt(spec := PromptSpec(use=asked), tokenizer)
        return spec, ()
    if template is None:
        return PromptSpec(use="vicuna_v1"), ("it has no chat template: prompt vicuna_v1, in which LLaVA-1.5 was trained",)
    presets = [PromptSpec(use=name, system=system) for name, one in TEMPLATES.items() if not one.pictures_only for system in ((None, "") if one.system else (None,))]
    prompts, refusal = _fitting(tokenizer, [*presets, PromptSpec(use="tokenizer")])
    alike = {prompt: [_reads_alike(prompt, tokenizer, template, talk) for talk in (*_FIRST, _TALK)] for prompt in prompts}
    whole = [prompt.spec for prompt in prompts if all(alike[prompt])]
    first = [prompt.spec for prompt in reversed(prompts) if all(alike[prompt][:-1])]  # the checkpoint's own template before presets
    for spec in (whole or first)[:1]:
        name = spec.use if spec.system is None else f"{spec.use} without its system text"
        reach = "a first question and whole talks" if whole else "a first question (later turns are written differently)"
        return spec, (f"prompt {name} reads {reach} as the checkpoint's own chat template does",)
    raise ConfigurationError(
        "no prompt reads questions as the checkpoint's own chat template does", got=refusal, cure=f"choose one with --prompt: {', '.join([*TEMPLATES, 'tokenizer'])}"
    )


def _fitting(tokenizer: Any, specs: Sequence[PromptSpec]) -> tuple[list[Prompt], str | None]:
    """The prompts that fit the tokenizer, and why the last of the others does not."""
    prompts: list[Prompt] = []
    refusal = None
    for spec in specs:
        try:
            prompts.append(Prompt(spec, tokenizer))
        except VLMError as problem:
            refusal = problem.what
    return prompts, refusal


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The processor's own where it has one (older folders keep it beside), else the tokenizer's."""
    file = folder / "chat_template.json"
    found = read_json(file).get("chat_template") if file.is_file() else tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _starting(tokenizer: Any, template: str | None) -> str | None:
    """The template that writes the start token which the tokenizer would put in front of it."""
    if template is None or not _adds_start(tokenizer) or _starts(_rendered(tokenizer, template, _FIRST[1]), tokenizer):
        return template
    return "{{ bos_token }}" + template


def _adds_start(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _starts(text: str | None, tokenizer: Any) -> bool:
    return text is not None and tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


_LISTS, _BREAKS, _STRINGS = range(3)
"""Forms of contents: lists of pictures and texts; lists for a template that writes the line break behind a picture itself; strings."""


def _rendered(tokenizer: Any, template: str, talk: Sequence[tuple[str, str]], form: int = _LISTS) -> str | None:
    """The conversation as text up to the next answer; None where the template does not take it in this form."""
    messages: list[dict[str, Any]] = []
    for role, text in talk:
        _, found, rest = text.rpartition("<image>")
        parts = [{"type": "image"}] * bool(found) + [{"type": "text", "text": rest.lstrip("\n") if form == _BREAKS else rest}]
        messages.append({"role": role, "content": text if form == _STRINGS else parts})
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception:  # somebody else's program: nearly every built-in kind
        return None


def _reads_alike(prompt: Prompt, tokenizer: Any, template: str, talk: Sequence[tuple[str, str]]) -> bool:
    ours = _rendered(tokenizer, chat_template(prompt), talk)
    for form in (_LISTS, _BREAKS, _STRINGS):
        theirs = _rendered(tokenizer, template, talk, form)
        if theirs is None:
            continue
        starts = _starts(theirs, tokenizer)
        text = theirs.removeprefix(tokenizer.bos_token) if starts else theirs
        if text == ours and (starts or _adds_start(tokenizer)) == starts_row(prompt):
            return True
    return False
