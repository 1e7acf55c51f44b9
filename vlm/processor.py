"""Pictures and conversations -> model inputs. The same code in training, evaluation, chat and server; the one place where placeholders are expanded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlm.config import ModelSpec, links, picture_tokens, typical_size, whole_layout
from vlm.data.sample import Picture, Sample, Turn, held
from vlm.encoders.base import Mode
from vlm.errors import CheckpointError, DataError
from vlm.features import Cut, ImageInput, TokenLayout
from vlm.images import LIMITS, apply_policy, open_picture, policy_size, too_large, upright_size
from vlm.llm.context import TEXT, VISION
from vlm.prompt import GIVEN_UP, PICTURE, Encoded, Prompt, PromptSpec
from vlm.row import IGNORE, Row, collate
from vlm.tiles import Tiling, tiled
from vlm.weights.files import find_folder, read_json

__all__ = ["VLMProcessor", "load_tokenizer", "naming", "pictures_in_front", "placeholder_id"]

PLACEHOLDERS = ("<image_placeholder>", "<image>")
"""What tokenizers call the picture token, the first that is there; DeepSeek-VL's has a name of its own."""


def placeholder_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands for a picture token: the tokenizer's own, else an `<image>` that is added to it.

    Rows of the embedding are only ever added, a padded vocabulary keeps its size.
    """
    known = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    for name in PLACEHOLDERS:
        if name in known:
            return known[name]
    tokenizer.add_tokens([PLACEHOLDERS[-1]], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(PLACEHOLDERS[-1]))  # type: ignore[arg-type]


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """The decoder's tokenizer from its local folder, with the placeholder in it. Raises CheckpointError."""
    place = model.llm.tokenizer or model.llm.path
    if place is None:
        raise CheckpointError("the decoder has no tokenizer", cure="give llm.tokenizer or llm.path")
    cure = "give llm.tokenizer a folder with tokenizer.json; for a decoder with weights: random, `vlm data tokenizer SRC OUT` makes one"
    try:
        folder = find_folder(place)
    except CheckpointError as problem:
        raise CheckpointError(f"no tokenizer at {place!r}", got=problem.got, cure=cure) from problem
    tokenizer = _read_tokenizer(folder, cure)
    placeholder_id(tokenizer)
    return tokenizer


def _read_tokenizer(folder: Path, cure: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # of damaged files nearly every built-in kind, and tokenizers' own, which is a plain Exception
        for file in (folder / "tokenizer_config.json", folder / "tokenizer.json"):
            if file.is_file():
                read_json(file)  # the message of transformers names no file
        raise CheckpointError(f"no tokenizer in {folder}: {' '.join(str(problem).split()).rstrip('.')}", cure=cure) from problem


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the processor's file holds beside tokenizer and model."""

    prompt: Mapping[str, Any]
    policy: Mapping[str, Any] = field(default_factory=lambda: {"use": "native", "official": False})


class VLMProcessor:
    """Turns samples into rows and rows into batches, for one model, one prompt and one picture policy.

    Args:
        model: the parts' Specs. width: the decoder's hidden size. tokenizer: with the placeholder token in it. prompt, policy: of the stage.
        tiling: how policy `anyres` cuts; default: as LLaVA-NeXT does.
    """

    def __init__(
        self,
        model: ModelSpec,
        width: int,
        tokenizer: PreTrainedTokenizerBase,
        prompt: PromptSpec,
        policy: str = "native",
        official_pictures: bool = False,
        tiling: Tiling | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.width = width
        self.image_token_id = placeholder_id(tokenizer)
        self.prompt = Prompt(prompt, tokenizer)
        self.policy, self.official_pictures = policy, official_pictures
        self.tiling = (tiling or Tiling(official=official_pictures)) if policy == "anyres" else None
        self._chain = links(model.encoder, model.connector, width)
        self._every_picture = typical_size(model.encoder) if picture_tokens(model, width, policy, self.tiling)[1] else None

    # ---- pictures ------------------------------------------------------------------------------------------------------

    def layout(self, width: int, height: int, mode: Mode = "infer") -> TokenLayout:
        """Tokens that a picture of this size becomes, behind all connectors."""
        return self._plan(width, height, mode)[1]

    def see(self, picture: Picture | Image.Image | bytes | str | Path, mode: Mode = "infer", where: str = "") -> ImageInput:
        """A picture, from wherever, as its encoder reads it."""
        if isinstance(picture, Image.Image):
            picture = held(picture, where or "picture given as an image")
        encoder = self.model.encoder
        with naming(picture, where):
            image = open_picture(_bytes(picture, where), where=where, official=self.official_pictures)
            size = image.size
            image = apply_policy(self.policy, image, mean=getattr(encoder, "mean", None), size=getattr(encoder, "size", None), official=self.official_pictures)
            cut, layout = self._plan(*size, mode)
            views = encoder.preprocess(image, mode) if cut is None else tiled(encoder, image, cut, mode)
        return ImageInput(views, *size, layout, cut)

    def sketch(self, picture: Picture, mode: Mode = "infer", where: str = "") -> ImageInput:
        """A picture without pixels: its size, from the file's header, and its layout. Where all pictures have one layout nothing is opened, and the size is the encoder's own."""
        with naming(picture, where):
            size = self._every_picture or upright_size(_bytes(picture, where), where=where)
            return ImageInput({}, *size, self.layout(*size, mode))

    def _plan(self, width: int, height: int, mode: Mode) -> tuple[Cut | None, TokenLayout]:
        """How a picture of this size is cut, None where it is read whole, and its tokens behind all connectors."""
        side, _ = typical_size(self.model.encoder)
        if self.tiling is None:
            return None, whole_layout(self.model.encoder, self._chain, policy_size(self.policy, width, height, side), mode)
        cut = self.tiling.plan(width, height, side, whole_layout(self.model.encoder, self._chain, (side, side), mode))
        return cut, cut.layout

    @property
    def picture_policy(self) -> dict[str, Any]:
        """What becomes of a picture before the encoder's own preprocessing, for JSON: two processors of a model for which this is equal see the same."""
        return {"use": self.policy, "official": self.official_pictures} | ({"tiling": asdict(self.tiling)} if self.tiling is not None else {})

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def row(self, sample: Sample, *, mode: Mode = "train", generate: bool = False, max_length: int | None = None, too_long: str = "cut", pixels: bool = True) -> Row:
        """One sample as a row; generate: it ends in the prompt for the next answer. pixels: without them the pictures are sketches, until `look` opens them.

        Raises DataError where a row is longer than max_length and too_long is "error", where one picture does not fit, where nothing is left to read, or where a training row has nothing supervised.
        """
        see = self.see if pixels else self.sketch
        images = [see(picture, mode, _where(sample)) for picture in sample.pictures]
        if sample.independent and not generate:
            parts = self._branches(sample, max_length)
        else:
            parts = [self.prompt.encode(sample.turns, generate=generate, where=_where(sample), max_length=max_length)]
        row = self._expand(sample, parts, images)
        needed = len(row)
        if not needed:
            raise DataError(f"{_where(sample)}: prompt {self.prompt.spec.use!r} leaves nothing of it to read", kind="empty", cure="add a picture, or choose another prompt")
        if max_length is not None and needed > max_length:
            row = self._cut(row, sample, max_length, too_long)
        if not generate and mode == "train" and not row.supervised and GIVEN_UP not in row.notes:
            raise DataError(
                f"{_where(sample)}: no token of sample {sample.id!r} is supervised" + (f" once it is cut to {max_length} tokens" if len(row) < needed else ""),
                kind="too long",
                got=f"{needed} tokens" + (" needed" if len(row) < needed else ""),
                expected=f"an answer within max_length {max_length}" if len(row) < needed else "an assistant turn with text",
                cure="raise max_length, or leave the sample out" if len(row) < needed else "add an answer, or leave the sample out",
            )
        return row

    def look(self, row: Row, sample: Sample, *, mode: Mode = "train") -> None:
        """Open the pictures of a row that was made without pixels. Raises DataError."""
        row.images = [self.see(picture, mode, _where(sample)) for picture in sample.pictures[: len(row.images)]]

    def _branches(self, sample: Sample, max_length: int | None) -> list[Encoded]:
        """The trunk that all question-answer pairs share, then each pair's own part: every pair is encoded as a conversation of its own, what they have in common is the trunk.

        Raises DataError for turns that are no pairs, and for pictures elsewhere than in front of the first question.
        """
        head = tuple(turn for turn in sample.turns if turn.role == "system")
        talk = [turn for turn in sample.turns if turn.role != "system"]
        if not talk or [turn.role for turn in talk] != ["user", "assistant"] * (len(talk) // 2):
            raise DataError(
                f"{_where(sample)}: independent turns must be pairs of a question and its answer",
                kind="role",
                got=", ".join(turn.role for turn in talk) or "none",
                cure="leave `independent` away",
            )
        shared = pictures_in_front(talk[0])
        if sum(isinstance(part, Picture) for part in shared) != len(sample.pictures):
            raise DataError(
                f"{_where(sample)}: independent questions must share the pictures, which stand in the first question",
                cure="leave `independent` away, or move the pictures to the front",
            )
        pairs: list[Encoded] = []
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            if pairs and shared:
                question = Turn("user", (*shared, question.text.lstrip("\n")))
            pairs.append(self.prompt.encode((*head, question, answer), where=_where(sample), max_length=max_length))
        if len(pairs) == 1:
            return pairs
        common = next((place for place, ids in enumerate(zip(*(pair.ids for pair in pairs), strict=False)) if len(set(ids)) > 1), min(len(pair.ids) for pair in pairs))
        # A branch never begins with its answer: what predicts the answer is the branch's own question.
        common = max(0, min([common, *(pair.supervised.index(True) - 1 for pair in pairs if any(pair.supervised))]))
        if pairs[0].ids[:common].count(PICTURE) < len(sample.pictures):
            raise DataError(
                f"{_where(sample)}: prompt {self.prompt.spec.use!r} puts answers right behind the picture, so independent ones cannot branch off behind it",
                cure="leave `independent` away, or choose another prompt",
            )
        trunk = Encoded(pairs[0].ids[:common], [False] * common, tuple(dict.fromkeys(note for pair in pairs for note in pair.notes)))
        ends = [
            len(pair.ids) - pair.supervised[::-1].index(True) if any(pair.supervised) else len(pair.ids) for pair in pairs
        ]  # nothing reads what stands behind the answer of a branch
        return [trunk, *(Encoded(pair.ids[common:end], [False, *pair.supervised[common + 1 : end]]) for pair, end in zip(pairs, ends, strict=True))]

    def _expand(self, sample: Sample, parts: Sequence[Encoded], images: Sequence[ImageInput]) -> Row:
        row = Row(sample.id, sample.source, [], [], [], [], [], [], list(images), sample.notes + parts[0].notes)
        seen = 0
        for branch, part in enumerate(parts):
            start = len(parts[0].ids) + sum(image.layout.count - 1 for image in images) if branch else 0
            for index, supervised in zip(part.ids, part.supervised, strict=True):
                count = images[seen].layout.count if index == PICTURE else 1
                row.ids += [self.image_token_id if index == PICTURE else index] * count
                row.labels += [index if supervised else IGNORE] * count
                row.types += [VISION if index == PICTURE else TEXT] * count
                row.pictures += [seen if index == PICTURE else -1] * count
                row.branches += [branch] * count
                row.documents += [0] * count
                row.positions += range(start, start + count)
                start += count
                seen += index == PICTURE
        return row

    def _cut(self, row: Row, sample: Sample, max_length: int, too_long: str) -> Row:
        """The first max_length tokens, never a part of a picture."""
        largest = max((image.layout.count for image in row.images), default=0)
        if largest >= max_length:
            raise DataError(
                f"{_where(sample)}: one picture takes {largest} tokens, which does not fit",
                kind="too long",
                expected=f"less than max_length {max_length}",
                cure="raise max_length, or use an encoder with fewer tokens",
            )
        if too_long == "error":
            raise DataError(
                f"{_where(sample)}: sample {sample.id!r} is too long",
                kind="too long",
                got=f"{len(row)} tokens",
                expected=f"at most max_length {max_length}",
                cure="raise max_length, or set too_long: cut",
            )
        end = max_length
        while 0 < end < len(row) and row.pictures[end] >= 0 and row.pictures[end - 1] == row.pictures[end]:
            end -= 1
        kept = max((picture for picture in row.pictures[:end]), default=-1) + 1
        return Row(
            row.id,
            row.source,
            row.ids[:end],
            row.labels[:end],
            row.types[:end],
            row.pictures[:end],
            row.branches[:end],
            row.positions[:end],
            row.images[:kept],
            (*row.notes, "cut"),
        )

    # ---- batches -------------------------------------------------------------------------------------------------------

    def __call__(self, samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Left-padded inputs of `VLM.generate` for samples that end in a question."""
        return self.inputs([self.row(sample, mode="infer", generate=True) for sample in samples], device)

    def inputs(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Left-padded inputs of `VLM.generate` for rows that end in a prompt for an answer."""
        batch = collate(rows, pad_id=self.pad_id, left=True)
        return {
            "input_ids": batch["input_ids"].to(device),
            "attention_mask": (batch["document_ids"] >= 0).to(device, torch.int64),
            "mm_token_type_ids": batch["mm_token_type_ids"].to(device),
            "images": batch["images"],
        }

    @property
    def pad_id(self) -> int:
        """What fills rows; padding is told by position, never by this id."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)  # type: ignore[arg-type]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that the tokenizer needs: its largest id and one."""
        return max(self.tokenizer.get_vocab().values()) + 1

    # ---- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Tokenizer (its chat template is this prompt's) and vlm_processor.json."""
        folder = Path(folder)
        own, self.tokenizer.chat_template = self.tokenizer.chat_template, self.prompt.template.chat
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.chat_template = own
        settings = _Settings(prompt=asdict(self.prompt.spec), policy=self.picture_policy)
        (folder / "vlm_processor.json").write_text(json.dumps(asdict(settings), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "VLMProcessor":
        """Of a folder that `save_pretrained` and the model's `save_pretrained` wrote. Raises CheckpointError."""
        from vlm.configuration import VLMConfig

        folder = Path(folder)
        file = folder / "vlm_processor.json"
        if not file.is_file():
            raise CheckpointError(f"{folder} holds no processor", expected="vlm_processor.json", cure="give the folder of a run, a stage or an export")
        settings = read_json(file)
        try:
            prompt, policy = PromptSpec(**settings["prompt"]), settings["policy"]
            pictures = policy["use"], policy["official"], Tiling.of(policy["tiling"]) if "tiling" in policy else None
        except (KeyError, TypeError) as problem:
            raise CheckpointError(f"{file} is damaged: {problem!r}", expected="`prompt` and `policy`, as vlm writes them", cure="fetch it again") from problem
        config = VLMConfig.read(folder)
        tokenizer = _read_tokenizer(folder, "fetch tokenizer.json and tokenizer_config.json again")
        return cls(config.spec(), config.text_config.hidden_size, tokenizer, prompt, *pictures)


def _where(sample: Sample) -> str:
    return sample.where or f"sample {sample.id!r}"


def pictures_in_front(question: Turn) -> tuple[str | Picture, ...]:
    """The pictures that a question begins with, what is between them, and the line breaks behind: what every independent question gets."""
    shared: tuple[str | Picture, ...] = ()
    for place, part in enumerate(question.parts):
        if isinstance(part, str) and part.strip():
            return (*shared, part[: len(part) - len(part.lstrip("\n"))]) if shared else ()
        shared = question.parts[: place + 1]
    return shared


@contextmanager
def naming(picture: Picture | Image.Image | bytes | str | Path, where: str) -> Iterator[None]:
    """Errors of a picture say whose it is: `where` first and its name behind the fault, so that faults of one kind begin alike."""
    try:
        yield
    except DataError as problem:
        name = picture.name if isinstance(picture, Picture) else str(picture) if isinstance(picture, str | Path) else ""
        what = problem.what if problem.what.startswith(where) else f"{where}: {problem.what}"
        got = ("" if name in what else name, "" if problem.got is None else str(problem.got))
        raise problem.changed(what=what, got=", ".join(filter(None, got)) or None) from problem


def _bytes(picture: Picture | bytes | str | Path, where: str) -> bytes:
    if isinstance(picture, bytes):
        return picture
    source = Picture(str(picture)) if not isinstance(picture, Picture) else picture
    try:
        size = source.length()
        if size > LIMITS.max_bytes:
            raise too_large(f"{where or 'picture'}: picture {source.name}", f"{size:,} bytes")
        return source.read()
    except OSError as problem:
        raise DataError(
            f"{where or 'picture'}: cannot read picture {source.name}",
            kind="missing picture",
            got=problem.strerror or str(problem),
            cure="check the path and the source's `images` folder",
        ) from problem
