"""Parameter groups, rates, decay, and the ledger (field case train_parameter_groups)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlm.errors import ConfigurationError
from vlm.train.config import OptimizerSpec
from vlm.train.ledger import check_ledger, ledger_rows
from vlm.train.optim import Group, adamw, decays, plan, rates

DECAY = OptimizerSpec(weight_decay=0.1)

OWN_SHAPES = {
    "encoder.stem.weight": (8, 3, 2, 2), "encoder.class_token": (1, 1, 8), "encoder.register_tokens": (1, 2, 8), "encoder.position_embedding.weight": (5, 8), "encoder.blocks.0.norm1.weight": (8,),
    "encoder.blocks.0.fc1.weight": (16, 8), "connector.queries": (4, 8), "connector.up.weight": (8, 8), "connector.up.bias": (8,), "llm.embed.weight": (32, 8), "llm.layers.0.q.weight": (8, 8),
    "llm.layers.0.norm.weight": (8,), "llm.head.weight": (32, 8), "reward.weight": (1, 8), "scale": (),
}  # fmt: skip
OWN_STAGES = {
    "a": {"connector": 1e-3},
    "b": {"llm": 2e-5, "encoder": 2e-6, "connector": 1e-4},
    "c": {"connector": 1e-4, "encoder": 2e-6, "llm": 2e-5},
    "typo": {"conector": 1e-3},
    "unnamed": {"llm": 2e-5, "reward": 1e-4},
}


@dataclass
class Case:
    """shapes: name -> shape; tied: pairs of names of one tensor; stages: `train` trees; no_decay: names; alone: the name that `unnamed` trains, left: the one that it does not name."""

    shapes: Mapping[str, Sequence[int]]
    tied: Sequence[tuple[str, str]]
    stages: Mapping[str, Mapping[str, Any]]
    no_decay: set[str]
    alone: str
    left: str
    trained_by_a: set[str]

    def model(self) -> nn.Module:
        """A module tree with these parameters under these names."""
        made = {name: nn.Parameter(torch.zeros(tuple(shape))) for name, shape in self.shapes.items()}
        for first, second in self.tied:
            made[second] = made[first]
        root = nn.Module()
        for name, parameter in made.items():
            *path, last = name.split(".")
            place = root
            for word in path:
                if not hasattr(place, word):
                    place.add_module(word, nn.Module())
                place = getattr(place, word)
            place.register_parameter(last, parameter)
        return root


def paths(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The finest grouping there is: every parameter under its own name."""
    return {name: [parameter] for name, parameter in model.named_parameters()}


def planned(model: nn.Module, tree: Mapping[str, Any], optimizer: OptimizerSpec = DECAY, unused: Sequence[nn.Parameter] = ()) -> list[Group]:
    return plan(dict(model.named_parameters()), paths(model), tree, optimizer, unused)


def facts(groups: Sequence[Group]) -> dict[str, tuple[float | None, float]]:
    return {name: (group.rate, group.decay) for group in groups for name in group.names}


@pytest.fixture(params=["own", "folder"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "own":
        never = {name for name, shape in OWN_SHAPES.items() if len(shape) < 2 or any(word in name for word in ("token", "position", "queries"))}
        return Case(
            OWN_SHAPES, [("llm.embed.weight", "llm.head.weight")], OWN_STAGES, never, "reward.weight", "scale", {name for name in OWN_SHAPES if name.startswith("connector.")}
        )
    folder: Path = request.getfixturevalue("field_folder") / "train_parameter_groups"
    parameters, stages, expected = (json.loads((folder / f"{name}.json").read_text()) for name in ("parameters", "stages", "expected"))
    assert len(parameters["shapes"]) - len(expected["a"]["trained"]) == expected["a"]["frozen"]
    return Case(parameters["shapes"], parameters["tied"], stages, set(expected["no_decay"]), "score.weight", "temperature", set(expected["a"]["trained"]))


def test_a_number_covers_everything_below_and_the_rest_is_frozen(case: Case) -> None:
    model = case.model()
    groups = planned(model, case.stages["a"])
    optimizer = adamw(groups, DECAY)
    check_ledger(groups, model, optimizer)
    assert {name for name, (rate, _) in facts(groups).items() if rate is not None} == case.trained_by_a
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == case.trained_by_a
    assert all(rate in (None, case.stages["a"]["connector"]) for rate, _ in facts(groups).values())


def test_the_order_of_keys_does_not_matter(case: Case) -> None:
    b, c = ([(g.path, g.names, g.rate, g.decay) for g in planned(case.model(), case.stages[stage])] for stage in "bc")
    assert b == c
    for path, names, rate, _ in b:
        assert rate == case.stages["b"].get(path.split(".")[0]), names


def test_every_trained_tensor_is_in_one_optimizer_group(case: Case) -> None:
    model = case.model()
    optimizer = adamw(planned(model, case.stages["b"]), DECAY)
    held = [id(parameter) for entry in optimizer.param_groups for parameter in entry["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    for first, second in case.tied:
        assert sum(name in (first, second) for group in planned(model, case.stages["b"]) for name in group.names) == 1
    assert {entry["weight_decay"] for entry in optimizer.param_groups} == {0.0, 0.1}
    assert all(entry["lr"] == entry["peak"] for entry in optimizer.param_groups)


def test_vectors_norms_learned_tokens_and_positions_do_not_decay(case: Case) -> None:
    found = facts(planned(case.model(), case.stages["b"]))
    assert {name for name, (_, decay) in found.items() if not decay} == case.no_decay
    assert all(decay in (0.0, 0.1) for _, decay in found.values())


def test_an_unknown_name_gets_the_nearest(case: Case) -> None:
    with pytest.raises(ConfigurationError, match=r"no group 'conector'.*did you mean 'connector'"):
        planned(case.model(), case.stages["typo"])


def test_what_nobody_names_is_frozen_and_listed(case: Case) -> None:
    model = case.model()
    groups = planned(model, case.stages["unnamed"])
    assert facts(groups)[case.alone][0] == 1e-4 and facts(groups)[case.left][0] is None
    listed = {str(row["group"]): row for row in ledger_rows(groups)}
    assert listed[case.left]["why"] == "frozen" and listed[case.left]["rate"] is None and listed[case.left]["decay"] is None
    assert listed[case.alone]["why"] == "trained" and listed[case.alone]["parameters"] == dict(model.named_parameters())[case.alone].numel()
    assert sum(int(str(row["tensors"])) for row in listed.values()) == len(list(model.parameters()))
    adamw(groups, DECAY)
    assert not dict(model.named_parameters())[case.left].requires_grad


GROUPS = ("encoder", "encoder.low", "connector.mlp", "llm.embed", "llm.ffn", "llm.moe.router", "llm.moe.experts")


@pytest.mark.parametrize(
    "tree, expected",
    [
        ({"llm": 1}, {"llm.embed": 1, "llm.ffn": 1, "llm.moe.router": 1, "llm.moe.experts": 1}),
        ({"llm": {"rest": 1, "moe": {"router": 2}}}, {"llm.embed": 1, "llm.ffn": 1, "llm.moe.router": 2}),
        ({"llm": {"rest": 1, "moe": {"router": 2, "rest": 3}}}, {"llm.embed": 1, "llm.ffn": 1, "llm.moe.router": 2, "llm.moe.experts": 3}),
        ({"llm": {"rest": 1, "embed": "frozen"}}, {"llm.ffn": 1, "llm.moe.router": 1, "llm.moe.experts": 1}),
        ({"llm": {"moe": 1}}, {"llm.moe.router": 1, "llm.moe.experts": 1}),
        ({"encoder": {"low": 1}}, {"encoder.low": 1}),
        ({"encoder": {"rest": 2, "low": 1}}, {"encoder": 2, "encoder.low": 1}),
        ({"encoder": 3}, {"encoder": 3, "encoder.low": 3}),
        ({"rest": 4, "llm": "frozen"}, {"encoder": 4, "encoder.low": 4, "connector.mlp": 4}),
        ({"connector": {"mlp": {"rest": 5}}}, {"connector.mlp": 5}),
        ({"connector": 0}, {"connector.mlp": 0}),
    ],
)
def test_rates(tree: Mapping[str, Any], expected: Mapping[str, float]) -> None:
    assert rates(GROUPS, tree) == {path: expected.get(path) for path in GROUPS}
    assert rates(GROUPS, dict(reversed(tree.items()))) == rates(GROUPS, tree)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"lm": 1}, r"no group 'lm'.*did you mean 'llm'"),
        ({"llm": {"moe": {"routr": 1}}}, r"no group 'llm\.moe\.routr'.*did you mean 'router'"),
        ({"connector": {"mlp": {"weight": 1}}}, r"no group 'connector\.mlp\.weight'.*nothing below connector\.mlp"),
        ({"llm": "fast"}, r"rate of 'llm' is no rate.*'fast'"),
        ({"llm": -1e-4}, r"rate of 'llm' is no rate.*-0\.0001"),
        ({"llm": True}, r"rate of 'llm' is no rate.*True"),
        ({"llm": float("nan")}, r"rate of 'llm' is no rate.*nan"),
        ({"llm": float("inf")}, r"rate of 'llm' is no rate.*inf"),
        ({"llm": {"rest": "slow"}}, r"rate of 'llm\.rest' is no rate.*'slow'"),
        ({"llm": {"rest": {"moe": 1}}}, r"rate of 'llm\.rest' is no rate.*\{'moe': 1\}"),
        ({"rest": {"llm": 1}}, r"rate of 'rest' is no rate"),
        ({"llm": None}, r"rate of 'llm' is no rate.*None"),
    ],
)
def test_a_tree_that_says_nothing_clear_is_refused(tree: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rates(GROUPS, tree)


def test_a_stage_that_would_train_nothing_is_refused() -> None:
    model = nn.Linear(2, 2)
    for tree in ({}, {"weight": "frozen"}):
        with pytest.raises(ConfigurationError, match="would train nothing"):
            planned(model, tree)
    with pytest.raises(ConfigurationError, match="would train nothing"):
        planned(model, {"weight": 1e-3}, unused=[model.weight])


def test_parts_whose_groups_overlap_or_leave_something_out_are_refused() -> None:
    model = nn.Linear(2, 2)
    named = dict(model.named_parameters())
    with pytest.raises(ConfigurationError, match=r"weight is in two groups.*one and two"):
        plan(named, {"one": [model.weight], "two": [model.weight, model.bias]}, {"one": 1}, DECAY)
    with pytest.raises(ConfigurationError, match=r"without a group.*bias"):
        plan(named, {"one": [model.weight]}, {"one": 1}, DECAY)


def test_what_no_gradient_reaches_is_named_but_idle() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = plan(dict(model.named_parameters()), {"all": list(model.parameters())}, {"all": 1e-3}, DECAY, list(model[1].parameters()))
    check_ledger(groups, model, adamw(groups, DECAY))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.weight", "0.bias"]
    assert {row["why"] for row in ledger_rows(groups)} == {"trained", "kept for the checkpoint, no gradient reaches it"}


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("llm.model.embed_tokens.weight", (10, 4), True),
        ("encoder.tower.embeddings.patch_embedding.weight", (4, 3, 2, 2), True),
        ("encoder.tower.embeddings.class_embedding", (4,), False),
        ("encoder.tower.embeddings.position_embedding.weight", (5, 4), False),
        ("llm.model.layers.0.mlp.up_proj.bias", (4,), False),
        ("encoder.pos_embed", (1, 5, 4), False),
        ("connector.qladder.queries", (64, 4), False),
        ("llm.model.embed_positions.weight", (10, 4), False),
        ("llm.transformer.wpe.weight", (10, 4), False),
    ],
)
def test_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, shape) is expected


def two() -> tuple[nn.Module, list[Group], torch.optim.AdamW]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = plan(dict(model.named_parameters()), {"first": list(model[0].parameters()), "second": list(model[1].parameters())}, {"first": 1e-3}, DECAY)
    return model, groups, adamw(groups, DECAY)


def test_the_ledger_stops_on_every_kind_of_disagreement() -> None:
    model, groups, optimizer = two()
    check_ledger(groups, model, optimizer)
    weight, other = model.get_parameter("0.weight"), model.get_parameter("1.weight")

    other.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"1\.weight is trained, but nobody named it"):
        check_ledger(groups, model, optimizer)
    other.requires_grad_(False)

    weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"0\.weight was named, but is frozen"):
        check_ledger(groups, model, optimizer)
    weight.requires_grad_(True)

    kept = [entry["params"] for entry in optimizer.param_groups]
    for entry in optimizer.param_groups:
        entry["params"] = [parameter for parameter in entry["params"] if parameter is not weight]
    with pytest.raises(ConfigurationError, match=r"0\.weight wants a gradient, but no optimizer group holds it"):
        check_ledger(groups, model, optimizer)

    for entry, params in zip(optimizer.param_groups, kept, strict=True):
        entry["params"] = [*params, other]
    with pytest.raises(ConfigurationError, match=r"1\.weight is held by the optimizer, but frozen"):
        check_ledger(groups, model, optimizer)

    for entry, params in zip(optimizer.param_groups, kept, strict=True):
        entry["params"] = [*params, weight]
    with pytest.raises(ConfigurationError, match=r"0\.weight is in two optimizer groups"):
        check_ledger(groups, model, optimizer)
