"""The contract of an encoder, for every registered one."""

import json
import pickle
import random
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from ranks import assert_equal_steps, launch

from vlm import encoders
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.base import Encoder, EncoderSpec, Mode
from vlm.errors import ConfigurationError, EnvironmentProblem
from vlm.features import SUMMARY, Features, ImageInput, Level
from vlm.loading import first_model
from vlm.model import VLM

ARGUMENTS: dict[str, dict[str, Any]] = {"clip": {"config": tiny.tower_config("clip")}, "siglip": {"config": tiny.tower_config("siglip")}}
ARGUMENTS |= {"hybrid": tiny.hybrid_arguments(), "hybrid with clip": tiny.hybrid_arguments("clip")}
ARGUMENTS |= {f"hybrid {concat}": tiny.hybrid_arguments(concat=concat) for concat in ("feature", "sequence", "add")}
ARGUMENTS |= {"timm": {"name": "test_vit", "size": 32}, "timm stages": {"name": "test_efficientnet", "size": 64}}
ARGUMENTS |= {
    "open_clip": {"config": tiny.open_clip_config()},
    "open_clip pooler": {"config": tiny.open_clip_config(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2)},
}
ARGUMENTS |= {"open_clip resnet": {"config": tiny.open_clip_config(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64)}}
ARGUMENTS |= {"open_clip trunk": {"config": tiny.open_clip_config(timm_model_name="test_vit3", timm_pool="map", timm_proj="", image_size=32)}}
"""What makes a registered encoder small; one that is not listed is built with its defaults. Behind the name a variant of it."""
LARGEST = 20_000_000


@pytest.fixture(params=sorted({*encoders.registry.names(), *ARGUMENTS}), scope="module")
def spec(request: pytest.FixtureRequest) -> EncoderSpec:
    made = encoders.registry.get(request.param.split()[0])
    try:
        found = made(weights="random", **ARGUMENTS.get(request.param, {}))
    except TypeError as problem:
        pytest.skip(f"encoder {request.param} needs arguments that nobody can guess: {problem}")
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in found.build().parameters())
    if count > LARGEST:
        pytest.skip(f"encoder {request.param} has {count:,} parameters with its defaults; list small numbers in ARGUMENTS")
    return found


@pytest.fixture(scope="module")
def encoder(spec: EncoderSpec) -> Encoder:
    torch.manual_seed(0)
    built = spec.build()
    built.initialise()
    return built.eval()


def sizes(count: int = 40) -> list[tuple[int, int]]:
    draw = random.Random(7)
    extreme = [(1, 1), (1, 50), (50, 1), (4000, 30), (30, 4000), (28, 28)]
    return extreme + [(draw.randint(1, 300), draw.randint(1, 300)) for _ in range(count - len(extreme))]


def seen(spec: EncoderSpec, image: Image.Image, mode: Mode = "infer") -> ImageInput:
    return ImageInput(spec.preprocess(image, mode), *image.size, next(iter(spec.layout(*image.size, mode).values())))


def every(spec: EncoderSpec) -> dict[str, list[Level]]:
    """All hidden states of all streams."""
    return {stream: list(range(depth + 1)) for stream, depth in spec.levels.items()}


def flat(features: Features) -> list[torch.Tensor]:
    return [tensor for stream in features.streams.values() for tensor in stream.levels.values()]


def test_every_encoder_of_the_package_is_covered() -> None:
    assert set(encoders.registry._files()) <= set(ARGUMENTS)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_layout_counts_what_forward_gives(spec: EncoderSpec, encoder: Encoder, mode: Mode) -> None:
    images = [seen(spec, tiny.picture(seed=index, size=size), mode) for index, size in enumerate(sizes())]
    with torch.no_grad():
        features = encoder(images, every(spec))
    assert tuple(features.streams) == tuple(spec.streams) == tuple(spec.levels) == tuple(spec.widths)
    for name, stream in features.streams.items():
        layouts = [spec.layout(*size, mode)[name] for size in sizes()]
        assert stream.lengths == tuple(layout.count for layout in layouts)
        assert stream.grids == tuple((layout.rows, layout.columns) for layout in layouts)
        assert all(layout.roles[: stream.prefix] == (SUMMARY,) * stream.prefix and layout.roles.count(SUMMARY) == stream.prefix for layout in layouts)
        assert list(stream.levels) == list(range(spec.levels[name] + 1))
        for tokens in stream.levels.values():
            assert tokens.shape == (sum(stream.lengths), spec.widths[name])


def test_preprocess_is_deterministic(spec: EncoderSpec) -> None:
    image = tiny.picture(seed=3, size=(61, 40))
    for mode in ("train", "infer"):
        first, second = spec.preprocess(image, mode), spec.preprocess(image.copy(), mode)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert all(view.dtype == torch.float32 and view.ndim == 3 and torch.isfinite(view).all() for view in first.values())


def test_one_by_one_is_a_batch(spec: EncoderSpec, encoder: Encoder) -> None:
    images = [seen(spec, tiny.picture(seed=index, size=size)) for index, size in enumerate([(40, 30), (28, 90), (1, 1)])]
    with torch.no_grad():
        together = encoder(images, every(spec))
        alone = [encoder([image], every(spec)) for image in images]
    for name, stream in together.streams.items():
        for level, tokens in stream.levels.items():
            apart = torch.cat([one.streams[name].levels[level] for one in alone])
            assert torch.allclose(tokens, apart, rtol=1e-5, atol=1e-5), (name, level)
    assert not torch.allclose(flat(alone[0])[-1], flat(alone[2])[-1])


def test_negative_levels_count_from_behind(spec: EncoderSpec, encoder: Encoder) -> None:
    image = [seen(spec, tiny.picture(seed=1))]
    for stream, depth in spec.levels.items():
        with torch.no_grad():
            found = encoder(image, {stream: [depth, -1, 0, -depth - 1, max(0, depth - 1), -2]}).streams[stream].levels
        assert torch.equal(found[depth], found[-1]) and torch.equal(found[0], found[-depth - 1]) and torch.equal(found[max(0, depth - 1)], found[-2])


def test_gradients_reach_what_is_not_unused(spec: EncoderSpec, encoder: Encoder) -> None:
    images = [seen(spec, tiny.picture(seed=index)) for index in range(2)]
    for wanted in (every(spec), {stream: [-2] for stream in spec.streams}, {stream: [0] for stream in spec.streams}):
        encoder.zero_grad(set_to_none=True)
        sum(tensor.square().sum() for tensor in flat(encoder(images, wanted))).backward()  # type: ignore[union-attr]
        idle = {id(parameter) for parameter in encoder.unused(wanted)}
        for name, parameter in encoder.named_parameters():
            assert (parameter.grad is None) == (id(parameter) in idle), (name, wanted)


def test_groups_hold_every_parameter_once(spec: EncoderSpec, encoder: Encoder) -> None:
    grouped = [id(parameter) for parameters in encoder.groups().values() for parameter in parameters]
    everything = {id(parameter) for parameter in encoder.parameters()}
    assert len(grouped) == len(set(grouped)) and set(grouped) == everything
    assert {id(parameter) for parameter in encoder.unused(every(spec))} <= everything


def test_a_spec_is_frozen_and_travels_to_workers(spec: EncoderSpec) -> None:
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec and again.layout(50, 40, "train") == spec.layout(50, 40, "train")
    with pytest.raises(FrozenInstanceError):
        spec.path = "elsewhere"  # type: ignore[misc]


def test_it_builds_without_memory(spec: EncoderSpec, encoder: Encoder) -> None:
    with torch.device("meta"):
        empty = spec.build()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {name: tensor.shape for name, tensor in encoder.state_dict().items()}


def test_the_dummy_is_a_valid_picture(spec: EncoderSpec, encoder: Encoder) -> None:
    dummy = spec.dummy()
    real = spec.preprocess(tiny.picture(), "train")
    assert {name: view.dtype for name, view in dummy.views.items()} == {name: view.dtype for name, view in real.items()}
    features = encoder([dummy], every(spec))
    assert all(torch.isfinite(tensor).all() for tensor in flat(features))
    assert {name: stream.lengths for name, stream in features.streams.items()} == {
        name: (layout.count,) for name, layout in spec.layout(dummy.width, dummy.height, "train").items()
    }


def test_a_block_has_the_sizes_it_names(spec: EncoderSpec, encoder: Encoder) -> None:
    for index in range(min(spec.levels.values())):
        block = encoder.block(index)
        if block is None:
            pytest.skip("this tower has no blocks for a ladder")
        for linear in (block.query, block.key, block.value, block.out):
            assert linear.weight.shape == (block.width, block.width)
        assert block.fc1.weight.shape == (block.mlp_width, block.width) and block.fc2.weight.shape == (block.width, block.mlp_width)
        assert all(norm.weight.shape == (block.width,) and norm.eps == block.eps for norm in (block.norm1, block.norm2))
        assert block.width % block.heads == 0 and block.width in spec.widths.values()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_numbers_that_transformers_refuses(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)does not accept the encoder's config.*hidden_size.*encoder\.config"):
        encoders.registry.get(name)(config={"hidden_size": "wide"}, weights="random")
    with pytest.raises(ConfigurationError, match=rf"encoder {name} needs at least one block. got num_hidden_layers 0"):
        encoders.registry.get(name)(config={"num_hidden_layers": 0}, weights="random")


# ---- inside a VLM ----------------------------------------------------------------------------------------------------------

PICTURE = 399
"""The id that stands for a picture token."""


@pytest.fixture(scope="module")
def model(spec: EncoderSpec) -> VLM:
    """A whole model around the encoder."""
    torch.manual_seed(0)
    connector = HybridMLPSpec() if len(spec.streams) == 2 and "high" in spec.streams else MLPSpec()
    return first_model(ModelSpec(encoder=spec, connector=connector, llm=LLMSpec(config=tiny.llm_config(), weights="random")), PICTURE)


@torch.no_grad()
def test_saved_and_loaded(spec: EncoderSpec, model: VLM, tmp_path: Path) -> None:
    images = [seen(spec, tiny.picture(seed=index, size=size)) for index, size in enumerate([(40, 30), (7, 90)])]
    expected = model.eval().see(images).tokens
    model.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path).eval()
    assert again.spec.encoder == spec.form()
    own, back = model.state_dict(), again.state_dict()
    assert own.keys() == back.keys() and all(torch.equal(back[name], tensor) for name, tensor in own.items())
    assert torch.allclose(again.see(images).tokens, expected, atol=1e-6)


def test_text_only_rows_bring_all_gradients_in_the_same_order(spec: EncoderSpec, model: VLM) -> None:
    arrived: list[str] = []
    hooks = [parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name)) for name, parameter in model.named_parameters()]
    images = [seen(spec, tiny.picture(seed=index, size=size)) for index, size in enumerate([(40, 30), (7, 90)])]
    count = len(model.train().see(images).tokens)
    with_pictures = torch.tensor([[5, *[PICTURE] * count, 6, 7]])
    orders = []
    for ids, pictures in ((with_pictures, images), (torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), None)):
        arrived.clear()
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids.masked_fill(ids == PICTURE, -100), images=pictures).loss_sum.backward()
        orders.append(list(arrived))
        seen_by_loss = [bool(parameter.grad.any()) for name, parameter in model.named_parameters() if name.startswith("encoder.") and parameter.grad is not None]
        assert any(seen_by_loss) == (pictures is not None), "the picture in the place of none has no weight"
    for hook in hooks:
        hook.remove()
    idle = {id(parameter) for parameter in model.unused()}
    assert orders[0] == orders[1]
    assert set(orders[0]) == {name for name, parameter in model.named_parameters() if id(parameter) not in idle}


# ---- on two ranks ----------------------------------------------------------------------------------------------------------

SAM = "{weights: random, downsample_channels: [12, 16], config: {hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2, mlp_dim: 24, output_channels: 8, image_size: 32, patch_size: 8, window_size: 3, global_attn_indexes: [1]}}"
VIT = "weights: random, config: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3, num_attention_heads: 2, image_size: 28, patch_size: 14}"
OPEN = "embed_dim: 24, vision_cfg: {image_size: 28, patch_size: 14, width: 16, head_width: 8, layers: 3"
RUNS = {
    "clip": [f"model.encoder={{use: clip, {VIT}}}"],
    "clip in tiles": [f"model.encoder={{use: clip, {VIT}}}", "every_stage.images=anyres", "model.newline=true"],
    "siglip": [f"model.encoder={{use: siglip, {VIT}}}"],
    "hybrid": [f"model.encoder={{use: hybrid, high: {SAM}, low: {{use: siglip, {VIT}}}}}", "model.connector=hybrid_mlp"],
    "hybrid add": [f"model.encoder={{use: hybrid, concat: add, high: {SAM}, low: {{use: clip, {VIT}}}}}"],
    "timm": ["model.encoder={use: timm, name: test_vit, size: 32, weights: random}"],
    "timm beside a ladder": ["model.encoder={use: timm, name: test_vit, size: 32, weights: random}", "model.connector={use: qladder, queries: 2, then: {use: mlp}}"],
    "timm stages": ["model.encoder={use: timm, name: test_efficientnet, size: 64, weights: random}"],
    "open_clip": [f"model.encoder={{use: open_clip, weights: random, config: {{{OPEN}}}}}}}"],
    "open_clip pooler": [f"model.encoder={{use: open_clip, weights: random, config: {{{OPEN}, attentional_pool: true, attn_pooler_queries: 5, attn_pooler_heads: 2}}}}}}"],
}
"""Overrides of llava_tiny by encoder."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of one rank at ZeRO 0 and of two at ZeRO 3, with the weights behind one step by encoder."""
    root = tiny.data_root(tmp_path_factory.mktemp("data"))
    worker = Path(__file__).with_name("encoder_ranks.py")
    one, two = (launch(worker, root, tmp_path_factory.mktemp("step"), zero, ranks, json.dumps(RUNS)) for zero, ranks in ((0, 1), (3, 2)))
    return one, two


@pytest.mark.ranks
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_with_unequal_pictures_take_one_step(steps: tuple[Path, Path], name: str) -> None:
    """ZeRO 3 against one process, every parameter trained."""
    one, two = (folder / name for folder in steps)
    assert_equal_steps(one, two)


def test_every_encoder_is_taken_to_two_ranks() -> None:
    assert set(encoders.registry._files()) <= {name.split()[0] for name in RUNS}
