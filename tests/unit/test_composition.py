"""Composition: layers of YAML, overrides, interpolation, code that is imported, and the way back. Generic over the schema: most tests use a miniature of it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from miniature import (
    ENCODERS,
    LLM,
    HybridMLPSpec,
    LlavaSpec,
    MLPSpec,
    MMLoRASpec,
    MoDSpec,
    MoESpec,
    Optimizer,
    Prompt,
    QLadderSpec,
    Run,
    Schedule,
    Stage,
    TowerSpec,
    TwoStreamsSpec,
    configs_folder,
    problems,
    write,
)

import vlm
from vlm.composition import CONFIGS, ConfigurationProblems, compose, from_plain, import_parts, resolved


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return configs_folder(tmp_path, monkeypatch)


def test_first_example_of_the_design(configs):
    run = compose(Run, "arcana_7b", ["data_root=/data"], configs=configs)
    assert run.name == "arcana_7b"
    assert run.model.encoder == TowerSpec(path="openai/clip", size=336, config={"hidden_size": 1024})
    assert run.model.connector == QLadderSpec(queries=64, select="same", then=MLPSpec(depth=3))
    assert run.model.llm == LLM(path="lmsys/vicuna", config={"model_type": "llama", "hidden_size": 4096, "pad_token_id": None})
    assert run.model.adapt == {"mm_lora": MMLoRASpec(since="instruct", rank={"vision": 64, "language": 192}, scale=2.0, dropout=0.05)}
    assert run.data["captions"] == LlavaSpec(file="/data/lcs558k/chat.json", images="/data/lcs558k", samples=558128)
    align, instruct = run.stages.values()
    assert align == Stage(
        train={"connector": 1e-3}, data="captions", prompt=Prompt(use="plain"), images=Prompt(use="crop"), batch=256, micro_batch=16, max_length=2048, epochs=1.0,
        schedule=Schedule(kind="cosine", warmup=0.03), optimizer=Optimizer(weight_decay=0.0, clip=1.0), deepspeed={"zero_optimization": {"stage": 2, "reduce_scatter": True}},
    )  # fmt: skip
    assert instruct.train == {"connector": 2e-5, "llm": {"mm_lora": 2e-4}}
    assert (instruct.batch, instruct.micro_batch, instruct.deepspeed) == (128, 16, {"zero_optimization": {"stage": 3}})


def test_second_example_of_the_design(configs):
    run = compose(Run, "everything", configs=configs)
    assert run.name == "everything"
    assert run.model.encoder == TwoStreamsSpec(high=TowerSpec(size=1024), low=TowerSpec(config={"width": 768}))
    assert run.model.connector == QLadderSpec(queries=64, select="same", stream="low", then=HybridMLPSpec())
    assert run.model.llm == LLM(path="Qwen/Qwen3", config={"model_type": "qwen3"}, tied=True)  # nothing of Vicuna's numbers is left
    assert list(run.model.adapt) == ["mm_lora", "moe", "mod"]
    assert run.model.adapt["mm_lora"] == MMLoRASpec(since="instruct", rank={"vision": 16, "language": 48}, scale=2.0, dropout=0.05)
    assert run.model.adapt["moe"] == MoESpec(since="experts", layers="sparse", experts=4, top_k=2, balance=0.01, capacity="dropless")
    assert list(run.stages) == ["align", "instruct", "experts"]
    assert run.stages["align"].train == {"connector": 1e-3, "encoder": {"high": {"neck": 1e-4}}}
    assert run.stages["align"].images == Prompt(use="native")
    assert run.stages["experts"].data == {"mix665k": 0.8, "captions": 0.2}
    assert {stage.pack for stage in run.stages.values()} == {4096}
    assert {stage.max_length for stage in run.stages.values()} == {2048}


class TestNames:
    def test_file_of_the_group_before_a_registered_part(self, configs):
        write(configs / "connector/mlp.yaml", "{use: mlp, depth: 7}")
        assert compose(Run, "small", configs=configs).model.connector == MLPSpec(depth=7)

    def test_path_from_the_yaml_then_from_the_working_directory(self, configs, tmp_path):
        run = write(tmp_path / "mine/run.yaml", "{base: small, model: {encoder: parts/a.yaml, connector: parts/b.yaml}}")
        write(tmp_path / "mine/parts/a.yaml", "{use: tower, size: 10}")
        write(tmp_path / "here/parts/a.yaml", "{use: tower, size: 20}")
        write(tmp_path / "here/parts/b.yaml", "{use: mlp, depth: 9}")
        model = compose(Run, run, configs=configs).model
        assert (model.encoder, model.connector) == (TowerSpec(size=10), MLPSpec(depth=9))
        assert compose(Run, run, ["model.encoder=parts/a.yaml"], configs=configs).model.encoder == TowerSpec(size=20)

    def test_base_within_a_group_file_and_keys_beside_it(self, configs):
        write(configs / "encoder/bigger.yaml", "{base: clip_l_336, size: 448}")
        assert compose(Run, "small", ["model.encoder=bigger"], configs=configs).model.encoder == TowerSpec(path="openai/clip", size=448, config={"hidden_size": 1024})
        assert compose(Run, "small", ["model.encoder={base: bigger, size: 2}"], configs=configs).model.encoder.size == 2

    def test_a_name_replaces_what_lies_below(self, configs):
        run = compose(Run, "arcana_7b", ["model.encoder=clip_b", "model.connector=mlp"], configs=configs)
        assert run.model.encoder == TowerSpec(config={"width": 768})
        assert run.model.connector == MLPSpec()

    def test_a_changed_use_replaces_and_the_same_use_merges(self, configs):
        assert compose(Run, "arcana_7b", ["model.connector={use: mlp, level: 3}"], configs=configs).model.connector == MLPSpec(level=3)
        assert compose(Run, "arcana_7b", ["model.connector.then.use=hybrid_mlp"], configs=configs).model.connector.then == HybridMLPSpec()
        assert compose(Run, "arcana_7b", ["model.connector.then={use: mlp, level: 3}"], configs=configs).model.connector.then == MLPSpec(depth=3, level=3)

    def test_an_adaptation_s_key_counts_as_its_use(self, configs):
        assert compose(Run, "arcana_7b", ["model.adapt.mm_lora={use: mm_lora, scale: 3}"], configs=configs).model.adapt["mm_lora"].rank == {"vision": 64, "language": 192}
        assert compose(Run, "arcana_7b", ["model.adapt.mm_lora={use: moe, experts: 3}"], configs=configs).model.adapt["mm_lora"] == MoESpec(experts=3)

    def test_then_and_parts_of_parts_take_names(self, configs):
        run = compose(Run, "arcana_7b", ["model.connector.then=mlp", "model.encoder=sam_b_siglip_l_1024", "model.encoder.high=clip_b"], configs=configs)
        assert run.model.connector.then == MLPSpec()
        assert run.model.encoder.high == TowerSpec(config={"width": 768})
        assert compose(Run, "everything", ["model.encoder.low=null"], configs=configs).model.encoder.low is None

    def test_an_adaptation_is_named_by_its_key_a_preset_or_use(self, configs):
        adapt = compose(Run, "small", ["model.adapt={mm_lora: {scale: 3}, a: big_lora, b: moe, c: {use: mod}}"], configs=configs).model.adapt
        assert adapt == {"mm_lora": MMLoRASpec(scale=3.0), "a": MMLoRASpec(rank={"vision": 256, "language": 256}), "b": MoESpec(), "c": MoDSpec()}

    def test_data_sources_by_preset_and_a_new_one_by_override(self, configs):
        run = compose(Run, "small", ["data.captions=lcs", "data.more={reader: llava, file: b.json}"], configs=configs)
        assert run.data == {"captions": LlavaSpec(file="${data_root}/lcs.json", samples=558128), "more": LlavaSpec(file="b.json")}

    def test_a_stage_preset_still_lies_on_every_stage(self, configs, tmp_path):
        run = write(tmp_path / "run.yaml", "{base: small, every_stage: {batch: 8, pack: 64}, stages: {align: llava_align}}")
        stage = compose(Run, run, configs=configs).stages["align"]
        assert (stage.batch, stage.pack, stage.train) == (256, 64, {"connector": 1e-3})

    def test_unknown_names(self, configs, tmp_path):
        found = problems(configs, "small", "model.encoder=clip_l_33", "model.llm=nope.yaml", "model.connector.use=mpl", "stages.align.deepspeed=zero4")
        assert "model.encoder (command line): nothing is called 'clip_l_33'" in found[0]
        assert "did you mean 'clip_l_336'?" in found[0]
        assert "registered encoder: tower, two_streams" in found[0]
        assert "model.llm (command line): there is no file 'nope.yaml'" in found[1]
        assert "configs/deepspeed: zero2, zero3" in found[2]
        assert re.search(r"model\.connector\.use .*no connector is called 'mpl'.*did you mean 'mlp'", found[3])
        assert "nothing is called 'smal'" in problems(configs, "smal")[0]

    def test_a_circle_of_bases(self, configs, tmp_path):
        write(tmp_path / "a.yaml", "base: ./b.yaml")
        write(tmp_path / "b.yaml", "base: ./a.yaml")
        (problem,) = problems(configs, tmp_path / "a.yaml")
        assert "goes round" in problem
        assert f"{tmp_path}/a.yaml -> {tmp_path}/b.yaml -> {tmp_path}/a.yaml" in problem

    def test_a_part_without_a_name(self, configs):
        (problem,) = problems(configs, "small", "data.more={file: b.json}")
        assert "data.more (command line): no `reader:` says which reader it is. expected one of llava" in problem


class TestLayers:
    def test_the_name_of_a_run_is_its_file_s(self, configs, tmp_path):
        assert compose(Run, write(tmp_path / "llava_1.5_7b.yaml", "base: small"), configs=configs).name == "llava_1.5_7b"
        assert compose(Run, "small", ["name=other"], configs=configs).name == "other"

    def test_overrides_are_yaml(self, configs):
        overrides = ["stages.align.schedule.warmup=1e-3", "stages.align.data={captions: 1e-1}", "eval.x='7'", "data_root=a=b", "model.llm.config.rope={theta: 1.0e+4}"]
        run = compose(Run, "small", overrides, configs=configs)
        stage = run.stages["align"]
        assert (stage.schedule.warmup, stage.data, run.eval, run.data_root) == (1e-3, {"captions": 0.1}, {"x": "7"}, "a=b")
        assert run.model.llm.config == {"model_type": "llama", "rope": {"theta": 1e4}}

    def test_null_takes_away(self, configs):
        run = compose(Run, "everything", ["model.adapt.mm_lora=null", "every_stage.pack=null", "stages.align=null", "stages.instruct.train.llm=null"], configs=configs)
        assert list(run.model.adapt) == ["moe", "mod"]
        assert list(run.stages) == ["instruct", "experts"]
        assert run.stages["instruct"].pack is None
        assert run.stages["instruct"].train == {"connector": 2e-5}
        assert compose(Run, "everything", ["model.adapt=null"], configs=configs).model.adapt == {}
        assert compose(Run, "everything", ["stages.align.pack=null"], configs=configs).stages["align"].pack is None

    def test_null_where_there_is_nothing(self, configs):
        found = problems(configs, "small", "model.adapt.moe=null", "model.connector=null")
        assert "nothing to take away" in found[1]
        assert "write {} for its defaults" in found[1]
        assert "model.connector (command line): wrong type or value. got null" in found[0]

    def test_null_in_a_free_mapping_is_a_value(self, configs):
        assert compose(Run, "arcana_7b", ["model.llm.config.hidden_size=null"], configs=configs).model.llm.config["hidden_size"] is None

    def test_a_stage_wins_over_every_stage(self, configs, tmp_path):
        text = """
base: small
every_stage:
  batch: 4
  images: {use: pad, system: x}
  prompt: {use: plain, official: true}
  deepspeed: zero2
  schedule: {kind: linear, warmup: 0.5}
  train: {llm: 1.0e-5, connector: 1.0e-4}
stages:
  align: {images: crop, deepspeed: zero3, schedule: {warmup: 0.1}, train: {llm: {embed: frozen}}}
  second: {base: llava_align, batch: 2}
"""
        run = write(tmp_path / "run.yaml", text)
        align, second = compose(Run, run, ["every_stage.max_length=64"], configs=configs).stages.values()
        assert (align.batch, align.max_length, align.images) == (4, 64, Prompt(use="crop"))
        assert align.prompt == Prompt(use="plain", official=True)
        assert align.deepspeed == {"zero_optimization": {"stage": 3}}
        assert align.schedule == Schedule(kind="linear", warmup=0.1)
        assert align.train == {"llm": {"rest": 1e-5, "embed": "frozen"}, "connector": 1e-4}
        assert (second.batch, second.max_length, second.images.use, second.deepspeed["zero_optimization"]["stage"]) == (2, 64, "pad", 2)

    def test_rates_merge_as_trees(self, configs):
        def train(*overrides: str) -> Mapping[str, Any]:
            return compose(Run, "arcana_7b", [f"stages.instruct.train{text}" for text in overrides], configs=configs).stages["instruct"].train

        assert train(".connector.norm=1") == {"connector": {"rest": 2e-5, "norm": 1.0}, "llm": {"mm_lora": 2e-4}}
        assert train(".llm=1e-5") == {"connector": 2e-5, "llm": {"rest": 1e-5, "mm_lora": 2e-4}}
        assert train(".llm=1e-5", ".llm.embed=frozen", ".llm=2e-5")["llm"] == {"rest": 2e-5, "mm_lora": 2e-4, "embed": "frozen"}
        assert train(".llm=frozen") == {"connector": 2e-5, "llm": "frozen"}
        assert train("=1e-5") == {"connector": 2e-5, "llm": {"mm_lora": 2e-4}, "rest": 1e-5}

    def test_a_rate_that_is_none(self, configs):
        found = problems(configs, "small", "stages.align.train={llm: hot, connector: true, encoder: [1]}")
        assert [re.match(r"[\w.]+", problem)[0] for problem in found] == ["stages.align.train.llm", "stages.align.train.connector", "stages.align.train.encoder"]
        assert "expected a rate, `frozen`, or a mapping of them" in found[0]

    def test_the_command_line_creates_no_stage(self, configs):
        for override in ("stages.algn.batch=4", "stages={algn: {batch: 4}}"):
            (problem,) = problems(configs, "small", override)
            assert problem.startswith("stages.algn (command line): the command line cannot create a stage. expected one of align. did you mean 'stages.align'?")

    def test_overrides_that_cannot_be_read(self, configs):
        found = problems(configs, "small", "seed", "a..b=1", "seed={", "base=arcana_7b", "import=./x.py")
        assert len(found) == 5
        assert "expected a.b.c=value" in found[0]
        assert "'base' cannot be set on the command line" in found[3]

    def test_files_that_cannot_be_read(self, configs, tmp_path):
        for text, message in (("a: [", "cannot be read"), ("seed: 1\nseed: 2", "duplicate key seed"), ("- a", "holds no mapping"), ("name: ${x", "cannot be read")):
            (problem,) = problems(configs, write(tmp_path / "bad.yaml", text))
            assert message in problem
            assert "bad.yaml" in problem

    def test_an_override_of_every_stage_that_no_stage_takes_is_refused(self):
        """Each stage of llava_tiny names its prompt."""
        with pytest.raises(
            ConfigurationProblems, match=r"(?s)every_stage\.prompt \(command line\): this override changes nothing.*override stages\.align\.prompt and stages\.instruct\.prompt"
        ):
            vlm.compose("llava_tiny", "every_stage.prompt=vicuna_v1")
        assert vlm.compose("llava_tiny", "every_stage.steps=3").stages["align"].steps == 3


class TestInterpolation:
    def test_an_unset_value_leaves_the_text(self, configs):
        run = compose(Run, "arcana_7b", configs=configs)
        assert run.data["mix665k"] == LlavaSpec(file="${data_root}/llava_v1_5_mix665k.json", images="${data_root}", samples=665298)

    def test_other_values_of_the_run(self, configs):
        overrides = ["eval.a=${name}-${seed}", "eval.b=${data.captions.file}", "data.captions.file=${runs}/x.json", "data.captions.samples=${seed}"]
        run = compose(Run, "small", overrides, configs=configs)
        assert run.eval == {"a": "small-0", "b": "runs/x.json"}
        assert run.data["captions"].samples == 0

    def test_a_value_that_waits_for_another(self, configs):
        overrides = ["data.captions.images=${data_root}/p", "data.captions.file=${data.captions.images}/x.json"]
        assert compose(Run, "small", overrides, configs=configs).data["captions"].file == "${data.captions.images}/x.json"
        assert compose(Run, "small", [*overrides, "data_root=/d"], configs=configs).data["captions"].file == "/d/p/x.json"

    def test_the_environment_only_where_it_is_named(self, configs, monkeypatch):
        monkeypatch.setenv("data_root", "/wrong")
        monkeypatch.setenv("PLACE", "/place")
        run = compose(Run, "small", ["eval.a=${data_root}", "eval.b=${oc.env:PLACE}"], configs=configs)
        assert run.eval == {"a": "${data_root}", "b": "/place"}

    def test_what_cannot_be_resolved(self, configs):
        found = problems(configs, "small", "eval.a=${data_rot}/x", "eval.b=${oc.env:NOT_THERE}", "eval.c=${eval.d}", "eval.d=${eval.c}", "eval.e=${foo:1}")
        assert "eval.a (command line): '${data_rot}/x' cannot be resolved" in found[0]
        assert "did you mean 'data_root'?" in found[0]
        assert [problem.split()[0] for problem in found] == ["eval.a", "eval.b", "eval.c", "eval.d", "eval.e"]


PART = """
from dataclasses import dataclass
from miniature import ENCODERS, EncoderSpec

LOADED = globals().get("LOADED", 0) + 1

@ENCODERS.register("{name}")
@dataclass(frozen=True, kw_only=True)
class MySpec(EncoderSpec):
    size: int = 5
"""


@pytest.fixture
def own_registry(monkeypatch):
    """What user code registers is forgotten afterwards."""
    monkeypatch.setattr(ENCODERS, "_specs", dict(ENCODERS._specs))


class TestImport:
    def test_a_file_beside_the_yaml_once_and_resolved_to_its_path(self, configs, tmp_path, own_registry):
        part = write(tmp_path / "mine/part.py", PART.format(name="mine") + "\nopen(__file__ + '.log', 'a').write('x')\n")
        run = write(tmp_path / "mine/run.yaml", "{base: small, import: ./part.py, model: {encoder: {use: mine, path: p}}}")
        first, second = compose(Run, run, configs=configs), compose(Run, run, configs=configs)
        assert first == second
        assert (first.model.encoder.use, first.model.encoder.size) == ("mine", 5)
        assert Path(f"{part}.log").read_text() == "x"
        plain = resolved(first)
        assert plain["import"] == [str(part)]
        assert compose(Run, write(tmp_path / "away/config.yaml", yaml.safe_dump(plain)), configs=configs) == first
        assert "import" not in resolved(compose(Run, "small", configs=configs))

    def test_a_module_and_a_group_file_s_own_import(self, configs, tmp_path, own_registry, monkeypatch):
        write(tmp_path / "lib/own_parts_of_this_test.py", PART.format(name="from_module"))
        monkeypatch.syspath_prepend(str(tmp_path / "lib"))
        write(configs / "encoder/own.yaml", "{import: [own_parts_of_this_test], use: from_module, size: 6}")
        run = compose(Run, "small", ["model.encoder=own"], configs=configs)
        assert run.model.encoder.size == 6
        assert resolved(run)["import"] == ["own_parts_of_this_test"]

    def test_what_is_not_there(self, configs, tmp_path):
        run = write(tmp_path / "run.yaml", "{base: small, import: [./no.py, no_such_module_here]}")
        found = problems(configs, run)
        assert f"there is no file {tmp_path}/no.py" in found[0]
        assert "there is no module 'no_such_module_here'" in found[1]

    def test_a_folder_that_somebody_sent_runs_no_code(self, configs, tmp_path, own_registry):
        part = write(tmp_path / "sent/part.py", PART.format(name="sent") + "\nopen(__file__ + '.log', 'a').write('x')\n")
        write(tmp_path / "sent/encoder.yaml", "{import: ./part.py, use: sent}")
        for number, text in enumerate(("{base: small, import: ./part.py, model: {encoder: {use: sent}}}", "{base: small, model: {encoder: ./encoder.yaml}}")):
            with pytest.raises(ConfigurationProblems) as caught:
                compose(Run, write(tmp_path / f"sent/run{number}.yaml", text), configs=configs, allow_import=False)
            unknown, withheld = map(str, caught.value.problems)
            assert "no encoder is called 'sent'" in unknown
            assert f"run{number}.yaml is data, so the code that its `import:` names was not run. got ./part.py. if you trust that code, import it before" in withheld
        assert not Path(f"{part}.log").exists()

    def test_parts_that_were_imported_before_serve_such_a_folder(self, configs, tmp_path, own_registry, monkeypatch):
        part = write(tmp_path / "mine/part.py", PART.format(name="trusted"))
        run = write(tmp_path / "sent/config.yaml", "{base: small, import: /elsewhere/part.py, model: {encoder: {use: trusted}}}")
        monkeypatch.chdir(part.parent)
        import_parts(["./part.py"])
        composed = compose(Run, run, configs=configs, allow_import=False)
        assert composed.model.encoder.size == 5
        assert resolved(composed)["import"] == [str(part)]
        with pytest.raises(ConfigurationProblems, match="there is no file /elsewhere/part.py"):
            compose(Run, run, configs=configs)

    def test_a_checkpoint_names_no_code_and_no_file(self, configs, tmp_path):
        part = write(tmp_path / "evil.py", "raise SystemExit('run')")
        mapping = {"import": [str(part)], "base": "clip_b", "use": "tower"}
        with pytest.raises(ConfigurationProblems) as caught:
            from_plain(ENCODERS, mapping)
        assert ["import" in str(p) or "base" in str(p) for p in caught.value.problems] == [True, True]
        with pytest.raises(ConfigurationProblems, match=r"model\.encoder: wrong type or value"):
            from_plain(Run, {"model": {"encoder": "clip_b"}})


class TestBack:
    @pytest.mark.parametrize("config, overrides", [("arcana_7b", ["data_root=/d"]), ("everything", []), ("small", ["eval.a=\\${name}", "eval.b=${data_root}/\\${x}"])])
    def test_resolved_composes_to_an_equal_instance(self, configs, tmp_path, config, overrides):
        run = compose(Run, config, overrides, configs=configs)
        plain = resolved(run)
        again = compose(Run, write(tmp_path / "config.yaml", yaml.safe_dump(plain, sort_keys=False)), configs=configs)
        assert again == run
        assert resolved(again) == plain
        assert list(again.stages) == list(run.stages)

    def test_resolved_writes_names_and_defaults(self, configs):
        plain = resolved(compose(Run, "everything", configs=configs))
        assert plain["model"]["connector"]["use"] == "qladder"
        assert plain["model"]["connector"]["then"] == {"use": "hybrid_mlp", "level": -2, "stream": None, "then": None, "width": None}
        assert plain["model"]["encoder"]["low"]["use"] == "tower"
        assert plain["data"]["captions"]["reader"] == "llava"
        assert plain["stages"]["align"]["prompt"] == {"use": "plain", "system": None, "official": False}
        assert plain["data"]["captions"]["file"] == "${data_root}/lcs558k/chat.json"
        assert "every_stage" not in plain

    def test_a_text_with_a_dollar_stays_a_text(self, configs):
        run = compose(Run, "small", ["eval.a=\\${name}"], configs=configs)
        assert run.eval == {"a": "${name}"}
        assert resolved(run)["eval"] == {"a": "\\${name}"}


class TestShipped:
    """The YAML files of the package, through the schema of a run."""

    @pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml")))
    def test_a_run_composes_and_resolves(self, name, tmp_path):
        from vlm.train.config import RunSpec

        run = compose(RunSpec, name, ["data_root=/data"])
        assert run.name == name
        assert "${" not in str(run)
        assert compose(RunSpec, write(tmp_path / "config.yaml", yaml.safe_dump(resolved(run)))) == run

    def test_llava_1_5(self):
        from vlm.train.config import RunSpec

        align, instruct = compose(RunSpec, "llava_1.5_7b").stages.values()
        assert [-(-558128 // align.batch), -(-665298 // instruct.batch)] == [2181, 5198]
        assert (align.train, instruct.train) == ({"connector": 1e-3}, {"connector": 2e-5, "llm": 2e-5})
        assert (align.prompt.use, align.images.use, instruct.prompt.use, instruct.images.use) == ("plain", "crop", "vicuna_v1", "pad")
        assert [stage.deepspeed["zero_optimization"]["stage"] for stage in (align, instruct)] == [2, 3]

    @pytest.mark.parametrize("group, name", sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml") if path.parent.name in ("encoder", "llm")))
    def test_the_numbers_of_a_named_model_give_its_parameters(self, group, name):
        import torch
        from transformers import AutoModelForCausalLM

        from vlm.llm.decoder import decoder_config
        from vlm.train.config import RunSpec

        text = (CONFIGS / group / f"{name}.yaml").read_text()
        stated = int(re.search(r": ([\d,]+) parameters", text)[1].replace(",", ""))
        model = compose(RunSpec, "llava_1.5_7b", [f"model.{group}={name}"]).model
        with torch.device("meta"):
            built = model.encoder.build() if group == "encoder" else AutoModelForCausalLM.from_config(decoder_config(model.llm.config))
        assert sum(parameter.numel() for parameter in built.parameters()) == stated

    def test_every_file_says_what_it_is(self):
        for path in CONFIGS.glob("*/*.yaml"):
            head = [line for line in path.read_text().splitlines()[:5] if line.startswith("#")]
            assert any("vlm " in line for line in head), path
            assert any("Source:" in line for line in head), path
