"""Encoders of open_clip and timm against their own libraries: hidden states, stages, pictures, first values, files; saved, loaded and trained inside a VLM. (The contract is test_encoders.py's.)"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import records
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import vlm
from vlm import encoders
from vlm.encoders.backbone import BackboneEncoder, BackboneSpec
from vlm.encoders.base import Encoder
from vlm.errors import CheckpointError, ConfigurationError, EnvironmentProblem
from vlm.features import ImageInput, TokenLayout
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import load_tokenizer, placeholder_id

pytest.importorskip("timm", reason="the extra openclip is not installed")
pytest.importorskip("open_clip", reason="the extra openclip is not installed")

PYRAMIDS = ("test_efficientnet", "test_convnext", "test_byobnet", "test_resnet", "test_mambaout", "mobilenetv2_035", "levit_128s", "swin_tiny_patch4_window7_224", "poolformer_s12")
"""By stages: convolutions, their final map wider than the last stage (MobileNetV2), tokens at the end (LeViT), channels last (Swin)."""
TRANSFORMERS = ("test_vit", "test_vit3", "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224")


def made(use: str, seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """A Spec and its encoder with drawn values, in evaluation mode."""
    spec = encoders.registry.get(use)(weights="random", **fields)
    torch.manual_seed(seed)
    encoder = spec.build()
    encoder.initialise()
    return spec, encoder.eval()


def seen(pixels: Tensor) -> list[ImageInput]:
    return [ImageInput({"pixels": one}, 1, 1, TokenLayout(())) for one in pixels]


def noise(spec: BackboneSpec, count: int = 2) -> Tensor:
    return torch.randn(count, 3, spec.side, spec.side)


def beside(encoder: BackboneEncoder) -> Any:
    """The library's model itself, with the same values and its own forward."""
    model = encoder.spec.construct()
    model.load_state_dict(encoder.tower.state_dict())
    return model.eval()


# ---- hidden states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_levels_are_timms_own(name: str) -> None:
    spec, encoder = made("timm", name=name)
    assert spec.streams == ("image",)
    pixels = noise(spec)
    first: list[Tensor] = []
    theirs = beside(encoder)
    theirs.blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    final, outputs = theirs.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True)
    levels = encoder(seen(pixels), {"image": [*range(spec.depth + 1), "final"]}).streams["image"].levels
    assert spec.depth == len(outputs) == len(theirs.blocks) and spec.prefix == theirs.num_prefix_tokens
    assert torch.equal(levels[0], first[0].flatten(0, 1))
    for index, (patches, prefix) in enumerate(outputs):
        assert torch.equal(levels[index + 1], torch.cat([prefix, patches], 1).flatten(0, 1)), index
    assert torch.equal(levels["final"], final.flatten(0, 1)) and torch.equal(levels["final"], theirs.forward_features(pixels).flatten(0, 1))


@pytest.mark.parametrize("name", PYRAMIDS)
@torch.no_grad()
def test_stages_are_timms_own(name: str) -> None:
    spec, encoder = made("timm", name=name)
    pixels, theirs = noise(spec), beside(encoder)
    maps = theirs.forward_intermediates(pixels, intermediates_only=True)
    assert spec.streams == ("features", *(f"stage{number}" for number in range(1, len(maps) + 1)))
    wanted = {stream: [-2] for stream in spec.streams}
    found = encoder(seen(pixels), wanted).streams
    for number, one in enumerate(maps, 1):
        stream = found[f"stage{number}"]
        assert torch.equal(stream.levels[-2], one.flatten(2).transpose(1, 2).flatten(0, 1)), number
        assert stream.grids == (tuple(one.shape[2:]),) * 2 and spec.layout(5, 900, "train")[f"stage{number}"].count == stream.lengths[0] == one[0, 0].numel()
    final = theirs.forward_features(pixels)
    flat = final.flatten(0, -2) if final.ndim == 3 or final.shape[-1] == spec.width else final.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.equal(found["features"].levels[-2], flat)
    alone = encoder(seen(pixels), {"stage2": [-1]}).streams
    assert list(alone) == ["stage2"] and torch.allclose(alone["stage2"].levels[-1], found["stage2"].levels[-2], atol=1e-6)


@torch.no_grad()
def test_levels_are_open_clips_own() -> None:
    spec, encoder = made("open_clip", config=tiny.open_clip_config())
    pixels, theirs = noise(spec), beside(encoder)
    theirs.output_tokens = True
    found = theirs.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
    levels = encoder(seen(pixels), {"image": [0, 1, 2, 3, "final"]}).streams["image"].levels
    assert torch.equal(levels[0], theirs._embeds(pixels).flatten(0, 1))
    for index, (patches, prefix) in enumerate(zip(found["image_intermediates"], found["image_intermediates_prefix"], strict=True), 1):
        assert torch.allclose(levels[index], torch.cat([prefix, patches], 1).flatten(0, 1), atol=1e-6), index
    pooled, tokens = theirs(pixels)
    final = levels["final"].view(2, 5, 16)
    assert torch.allclose(final[:, 1:], tokens, atol=1e-6) and torch.allclose(final[:, 0] @ theirs.proj, pooled, atol=1e-6)


@torch.no_grad()
def test_cocas_pooler_is_a_stream() -> None:
    spec, encoder = made("open_clip", config=tiny.open_clip_config(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2))
    assert spec.streams == ("image", "pooled")
    pixels, theirs = noise(spec), beside(encoder)
    theirs.output_tokens = True
    pooled, tokens = theirs(pixels)
    stream = encoder(seen(pixels), {"pooled": ["final"]}).streams["pooled"]
    assert torch.allclose(stream.patches("final")[0], tokens.flatten(0, 1), atol=1e-6) and stream.lengths == (5, 5)
    assert torch.allclose(stream.levels["final"].view(2, 5, 24)[:, 0] @ theirs.proj, pooled, atol=1e-6)


@torch.no_grad()
def test_open_clips_resnet_and_trunks() -> None:
    spec, encoder = made("open_clip", config=tiny.open_clip_config(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64))
    pixels, theirs = noise(spec), beside(encoder)
    before: list[Tensor] = []
    theirs.attnpool.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    theirs(pixels)
    levels = encoder(seen(pixels), {"features": [-1], "stage5": [-1]}).streams
    assert torch.equal(levels["features"].levels[-1], before[0].flatten(2).transpose(1, 2).flatten(0, 1))
    assert torch.equal(levels["features"].levels[-1], levels["stage5"].levels[-1])
    spec, encoder = made("open_clip", config=tiny.open_clip_config(timm_model_name="test_convnext", image_size=64))
    theirs = beside(encoder)
    assert torch.equal(
        encoder(seen(pixels), {"features": [0]}).streams["features"].levels[0],
        theirs.trunk.forward_features(pixels).flatten(2).transpose(1, 2).flatten(0, 1),
    )


# ---- first values, modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("use", "fields"), [("timm", {"name": "test_efficientnet"}), ("timm", {"name": "test_vit"}), ("open_clip", {"config": tiny.open_clip_config()})])
def test_first_values_are_the_librarys(use: str, fields: dict[str, Any]) -> None:
    spec, encoder = made(use, seed=3, **fields)
    torch.manual_seed(3)
    spec.build()  # what `made` draws before
    expected = spec.construct().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.tower.state_dict().items())


def test_batch_norm_keeps_its_statistics() -> None:
    spec, encoder = made("timm", name="test_efficientnet", size=64)
    pixels = noise(spec, 3)
    encoder.train()
    assert encoder.training and not any(module.training for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    together = encoder(seen(pixels), {"features": [-1]}).streams["features"].levels[-1]
    alone = encoder(seen(pixels[:1]), {"features": [-1]}).streams["features"].levels[-1]
    assert torch.allclose(together[: len(alone)], alone, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


def test_what_an_adaptation_adds_to_an_idle_block_is_idle() -> None:
    _, encoder = made("timm", name="test_vit", size=32)
    encoder.tower.blocks[5].attn.qkv.extra = nn.Linear(2, 2)
    encoder.tower.blocks[0].attn.qkv.extra = nn.Linear(2, 2)
    idle = {id(parameter) for parameter in encoder.unused({"image": [-2]})}
    names = {name for name, parameter in encoder.named_parameters() if id(parameter) in idle}
    assert "tower.blocks.5.attn.qkv.extra.weight" in names and "tower.blocks.0.attn.qkv.extra.weight" not in names and "tower.norm.weight" in names


@pytest.mark.parametrize(("use", "fields"), [("timm", {"name": "test_vit", "size": 32}), ("open_clip", {"config": tiny.open_clip_config()})])
@torch.no_grad()
def test_a_block_computes_what_its_tower_does(use: str, fields: dict[str, Any]) -> None:
    spec, encoder = made(use, **fields)
    levels = encoder(seen(noise(spec)), {"image": [1, 2]}).streams["image"].levels
    block = encoder.block(1)
    x = levels[1].view(2, -1, block.width)

    def heads(linear: nn.Linear) -> Tensor:
        return linear(block.norm1(x)).view(2, x.shape[1], block.heads, -1).transpose(1, 2)

    mixed = nn.functional.scaled_dot_product_attention(heads(block.query), heads(block.key), heads(block.value))
    x = x + block.out(mixed.transpose(1, 2).flatten(2))
    assert block.activation == "gelu"
    x = x + block.fc2(nn.functional.gelu(block.fc1(block.norm2(x))))
    assert torch.allclose(x.flatten(0, 1), levels[2], atol=1e-5)


# ---- pictures ------------------------------------------------------------------------------------------------------------

SIZES = ((61, 40), (40, 61), (300, 7), (1, 1), (500, 333), (160, 160))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("interpolation", "part"), [("bicubic", 0.875), ("bilinear", 1.0), ("bicubic", 0.95)])
def test_pictures_are_prepared_as_timm_does(mode: str, interpolation: str, part: float) -> None:
    from timm.data.transforms_factory import create_transform

    numbers = {"input_size": (3, 64, 64), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1), "interpolation": interpolation, "crop_pct": part, "crop_mode": mode}
    spec = encoders.registry.get("timm")(weights="random", config={"architecture": "test_convnext", "pretrained_cfg": numbers})
    theirs: Any = create_transform(**numbers)  # type: ignore[arg-type]
    for index, size in enumerate(SIZES):
        image = tiny.picture(seed=index, size=size)
        assert torch.allclose(spec.preprocess(image, "train")["pixels"], theirs(image), atol=1e-5), size


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pictures_are_prepared_as_open_clip_does(mode: str, tmp_path: Path) -> None:
    from open_clip.transform import image_transform

    numbers = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1], "interpolation": "bicubic", "resize_mode": mode, "fill_color": 9}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.open_clip_config(), "preprocess_cfg": numbers}))
    spec = encoders.registry.get("open_clip")(path=str(tmp_path))
    theirs: Any = image_transform(28, False, **numbers)  # type: ignore[arg-type]
    for index, size in enumerate(SIZES):
        image = tiny.picture(seed=index, size=size)
        if mode == "longest" and max(size) / min(size) > 28:  # open_clip itself fails on it
            continue
        assert torch.allclose(spec.preprocess(image, "train")["pixels"], theirs(image), atol=1e-5), size


def test_names_bring_their_data_config() -> None:
    siglip = encoders.registry.get("open_clip")(name="ViT-B-16-SigLIP", weights="random")
    assert (siglip.mean, siglip.fit, siglip.size, siglip.prefix, siglip.layout(9, 9, "infer")["image"].count) == ((0.5, 0.5, 0.5), "squash", 224, 0, 196)
    mobile = encoders.registry.get("timm")(name="mobilenetv2_100", weights="random", crop=1.0)
    assert (mobile.mean, mobile.crop, mobile.interpolation) == ((0.485, 0.456, 0.406), 1.0, "bicubic")
    assert mobile.layout(9, 9, "infer")["stage4"].count == 196 and mobile.widths["features"] == 1280


# ---- files ---------------------------------------------------------------------------------------------------------------


def loaded(spec: BackboneSpec) -> Encoder:
    """The encoder with the weights at its path, as loading.py reads them."""
    from vlm.loading import _first_values

    encoder = spec.build()
    _first_values(encoder, spec.path, spec.weights, encoder.initialise, encoder.weights_key, read=encoder.tensors)
    return encoder.eval()


def timm_folder(folder: Path, name: str = "test_efficientnet", **extra: Tensor) -> Any:
    """A repository as timm pushes it, classifier included."""
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7)
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d):
            nn.init.normal_(one.running_mean, std=0.1)  # type: ignore[arg-type]
    (folder / "config.json").write_text(
        json.dumps({"architecture": name, "num_classes": 7, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "input_size": [3, 96, 96]}})
    )
    save_file({**model.state_dict(), **extra}, folder / "model.safetensors")
    return model.eval()


@torch.no_grad()
def test_weights_of_timm(tmp_path: Path) -> None:
    model = timm_folder(tmp_path)
    spec = encoders.registry.get("timm")(path=str(tmp_path))
    assert (spec.size, spec.mean) == (96, (0.1, 0.2, 0.3))
    pixels = noise(spec)
    expected = model.forward_features(pixels).flatten(2).transpose(1, 2).flatten(0, 1)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        encoder = loaded(encoders.registry.get("timm")(path=str(place)))
        assert torch.equal(encoder(seen(pixels), {"features": [-1]}).streams["features"].levels[-1], expected)


def test_weights_of_another_model_stop(tmp_path: Path) -> None:
    timm_folder(tmp_path, more=torch.zeros(2))
    with pytest.raises(CheckpointError, match="1 unexpected .more"):
        loaded(encoders.registry.get("timm")(path=str(tmp_path)))
    with pytest.raises(CheckpointError, match="missing"):
        loaded(encoders.registry.get("timm")(path=str(tmp_path), name="test_convnext"))


@torch.no_grad()
def test_weights_of_open_clip(tmp_path: Path) -> None:
    import open_clip

    numbers = tiny.open_clip_config()
    torch.manual_seed(1)
    model = open_clip.CLIP(**numbers, text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 3}).eval()  # type: ignore[arg-type]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": numbers, "preprocess_cfg": {}}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    save_file({"vision_model.other": torch.zeros(1)}, tmp_path / "model.safetensors")  # transformers' form of the same model
    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save(model.visual.state_dict(), alone / "open_clip_pytorch_model.bin")  # its keys are those of a text tower, too
    specs = [encoders.registry.get("open_clip")(path=str(tmp_path)), encoders.registry.get("open_clip")(path=str(tmp_path / "open_clip_model.safetensors"))]
    specs += [
        encoders.registry.get("open_clip")(path=str(alone), config=numbers),
        encoders.registry.get("open_clip")(path=str(alone / "open_clip_pytorch_model.bin"), config=numbers),
    ]
    pixels = noise(specs[0])
    visual: Any = model.visual
    expected = visual._embeds(pixels).flatten(0, 1)
    for spec in specs:
        assert torch.equal(loaded(spec)(seen(pixels), {"image": [0]}).streams["image"].levels[0], expected)


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm, open_clip = encoders.registry.get("timm"), encoders.registry.get("open_clip")
    with pytest.raises(ConfigurationError, match="no model 'mobilenetv2_10'.*did you mean .*mobilenetv2_100"):
        timm(name="mobilenetv2_10")
    with pytest.raises(ConfigurationError, match="no tag 'nonsense'"):
        timm(name="convnext_tiny.nonsense")
    with pytest.raises(ConfigurationError, match="did you mean ViT-B-16"):
        open_clip(name="ViT-B16")
    with pytest.raises(ConfigurationError, match="no release 'nonsense'"):
        open_clip(name="ViT-B-16", tag="nonsense")
    with pytest.raises(ConfigurationError, match="has no model 'hf-hub:"):  # would be fetched
        open_clip(name="hf-hub:somebody/something")
    with pytest.raises(ConfigurationError, match="keeps every patch"):
        timm(config={"architecture": "test_vit", "model_args": {"patch_drop_rate": 0.5}})
    with pytest.raises(ConfigurationError, match="does not accept the encoder's numbers"):
        timm(config={"architecture": "test_vit", "model_args": {"nonsense": 1}})
    with pytest.raises(ConfigurationError, match="which tower of open_clip"):
        open_clip(path=str(tmp_path))

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("vlm.encoders.backbone.import_module", absent)
    for part in (timm, open_clip):
        with pytest.raises(EnvironmentProblem, match=r"needs the package .*vlm\[openclip\]"):
            part(name="test_vit")
    assert importlib.import_module("timm")


# ---- inside a VLM --------------------------------------------------------------------------------------------------------

ENCODERS = {
    "cnn": "{use: timm, name: test_efficientnet, size: 64, weights: random}",
    "windows": "{use: timm, config: {architecture: swin_tiny_patch4_window7_224, model_args: {embed_dim: 12, depths: [1, 2], num_heads: [2, 4], window_size: 4}}, size: 64, weights: random}",
    "transformer": "{use: open_clip, config: {embed_dim: 24, vision_cfg: {image_size: 28, patch_size: 14, width: 16, head_width: 8, layers: 3}}, weights: random}",
}
TRAINED = "stages.instruct.train={encoder: 1.0e-3, connector: 1.0e-3, llm: 1.0e-3}"


def compose(root: Path, encoder: str, *more: str) -> Any:
    return vlm.compose("llava_tiny", f"data_root={root}", f"model.encoder={ENCODERS[encoder]}", TRAINED, *more)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_saved_and_loaded(root: Path, tmp_path: Path, encoder: str) -> None:
    run = compose(root, encoder)
    model = first_model(run.model, placeholder_id(load_tokenizer(run.model))).eval()
    for buffer in model.encoder.buffers():
        if buffer.is_floating_point() and buffer.numel() > 1:
            buffer += 0.1 * torch.rand_like(buffer) * (buffer.ndim == 1)  # statistics as after training
    images = [ImageInput(run.model.encoder.preprocess(tiny.picture(seed=1), "infer"), 40, 30, TokenLayout(()))]
    model.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, again.encoder.state_dict()[name]) for name, value in model.encoder.state_dict().items())
    assert torch.allclose(model.see(images).tokens, again.see(images).tokens, atol=1e-6)
    assert again.spec.encoder.levels == run.model.encoder.levels


@pytest.mark.parametrize("encoder", ["cnn", "transformer"])
def test_trains_and_answers(root: Path, tmp_path: Path, encoder: str) -> None:
    run = compose(root, encoder, f"runs={tmp_path}")
    folder = vlm.fit(run)
    losses = [record["loss"] for record in records(folder)]
    assert len(losses) == 8 and all(0 < loss < 20 for loss in losses)
    before, after = (dict(VLM.from_pretrained(folder / place).encoder.named_parameters()) for place in ("stages/align", "export"))
    model, processor = vlm.load(folder)
    idle = {id(parameter) for parameter in model.encoder.unused(model.reads)}
    names = {name for name, parameter in model.encoder.named_parameters() if id(parameter) in idle}
    assert {name for name, value in before.items() if torch.equal(value, after[name])} == names
    asked = ("What colour is the picture?", [Image.open(root / "img" / "0.png").convert("RGB")])
    said = vlm.answer(model, processor, *asked, max_new_tokens=16)
    assert said and said == vlm.answer(*vlm.load(folder / "stages" / "instruct"), *asked, max_new_tokens=16)


@pytest.mark.ranks
@pytest.mark.parametrize("encoder", ["windows", "transformer"])
def test_two_ranks_at_zero_3_are_one(root: Path, tmp_path: Path, encoder: str) -> None:
    """Construction while ZeRO 3 partitions, parameters that modules hold themselves, packed attention projections, tables that no file holds."""
    one = vlm.fit(compose(root, encoder, f"runs={tmp_path}", "name=one"))
    overrides = [f"data_root={root}", f"model.encoder={ENCODERS[encoder]}", TRAINED, f"runs={tmp_path}", "name=two", "every_stage.deepspeed=zero3"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(Path(sys.executable).with_name("vlm")), "train", "llava_tiny", *overrides, "--nproc", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [[record["loss"] for record in records(folder)] for folder in (one, tmp_path / "two")]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=2e-5)
