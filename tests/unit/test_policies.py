"""The picture policies: pad, crop and squash; what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm.errors import ConfigurationError, DataError
from vlm.images import apply_policy, crop_to, mean_color, open_picture, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


def test_pad_centres_and_leaves_the_odd_row_below() -> None:
    color = mean_color(CLIP_MEAN)
    assert color == (122, 116, 104)
    wide = np.asarray(pad(Image.new("RGB", (5, 2), "red"), color))
    assert [row[0].tolist() for row in wide] == [[122, 116, 104], [255, 0, 0], [255, 0, 0], [122, 116, 104], [122, 116, 104]]
    tall = np.asarray(pad(Image.new("RGB", (2, 5), "red"), color))
    assert np.array_equal(tall, wide.transpose(1, 0, 2))
    square = Image.new("RGB", (3, 3), "red")
    assert np.array_equal(np.asarray(pad(square, color)), np.asarray(square))


@pytest.mark.parametrize("mode, size", [("L", (48, 16)), ("1", (10, 30)), ("P", (48, 16)), ("LA", (7, 9)), ("CMYK", (12, 4))])
def test_padding_in_every_mode(mode: str, size: tuple[int, int]) -> None:
    data = tiny.picture_bytes(tiny.picture(size=size, seed=0).convert(mode), "TIFF")
    got = np.asarray(apply_policy("pad", open_picture(data), CLIP_MEAN, 14))
    assert got.shape == (max(size), max(size), 3)
    assert got[0, 0].tolist() == [122, 116, 104]


@pytest.mark.parametrize("size", [(60, 30), (30, 60), (31, 31), (101, 37), (5, 3), (20, 20)])
def test_crop_is_clips_own(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = tiny.picture(size=size, seed=0)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}, do_rescale=False, do_normalize=False)
    wanted = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    assert np.array_equal(np.asarray(crop_to(image, 20)).transpose(2, 0, 1), wanted)
    larger = CLIPImageProcessorPil(size={"shortest_edge": 25}, crop_size={"height": 20, "width": 20}, do_rescale=False, do_normalize=False)
    assert np.array_equal(np.asarray(crop_to(image, 20, edge=25)).transpose(2, 0, 1), larger(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0])


def test_crop_loses_the_sides_and_squash_keeps_them() -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    cropped, squashed = (np.asarray(apply_policy(name, image, CLIP_MEAN, 20)) for name in ("crop", "squash"))
    assert cropped.shape == squashed.shape == (20, 20, 3)
    assert (cropped == (0, 0, 255)).all()
    assert squashed[10, [0, 10, 19]].tolist() == [[255, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert apply_policy("native", image, None, None) is image


def test_released_axes() -> None:
    image = tiny.picture(size=(5, 3), seed=0)
    turned = Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)))
    assert turned.size == (3, 5)
    assert np.array_equal(np.asarray(crop_to(image, 4, official=True)), np.asarray(crop_to(turned, 4)))
    assert not np.array_equal(np.asarray(crop_to(image, 4)), np.asarray(crop_to(turned, 4)))
    assert np.array_equal(np.asarray(crop_to(tiny.picture(size=(5, 4), seed=0), 4, official=True)), np.asarray(crop_to(tiny.picture(size=(5, 4), seed=0), 4)))
    with pytest.raises(DataError, match="1 pixel high"):
        crop_to(tiny.picture(size=(5, 1), seed=0), 4, official=True)


@pytest.mark.parametrize("policy", ["pad", "crop"])
def test_strips_that_would_fill_the_memory(policy: str) -> None:
    with pytest.raises(DataError, match=r"too thin for its length. got 60000 x 1"):
        apply_policy(policy, Image.new("RGB", (60000, 1)), CLIP_MEAN, 336)


def test_unknown_or_impossible_policies() -> None:
    image = Image.new("RGB", (2, 2))
    with pytest.raises(ConfigurationError, match=r"'padd'. expected one of native, crop, pad, squash, anyres. did you mean 'pad'"):
        apply_policy("padd", image, CLIP_MEAN, 14)
    with pytest.raises(ConfigurationError, match="'crop' needs an encoder with a `size`"):
        apply_policy("crop", image, CLIP_MEAN, None)
    with pytest.raises(ConfigurationError, match="'pad' needs an encoder with a `mean`"):
        apply_policy("pad", image, None, 14)


def test_field_gray_pad(field_folder: Path) -> None:
    folder = field_folder / "image_gray_pad"
    if not folder.is_dir():
        pytest.skip(f"{field_folder} has no {folder.name}")
    expected = json.loads((folder / "expected.json").read_text())
    padded = {}
    for name, size in expected["sizes_after_pad"].items():
        padded[name] = np.asarray(apply_policy("pad", open_picture((folder / name).read_bytes(), where=name), expected["clip_mean"], 14)).astype(int)
        assert list(padded[name].shape[1::-1]) == size
        assert padded[name][0, 0].tolist() == expected["pixel_0_0_after_pad"]
    for name, rows in expected["rows_above"].items():
        assert (padded[name][:rows] == expected["pixel_0_0_after_pad"]).all()
        assert (padded[name][rows] != expected["pixel_0_0_after_pad"]).any()
    assert np.abs(padded["palette_wide.png"] - padded["rgb_wide.png"]).max() <= 4
