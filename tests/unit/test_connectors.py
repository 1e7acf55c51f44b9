"""The contract of a connector, for every registered one and for chains."""

import pickle
import random
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vlm import connectors
from vlm.config import LLMSpec, ModelSpec, links
from vlm.connectors.base import ConnectorSpec, Link
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.identity import IdentitySpec
from vlm.connectors.linear import LinearSpec
from vlm.connectors.mlp import MLPSpec
from vlm.connectors.qladder import QLadderSpec
from vlm.encoders.base import Encoder, EncoderSpec
from vlm.encoders.clip import CLIPSpec
from vlm.encoders.hybrid import HybridSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import ConfigurationError
from vlm.features import Features, ImageInput, TokenLayout
from vlm.loading import first_model

ARGUMENTS: dict[str, dict[str, Any]] = {"linear": {}, "mlp": {}, "identity": {}, "hybrid_mlp": {}, "qladder": {"queries": 5, "then": MLPSpec()}}
"""What a registered connector needs; one that is not listed is built with its defaults."""
CHAINS: dict[str, ConnectorSpec] = {
    "linear, mlp": LinearSpec(hidden=20, then=MLPSpec()),
    "mlp of 3, mlp of 1, linear": MLPSpec(depth=3, hidden=12, level=-1, then=MLPSpec(depth=1, hidden=24, then=LinearSpec())),
    "final": MLPSpec(level="final"),
    "mlp of 1": MLPSpec(depth=1),
    "mlp of 4": MLPSpec(depth=4, hidden=40, level=0),
    "identity, mlp": IdentitySpec(then=MLPSpec()),
    "mlp, identity": MLPSpec(hidden=32, then=IdentitySpec()),
    "qladder of all layers, mlp": QLadderSpec(queries=1, all_layers=True, level=-3, then=MLPSpec()),
    "qladder, last": QLadderSpec(queries=3, select="last", level="final", then=LinearSpec()),
    "qladder, hybrid_mlp": QLadderSpec(queries=3, then=HybridMLPSpec()),
    "hybrid_mlp of 1": HybridMLPSpec(depth=1, level=-2),
    "hybrid_mlp of 3, linear": HybridMLPSpec(depth=3, hidden=20, then=LinearSpec()),
}
WIDTH = 32


@pytest.fixture(params=["clip", "siglip", "hybrid"], scope="module")
def tower(request: pytest.FixtureRequest) -> tuple[EncoderSpec, Encoder]:
    if request.param == "hybrid":
        spec: EncoderSpec = HybridSpec(**tiny.hybrid_arguments("clip"))
    else:
        spec = {"clip": CLIPSpec, "siglip": SigLIPSpec}[request.param](config=tiny.tower_config(request.param), weights="random")
    torch.manual_seed(0)
    built = spec.build()
    built.initialise()
    return spec, built.eval()


@pytest.fixture(params=[*connectors.registry.names(), *CHAINS], scope="module")
def spec(request: pytest.FixtureRequest) -> ConnectorSpec:
    if request.param in CHAINS:
        return CHAINS[request.param]
    try:
        return connectors.registry.get(request.param)(**ARGUMENTS.get(request.param, {}))
    except TypeError as problem:
        pytest.skip(f"connector {request.param} needs arguments that nobody can guess: {problem}")


class Chain(nn.Module):
    """The links of a chain on one tower, as the model holds them."""

    def __init__(self, spec: ConnectorSpec, encoder: EncoderSpec):
        super().__init__()
        self.links = links(encoder, spec, WIDTH)
        self.reads = self.links[0][0].reads(self.links[0][1])
        self.parts = nn.ModuleList(part.build(encoder, link) for part, link in self.links)

    def forward(self, features: Features) -> Features:
        for part in self.parts:
            features = part(features)
        return features


@pytest.fixture
def chain(spec: ConnectorSpec, tower: tuple[EncoderSpec, Encoder]) -> Chain:
    if len(tower[0].streams) > 1 and spec.use != "hybrid_mlp":
        spec = replace(spec, stream="low")
    try:
        made = Chain(spec, tower[0])
    except ConfigurationError as problem:
        pytest.skip(f"connector {spec.use} does not stand on this tower: {problem}")
    for part in made.parts:
        part.initialise(tower[1])  # type: ignore[operator]
    return made


def features_of(chain: Chain, tower: tuple[EncoderSpec, Encoder], sizes: list[tuple[int, int]]) -> tuple[Features, list[TokenLayout]]:
    """What the tower gives for noise of these sizes, and the layouts behind the whole chain."""
    encoder = tower[0]
    images, expected = [], []
    for index, size in enumerate(sizes):
        layouts = encoder.layout(*size, "infer")
        for part, _ in chain.links:
            layouts = part.layouts(layouts)
        (layout,) = layouts.values()
        expected.append(layout)
        images.append(ImageInput(encoder.preprocess(tiny.picture(seed=index, size=size), "infer"), *size, layout))
    with torch.no_grad():
        return tower[1](images, chain.reads), expected


def test_every_connector_of_the_package_is_covered() -> None:
    assert set(connectors.registry._files()) <= set(ARGUMENTS)


def test_layout_counts_what_forward_gives(chain: Chain, tower: tuple[EncoderSpec, Encoder]) -> None:
    draw = random.Random(7)
    sizes = [(1, 1), (4000, 30), (30, 4000), (28, 28), *((draw.randint(1, 300), draw.randint(1, 300)) for _ in range(36))]
    features, expected = features_of(chain, tower, sizes)
    out = chain(features)
    assert out.lengths == tuple(layout.count for layout in expected)
    assert out.stream().grids == tuple((layout.rows, layout.columns) for layout in expected)
    assert out.tokens.shape == (sum(out.lengths), WIDTH) and list(out.streams) == ["image"]


def test_one_by_one_is_a_batch(chain: Chain, tower: tuple[EncoderSpec, Encoder]) -> None:
    sizes = [(40, 30), (28, 90), (1, 1)]
    features, _ = features_of(chain, tower, sizes)
    together = chain(features)
    parts: list[Tensor] = []
    for index in range(len(sizes)):
        parts.append(chain(picked(features, index)).tokens)
    assert torch.allclose(together.tokens, torch.cat(parts), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parts[0], parts[2], atol=1e-4)


def picked(features: Features, index: int) -> Features:
    """The features of one picture."""
    streams = {}
    for name, stream in features.streams.items():
        levels = {level: tokens.split(stream.lengths)[index] for level, tokens in stream.levels.items()}
        streams[name] = stream._replace(levels=levels, lengths=stream.lengths[index : index + 1], grids=stream.grids[index : index + 1])
    return Features(streams)


def test_gradients_reach_what_is_not_unused(chain: Chain, tower: tuple[EncoderSpec, Encoder]) -> None:
    features, _ = features_of(chain, tower, [(40, 30), (28, 28)])
    chain(features).tokens.square().sum().backward()
    idle = {id(parameter) for part in chain.parts for parameter in part.unused()}  # type: ignore[operator]
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name
        assert id(parameter) in idle or parameter.grad.abs().max() > 0, name  # type: ignore[union-attr]


def test_gradients_reach_the_tower(chain: Chain, tower: tuple[EncoderSpec, Encoder]) -> None:
    features, _ = features_of(chain, tower, [(40, 30)])
    for stream in features.streams.values():
        for tokens in stream.levels.values():
            tokens.requires_grad_(True)
    chain(features).tokens.square().sum().backward()
    for stream in features.streams.values():
        for tokens in stream.levels.values():
            assert tokens.grad is not None and tokens.grad.any()


def test_groups_hold_every_parameter_once(chain: Chain) -> None:
    for part in chain.parts:
        grouped = [id(parameter) for parameters in part.groups().values() for parameter in parameters]  # type: ignore[operator]
        assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in part.parameters()}


def test_a_spec_is_frozen_and_travels_to_workers(spec: ConnectorSpec) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(FrozenInstanceError):
        spec.level = 7  # type: ignore[misc]


def test_it_builds_without_memory(tower: tuple[EncoderSpec, Encoder], chain: Chain) -> None:
    with torch.device("meta"):
        empty = Chain(chain.links[0][0], tower[0])
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {name: tensor.shape for name, tensor in chain.state_dict().items()}


def test_the_levels_read_are_those_that_the_tower_has(chain: Chain, tower: tuple[EncoderSpec, Encoder]) -> None:
    for stream, levels in chain.reads.items():
        depth = tower[0].levels[stream]
        assert levels and all(level == "final" or -depth - 1 <= int(level) <= depth for level in levels)


# ---- the projectors themselves ---------------------------------------------------------------------------------------------


def test_a_projector_is_linears_with_gelu_between() -> None:
    encoder = CLIPSpec(config=tiny.tower_config(), weights="random")
    chain = Chain(MLPSpec(depth=3, hidden=20), encoder)
    keys = {name: tuple(tensor.shape) for name, tensor in chain.parts[0].state_dict().items() if name.endswith("weight")}
    assert keys == {"layers.0.weight": (20, 16), "layers.2.weight": (20, 20), "layers.4.weight": (WIDTH, 20)}
    tokens = torch.randn(10, 16)
    features, _ = features_of(chain, (encoder, encoder.build().eval()), [(28, 28), (28, 28)])
    features.stream().levels[-2] = tokens
    x = torch.cat([tokens[1:5], tokens[6:]])  # without the class tokens
    for index in (0, 2, 4):
        linear: Any = chain.parts[0].layers[index]  # type: ignore[index]
        x = x @ linear.weight.T + linear.bias
        if index < 4:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    assert torch.allclose(chain(features).tokens, x, atol=1e-6)
    assert Chain(MLPSpec(depth=1), encoder).state_dict().keys() == Chain(LinearSpec(), encoder).state_dict().keys()


def test_widths_between_links_must_be_named() -> None:
    for part in (MLPSpec(then=LinearSpec()), LinearSpec(then=LinearSpec())):
        with pytest.raises(ConfigurationError, match=r"followed by another connector.*hidden"):
            links(CLIPSpec(config=tiny.tower_config(), weights="random"), part, WIDTH)
    with pytest.raises(ConfigurationError, match=r"at least one linear.*depth 0"):
        MLPSpec(depth=0)


def test_identity_does_not_change_widths() -> None:
    encoder = CLIPSpec(config=tiny.tower_config(), weights="random")
    for part in (IdentitySpec(), MLPSpec(hidden=20, then=IdentitySpec())):
        with pytest.raises(ConfigurationError, match=r"does not change widths.*a decoder of 32"):
            Chain(part, encoder)
    assert not list(Chain(IdentitySpec(then=LinearSpec()), encoder).parts[0].parameters())


def test_links_know_what_they_stand_on() -> None:
    encoder = CLIPSpec(config=tiny.tower_config(), weights="random")
    found = [link for _, link in links(encoder, CHAINS["mlp of 3, mlp of 1, linear"], WIDTH)]
    assert found == [Link({"image": 16}, {"image": 3}, None), Link({"image": 12}, {"image": 0}, None), Link({"image": 24}, {"image": 0}, WIDTH)]


def test_links_have_names_of_their_own_in_the_model() -> None:
    spec = ModelSpec(
        encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=CHAINS["mlp of 3, mlp of 1, linear"], llm=LLMSpec(config=tiny.llm_config(), weights="random")
    )
    model = first_model(spec, 399)
    assert list(model.connector) == ["mlp", "mlp_1", "linear_2"]
    assert {"connector.mlp", "connector.mlp_1", "connector.linear_2"} <= model.groups().keys()
    assert model.see([spec.encoder.dummy()]).tokens.shape == (4, WIDTH)
