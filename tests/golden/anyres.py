"""Cases of LLaVA-NeXT's any resolution as p-MoD's code does it (systems/pmod.md, sections 4.1 and 8): numbers, pixels and the order of tokens, without a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tests.golden.case import Case, Fields
from vlm.encoders.base import FixedSizeSpec
from vlm.features import Cut, Features, TokenLayout
from vlm.images import open_picture
from vlm.tiles import GRIDS, Tiling, assemble, fitted, tiled

__all__ = ["counts", "pixels", "tokens"]

LISTS = {4: GRIDS, 9: (*GRIDS, (3, 2), (2, 3), (3, 3), (2, 4), (4, 2))}
"""Grids of data whose path contains "next", by the number of sub-images."""


def _tiling(grids: Sequence[Sequence[int]] | None, size: int, patches: int | None) -> Tiling:
    """From pinpoints, (width, height) in pixels."""
    return Tiling(grids=None if grids is None else tuple((width // size, height // size) for width, height in grids), shrink_to=patches, official=True)


def _plan(tiling: Tiling, image_size: Sequence[int], size: int, side: int) -> Cut:
    width, height = image_size
    return tiling.plan(width, height, size, TokenLayout.grid(side, side))


def _told(image_size: Sequence[int], cut: Cut) -> dict[str, Any]:
    """What expected.json says of the pixels of a picture."""
    rows, columns = cut.tiles
    return {"image_size": list(image_size), "best_resolution": [columns * cut.size, rows * cut.size], "grid_w_h": [columns, rows], "crops": cut.pieces}


def _counted(image_size: Sequence[int], cut: Cut) -> dict[str, Any]:
    """What expected.json says of the tokens of a picture."""
    whole = tuple(tiles * tokens - 2 * trim for tiles, tokens, trim in zip(cut.tiles, cut.tile, cut.trim, strict=True))
    count = cut.layout.count
    fine = count - cut.tile[0] * cut.tile[1]
    return {**_told(image_size, cut), "hr_h_w": list(cut.grid), "interpolated": whole != cut.grid, "hr_tokens": fine, "total_tokens": count}


def counts(case: Case) -> Mapping[str, Any]:
    """Picture sizes -> grids and numbers of tokens, for several lists of grids."""
    return {"expected.json": [_variant(Fields(variant), case.inputs["image_sizes"]) for variant in case.config["variants"]]}


def _variant(variant: Fields, sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    size, side, most = variant["image_size"], variant["patches_per_side"], variant["max_num_sub_images"]
    shrink = variant.get("max_num_patches")
    tiling = Tiling(grids=LISTS[most], shrink_to=shrink, official=True) if variant["next_data"] else Tiling(max_tiles=most, shrink_to=shrink, official=True)
    unread = variant.unread(())
    assert not unread, f"unknown fields of a variant: {unread}"
    return {"grids_w_h": [list(grid) for grid in tiling.choices], "results": [_counted(one, _plan(tiling, one, size, side)) for one in sizes]}


def tokens(case: Case) -> Mapping[str, Any]:
    """Projected features of thumbnail and tiles -> the picture's tokens; all pictures of a case in one call."""
    config = case.config
    config.expect(mm_patch_merge_type="spatial_unpad")
    size, side = config["image_size"], config["patches_per_side"]
    tiling = _tiling(config["image_grid_pinpoints"], size, config["max_num_patches"])
    sizes = case.inputs["image_sizes"]
    cuts = [_plan(tiling, image_size, size, side) for image_size in sizes]
    pieces = [case.tensors[f"image_features.{index}"] for index in range(len(sizes))]
    assert [len(piece) for piece in pieces] == [cut.pieces for cut in cuts], "crops per picture"
    many = sum(map(len, pieces))
    packed = Features.of(torch.cat(pieces).flatten(0, 1), [side * side] * many, [(side, side)] * many)
    whole = assemble(packed, cuts, case.tensors["image_newline"])
    outputs = {f"tokens.{index}": part for index, part in enumerate(whole.tokens.split(whole.lengths))}
    return {**outputs, "expected.json": [_counted(*pair) for pair in zip(sizes, cuts, strict=True)]}


def pixels(case: Case) -> Mapping[str, Any]:
    """Picture files -> the canvas, and the pixel values of thumbnail and tiles."""
    config, processor = case.config, case.config["image_processor"]
    processor.expect(do_resize=True, resample=3, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True)
    size = config["image_size"]
    processor["crop_size"].expect(height=size, width=size)
    processor["size"].expect(shortest_edge=size)
    tiling = _tiling(config["image_grid_pinpoints"], size, None)
    encoder = FixedSizeSpec(size=size, patch=size, mean=tuple(processor["image_mean"]), std=tuple(processor["image_std"]), fit="crop", official=True)
    outputs: dict[str, Any] = {"expected.json": []}
    for index, file in enumerate(case.inputs["images"]):
        picture = open_picture(case.bytes_of(file), where=file, official=True)
        cut = _plan(tiling, picture.size, size, 1)
        outputs["expected.json"].append(_told(picture.size, cut))
        outputs |= {f"canvas.{index}": np.array(fitted(picture, cut)), f"pixel_values.{index}": tiled(encoder, picture, cut, "infer")["pixels"]}
    return outputs
