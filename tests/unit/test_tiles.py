"""Any resolution: what is counted is what comes, tokens stand where their pixels stood, and transformers' LLaVA-NeXT gives the same."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversations import says, user
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor

import vlm
import vlm.processor
import vlm.tiles
from tests.golden.case import Case
from vlm import connectors, encoders
from vlm.config import LLMSpec, ModelSpec, picture_tokens
from vlm.configuration import VLMConfig
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample
from vlm.encoders.clip import CLIPSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.features import PATCH, SEPARATOR, SUMMARY, Cut, Features, ImageInput, TokenLayout
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.row import collate
from vlm.tiles import GRIDS, Tiling, assemble
from vlm.train.config import PolicySpec
from vlm.weights.llava import from_llava, to_llava

ENCODERS = {"clip": CLIPSpec, "siglip": SigLIPSpec}
DRAW = random.Random(5)
SIZES = [
    (1, 1),
    (4000, 30),
    (30, 4000),
    (1, 2000),
    (28, 28),
    *((DRAW.randint(1, 4000), DRAW.randint(1, 60)) for _ in range(10)),
    *((DRAW.randint(1, 200), DRAW.randint(1, 200)) for _ in range(25)),
]
TILINGS = {
    "default": Tiling(),
    "official": Tiling(official=True),
    "max_tiles": Tiling(max_tiles=6),
    "whole": Tiling(unpad=False, newline=False),
    "no thumbnail": Tiling(thumbnail=False, grids=((1, 1), (2, 3))),
    "shrunk": Tiling(max_tiles=9, shrink_to=2),
}


def spec(tower: str = "clip", newline: bool = True) -> ModelSpec:
    config = tiny.tower_config(tower, patch_size=7)
    return ModelSpec(encoder=ENCODERS[tower](config=config, weights="random"), connector=MLPSpec(), llm=LLMSpec(config=tiny.llm_config(), weights="random"), newline=newline)


@cache
def made(tower: str = "clip") -> VLM:
    torch.manual_seed(0)
    return first_model(spec(tower), vlm.processor.placeholder_id(tiny.tokenizer())).train()


def processor(tiling: Tiling | None = None, tower: str = "clip") -> VLMProcessor:
    return VLMProcessor(spec(tower), 32, tiny.tokenizer(), PromptSpec(use="chatml"), "anyres", tiling=tiling)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    """Wide, tall, small and thin."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(90, 40), (31, 64), (9, 9), (200, 3)]):
        tiny.picture(seed=number, size=size).save(folder / f"{number}.png")
    return [Picture(str(folder / f"{number}.png")) for number in range(4)]


# ---- counts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower, tiling", [*(("clip", name) for name in TILINGS), ("siglip", "default")])
def test_what_is_counted_is_what_comes(tower: str, tiling: str) -> None:
    one, model = processor(TILINGS[tiling], tower), made(tower)
    images = [one.see(Image.new("RGB", size, "red")) for size in SIZES]
    with torch.no_grad():
        features = model.see(images)
    for size, image, length, grid in zip(SIZES, images, features.lengths, features.stream().grids, strict=True):
        assert one.layout(*size) == image.layout and (image.layout.count, image.layout.rows, image.layout.columns) == (length, *grid), size
        assert image.layout.roles.count(PATCH) == grid[0] * grid[1] and image.layout.roles.count(SEPARATOR) == grid[0] * TILINGS[tiling].newline
        assert image.layout.roles.count(SUMMARY) == 16 * TILINGS[tiling].thumbnail
        assert length > 0 and (tiling == "official" or min(grid) > 0), "a thin picture keeps a row and a column"
    alone = [model.see([image]).tokens for image in images[:9]]
    for together, single in zip(features.tokens.split(features.lengths), alone, strict=False):
        torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["convolutions", "transformer", "two towers"])
def test_any_encoder_of_one_size_reads_tiles(kind: str) -> None:
    if kind == "two towers":
        model = replace(spec(), encoder=encoders.registry.get("hybrid")(**tiny.hybrid_arguments()), connector=connectors.registry.get("hybrid_mlp")())
    else:
        pytest.importorskip("timm")
        name, level = {"convolutions": ("mobilenetv2_050", 0), "transformer": ("vit_tiny_patch16_224", -2)}[kind]
        model = replace(spec(), encoder=encoders.registry.get("timm")(name=name, size=64, weights="random"), connector=MLPSpec(level=level))
    one = VLMProcessor(model, 32, tiny.tokenizer(), PromptSpec(use="chatml"), "anyres")
    images = [one.see(Image.new("RGB", size)) for size in ((90, 40), (600, 5), (1, 1))]
    with torch.no_grad():
        features = first_model(model, 399).see(images)
    assert list(features.lengths) == [image.layout.count for image in images] and len(set(features.lengths)) > 1


def test_the_released_code_leaves_nothing_of_thin_pictures() -> None:
    side = TokenLayout.grid(24, 24)
    assert [Tiling(official=True).plan(*size, 336, side).grid for size in ((4000, 30), (30, 4000))] == [(0, 72), (72, 0)]
    assert [Tiling().plan(*size, 336, side).grid for size in ((4000, 30), (30, 4000))] == [(2, 72), (72, 2)]


def test_of_canvases_that_hold_the_whole_picture_the_smallest_is_taken() -> None:
    assert Tiling(grids=((2, 2), (2, 1), (1, 2))).plan(20, 20, 28, TokenLayout.grid(4, 4)).tiles == (1, 2)


def test_the_last_digits_decide_a_few_sizes() -> None:
    """55 x (24 / 88) is 15, or just below: one of the five sizes from 20 x 20 to 303 x 303 that the two ways to round tell apart."""
    side = TokenLayout.grid(24, 24)
    assert [Tiling(official=official).plan(88, 55, 336, side).grid for official in (False, True)] == [(16, 24), (14, 24)]


# ---- transformers ----------------------------------------------------------------------------------------------------------


PINPOINTS = [[rows * 28, columns * 28] for columns, rows in GRIDS]  # transformers: (height, width)


def theirs(model: VLM) -> Any:
    """LLaVA-NeXT of transformers with the weights of ours."""
    vision: Any = CLIPVisionConfig(**tiny.tower_config(patch_size=7))
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**model.config.text_config.to_dict()), image_token_index=model.config.image_token_id, image_grid_pinpoints=PINPOINTS
    )
    other = LlavaNextForConditionalGeneration(config).eval()
    tensors = {name if name != "newline.weight" else "model.image_newline": tensor for name, tensor in model.state_dict().items()}
    tensors = {name if name.startswith("model.") else _next(to_llava(name)): tensor for name, tensor in tensors.items()}
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    return other


def _next(name: str) -> str:
    """A name in a LLaVA file -> in transformers' module."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.").replace("language_model.model.", "language_model.")
    return "lm_head." + name.removeprefix("language_model.lm_head.") if "lm_head" in name else "model." + name


def test_it_is_transformers_llava_next(pictures: list[Picture]) -> None:
    one, model = processor(), made().eval()
    sample = Sample("s", (user(pictures[0], " and ", pictures[1], " or ", pictures[2], "?"), says("red")))
    row = one.row(sample)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS)
    read: Any = images([Image.open(picture.path) for picture in sample.pictures], return_tensors="pt")
    for image, pixels, size in zip(row.images, read["pixel_values"], read["image_sizes"], strict=True):
        assert (image.height, image.width) == tuple(size.tolist())
        torch.testing.assert_close(image.views["pixels"], pixels[: len(image.views["pixels"])], rtol=0, atol=1e-5)
    other = theirs(model)
    batch = collate([row], pad_id=0)
    with torch.no_grad():
        features = other.get_image_features(read["pixel_values"], read["image_sizes"]).pooler_output
        torch.testing.assert_close(model.see(row.images).tokens, torch.cat(list(features)), rtol=0, atol=1e-5)
        logits = other(input_ids=batch["input_ids"], pixel_values=read["pixel_values"], image_sizes=read["image_sizes"]).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=0).logits, logits, rtol=0, atol=1e-5)
    made().train()


def test_it_is_p_mods_llava_next(golden_folder: Path) -> None:
    """From picture files to the decoder's input with the official preset, on the weights of a whole p-MoD model."""
    case = Case(golden_folder / "pmod_llava_anyres")
    settings, width = case.config["vision_config"], case.config["hidden_size"]
    grids = tuple((across // 28, down // 28) for across, down in case.config["image_grid_pinpoints"])
    model = VLM(VLMConfig.of(replace(spec(), encoder=CLIPSpec(config=dict(settings))), LlamaConfig(hidden_size=width, num_hidden_layers=1), 0)).eval()
    tensors = {"newline.weight" if name == "model.image_newline" else from_llava(name): tensor for name, tensor in case.weights.items()}
    missing, _ = model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("llm.")}, strict=False)
    assert all(name.startswith("llm.") for name in missing), missing
    one = VLMProcessor(model.spec, width, tiny.tokenizer(), PromptSpec(use="chatml"), "anyres", True, Tiling(grids=grids, official=True))
    images = [one.see(case.bytes_of(file)) for file in case.inputs["images"]]
    for index, image in enumerate(images):
        torch.testing.assert_close(image.views["pixels"], case.expected[f"pixel_values.{index}"], rtol=1e-4, atol=3e-5)
    with torch.no_grad():
        seen = model.see(images)
    assert [image.layout.count for image in images] == list(seen.lengths) == case.expected["vision_tokens"]
    torch.testing.assert_close(seen.tokens, case.expected["inputs_embeds"][case.expected["mod_target_mask"]], rtol=3e-4, atol=3e-5)


def test_transformers_counts_the_same() -> None:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=[[side * 12 for side in pair] for pair in PINPOINTS]
    )
    reader = LlavaNextProcessor(images, tiny.tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    draw, side = random.Random(3), TokenLayout.grid(24, 24)
    for width, height in ((draw.randint(20, 2000), draw.randint(20, 2000)) for _ in range(2000)):
        if max(width, height) < 40 * min(width, height):
            assert Tiling().plan(width, height, 336, side).layout.count == reader._get_number_of_features(height, width, 336, 336) - 1, (width, height)


# ---- places ----------------------------------------------------------------------------------------------------------------


def numbered(cut: Cut) -> tuple[Features, list[tuple[int, int, int]]]:
    """Tokens that are their number, and (piece, row, column) of each."""
    rows, columns = cut.tile
    where = [(piece, row, column) for piece in range(cut.pieces) for row in range(rows) for column in range(columns)]
    tokens = torch.arange(float(len(where)))[:, None].expand(-1, 3)
    return Features.of(tokens, [rows * columns] * cut.pieces, [cut.tile] * cut.pieces), where


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (60, 60), (300, 20)])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tokens_stand_where_their_pixels_stood(size: tuple[int, int], thumbnail: bool) -> None:
    cut = Tiling(max_tiles=6, thumbnail=thumbnail).plan(*size, 28, TokenLayout.grid(3, 4))
    features, where = numbered(cut)
    got = assemble(features, [cut], torch.full((3,), -1.0)).tokens[:, 0].tolist()
    first = 12 * thumbnail
    assert got[:first] == list(range(first))
    rows, columns = cut.grid
    for row in range(rows):
        line = got[first + row * (columns + 1) :][: columns + 1]
        assert line.pop() == -1
        for column, number in enumerate(line):
            piece, inner_row, inner_column = where[int(number)]
            tile_row, tile_column = divmod(piece - thumbnail, cut.tiles[1])
            assert (tile_row * 3 + inner_row, tile_column * 4 + inner_column) == (row + cut.trim[0], column + cut.trim[1])


def test_the_border_is_what_goes() -> None:
    """Of a white picture on the black canvas every token that stays is of white pixels, but for the row or column that is partly border."""
    one = processor(Tiling(thumbnail=False))
    for size in [(90, 40), (31, 64), (120, 33)]:
        image = one.see(Image.new("RGB", size, "white"))
        assert image.cut is not None
        light = image.views["pixels"][:, 0].reshape(-1, 4, 7, 4, 7).mean((2, 4))  # per token
        features = Features.of(light.reshape(-1, 1), [16] * image.cut.pieces, [(4, 4)] * image.cut.pieces)
        kept = assemble(features, [replace(image.cut, newline=False)]).tokens
        black, white = -one.model.encoder.mean[0] / one.model.encoder.std[0], light.max()  # type: ignore[attr-defined]
        assert kept.min() > black + 0.1 and (kept == white).float().mean() >= 0.5, size
        assert image.cut.trim == (0, 0) or light.min() < black + 0.1


def test_a_shrunk_map_is_the_interpolated_one() -> None:
    cut = Tiling(grids=((2, 2),), shrink_to=1).plan(56, 56, 28, TokenLayout.grid(4, 4))
    assert cut.grid == (4, 4)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    map_ = (10 * rows + columns).view(2, 4, 2, 4).transpose(1, 2).reshape(4, 16)
    tokens = torch.cat([torch.zeros(1, 16), map_]).reshape(-1, 1)
    whole = torch.arange(3.0)[:, None]  # a picture that is not cut, behind it
    features = Features.of(torch.cat([tokens, whole]), [16] * 5 + [3], [(4, 4)] * 5 + [(1, 3)])
    got = assemble(features, [cut, None], torch.tensor([-1.0]))
    middles = torch.arange(0.5, 8, 2)
    assert torch.equal(got.tokens[16:36].view(4, 5)[:, :4], 10 * middles[:, None] + middles) and torch.equal(got.tokens[36:], whole)
    assert got.lengths == (36, 3) and got.stream().grids == ((4, 4), (1, 3))


# ---- in a model ------------------------------------------------------------------------------------------------------------


def rows_of(one: VLMProcessor, pictures: Sequence[Picture]) -> dict[str, Any]:
    samples = {
        "vision": Sample("v", (user(pictures[0], "\nWhat colour?"), says("red and green"))),
        "text": Sample("t", (user("Hello"), says("Hello!"))),
        "several": Sample("s", (user(pictures[1], " and ", pictures[3], " or ", pictures[2], "?"), says("the left"))),
    }
    return {name: one.row(sample) for name, sample in samples.items()}


def gradients(model: VLM, *batches: dict[str, Any]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Summed gradients, and for each batch the order in which they arrived."""
    model.zero_grad(set_to_none=True)
    orders: list[list[str]] = []
    handles = [parameter.register_post_accumulate_grad_hook(lambda _, name=name: orders[-1].append(name)) for name, parameter in model.named_parameters()]
    for batch in batches:
        orders.append([])
        model(**batch).loss_sum.backward()
    for handle in handles:
        handle.remove()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}, orders


@pytest.mark.parametrize("tiling", ["default", "shrunk"])
def test_mixed_batches_are_their_rows_and_gradients_come_in_one_order(pictures: list[Picture], tiling: str) -> None:
    model = made()
    rows = rows_of(processor(TILINGS[tiling]), pictures)
    whole = VLMProcessor(spec(), 32, tiny.tokenizer(), PromptSpec(use="chatml"), "pad").row(Sample("p", (user(pictures[0], "?"), says("red"))))
    together, (order,) = gradients(model, collate([*rows.values(), whole], pad_id=0))
    alone, orders = gradients(model, *(collate([row], pad_id=0) for row in [*rows.values(), whole]))
    packed, (other,) = gradients(model, collate([type(whole).packed([*rows.values(), whole])], pad_id=0))
    assert all(found == order for found in [*orders, other]) and len(order) == len(set(order))
    for got in (together, packed):
        assert got.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(got[name], alone[name], rtol=1e-4, atol=1e-5 * float(alone[name].abs().max()) + 1e-6, msg=name)
    blind, _ = gradients(model, collate([rows["text"]], pad_id=0))
    assert together["newline.weight"].abs().max() > 0 and not blind["newline.weight"].any()


def test_a_model_without_a_newline_reads_tiles_without_one(pictures: list[Picture]) -> None:
    torch.manual_seed(0)
    model = first_model(spec(newline=False), 399)
    assert "newline.weight" not in model.state_dict()
    with torch.no_grad():
        assert len(model.see([processor(Tiling(newline=False)).see(pictures[0])]).tokens) == processor(Tiling(newline=False)).layout(90, 40).count
        with pytest.raises(CheckpointError, match=r"end in a newline, and the model has none.*model\.newline: true"):
            model.see([processor().see(pictures[0])])


def test_a_sketch_reads_the_header_alone(pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    one = processor()
    seen = [one.see(picture).layout for picture in pictures]
    monkeypatch.setattr("vlm.processor.open_picture", None)
    assert [one.sketch(picture).layout for picture in pictures] == seen and len({layout.count for layout in seen}) == 4
    assert picture_tokens(one.model, 32, "anyres", one.tiling) == (one.layout(28, 28).count, False)


def test_the_first_newline_is_as_small_as_an_embedding() -> None:
    torch.manual_seed(1)
    newline = vlm.tiles.Newline(4096)
    newline.reset_parameters()
    assert float(newline.weight.detach().std()) == pytest.approx(1 / 64, rel=0.05)


def test_a_connector_that_moves_tokens_is_refused() -> None:
    for layout in (TokenLayout.grid(4, 4, 1), TokenLayout((PATCH,) * 8, 4, 4), TokenLayout(())):
        with pytest.raises(ConfigurationError, match="a tile's tokens are no plain grid"):
            Tiling().plan(50, 50, 28, layout)


def test_the_policy_travels_with_the_processor(pictures: list[Picture], tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    one = processor(TILINGS["shrunk"])
    one.save_pretrained(tmp_path)
    other = VLMProcessor.from_pretrained(tmp_path)
    assert other.tiling == one.tiling == TILINGS["shrunk"] and other.policy == "anyres"
    left, right = one.see(pictures[0]), other.see(pictures[0])
    assert left.cut == right.cut and torch.equal(left.views["pixels"], right.views["pixels"])
    assert VLM.from_pretrained(tmp_path).newline is not None
    assert PolicySpec(use="anyres").tiling == Tiling() and PolicySpec().tiling is None


def test_a_cut_picture_goes_to_a_device_as_a_whole(pictures: list[Picture]) -> None:
    image: ImageInput = processor().see(pictures[0])
    moved = image.to(torch.device("cpu"), torch.bfloat16)
    assert moved.cut == image.cut and moved.views["pixels"].dtype == torch.bfloat16
    pieces = moved.pieces()
    assert len(pieces) == image.cut.pieces and all(piece.layout == TokenLayout.grid(4, 4) and piece.cut is None for piece in pieces)  # type: ignore[union-attr]
