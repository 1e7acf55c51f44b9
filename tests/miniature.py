"""A miniature of the schema of a run, with registries of its own, and a folder of configurations of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from vlm.composition import ConfigurationProblems, compose
from vlm.errors import ConfigurationError
from vlm.registry import Registry


class Parts(Registry):
    """A registry without a package behind it."""

    def _files(self) -> list[str]:
        return []


ENCODERS, CONNECTORS, ADAPTATIONS, READERS = Parts("encoder", "tests"), Parts("connector", "tests"), Parts("adaptation", "tests"), Parts("reader", "tests")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    use: ClassVar[str]
    path: str | None = None
    config: Mapping[str, Any] | None = None


@ENCODERS.register("tower")
@dataclass(frozen=True, kw_only=True)
class TowerSpec(EncoderSpec):
    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ConfigurationError("an odd size", got=self.size, expected="an even one", cure="set size: 224")


@ENCODERS.register("two_streams")
@dataclass(frozen=True, kw_only=True)
class TwoStreamsSpec(EncoderSpec):
    high: EncoderSpec = field(metadata={"group": "encoder", "registry": ENCODERS})
    low: EncoderSpec | None = field(default=None, metadata={"group": "encoder", "registry": ENCODERS})


@dataclass(frozen=True, kw_only=True)
class ConnectorSpec:
    use: ClassVar[str]
    level: int | str = -2
    stream: str | None = None
    then: Any = None


@CONNECTORS.register("mlp")
@dataclass(frozen=True, kw_only=True)
class MLPSpec(ConnectorSpec):
    depth: int = 2


@CONNECTORS.register("qladder")
@dataclass(frozen=True, kw_only=True)
class QLadderSpec(ConnectorSpec):
    queries: int = 16
    select: Literal["same", "next"] = "next"


@CONNECTORS.register("hybrid_mlp")
@dataclass(frozen=True, kw_only=True)
class HybridMLPSpec(ConnectorSpec):
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class AdaptationSpec:
    use: ClassVar[str]
    since: str | None = None


@ADAPTATIONS.register("mm_lora")
@dataclass(frozen=True, kw_only=True)
class MMLoRASpec(AdaptationSpec):
    rank: Mapping[str, int] = field(default_factory=lambda: {"vision": 8, "language": 8})
    scale: float = 1.0
    dropout: float = 0.0


@ADAPTATIONS.register("moe")
@dataclass(frozen=True, kw_only=True)
class MoESpec(AdaptationSpec):
    layers: str | Sequence[int] = "all"
    experts: int = 2
    top_k: int = 1
    balance: float = 0.0
    capacity: float | Literal["dropless"] = "dropless"
    every: float | int = 1
    noise: Literal[0, 1] = 0


@ADAPTATIONS.register("mod")
@dataclass(frozen=True, kw_only=True)
class MoDSpec(AdaptationSpec):
    schedule: str = "constant"
    threshold: float = 0.5
    min: float = 0.0
    offset: float = 0.0
    denominator: str = "depth"
    tokens: str = "all"


@READERS.register("llava")
@dataclass(frozen=True, kw_only=True)
class LlavaSpec:
    file: str
    images: str | None = None
    samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class LLM:
    path: str | None = None
    config: Mapping[str, Any] | None = None
    tied: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    encoder: EncoderSpec = field(metadata={"group": "encoder", "registry": ENCODERS})
    connector: ConnectorSpec = field(metadata={"group": "connector", "registry": CONNECTORS})
    llm: LLM = field(metadata={"group": "llm"})
    adapt: Mapping[str, AdaptationSpec] = field(default_factory=dict, metadata={"group": "adapt", "registry": ADAPTATIONS})


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    use: str
    system: str | None = None
    official: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    train: Mapping[str, Any] = field(default_factory=dict)
    data: str | Mapping[str, float]
    prompt: Prompt = field(metadata={"bare": "use"})
    images: Prompt = field(default_factory=lambda: Prompt(use="native"), metadata={"bare": "use"})
    batch: int = 32
    micro_batch: int = 8
    max_length: int = 512
    pack: int | None = None
    epochs: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: Optimizer = field(default_factory=Optimizer)
    deepspeed: Mapping[str, Any] = field(default_factory=dict, metadata={"group": "deepspeed"})


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    model: Model
    data: Mapping[str, Any] = field(metadata={"group": "data", "registry": READERS, "key": "reader"})
    stages: Mapping[str, Stage]
    eval: Mapping[str, str] = field(default_factory=dict)
    data_root: str | None = None
    runs: str = "runs"
    seed: int = 0


GROUPS = {
    "encoder/clip_l_336": "{use: tower, path: openai/clip, size: 336, config: {hidden_size: 1024}}",
    "encoder/clip_b": "{use: tower, config: {width: 768}}",
    "encoder/sam_b_siglip_l_1024": "{use: two_streams, high: {use: tower, size: 1024}, low: clip_b}",
    "llm/vicuna_7b_v1.5": "{path: lmsys/vicuna, config: {model_type: llama, hidden_size: 4096, pad_token_id: null}}",
    "llm/qwen3_0.6b": "{path: Qwen/Qwen3, config: {model_type: qwen3}, tied: true}",
    "adapt/big_lora": "{use: mm_lora, rank: {vision: 256, language: 256}}",
    "data/lcs": "{reader: llava, file: '${data_root}/lcs.json', samples: 558128}",
    "stage/llava_align": "{train: {connector: 1.0e-3}, data: captions, prompt: plain, batch: 256}",
    "deepspeed/zero2": "{zero_optimization: {stage: 2, reduce_scatter: true}}",
    "deepspeed/zero3": "{zero_optimization: {stage: 3}}",
    # the two runs of DESIGN section 4
    "run/arcana_7b": """
model:
  encoder: clip_l_336
  connector: {use: qladder, queries: 64, select: same, then: {use: mlp, depth: 3}}
  llm: vicuna_7b_v1.5
  adapt: {mm_lora: {since: instruct, rank: {vision: 64, language: 192}, scale: 2.0, dropout: 0.05}}
data:
  captions: {reader: llava, file: "${data_root}/lcs558k/chat.json", images: "${data_root}/lcs558k", samples: 558128}
  mix665k: {reader: llava, file: "${data_root}/llava_v1_5_mix665k.json", images: "${data_root}", samples: 665298}
every_stage: {epochs: 1, micro_batch: 16, max_length: 2048, schedule: {kind: cosine, warmup: 0.03}, optimizer: {weight_decay: 0.0, clip: 1.0}}
stages:
  align: {train: {connector: 1.0e-3}, data: captions, prompt: plain, images: crop, batch: 256, deepspeed: zero2}
  instruct: {train: {connector: 2.0e-5, llm: {mm_lora: 2.0e-4}}, data: mix665k, prompt: vicuna_v1, images: pad, batch: 128, deepspeed: zero3}
""",
    "run/everything": """
base: arcana_7b
model:
  encoder: sam_b_siglip_l_1024
  connector: {stream: low, then: {use: hybrid_mlp}}
  llm: qwen3_0.6b
  adapt:
    mm_lora: {rank: {vision: 16, language: 48}}
    moe: {since: experts, layers: sparse, experts: 4, top_k: 2, balance: 0.01, capacity: dropless}
    mod: {since: experts, schedule: shifted_cosine, threshold: 0.85, min: 0.15, offset: 0.5, denominator: depth, tokens: vision}
every_stage: {pack: 4096}
stages:
  align: {train: {encoder: {high: {neck: 1.0e-4}}}, images: native}
  instruct: {prompt: chatml, images: native}
  experts:
    train: {connector: 2.0e-5, llm: {moe: {experts: 2.0e-5, router: 1.0e-4}, mod: 1.0e-4, mm_lora: 1.0e-4}}
    data: {mix665k: 0.8, captions: 0.2}
    prompt: chatml
    batch: 128
    deepspeed: zero2
""",
    "run/small": """
model: {encoder: tower, connector: mlp, llm: {config: {model_type: llama}}}
data: {captions: {reader: llava, file: a.json}}
stages: {align: {data: captions, prompt: plain}}
""",
}


def configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of config groups; the working directory becomes another, empty one."""
    folder = tmp_path / "configs"
    for name, text in GROUPS.items():
        write(folder / f"{name}.yaml", text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def write(path: Path, text: str) -> Path:
    """Write a file and the folders it lies in; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems(configs: Path, config: str | Path, *overrides: str) -> list[str]:
    """All problems of a run that does not compose."""
    with pytest.raises(ConfigurationProblems) as caught:
        compose(Run, config, overrides, configs=configs)
    return [str(problem) for problem in caught.value.problems]
