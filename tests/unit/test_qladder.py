"""QLadder: which layers there are, where they come from, what comes out; Arcana's published numbers."""

from typing import Any

import pytest
import tiny
import torch

from vlm.config import LLMSpec, ModelSpec, links, whole_layout
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.mlp import MLPSpec
from vlm.connectors.qladder import QLadder, QLadderSpec
from vlm.encoders.base import EncoderSpec, FixedSizeSpec
from vlm.encoders.clip import CLIPSpec
from vlm.encoders.hybrid import HybridSpec
from vlm.encoders.open_clip import OpenCLIPSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.encoders.timm import TimmSpec
from vlm.errors import ConfigurationError
from vlm.features import EXTRA, OUT, PATCH, Features, ImageInput, TokenLayout
from vlm.loading import first_model
from vlm.tiles import Tiling

TOWERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "clip": (CLIPSpec, {"config": tiny.tower_config()}, "image"),
    "siglip": (SigLIPSpec, {"config": tiny.tower_config("siglip")}, "image"),
    "open_clip": (OpenCLIPSpec, {"config": tiny.open_clip_config()}, "image"),
    "timm": (TimmSpec, {"name": "test_vit", "size": 32}, "image"),
    "hybrid": (HybridSpec, tiny.hybrid_arguments(), "low"),
}


def ladder(spec: QLadderSpec, encoder: EncoderSpec) -> QLadder:
    (first, link), *_ = links(encoder, spec, 32)
    return first.build(encoder, link)  # type: ignore[return-value]


def drawn(name: str) -> tuple[EncoderSpec, Any, str]:
    made, arguments, stream = TOWERS[name]
    spec = made(weights="random", **arguments)
    torch.manual_seed(0)
    tower = spec.build()
    tower.initialise()
    return spec, tower.eval(), stream


def pictures(spec: EncoderSpec, count: int = 2) -> list[ImageInput]:
    return [ImageInput(spec.preprocess(tiny.picture(seed=index), "infer"), 40, 30, TokenLayout(())) for index in range(count)]


# ---- which layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "level, select, used", [(-2, "same", 23), (-1, "same", 24), (-24, "same", 1), (0, "same", 1), (23, "same", 24), ("final", "same", 24), (-2, "last", 24), (3, "last", 24)]
)
def test_level_and_selection_say_which_layers_are_used(level: Any, select: Any, used: int) -> None:
    spec = QLadderSpec(level=level, select=select)
    assert spec.used(24) == spec.built(24) == used
    for all_layers in (QLadderSpec(level=level, select=select, official=True), QLadderSpec(level=level, select=select, all_layers=True)):
        assert all_layers.used(24) == used and all_layers.built(24) == 24
    assert QLadderSpec(level=level, select=select, official=True, all_layers=False).built(24) == used


@pytest.mark.parametrize("level", [24, -25])
def test_a_level_without_a_layer_is_refused(level: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"no layer of this number. got level {level}; expected -24 to 23"):
        QLadderSpec(level=level).used(24)


def test_published_sizes() -> None:
    """systems/arcana.md, sections 6.1 and 6.2."""
    clip_l = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    clip_b = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    siglip_l = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384, "patch_size": 16}
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    for encoder, whole, trimmed in (
        (CLIPSpec(config=clip_l, weights="random"), 302_424_064, 289_825_792),
        (CLIPSpec(config=clip_b, weights="random"), 85_122_048, 78_032_640),
        (SigLIPSpec(config=siglip_l, weights="random"), 302_424_064, 289_825_792),
        (SigLIPSpec(config=so400m, weights="random"), 411_602_544, 396_360_736),
    ):
        for all_layers, expected in ((True, whole), (False, trimmed)):
            with torch.device("meta"):
                made = ladder(QLadderSpec(all_layers=all_layers, then=MLPSpec()), encoder)
            assert sum(parameter.numel() for parameter in made.parameters()) == expected
            assert sum(parameter.numel() for parameter in made.unused()) == (whole - trimmed if all_layers else 0)
    encoder = CLIPSpec(config=clip_l, weights="random")
    layout = whole_layout(encoder, links(encoder, QLadderSpec(then=MLPSpec()), 4096), (336, 336), "train")
    assert layout.roles == (PATCH,) * 576 + (EXTRA,) * 64 and (layout.rows, layout.columns) == (24, 24)


# ---- where its values come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_a_fresh_layer_is_the_block_that_it_stands_beside(name: str) -> None:
    """Fed with the block's own input as queries behind the block's own norm it is self-attention, and gives what the block gives."""
    spec, tower, stream = drawn(name)
    depth = spec.levels[stream]
    made = ladder(QLadderSpec(queries=3, select="last", stream=stream, then=MLPSpec()), spec)
    made.initialise(tower)
    features = tower(pictures(spec), {stream: list(range(depth + 1))}).streams[stream]
    assert len(made.layers) == depth
    for index, layer in enumerate(made.layers):
        inner: Any = layer
        states, after = (features.levels[level].view(2, -1, spec.widths[stream]) for level in (index, index + 1))
        assert inner.query_norm.weight.eq(1).all() and inner.query_norm.bias.eq(0).all()
        inner.query_norm.load_state_dict(inner.key_norm.state_dict())
        assert torch.allclose(inner(states, states), after, atol=1e-5)
        assert torch.allclose(inner.looks(states, states).sum(-1), torch.ones(()), atol=1e-5)
    assert abs(made.queries.std().item() - 1) < 0.3


def test_a_layer_beside_an_unknown_block_is_drawn() -> None:
    made = ladder(QLadderSpec(queries=3, then=MLPSpec()), CLIPSpec(config=tiny.tower_config(), weights="random"))
    layer: Any = made.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.initialise(None)
    assert not any(parameter.isnan().any() for parameter in layer.parameters())
    assert not layer.q_proj.bias.any() and layer.key_norm.weight.eq(1).all() and layer.q_proj.weight.std() > 0.1


# ---- what comes out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select, level", [("same", -2), ("last", -2), ("same", 0)])
def test_queries_climb_by_the_inputs_of_the_blocks(select: Any, level: Any) -> None:
    spec, tower, _ = drawn("clip")
    made = ladder(QLadderSpec(queries=3, select=select, level=level, then=MLPSpec()), spec)
    made.initialise(tower)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = tower(pictures(spec), {"image": [0, 1, 2, 3, -2]})
    queries = made.queries.repeat(2, 1, 1)
    for index in range({("same", -2): 2, ("last", -2): 3, ("same", 0): 1}[select, level]):
        layer: Any = made.layers[index]
        states = layer.key_norm(features.streams["image"].levels[index].view(2, 5, 16))
        heads = [linear(tokens).view(2, -1, 2, 8).transpose(1, 2) for linear, tokens in ((layer.q_proj, layer.query_norm(queries)), (layer.k_proj, states), (layer.v_proj, states))]
        seen = (heads[0] @ heads[1].transpose(-1, -2) / 8**0.5).softmax(-1) @ heads[2]
        queries = queries + layer.out_proj(seen.transpose(1, 2).reshape(2, -1, 16))
        inner = layer.fc1(layer.mlp_norm(queries))
        queries = queries + layer.fc2(inner * torch.sigmoid(1.702 * inner))
    [given] = features.streams["image"].levels[{-2: -2, 0: 0}[level]][None]
    expected = torch.cat([torch.cat([given.view(2, 5, 16)[index, 1:], queries[index]]) for index in range(2)])
    out = made(features)
    assert out.lengths == (7, 7) and torch.allclose(out.tokens, expected, atol=1e-5)


def test_the_other_stream_of_a_hybrid_has_zeros_where_the_queries_are() -> None:
    """systems/arcana.md, section 6.2.4: the high half of a query is the bias of its projection."""
    spec, tower, _ = drawn("hybrid")
    connector = QLadderSpec(queries=3, stream="low", level="final", then=HybridMLPSpec(depth=1))
    (first, link), (second, behind) = links(spec, connector, 32)
    made: Any = first.build(spec, link)
    made.initialise(tower)
    aligner: Any = second.build(spec, behind)
    reads = first.reads(link)
    assert set(reads) == {"low", "high"}
    handed = made(tower(pictures(spec), reads))
    assert list(handed.streams) == ["low", "high"]
    tokens = aligner(handed).tokens.view(2, -1, 32)
    patches = tower.spec.high_layout().count
    assert tokens.shape[1] == patches + 3 == whole_layout(spec, [(first, link), (second, behind)], (9, 9), "train").count
    assert torch.equal(tokens[:, patches:, :16], aligner.high_up_proj.bias.expand(2, 3, 16))
    low_alone = links(spec, QLadderSpec(queries=3, stream="low", then=MLPSpec()), 32)
    assert set(low_alone[0][0].reads(low_alone[0][1])) == {"low"}  # so the high tower is not computed


def test_layers_that_are_never_read_are_kept_and_not_computed() -> None:
    spec, tower, _ = drawn("clip")
    made = ladder(QLadderSpec(queries=3, all_layers=True, level=-3, then=MLPSpec()), spec)
    made.initialise(tower)
    before = made(tower(pictures(spec), {"image": [0, -3]})).tokens
    with torch.no_grad():
        for parameter in made.unused():
            parameter.fill_(torch.nan)
    assert len(made.layers) == 3 and torch.equal(made(tower(pictures(spec), {"image": [0, -3]})).tokens, before)
    assert {id(parameter) for parameter in made.unused()} == {id(parameter) for layer in made.layers[1:] for parameter in layer.parameters()}


def test_a_model_lists_ladder_and_projector_apart_and_copies_the_tower() -> None:
    encoder = CLIPSpec(config=tiny.tower_config(), weights="random")
    spec = ModelSpec(encoder=encoder, connector=QLadderSpec(queries=3, then=MLPSpec()), llm=LLMSpec(config=tiny.llm_config(), weights="random"))
    model = first_model(spec, 399)
    assert {"connector.qladder", "connector.mlp_1"} <= model.groups().keys()
    part: Any = model.connector["qladder"]
    source: Any = model.encoder.block(1)
    assert torch.equal(part.layers[1].v_proj.weight, source.value.weight) and torch.equal(part.layers[1].key_norm.bias, source.norm1.bias)
    assert model.see(pictures(encoder)).lengths == (7, 7)


# ---- what it does not stand on ---------------------------------------------------------------------------------------------


def refused(spec: QLadderSpec, encoder: EncoderSpec) -> str:
    with pytest.raises(ConfigurationError) as caught:
        ladder(spec, encoder)
    return str(caught.value)


def test_what_a_ladder_cannot_stand_on_is_said() -> None:
    clip = CLIPSpec(config=tiny.tower_config(), weights="random")
    flat = TimmSpec(name="test_efficientnet", size=64, weights="random")
    assert "does not change widths. got tokens of 16, a decoder of 32" in refused(QLadderSpec(), clip)
    assert "blocks of a vision transformer. got stream high" in refused(QLadderSpec(then=MLPSpec()), HybridSpec(**tiny.hybrid_arguments()))
    with pytest.raises(ConfigurationError, match="needs queries. got queries 0"):
        QLadderSpec(queries=0)
    (_, (second, behind), _) = links(clip, MLPSpec(hidden=16, then=QLadderSpec(then=MLPSpec())), 32)
    with pytest.raises(ConfigurationError, match="right behind it"):
        second.build(clip, behind)
    assert "no layer of this number. got level -2; expected -1 to 0" in refused(QLadderSpec(then=MLPSpec()), flat)


def test_tiles_are_no_place_for_queries() -> None:
    """systems/arcana.md, section 2.5."""
    encoder: FixedSizeSpec = CLIPSpec(config=tiny.tower_config(), weights="random")
    layout = whole_layout(encoder, links(encoder, QLadderSpec(queries=3, then=MLPSpec()), 32), (28, 28), "train")
    with pytest.raises(ConfigurationError, match="no plain grid"):
        Tiling().plan(90, 40, 28, layout)


def test_features_keep_their_names() -> None:
    spec, tower, _ = drawn("clip")
    out: Features = ladder(QLadderSpec(queries=1, then=MLPSpec()), spec)(tower(pictures(spec), {"image": [0, 1, -2]}))
    assert list(out.streams) == ["image"] and list(out.streams["image"].levels) == [OUT] and out.stream().prefix == 0
