"""The schema: what a tree of plain values is refused for, in which words; which types are taken; and the way back from an instance."""

import pickle
import re
from pathlib import Path

import pytest
from miniature import CONNECTORS, LLM, MLPSpec, MMLoRASpec, Model, MoESpec, QLadderSpec, Run, TowerSpec, configs_folder, problems, write

from vlm.composition import compose
from vlm.errors import ConfigurationError
from vlm.schema import ConfigurationProblems, from_plain, to_plain


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return configs_folder(tmp_path, monkeypatch)


class TestMessages:
    def test_an_unknown_key_gives_its_path_and_the_nearest(self, configs):
        (problem,) = problems(configs, "small", "stages.align.schedule.warmpu=0.1")
        assert problem == "stages.align.schedule.warmpu (command line): there is no such key. expected one of kind, warmup. did you mean 'stages.align.schedule.warmup'?"
        assert "did you mean 'model.connector.depth'?" in problems(configs, "small", "model.connector.deph=1")[0]
        assert "did you mean 'every_stage'?" in problems(configs, "small", "evry_stage.batch=1")[0]

    def test_a_wrong_type_gives_path_value_and_expected_type(self, configs, tmp_path):
        run = write(tmp_path / "run.yaml", "{base: small, seed: many, stages: {align: {batch: 2.5}}}")
        found = problems(configs, run)
        assert f"stages.align.batch ({run}): wrong type or value. got 2.5 (float); expected int" in found
        assert f"seed ({run}): wrong type or value. got 'many' (str); expected int" in found

    def test_a_mistake_under_every_stage_is_reported_there_and_once(self, configs, tmp_path):
        run = write(tmp_path / "run.yaml", "{base: arcana_7b, every_stage: {bach: 3, schedule: {kind: cosin}}, stages: {align: {schedule: {warmup: x}}}}")
        found = problems(configs, run)
        assert sorted(re.match(r"[\w.]+", problem)[0] for problem in found) == ["every_stage.bach", "every_stage.schedule.kind", "stages.align.schedule.warmup"]
        assert "did you mean 'every_stage.batch'?" in next(problem for problem in found if "bach" in problem)

    def test_what_a_spec_says_itself_stands_behind_the_path(self, configs):
        (problem,) = problems(configs, "small", "model.encoder.size=3")
        assert problem == "model.encoder (command line): an odd size. got 3; expected an even one. set size: 224"

    def test_a_missing_value(self, configs, tmp_path):
        run = write(tmp_path / "run.yaml", "{model: {encoder: tower, llm: {}}, data: {captions: llava}, stages: {a: {data: captions}, b: {data: captions, prompt: {system: x}}}}")
        found = sorted(problems(configs, run))
        wanted = {
            "data.captions.file": "str",
            "model.connector": "a connector",
            "stages.a.prompt": "a mapping",
            "stages.b.prompt.use": "str",
        }
        assert found == [f"{path} ({run}): is missing. expected {kind}" for path, kind in wanted.items()]

    def test_all_at_once_numbered_and_picklable(self, configs):
        with pytest.raises(ConfigurationProblems) as caught:
            compose(Run, "small", ["seed=x", "foo=1", "model.encoder=nope", "stages.x.batch=1", "data.captions.samples=1.5", "model.adapt.nope={}"], configs=configs)
        error = caught.value
        assert len(error.problems) == 6
        assert str(error).startswith("6 problems in small\n  1. ")
        assert "\n  6. " in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert isinstance(again, ConfigurationError)


class TestTypes:
    def test_what_is_taken(self, configs):
        overrides = ["model.encoder.mean=[1, 2e-1, '1e-3']", "model.encoder.levels=[1, 2, 3]", "model.connector.level=final", "model.llm.dtype=bfloat16"]
        run = compose(Run, "small", overrides, configs=configs)
        assert run.model.encoder == TowerSpec(mean=(1.0, 0.2, 1e-3), levels=(1, 2, 3))
        assert run.model.connector.level == "final"
        assert run.model.llm.dtype == "bfloat16"
        moe = compose(Run, "small", ["model.adapt.moe={layers: [0, 2], capacity: 2, every: 2}"], configs=configs).model.adapt["moe"]
        assert (moe.layers, moe.capacity, moe.every) == ((0, 2), 2.0, 2)
        assert (type(moe.capacity), type(moe.every)) == (float, int)

    @pytest.mark.parametrize(
        "override, message",
        [
            ("seed='1'", "expected int"),
            ("seed=true", "expected int"),
            ("seed=1.0", "expected int"),
            ("name=7", "expected str. quote it: '7'"),
            ("model.llm.tied=1", "expected bool"),
            ("model.llm.dtype=float16", "expected one of 'float32', 'bfloat16' or null"),
            ("model.llm.config=x", "model.llm.config"),
            ("model.encoder.mean=[1, 2]", "expected a list of 3: float, float, float"),
            ("model.encoder.mean=[1, 2, x]", "model.encoder.mean.2"),
            ("model.encoder.levels=[1, a]", "model.encoder.levels.1"),
            ("model.encoder.mean=half", "expected a list"),
            ("stages.align.schedule=cosine", "expected a mapping"),
            ("stages.align.schedule.warmup=soon", "expected float"),
            ("stages.align.data=[captions]", "expected str or a mapping"),
            ("stages.align.data={captions: most}", "stages.align.data.captions"),
            ("stages.align.images=null", "got null"),
            ("model.adapt.moe.noise=true", "expected one of 0, 1"),
            ("model.adapt=moe", "expected a mapping by name"),
            ("model.adapt.moe=3", "whose `use:` names a registered adaptation"),
            ("eval={1: heldout}", "expected names that are text. quote it: '1'"),
        ],
    )
    def test_what_is_refused(self, configs, override, message):
        (problem,) = problems(configs, "small", override)
        assert message in problem
        assert problem.startswith(override.split("=")[0])


class TestBack:
    def test_one_part(self):
        spec = QLadderSpec(queries=3, then=MLPSpec(depth=1, level="final"))
        plain = to_plain(spec)
        assert plain["use"] == "qladder"
        assert from_plain(CONNECTORS, plain) == spec
        model = Model(encoder=TowerSpec(size=2), connector=spec, llm=LLM(config={"a": [1, {"b": None}]}), adapt={"x": MMLoRASpec(), "moe": MoESpec(layers=(1, 2))})
        assert from_plain(Model, to_plain(model)) == model

    def test_one_part_that_is_wrong(self):
        with pytest.raises(ConfigurationProblems, match=r"problem in connector\n  1. deph: there is no such key.*did you mean 'depth'"):
            from_plain(CONNECTORS, {"use": "mlp", "deph": 2})
        with pytest.raises(ConfigurationProblems, match="no `use:` says which connector it is"):
            from_plain(CONNECTORS, {"depth": 2})
