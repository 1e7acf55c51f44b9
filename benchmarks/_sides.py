"""The two sides of a bench of training or generation: this framework, and transformers' own LLaVA class with the same weights, samples and supervised tokens."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _corpus import Corpus
from PIL import Image

import vlm
from vlm.train.config import RunSpec
from vlm.train.cost import planned
from vlm.train.engine import Engine, connect
from vlm.train.log import Log
from vlm.train.loop import one_step
from vlm.train.memory import peak_memory
from vlm.train.optim import adamw
from vlm.train.signals import StopSignals
from vlm.train.stages import Stage
from vlm.train.steps import Step, loader
from vlm.weights import llava

__all__ = ["NARROW", "Ours", "Theirs", "Width", "check_equal", "run_of"]

RATE = 1e-4
STAGE = {"train": {"connector": RATE, "llm": RATE}, "data": "samples", "prompt": "chatml", "images": "squash", "schedule": {"kind": "constant", "warmup": 0}}
"""The tower is frozen and the rest is trained, as in LLaVA's instruction stage."""


@dataclass(frozen=True)
class Width:
    """Sizes of a model. The defaults are those of the claims: a CLIP tower of 3.7 million parameters, a decoder of 22 million of which 16 million are its vocabulary."""

    vocabulary: int = 32_000
    width: int = 256
    layers: int = 8
    heads: int = 4
    ffn: int = 688
    positions: int = 4096
    tower_width: int = 192
    tower_layers: int = 8
    picture: int = 112
    patch: int = 14


NARROW = Width(vocabulary=700, width=32, layers=2, ffn=48, tower_width=32, tower_layers=2, picture=28)


# ---- ours ----------------------------------------------------------------------------------------------------------------


class Ours:
    """A stage as `vlm train` runs it: its samples, its micro-batches, its DeepSpeed engine, its log.

    batch: samples per step. settings: further keys of the stage.
    """

    def __init__(self, samples: Corpus, width: Width, batch: int, steps: int, settings: dict[str, Any] | None = None):
        rank, ranks, device = connect()
        self.folder = samples.root / f"run-{len(list(samples.root.glob('run-*')))}"
        self.folder.mkdir()
        self.run = run_of(samples, width, self.folder, batch=batch, steps=steps, **settings or {})
        self.log = Log(self.folder, 0, 10**9)
        self.log.console.quiet = True
        self.log.begin("bench", 0, steps + 1)
        self.parts = Stage(self.run, 0, self.folder, rank, ranks, device, self.log, StopSignals())
        self.stage, self.data, self.processor = self.parts.stage, self.parts.data, self.parts.processor
        self.model = self.parts.model()

    def export(self, folder: Path) -> Path:
        """The weights as they are now, for transformers' class."""
        llava.write(self.model, self.processor, folder)
        return folder

    def start(self) -> None:
        """Optimizer and engine."""
        self.engine = Engine(self.model, adamw(planned(self.model, self.stage), self.stage.optimizer), self.parts.config, self.parts.device)

    def train(self, number: int) -> None:
        """A step of the stage: its samples read, rows made and packed, forward, backward, update, and its line in the log."""
        self.model.train()
        before = time.perf_counter()
        record = self.take(next(loader(self.data, number, 0)))
        self.log.step({"stage": "bench", "step": number + 1, "seconds": time.perf_counter() - before, "wait": 0.0, "memory": peak_memory()} | record)

    def take(self, step: Step) -> dict[str, Any]:
        """Forward, backward and update for a step that is made; returns what is written down."""
        return one_step(self.engine, step, self.stage, len(self.data), ("samples",))

    @torch.no_grad()
    def loss(self, number: int) -> tuple[float, int]:
        """Mean loss of a step and its supervised tokens, nothing trained."""
        self.model.eval()
        outputs = [self.model(**micro.to(self.parts.device)) for micro in self.data[number].micro_batches]
        supervised = sum(int(output.count) for output in outputs)
        return float(sum(output.loss_sum for output in outputs)) / supervised, supervised

    def indices(self, number: int) -> list[int]:
        """Samples of a step, in the order in which they are drawn."""
        return [index for _, index in self.data.mixture.step(number)]


def run_of(samples: Corpus, width: Width, folder: Path, *, workers: int = 0, **settings: Any) -> RunSpec:
    """A run of one stage. settings: keys of the stage."""
    tower = {
        "hidden_size": width.tower_width,
        "intermediate_size": 4 * width.tower_width,
        "num_hidden_layers": width.tower_layers,
        "num_attention_heads": max(1, width.tower_width // 64),
    }
    decoder = {
        "model_type": "llama", "vocab_size": width.vocabulary, "hidden_size": width.width, "intermediate_size": width.ffn, "num_hidden_layers": width.layers,
        "num_attention_heads": width.heads, "num_key_value_heads": width.heads, "max_position_embeddings": width.positions,
    }  # fmt: skip
    keys = {
        "model": {
            "encoder": {"use": "clip", "weights": "random", "config": tower | {"image_size": width.picture, "patch_size": width.patch, "hidden_act": "quick_gelu"}},
            "connector": {"use": "mlp", "depth": 2},
            "llm": {"weights": "random", "tokenizer": str(samples.root / "tokenizer"), "config": decoder},
        },
        "data": {"samples": {"reader": "llava", "file": str(samples.root / f"{samples.name}.json"), "images": str(samples.root)}},
        "stages": {"bench": STAGE | settings},
        "workers": workers,
        "runs": str(folder),
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(keys), encoding="utf-8")
    return vlm.compose(str(file))


def check_equal(ours: tuple[float, int], theirs: tuple[float, int]) -> None:
    """Both sides mean the same thing by a step. Raises AssertionError."""
    assert ours[1] == theirs[1], f"supervised tokens: ours {ours[1]}, theirs {theirs[1]}"
    assert abs(ours[0] - theirs[0]) < 1e-4 * theirs[0], f"loss before the first step: ours {ours[0]}, theirs {theirs[0]}"


# ---- theirs --------------------------------------------------------------------------------------------------------------


class Theirs:
    """transformers' `LlavaForConditionalGeneration` and its processor, loaded from an export, trained as their user writes it."""

    def __init__(self, folder: Path, samples: Corpus):
        from transformers import AutoProcessor, LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
        self.processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")  # whose pixels are ours
        self.processor.tokenizer.padding_side = "right"
        self.samples = samples
        self.texts = [self.processor.apply_chat_template(_messages(record["conversations"])) for record in samples.records]
        self.head = self.processor.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.picture_tokens = int(self.model.config.image_seq_length)
        self.end = self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        for parameter in self.model.model.vision_tower.parameters():
            parameter.requires_grad_(False)

    def start(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        """A padded batch of samples; labels on the answers and their end marks."""
        pictures = [Image.open(self.samples.root / self.samples.records[index]["image"]).convert("RGB") for index in indices]
        batch = dict(self.processor(images=pictures, text=[self.texts[index] for index in indices], padding=True, return_tensors="pt"))
        batch["labels"] = torch.tensor([self._labels(ids) for ids in batch["input_ids"].tolist()])
        return batch

    def questions(self, indices: Sequence[int]) -> dict[str, Any]:
        """Left-padded inputs of `generate`: the samples without their last answers."""
        records = [self.samples.records[index] for index in indices]
        texts = [self.processor.apply_chat_template(_messages(record["conversations"][:-1]), add_generation_prompt=True) for record in records]
        pictures = [Image.open(self.samples.root / record["image"]).convert("RGB") for record in records]
        return dict(self.processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt"))

    def _labels(self, ids: list[int]) -> list[int]:
        labels, place = [-100] * len(ids), 0
        while place < len(ids):
            if ids[place : place + len(self.head)] != self.head:
                place += 1
                continue
            place += len(self.head)
            end = ids.index(self.end, place) + 1
            labels[place:end] = ids[place:end]
            place = end
        return labels

    def length(self, index: int) -> int:
        """Tokens of a sample beside its picture's, of which all have as many."""
        return len(self.processor.tokenizer.encode(self.texts[index]))

    def train(self, indices: Sequence[int], micro_batch: int) -> None:
        """A step of a plain loop, cut into micro-batches as it stands; the loss is the mean over the step's supervised tokens, as the Trainer's is."""
        self.update([self.collate(indices[start : start + micro_batch]) for start in range(0, len(indices), micro_batch)])

    def update(self, batches: Sequence[dict[str, Any]]) -> None:
        """Forward, backward and update for the micro-batches of a step."""
        self.model.train()
        supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            self.model(**batch, num_items_in_batch=supervised).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def trainer(self, batch: int, micro_batch: int, sampling: str) -> Callable[[Sequence[int]], tuple[float, float]]:
        """A step of transformers' Trainer over the same model, with its own defaults for optimizer and loop; returns its seconds and CPU seconds from the first sample to the end of the epoch.

        The Trainer is started for each step, which is not counted: it belongs to a run, not to a step. sampling: its `train_sampling_strategy`; "group_by_length" sorts within the step.
        """
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        times: list[tuple[float, float]] = []

        class Clock(TrainerCallback):
            def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
                times.append((time.perf_counter(), time.process_time()))

            on_epoch_end = on_epoch_begin

        rank = os.environ.pop("LOCAL_RANK", None)  # ours, for its one process; the Trainer would take it for several and wrap the model
        arguments = TrainingArguments(
            output_dir=str(self.samples.root / "trainer"), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=batch // micro_batch, num_train_epochs=1, learning_rate=RATE,
            lr_scheduler_type="constant", train_sampling_strategy=sampling, remove_unused_columns=False, use_cpu=True, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer: Any = Trainer(self.model, arguments, data_collator=lambda items: self.collate([item["sample"] for item in items]), callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank

        def step(indices: Sequence[int]) -> tuple[float, float]:
            trainer.train_dataset = [{"sample": index, "input_ids": self.processor.tokenizer.encode(self.texts[index])} for index in indices]
            trainer.train()
            (wall, cpu), (wall_end, cpu_end) = times[-2:]
            return wall_end - wall, cpu_end - cpu

        return step

    @torch.no_grad()
    def loss(self, indices: Sequence[int]) -> tuple[float, int]:
        """Mean loss of a batch and its supervised tokens."""
        batch = self.collate(indices)
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        return float(self.model(**batch, num_items_in_batch=supervised).loss), supervised


def _messages(turns: list[dict[str, str]]) -> list[dict[str, Any]]:
    messages = []
    for turn in turns:
        text = turn["value"].removeprefix("<image>\n")
        picture = [{"type": "image"}, {"type": "text", "text": "\n" + text}] if text != turn["value"] else [{"type": "text", "text": text}]
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": picture})
    return messages
