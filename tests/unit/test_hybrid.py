"""DeepSeek-VL's pair: attention without N x N tensors, first weights of each tower, fusion, picture geometry, and the aligner's layout."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import records
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SamVisionConfig, SamVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.sam.modeling_sam import SamVisionAttention

import vlm
from vlm.configuration import VLMConfig
from vlm.connectors.base import Link
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.encoders.base import EncoderSpec
from vlm.encoders.hybrid import HybridEncoder, HybridSpec, SAMSpec
from vlm.encoders.sam import GlobalAttention, SAMTower
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.features import Features, ImageInput, Stream, TokenLayout
from vlm.initial import first_values
from vlm.letterbox import fit_square, inner_size
from vlm.train.check import check_run
from vlm.train.folder import absolute
from vlm.weights.deepseek_keys import from_official, to_official


def spec_of(**fields: Any) -> HybridSpec:
    """The tiny pair with other fields."""
    arguments: dict[str, Any] = {**tiny.hybrid_arguments(), **fields}
    return HybridSpec(**arguments)


def sam_of(**fields: Any) -> SAMSpec:
    """The tiny pair's high tower with other fields."""
    return replace(spec_of().high, **fields)


def made(low: str = "siglip", **fields: Any) -> HybridEncoder:
    torch.manual_seed(0)
    encoder = spec_of(**tiny.hybrid_arguments(low), **fields).build()
    first_values(encoder, encoder.initialise)
    with torch.no_grad():
        encoder.high.alpha.fill_(0.7)
    return encoder.eval()


def seen(spec: EncoderSpec, size: tuple[int, int] = (40, 30), seed: int = 0) -> ImageInput:
    return ImageInput(spec.preprocess(tiny.picture(seed=seed, size=size), "infer"), *size, TokenLayout(()))


# ---- attention over the whole grid -----------------------------------------------------------------------------------------


def attention(kind: type[nn.Module], built: int, heads: int = 3, width: int = 24) -> Any:
    torch.manual_seed(1)
    made = kind(SamVisionConfig(hidden_size=width, num_attention_heads=heads, image_size=built * 16), 0)  # type: ignore[call-arg]
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("grid, built", [((7, 7), 7), ((9, 21), 21), ((4, 8), 6), ((10, 3), 5)])
def test_folded_attention_equals_explicit_scores(grid: tuple[int, int], built: int) -> None:
    found = []
    for kind in (SamVisionAttention, GlobalAttention):
        module = attention(kind, built)
        x = torch.randn(2, *grid, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        output = module(x)[0]
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        found.append({"output": output, "x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}})
    explicit, folded = found
    for name, expected in explicit.items():
        assert (folded[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + (1e-5 if name == "qkv.bias" else 0), name  # a key's bias has no gradient but noise


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_tensor_is_as_large_as_the_scores_of_one_head() -> None:
    tokens = 32 * 32
    sizes = {}
    for kind in (SamVisionAttention, GlobalAttention):
        module = attention(kind, 32, heads=12, width=96)
        x = torch.randn(1, 32, 32, 96, requires_grad=True)
        with Largest() as largest:
            module(x)[0].sum().backward()
        sizes[kind] = largest.elements
    assert sizes[SamVisionAttention] == 12 * tokens**2, "the measure sees the explicit scores"
    assert sizes[GlobalAttention] < tokens**2


# ---- towers and their first weights ----------------------------------------------------------------------------------------


def test_published_parameters_and_tokens() -> None:
    spec = vlm.compose("llava_1.5_7b", "model.encoder=sam_b_siglip_l_1024", "model.connector=hybrid_mlp").model.encoder
    with torch.device("meta"):
        tower = spec.build()
    counts = {name: sum(parameter.numel() for parameter in found) for name, found in tower.groups().items()}
    assert counts == {"high": 88_883_456, "high.neck": 2 * 787_456 + 1, "high.downsamples": 5_898_240, "low": 303_688_704}
    assert sum(parameter.numel() for parameter in tower.high.parameters()) == 96_356_609  # type: ignore[union-attr]
    low: Any = spec.low  # type: ignore[attr-defined]
    with torch.device("meta"):
        stored = replace(low, config={**low.config, "vision_use_head": True}).build()
    assert sum(parameter.numel() for parameter in stored.parameters()) == 316_283_904, "with the pooling head that official files hold"
    assert spec.layout(1024, 1024, "infer") == spec.layout(3000, 20, "infer")
    assert {name: (layout.count, layout.rows) for name, layout in spec.layout(3000, 20, "infer").items()} == {"high": (576, 24), "low": (576, 24)}


def test_a_fresh_tower_is_alive_and_its_second_neck_waits() -> None:
    torch.manual_seed(0)
    encoder = spec_of().build()
    first_values(encoder, encoder.initialise)
    high: Any = encoder.high
    assert high(torch.randn(1, 3, 32, 32)).std() > 1e-3
    assert all(torch.equal(tensor, high.neck_hd.state_dict()[name]) for name, tensor in high.trunk.neck.state_dict().items())
    assert high.alpha == 0 and not high.trunk.pos_embed.any() and not any(layer.attn.rel_pos_h.any() for layer in high.trunk.layers)


def public_sam(folder: Path, kind: str, **more: Tensor) -> dict[str, Tensor]:
    """A plain SAM of the tiny numbers in a folder, in transformers' names or in its own, beside a decoder that nobody here reads."""
    torch.manual_seed(5)
    config = SamVisionConfig(**dict(sam_of().config or {}))
    tensors = {name: torch.randn_like(tensor) for name, tensor in SamVisionModel(config).state_dict().items()}
    if kind == "own":
        official = to_official({f"high.trunk.{name.removeprefix('vision_encoder.')}": tensor for name, tensor in tensors.items()})
        tensors = {name.replace("vision_tower_high.vision_tower.", "image_encoder."): tensor for name, tensor in official.items()}
    folder.mkdir()
    save_file({**tensors, "mask_decoder.iou_token.weight": torch.zeros(1), "prompt_encoder.not_a_point_embed.weight": torch.zeros(1), **more}, folder / "model.safetensors")
    return tensors


def loaded(folder: Path, **fields: Any) -> SAMTower:
    encoder = spec_of(high=sam_of(path=str(folder), weights="path"), **fields).build()
    first_values(encoder, encoder.initialise)
    return encoder.high


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_start_from_a_plain_sam(tmp_path: Path, kind: str) -> None:
    tensors = public_sam(tmp_path / "sam", kind)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"2 tensors are never used.*mask_decoder.iou_token.weight, prompt_encoder"):
        tower = loaded(tmp_path / "sam")
    own = {SAMTower.weights_key(name): tensor for name, tensor in tensors.items()}
    assert own.keys() == {name for name in tower.state_dict() if name.startswith("trunk.")}
    assert all(torch.equal(tower.state_dict()[str(name)], tensor) for name, tensor in own.items())
    assert all(torch.equal(tensor, own[f"trunk.neck.{name}"]) for name, tensor in tower.neck_hd.state_dict().items()), "copied after loading"
    with pytest.warns(UserWarning, match="never used"):
        official = loaded(tmp_path / "sam", official=True)
    assert not torch.equal(official.neck_hd.conv1.weight, own["trunk.neck.conv1.weight"]) and official.neck_hd.conv1.weight.std() > 0.01
    assert tower.alpha == 0 and all(conv.weight.std() > 0.01 for conv in tower.downsamples)  # type: ignore[union-attr,operator]


def test_where_first_weights_came_from_is_looked_at_and_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public_sam(tmp_path / "sam", "own")
    (tmp_path / "pair.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    data = f"data_root={tiny.data_root(tmp_path / 'data')}"
    run = vlm.compose("pair.yaml", data, "model.encoder.high={weights: path, path: sam}", "model.encoder.low={weights: path, path: no/such}")
    report = check_run(run)
    assert "model.encoder.low.path: no/such is neither a folder nor a cached hub snapshot" in report.not_checked
    assert not any("encoder.high" in str(line) for line in (*report.not_checked, *report.problems))
    encoder: Any = absolute(run).model.encoder
    assert (encoder.high.path, encoder.low.path) == (str(tmp_path / "sam"), "no/such")
    assert (encoder.form().high, encoder.form().low) == (replace(encoder.high, path=None), replace(encoder.low, path=None))
    assert "path" not in json.dumps(VLMConfig.of(replace(run.model, encoder=encoder), None, 1).encoder).replace('"weights": "path"', "").replace('"path": null', "")


def test_a_check_says_whether_transformers_has_a_class_for_it(tmp_path: Path) -> None:
    (tmp_path / "pair.yaml").write_text(RUN)
    data = f"data_root={tiny.data_root(tmp_path / 'data')}"
    fits = check_run(vlm.compose(str(tmp_path / "pair.yaml"), data, "model.encoder.high.downsample_channels=[16,32]"))
    assert fits.exports["deepseek_vl_hybrid"] == "transformers' DeepseekVLHybridForConditionalGeneration"
    assert list(check_run(vlm.compose(str(tmp_path / "pair.yaml"), data)).impossible) == ["llava"]


def test_a_tower_that_has_been_trained_keeps_its_second_neck(tmp_path: Path) -> None:
    tower = made().high
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.uniform_()
    official = {name.removeprefix("vision_tower_high.vision_tower."): tensor for name, tensor in to_official({f"high.{k}": v for k, v in tower.state_dict().items()}).items()}
    save_file({name: tensor.contiguous() for name, tensor in official.items()}, tmp_path / "model.safetensors")
    again = loaded(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tower.state_dict().items())


def test_a_sam_that_does_not_fit(tmp_path: Path) -> None:
    public_sam(tmp_path / "more", "own", **{"image_encoder.blocks.3.norm1.weight": torch.ones(16)})
    with pytest.warns(UserWarning, match="never used"), pytest.raises(CheckpointError, match=r"1 unexpected \(trunk.layers.3.layer_norm1.weight\)"):
        loaded(tmp_path / "more")
    public_sam(tmp_path / "part", "own", **{"neck_hd.0.weight": torch.ones(8, 16, 1, 1)})
    with pytest.warns(UserWarning, match="never used"), pytest.raises(CheckpointError, match=r"5 missing \(neck_hd.conv2.weight"):
        loaded(tmp_path / "part")
    public_sam(tmp_path / "twice", "own", **{"vision_encoder.layers.0.mlp.lin1.bias": torch.ones(24)})
    with pytest.raises(CheckpointError, match="holds a tensor twice"):
        loaded(tmp_path / "twice")
    encoder = spec_of(high=sam_of(weights="path")).build()
    with pytest.raises(ConfigurationError, match=r"high tower are wanted.*encoder.high.path"):
        first_values(encoder, encoder.initialise)


def test_the_low_tower_leaves_its_pooling_head_behind(tmp_path: Path) -> None:
    numbers = tiny.tower_config("siglip")
    torch.manual_seed(3)
    source = SiglipVisionModel(SiglipVisionConfig(**numbers))
    source.save_pretrained(tmp_path)
    low = SigLIPSpec(config=numbers | {"vision_use_head": False}, path=str(tmp_path))
    encoder = spec_of(low=low).build()
    with pytest.warns(UserWarning, match=r"tensors are never used by the SigLIPEncoder.*head"):
        first_values(encoder, encoder.initialise)
    assert torch.equal(encoder.low.tower.post_layernorm.weight, source.state_dict()["post_layernorm.weight"])  # type: ignore[union-attr]


def test_official_names_come_back() -> None:
    low = SigLIPSpec(config=tiny.tower_config("siglip", vision_use_head=False), weights="random")
    encoder = spec_of(low=low).build()
    first_values(encoder, encoder.initialise)
    own = encoder.state_dict()
    official = to_official(own)
    dropped: list[str] = []
    back = dict(from_official([*official.items(), ("high_layer_norm.weight", torch.ones(2)), ("vision_tower_low.vision_tower.attn_pool.latent", torch.ones(2))], dropped))
    assert back.keys() == own.keys() and all(torch.equal(back[name], tensor) for name, tensor in own.items())
    assert dropped == ["high_layer_norm.weight", "vision_tower_low.vision_tower.attn_pool.latent"]
    assert "vision_tower_low.vision_tower.blocks.0.attn.qkv.weight" in official and official["vision_tower_low.vision_tower.pos_embed"].shape == (1, 4, 16)
    assert dict(from_official([("vision_tower_low.vision_tower.new", torch.ones(1))], dropped)).keys() == {"vision_tower_low.vision_tower.new"}


def test_a_sam_with_positions_takes_one_size() -> None:
    tower = made().high
    with pytest.raises(ConfigurationError, match=r"positions for one size.*got 3 x 8 patches; expected 4 x 4"):
        tower(torch.zeros(1, 3, 24, 64))


def test_a_sam_without_a_global_block_is_refused() -> None:
    numbers = {**sam_of().numbers(), "global_attn_indexes": []}
    with pytest.raises(ConfigurationError, match="no global block"):
        SAMTower(SamVisionConfig(**numbers), (), (4, 4))


# ---- fusion ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["siglip", "clip"])
def test_fused_streams_are_made_of_the_two(low: str) -> None:
    apart = made(low=low)
    images = [seen(apart.spec, seed=seed) for seed in range(3)]
    with torch.no_grad():
        pair = apart(images, {"high": [0], "low": [-2]})
        high, coarse = pair.stream("high").levels[0].view(3, 4, 16), pair.stream("low").patches(-2)[0].view(3, 4, 16)
        fused = {"feature": torch.cat([high, coarse], 2), "sequence": torch.cat([high, coarse], 1), "add": high + coarse}
        for concat, expected in fused.items():
            encoder = made(low=low, concat=concat)
            assert torch.equal(encoder(images, {"image": [-2]}).stream().levels[-2], expected.flatten(0, 1)), concat


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"concat": "add", "high": sam_of(downsample_channels=(12, 20))}, "one width.*20 high, 16 low"),
        ({"concat": "sequence", "high": sam_of(downsample_channels=(12, 20))}, "one width"),
        ({"concat": "feature", "high": sam_of(downsample_channels=(16,))}, "one grid.*4 x 4 high, 2 x 2 low"),
        ({"path": "somewhere"}, r"no path of its own.*high\.path"),
        ({"high": SAMSpec(config={"image_size": 8, "patch_size": 4})}, "image_size 8"),
        ({"high": SAMSpec(config={"hidden_size": "wide"})}, "does not accept"),
    ],
)
def test_what_does_not_fit_together(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        spec_of(**fields)


def test_the_map_is_resized_to_four_times_the_low_grid_or_as_told() -> None:
    assert spec_of().interpolated() == (8, 8)
    fixed = spec_of(high=sam_of(interpolate=(10, 7)))
    assert (fixed.high_layout().rows, fixed.high_layout().columns) == (3, 2)
    assert fixed.build().high(torch.randn(1, 3, 32, 32)).shape == (1, 16, 3, 2)


def test_a_stream_that_nobody_reads_is_not_computed() -> None:
    encoder = made()
    with torch.no_grad():
        assert list(encoder([seen(encoder.spec)], {"low": [1]}).streams) == ["low"]
    assert {id(parameter) for parameter in encoder.unused({"low": ["final"]})} >= {id(parameter) for parameter in encoder.high.parameters()}
    assert {id(parameter) for parameter in encoder.unused({"high": [0]})} == {id(parameter) for parameter in encoder.low.parameters()}


# ---- pictures --------------------------------------------------------------------------------------------------------------


def test_sizes_under_both_rules() -> None:
    assert inner_size(49, 49, 1024, "trunc") == (1024, 1024), "49 * (1024 / 49) is below 1024"
    assert (inner_size(100, 33, 48, "trunc"), inner_size(100, 33, 48, "round")) == ((48, 15), (48, 16))
    assert [inner_size(256, side, 384, "round")[1] for side in (11, 13)] == [16, 20], "ties go to even"
    assert [inner_size(4000, 30, 1024, rule) for rule in ("trunc", "round")] == [(1024, 14), (1024, 14)]


def test_the_picture_lies_in_the_middle_of_its_colour() -> None:
    square = fit_square(Image.new("RGB", (64, 22), (9, 9, 9)), 48, (122, 116, 104))
    assert square.size == (48, 48)
    assert [square.getpixel((5, row)) for row in (15, 16, 31, 32)] == [(122, 116, 104), (9, 9, 9), (9, 9, 9), (122, 116, 104)]


def test_the_low_view_is_made_before_or_after_rounding() -> None:
    image = tiny.picture(seed=4, size=(32, 32))
    views = {rule: spec_of(rounding=rule).preprocess(image, "infer") for rule in ("trunc", "round")}
    assert torch.equal(views["trunc"]["high"], views["round"]["high"])
    levels = {rule: (view["low"] * 0.5 + 0.5) * 255 for rule, view in views.items()}
    assert (levels["round"] - levels["round"].round()).abs().max() < 1e-3 < (levels["trunc"] - levels["trunc"].round()).abs().max()
    assert (levels["round"] - levels["trunc"]).abs().max() < 1.1
    sharper = spec_of(rounding="round", resample="bicubic").preprocess(image, "infer")
    assert not torch.equal(sharper["low"], views["round"]["low"])


# ---- the aligner, and a whole run ------------------------------------------------------------------------------------------


def test_the_aligner_has_the_official_layout() -> None:
    link = Link({"high": 12, "low": 10}, {"high": 0, "low": 2}, 16)
    aligner = HybridMLPSpec(depth=3).build(None, link)
    assert {name: tuple(tensor.shape) for name, tensor in aligner.state_dict().items() if tensor.ndim == 2} == {
        "high_up_proj.weight": (8, 12),
        "low_up_proj.weight": (8, 10),
        "layers.1.weight": (16, 16),
        "layers.3.weight": (16, 16),
    }
    features = Features({"low": Stream({"final": torch.randn(4, 10)}, (4,), ((2, 2),)), "high": Stream({0: torch.randn(4, 12)}, (4,), ((2, 2),))})
    joined = torch.cat([aligner.high_up_proj(features.stream("high").levels[0]), aligner.low_up_proj(features.stream("low").levels["final"])], -1)
    assert torch.equal(aligner(features).tokens, aligner.layers(joined))
    with pytest.raises(ConfigurationError, match="half of its width.*width 15"):
        HybridMLPSpec().build(None, Link(link.widths, link.levels, 15))
    with pytest.raises(ConfigurationError, match="does not find its streams.*streams image"):
        HybridMLPSpec().reads(Link({"image": 4}, {"image": 2}, 16))
    with pytest.raises(ConfigurationError, match=r"on one grid.*4 tokens on 2 x 2 high, 6 on 2 x 3 low"):
        HybridMLPSpec().layout({"high": TokenLayout.grid(2, 2), "low": TokenLayout.grid(2, 3)})


RUN = """
base: llava_tiny
model:
  encoder:
    use: hybrid
    high: {weights: random, downsample_channels: [12, 16], config: {hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2, mlp_dim: 24, output_channels: 8, image_size: 32, patch_size: 8, window_size: 3, global_attn_indexes: [1]}}
    low: {use: siglip, weights: random, config: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3, num_attention_heads: 2, image_size: 28, patch_size: 14}}
  connector: hybrid_mlp
every_stage: {images: native, batch: 8, micro_batch: 2, steps: 3, checkpointing: true}
stages:
  align: {train: {connector: 1.0e-3, encoder: 1.0e-3}}
  instruct: {train: {connector: 1.0e-3, encoder: {high: {rest: frozen, neck: 1.0e-3, downsamples: 1.0e-3}, low: 1.0e-3}, llm: 1.0e-3}}
"""


@pytest.mark.ranks
def test_two_ranks_under_zero_3_train_as_one(tmp_path: Path) -> None:
    """Samples with two, one and no pictures, so that the ranks hold different numbers of them."""
    (tmp_path / "pair.yaml").write_text(RUN)
    data = tiny.data_root(tmp_path / "data")
    losses = []
    for name, options in (("one", ["every_stage.deepspeed=zero0"]), ("two", ["every_stage.deepspeed=zero3", "--nproc", "2"])):
        command = [sys.executable, "-m", "vlm", "train", "pair.yaml", f"data_root={data}", f"name={name}", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        losses.append([record["loss"] for record in records(tmp_path / "runs" / name)])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
