"""Export to classes of others, and the proof: a fresh process loads the folder through public classes only and must give our logits and our greedy tokens.

What no class of transformers loads is read again by our own import instead, with the same comparison.

Run as `python -m vlm.weights.export SCRATCH`, this module is that fresh process.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from vlm.errors import CheckpointError, ConfigurationError, NumericsError
from vlm.folders import check_place, partial_of, replace_folder, taken

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.config import ModelSpec
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["LOGITS", "PIXELS", "Case", "Family", "Report", "answers", "compare", "draw_pictures", "export_run", "families", "fresh_answers", "questions"]

LOGITS = 1e-4
"""Largest difference of logits in fp32 (DESIGN rule 3)."""
PIXELS = 1e-5
POSITIONS = 32
"""Logits compared per prompt: of the last so many positions, which see all before them (whole logits of a large vocabulary would take gigabytes)."""
NEW_TOKENS = 12
REPORT = "export_check.json"
IMPORTED = {"deepseek_vl_official": "deepseek_vl", "arcana": "arcana"}
"""Exports that no class of transformers loads -> the import that reads them again."""

Case = dict[str, "Tensor"]
"""What a model makes of one prompt: ids (S,), pixels (n, 3, H, W), of two towers also high_pixels, logits (POSITIONS or fewer, V), tokens (T,)."""
VIEWS = {"pixels": "pixels", "low": "pixels", "high": "high_pixels"}
"""View of a picture here -> its name in a Case."""
INPUTS = {"pixel_values": "pixels", "high_res_pixel_values": "high_pixels"}
"""Input of transformers' classes -> its name in a Case."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """A proven export. prompts: how many were compared. max_logit_difference: over all of them, in fp32. tokens_equal: how many greedy tokens agreed, all that there were.

    merged: what of LoRA was merged before writing. changed: what the class does otherwise (both sides were compared with that change), or needs beyond the folder.
    """

    folder: str
    max_logit_difference: float
    tokens_equal: int
    prompts: int
    merged: str = ""
    changed: str = ""


class Family(Protocol):
    """A family of transformers' classes: a module or an object. POLICIES: picture policies that it can express. WRITES: what comes out, in words."""

    @property
    def POLICIES(self) -> tuple[str, ...]: ...

    @property
    def WRITES(self) -> str: ...

    def obstacles(self, model: "ModelSpec", text_config: Any) -> list[str]:
        """What keeps a model from being one, each a sentence."""
        ...

    def as_written(self, processor: "VLMProcessor") -> "tuple[VLMProcessor, str]":
        """The processor with what the class does otherwise, and a sentence on that, or ""."""
        ...

    def write(self, model: "VLM", processor: "VLMProcessor", folder: Path) -> None:
        """Everything that the class loads. Raises ConfigurationError for what it cannot express."""
        ...


def families() -> dict[str, Family]:
    """Name after `--to` -> what writes it."""
    from vlm.weights import arcana, deepseek, deepseek_official, llava

    return {"llava": llava, "deepseek_vl": deepseek.SINGLE, "deepseek_vl_hybrid": deepseek.HYBRID, "deepseek_vl_official": deepseek_official, "arcana": arcana}


def export_run(source_folder: str | Path, out: str | Path | None = None, to: str = "llava") -> Report:
    """Write a finished run as a family of transformers, or in official keys, and prove it.

    The folder appears under its name once it is whole and proven, and replaces an older export only then; what fails the check is left beside it as NAME.failed.

    Args:
        source_folder: of a run, a stage or an export of vlm. out: where to; default: `source_folder/export-TO`.

    Raises:
        ConfigurationError: the model has parts which that family does not have; `out` holds something else than an export.
        CheckpointError: the public classes do not load the folder, or make other inputs of a prompt.
        NumericsError: logits or greedy tokens differ.
    """
    from vlm.loading import load
    from vlm.weights.merge import merge_lora

    if to not in families():
        raise ConfigurationError(f"no export is called {to!r}", expected=f"one of {', '.join([*families(), 'peft'])}")
    out = Path(out) if out is not None else Path(source_folder) / f"export-{to}"
    check_place(out.parent)
    if taken(out) and not (out / REPORT).is_file():
        raise ConfigurationError(f"{out} holds something else than an export", cure="give a folder that is new, empty or an earlier export")
    family = families()[to]
    model, processor = load(source_folder)
    processor, changed = family.as_written(processor)
    prompt = processor.prompt
    asked = questions(pictures_only=prompt.template.pictures_only, system=prompt.spec.fold_system == "fold" or prompt.keeps_system)
    partial = partial_of(out)
    try:
        merged = merge_lora(model)
        family.write(model, processor, partial)
        with TemporaryDirectory(prefix="vlm-export-") as scratch:
            draw_pictures(Path(scratch))
            ours = answers(model, processor, partial, asked, Path(scratch))
            del model  # the fresh process needs its memory
            if to in IMPORTED:
                theirs = _imported_answers(partial, IMPORTED[to], asked, Path(scratch))
            else:
                [theirs] = fresh_answers([(partial, asked)], Path(scratch))
        report = replace(compare(ours, theirs, out), merged=str(merged) if merged.names else "", changed=changed)
        (partial / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    except Exception as problem:
        if partial.exists() and not isinstance(problem, ConfigurationError):
            replace_folder(partial, out.with_name(f"{out.name}.failed"))
        raise
    else:
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


# ---- the prompts ---------------------------------------------------------------------------------------------------------


def questions(pictures_only: bool = False, system: bool = True) -> list[Messages]:
    """Conversations that end in a question, as transformers spells them; pictures by file name.

    pictures_only: those that a prompt without text can ask. system: one of them brings a system turn.
    """
    first, second, tall = ({"type": "image", "path": f"{index}.png"} for index in range(3))
    one: Messages = [{"role": "user", "content": [first, _text("\nWhat is in the picture?")]}]
    two: Messages = [{"role": "user", "content": [second, _text(" and "), tall, _text("\nWhich of the two is larger?")]}]
    if pictures_only:
        return [one, two]
    text: Messages = [{"role": "user", "content": [_text("How many days has a week?")]}]
    talk: Messages = [
        *([{"role": "system", "content": [_text("Answer in one word.")]}] if system else []),
        {"role": "user", "content": [tall, _text("\nWhat colour is it?")]},
        {"role": "assistant", "content": [_text("Red.")]},
        {"role": "user", "content": [_text("  And\nthe other?")]},
    ]
    return [one, two, text, talk]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def draw_pictures(folder: Path) -> None:
    """0.png, 1.png, 2.png: noise over a gradient, wide, tall and small, at odd sizes that every policy has to cut, pad or bend."""
    import numpy as np
    from PIL import Image

    for index, (width, height) in enumerate(((61, 37), (233, 401), (19, 23))):
        noise = np.random.default_rng(index).integers(0, 96, (height, width, 3))
        slope = np.linspace(0, 159, width)[None, :, None]
        Image.fromarray((noise + slope).astype(np.uint8)).save(folder / f"{index}.png")


def _placed(messages: Messages, folder: Path) -> Messages:
    """The same conversation with paths instead of file names."""
    return [{**m, "content": [{**part, "path": str(folder / part["path"])} if part["type"] == "image" else part for part in m["content"]]} for m in messages]


# ---- our side ------------------------------------------------------------------------------------------------------------


def answers(model: "VLM", processor: "VLMProcessor", folder: Path, asked: Sequence[Messages], scratch: Path) -> list[Case]:
    """What our model makes of the questions, in fp32 (the model is changed), under the generation settings written in `folder`."""
    import torch
    from transformers import GenerationConfig

    from vlm.data.sample import Picture, Sample, Turn

    model.float().eval()
    settings = GenerationConfig.from_pretrained(folder, do_sample=False, max_new_tokens=NEW_TOKENS)
    found: list[Case] = []
    for messages in asked:
        turns = tuple(Turn(m["role"], tuple(part["text"] if part["type"] == "text" else Picture(str(scratch / part["path"])) for part in m["content"])) for m in messages)
        inputs = processor([Sample("export", turns, where="export check")])
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=POSITIONS).logits
        tokens = model.generate(**inputs, generation_config=settings)
        case = {"ids": inputs["input_ids"][0], "logits": logits[0], "tokens": tokens[0]}
        for view in inputs["images"][0].views if inputs["images"] else ():
            case[VIEWS[view]] = torch.stack([image.views[view] for image in inputs["images"]])
        found.append(case)
    return found


def _imported_answers(folder: Path, family: str, asked: Sequence[Messages], scratch: Path) -> list[Case]:
    """The same of the written folder, imported."""
    from vlm.loading import load
    from vlm.weights.imports import import_model

    import_model(str(folder), scratch / "again", family)
    return answers(*load(scratch / "again"), folder, asked, scratch)


# ---- their side ----------------------------------------------------------------------------------------------------------


def fresh_answers(jobs: Sequence[tuple[Path, Sequence[Messages]]], scratch: Path) -> list[list[Case]]:
    """What transformers makes of each folder's questions, all asked in one new process. Raises CheckpointError with that process's words where it fails."""
    from safetensors.torch import load_file

    (scratch / "jobs.json").write_text(json.dumps([(str(folder), asked) for folder, asked in jobs]), encoding="utf-8")
    # -P: a folder of the user that happens to hold a transformers.py is not looked into
    done = subprocess.run([sys.executable, "-P", "-m", "vlm.weights.export", str(scratch)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        raise CheckpointError(
            f"transformers' public classes do not load the export {', '.join(str(folder) for folder, _ in jobs)}",
            got="\n".join(done.stderr.strip().splitlines()[-8:]),
            cure="keep the .failed folder, and report it with the model's config.json",
        )
    return [[load_file(scratch / f"{index}.{number}.safetensors") for number in range(len(asked))] for index, (_, asked) in enumerate(jobs)]


def _answer_jobs(scratch: Path) -> None:
    """The fresh process: nothing of vlm's models, processors or prompts is imported here."""
    from safetensors.torch import save_file

    for index, (folder, asked) in enumerate(json.loads((scratch / "jobs.json").read_text(encoding="utf-8"))):
        for number, case in enumerate(_public_answers(folder, [_placed(messages, scratch) for messages in asked])):
            save_file({name: tensor.contiguous() for name, tensor in case.items()}, scratch / f"{index}.{number}.safetensors")


def _public_answers(folder: str, asked: Sequence[Messages]) -> list[Case]:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    if wrong := {name: sorted(map(str, keys)) for name, keys in info.items() if keys and name.endswith("_keys")}:
        raise CheckpointError(f"keys of {folder} do not fit transformers' {type(model).__name__}", got=wrong)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")  # torchvision resizes differently
    found: list[Case] = []
    for messages in asked:
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        pictures = [Image.open(part["path"]) for m in messages for part in m["content"] if part["type"] == "image"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        if not torch.equal(processor(text=text, images=pictures or None, return_tensors="pt")["input_ids"], inputs["input_ids"]):
            raise CheckpointError(f"the processor of {folder} reads a rendered conversation differently from the conversation itself")
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=POSITIONS).logits
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        length = inputs["input_ids"].shape[1]
        case = {"ids": inputs["input_ids"][0], "logits": logits[0], "tokens": tokens[0, length:]}
        found.append(case | {name: inputs[key] for key, name in INPUTS.items() if key in inputs})
    return found


# ---- both ----------------------------------------------------------------------------------------------------------------


def compare(ours: Sequence[Case], theirs: Sequence[Case], folder: Path) -> Report:
    """Hold both sides against one another; `folder` is what messages and report call the export.

    Raises CheckpointError where ids or pixels differ, NumericsError where logits or greedy tokens do.
    """
    largest, tokens = 0.0, 0
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        where = f"export {folder}, prompt {number}"
        if our["ids"].tolist() != their["ids"].tolist():
            raise CheckpointError(
                f"{where}: the exported processor makes other ids of it",
                got=_first_difference(their["ids"], our["ids"]),
                cure="the tokenizer reads text behind control tokens differently",
            )
        if (difference := max(_largest_difference(our, their, name) for name in INPUTS.values())) > PIXELS:
            raise CheckpointError(
                f"{where}: the exported image processor makes other pixels of its pictures", got=f"a difference of {difference:.2e}", expected=f"at most {PIXELS:g}"
            )
        if not (difference := _largest_difference(our, their, "logits")) <= LOGITS:
            raise NumericsError(f"{where}: logits differ", got=f"{difference:.2e}", expected=f"at most {LOGITS:g} in fp32", cure="do not use the .failed folder; report it")
        if our["tokens"].tolist() != their["tokens"].tolist():
            raise NumericsError(f"{where}: greedy tokens differ", got=their["tokens"].tolist(), expected=our["tokens"].tolist(), cure="do not use the .failed folder; report it")
        largest, tokens = max(largest, difference), tokens + len(our["tokens"])
    return Report(str(folder), largest, tokens, len(ours))


def _largest_difference(our: Case, their: Case, name: str) -> float:
    if name not in our and name not in their:
        return 0.0
    if name not in our or name not in their or our[name].shape != their[name].shape:
        return float("inf")
    return float((our[name] - their[name]).abs().max())


def _first_difference(got: "Tensor", expected: "Tensor") -> str:
    pairs = zip(got.tolist(), expected.tolist(), strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(got), len(expected)))
    return f"{len(got)} ids {got[at : at + 6].tolist()} from position {at} on instead of {len(expected)} ids {expected[at : at + 6].tolist()}"


if __name__ == "__main__":
    _answer_jobs(Path(sys.argv[1]))
