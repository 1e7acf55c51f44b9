"""What a case of a whole Arcana may hold besides those at hand: several rows, text alone, masks of any dtype or none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.arcana_model import model
from tests.golden.case import Case

SOURCE = Case(Path(__file__).parent / "cases" / "arcana_model_generate")
IDS, IMAGES = SOURCE.tensors["input_ids"], SOURCE.tensors["images"]
TEXT = IDS.masked_fill(IDS < 0, 5)
ZERO = torch.zeros_like(IMAGES)
OTHER = torch.where(IDS > 2, IDS.flip(1).clamp(min=3), IDS)  # another text around the same placeholder


def answers(folder: Path, expected: dict[str, Tensor], inputs: dict[str, Tensor], **config: Any) -> dict[str, Any]:
    """Of the copied model, given other inputs."""
    shutil.copytree(SOURCE.folder, folder)
    save_file(inputs, folder / "inputs.safetensors")
    save_file(expected, folder / "expected.safetensors")
    description = SOURCE.description | {"config": SOURCE.description["config"] | config}
    (folder / "case.json").write_text(json.dumps(description), encoding="utf-8")
    return model(Case(folder))


def generated(folder: Path, ids: Tensor, images: Tensor) -> dict[str, Any]:
    return answers(folder, {"generated_ids": torch.zeros(0)}, {"input_ids": ids, "images": images})


def test_every_row_is_generated_with_its_own_pictures(tmp_path: Path) -> None:
    both = generated(tmp_path / "both", torch.cat([IDS, OTHER]), torch.cat([IMAGES, IMAGES.flip(-1)]))
    one, other = generated(tmp_path / "one", IDS, IMAGES), generated(tmp_path / "other", OTHER, IMAGES.flip(-1))
    assert torch.equal(one["generated_ids"], SOURCE.expected["generated_ids"])
    assert both["generated_ids"].tolist() == [*one["generated_ids"].tolist(), *other["generated_ids"].tolist()]
    assert torch.allclose(both["scores"].unflatten(0, (-1, 2)), torch.stack([one["scores"], other["scores"]], 1), atol=1e-4)
    assert not torch.equal(one["scores"], other["scores"])


def test_text_alone_is_generated_whatever_its_picture(tmp_path: Path) -> None:
    plain, seen = generated(tmp_path / "plain", TEXT, ZERO), generated(tmp_path / "seen", TEXT, IMAGES)
    assert not plain["im_mask"].any() and plain["logits"].shape[1] == IDS.shape[1]
    assert torch.equal(plain["scores"], seen["scores"])


def test_text_alone_trains_with_zero_gradients(tmp_path: Path) -> None:
    found = answers(tmp_path / "text", {"loss": torch.zeros(1)}, {"input_ids": TEXT, "images": ZERO, "labels": TEXT.clone()})
    gradients = {name: gradient for name, gradient in found.items() if "mm_projector" in name or "qladder_embeds" in name}
    assert len(gradients) == 5 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_the_mask_keeps_its_dtype_and_a_missing_one_stays_missing(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two rows whose placeholders make them unequal, padded on the left."""
    inputs = {"input_ids": torch.cat([IDS, TEXT]), "images": torch.cat([IMAGES, ZERO]), "labels": torch.cat([TEXT, TEXT])}
    without = answers(tmp_path / "without", {"loss": torch.zeros(1)}, inputs, tokenizer_padding_side="left")
    masked = answers(tmp_path / "masked", {"loss": torch.zeros(1)}, inputs | {"attention_mask": torch.ones(2, IDS.shape[1], dtype=dtype)}, tokenizer_padding_side="left")
    assert masked["attention_mask"].dtype == dtype and "attention_mask" not in without
    assert masked["attention_mask"].sum(1).tolist() == [masked["logits"].shape[1], IDS.shape[1]]
    same = torch.isclose(masked["logits"][:, -1], without["logits"][:, -1], atol=1e-4).all(-1)
    assert same.tolist() == [True, False], "without a mask the padded row attends to its padding"
