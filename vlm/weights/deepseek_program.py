"""A `multi_modality` configuration, as DeepSeek-VL's own program writes it -> our parts (systems/deepseek_vl.md, sections 2.1 to 2.6)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from vlm.connectors.base import ConnectorSpec
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.identity import IdentitySpec
from vlm.connectors.linear import LinearSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.base import EncoderSpec, Triple
from vlm.encoders.hybrid import HybridSpec, SAMSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.schema import Report, Slot, build
from vlm.weights.found import Row, flat_text, refuse

__all__ = ["CONFIG", "INTERPOLATE", "program_parts", "projector", "section"]

Concat = Literal["tuple", "feature", "sequence", "add"]
T = TypeVar("T")
N = TypeVar("N", bound="_Numbers")

CONFIG = {
    "sam_b_downsample": {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": (2, 5, 8, 11), "downsample_channels": (512, 1024)},
    "sam_vit_b": {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "sam_vit_l": {"width": 1024, "layers": 24, "heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "sam_vit_h": {"width": 1280, "layers": 32, "heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4},
    "siglip_so400m_patch14_384": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
}
"""Towers that the program knows by name; a configuration may bring others in its SAM_MODEL_CONFIG and SigLIP_MODEL_CONFIG."""
INTERPOLATE = (96, 96)
"""Rows and columns that the program resizes SAM's map to."""


# ---- what a configuration says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """A tower in one of the tables. Raises ConfigurationError for numbers of which no tower can be built."""

    width: int
    layers: int
    heads: int
    patch_size: int

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigurationError(f"a tower needs a positive {name}", got=value)
        if self.width % self.heads:
            raise ConfigurationError("the heads of a tower share its width evenly", got=f"width {self.width}, {self.heads} heads")


@dataclass(frozen=True, kw_only=True)
class _SAM(_Numbers):
    global_attn_indexes: tuple[int, ...]
    downsample_channels: tuple[int, ...] = ()
    patch_size: int = 16
    prompt_embed_dim: int = 256
    mlp_ratio: float = 4.0


@dataclass(frozen=True, kw_only=True)
class _SigLIP(_Numbers):
    mlp_ratio: float


@dataclass(frozen=True, kw_only=True)
class _Params:
    """What `CLIPVisionTower` is built of, with the program's own defaults."""

    model_name: str
    image_size: int = 336
    select_feature: str = "patch"
    select_layer: int = -2
    pixel_mean: Triple | None = None
    pixel_std: Triple | None = None

    @property
    def statistics(self) -> dict[str, Any]:
        """A tower normalises only where both are given."""
        if self.pixel_mean is None or self.pixel_std is None:
            return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        return {"mean": self.pixel_mean, "std": self.pixel_std}


@dataclass(frozen=True, kw_only=True)
class _Vision:
    cls: Literal["HybridVisionTower", "CLIPVisionTower"]


@dataclass(frozen=True, kw_only=True)
class _Fusion:
    """What `HybridVisionTower` says beside its two towers."""

    concat_type: Concat = "tuple"


@dataclass(frozen=True, kw_only=True)
class _Aligner:
    """What `MlpProjector` is built of."""

    projector_type: str
    n_embed: int | None = None
    input_dim: int | None = None
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class _Beyond:
    """What only we read and write, of models whose numbers are not in the program's code."""

    SAM_MODEL_CONFIG: Mapping[str, Any] = field(default_factory=dict)
    SigLIP_MODEL_CONFIG: Mapping[str, Any] = field(default_factory=dict)
    interpolate_size: tuple[int, ...] | None = INTERPOLATE

    def __post_init__(self) -> None:
        size = self.interpolate_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigurationError("interpolate_size is no size", got=list(size), expected="rows and columns, or null for four times the low grid")


def section(folder: Path, whose: str, content: Mapping[str, Any], kind: type[T], *path: str) -> T:
    """The fields of `kind` that stand at `path`; others beside them have no effect here.

    whose: the file, in the message. Raises CheckpointError naming every key that is missing or has a value of another kind.
    """
    found: Any = content
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping):
        found = {f.name: found[f.name] for f in fields(kind) if f.name in found}  # type: ignore[arg-type]
    report = Report()
    built = build(Slot(kind), found, path, report)
    if report.problems:
        raise CheckpointError(f"{folder} cannot be imported, {whose} is wrong: {'; '.join(report.problems)}", cure="fetch it again")
    return built


def projector(kind: str, depth: int) -> ConnectorSpec:
    """What an `MlpProjector` of this type is here. Raises ConfigurationError for a type that it has not."""
    match kind:
        case "identity":
            return IdentitySpec(level="final")
        case "linear":
            return LinearSpec(level="final")
        case "mlp_gelu":
            return MLPSpec(depth=depth, level="final")
        case "low_high_hybrid_split_mlp_gelu":
            return HybridMLPSpec(depth=depth)
    raise ConfigurationError(f"DeepSeek-VL has no projector {kind!r}")


# ---- our parts -------------------------------------------------------------------------------------------------------------


def program_parts(folder: Path, config: Mapping[str, Any]) -> tuple[EncoderSpec, ConnectorSpec, Any]:
    """Encoder, connector and the decoder's config of a `multi_modality` configuration.

    Raises CheckpointError: a key is missing or has an impossible value. ConfigurationError naming everything that ours cannot express. Both name `folder`.
    """
    text = _text(folder, config)
    program = _program(folder, config)
    refuse(folder, program.problems(text.hidden_size))
    try:
        encoder, connector = program.encoder(), program.connector()
        connector.layout(encoder.layout(1, 1, "infer"))
    except ConfigurationError as problem:
        raise problem.changed(what=f"{folder} cannot be imported: {problem.what}", cure="import a checkpoint of these parts") from problem
    read, widths = program.aligner.input_dim, set(encoder.widths.values())
    refuse(folder, [(program.projects and read is not None and widths != {read}, "aligner_config.params.input_dim", read, f"the towers' {' and '.join(map(str, sorted(widths)))}")])
    return encoder, connector, text


def _text(folder: Path, config: Mapping[str, Any]) -> Any:
    told = config["language_config"]
    wrong = f"{folder} cannot be imported, the language_config in its config.json is wrong"
    if not isinstance(told, Mapping):
        raise CheckpointError(wrong, got=repr(told), expected="a mapping", cure="fetch it again")
    try:
        text = flat_text("llama", told)
    except ConfigurationError as problem:
        raise CheckpointError(f"{wrong}: {problem.what}", cure="fetch it again") from problem
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if groups < 1 or heads % groups:
        raise CheckpointError(wrong, got=f"num_key_value_heads {groups}", expected=f"a divisor of num_attention_heads, {heads}", cure="fetch it again")
    return text


def _program(folder: Path, config: Mapping[str, Any]) -> "_Program":
    def told(kind: type[T], *path: str) -> T:
        return section(folder, "its config.json", config, kind, *path)

    beyond = told(_Beyond)

    def tower(kind: type[N], table: str, *place: str) -> _Tower[N]:
        """Parameters from their place, numbers from the program's table or the configuration's own."""
        path = ("vision_config", "params", *place)
        params = told(_Params, *path)
        known = {name: entry for name, entry in CONFIG.items() if name.startswith(table.partition("_")[0].lower())} | dict(getattr(beyond, table))
        if params.model_name not in known:
            raise ConfigurationError(
                f"{folder} cannot be imported: nothing says what tower {params.model_name!r} is, the {'.'.join(path)}.model_name in its config.json",
                expected=f"one of {', '.join(known)}",
                cure="import a checkpoint of these parts",
            )
        return _Tower(".".join(path), params, section(folder, "its config.json", {table: known}, kind, table, params.model_name))

    aligner = told(_Aligner, "aligner_config", "params")
    if told(_Vision, "vision_config").cls == "CLIPVisionTower":
        return _Program(aligner, tower(_SigLIP, "SigLIP_MODEL_CONFIG"))
    concat = told(_Fusion, "vision_config", "params").concat_type
    high, low = tower(_SAM, "SAM_MODEL_CONFIG", "high_res_cfg"), tower(_SigLIP, "SigLIP_MODEL_CONFIG", "low_res_cfg")
    return _Program(aligner, low, high, concat, beyond.interpolate_size)


@dataclass(frozen=True)
class _Tower(Generic[N]):
    """place: of its parameters in config.json."""

    place: str
    params: _Params
    numbers: N

    def problems(self) -> list[Row]:
        feature, size, patch = self.params.select_feature, self.params.image_size, self.numbers.patch_size
        own = not self.params.model_name.startswith("siglip")  # of a SigLIP everything is selected, whatever is written
        return [
            (own and feature != "same", f"{self.place}.select_feature", repr(feature), "same"),
            (size < patch, f"{self.place}.image_size", size, f"{patch} or more, a patch"),
        ]


@dataclass(frozen=True)
class _Program:
    """All that is read of a configuration. high, concat: of two towers."""

    aligner: _Aligner
    low: _Tower[_SigLIP]
    high: _Tower[_SAM] | None = None
    concat: Concat | None = None
    interpolate: tuple[int, ...] | None = None

    @property
    def projects(self) -> bool:
        return self.aligner.projector_type != "identity"

    @property
    def kept(self) -> int:
        """Blocks of the SigLIP that are built."""
        layers, select = self.low.numbers.layers, self.low.params.select_layer
        return min(layers, layers + select + 1 if select <= 0 else select)

    def problems(self, width: int) -> list[Row]:
        """What ours cannot express. width: the decoder's."""
        kinds = ("low_high_hybrid_split_mlp_gelu",) if self.concat == "tuple" else ("mlp_gelu", "linear", "identity")
        kind, out, depth, place = self.aligner.projector_type, self.aligner.n_embed, self.aligner.depth, "aligner_config.params"
        select = self.low.params.select_layer
        return [
            (kind not in kinds, f"{place}.projector_type", repr(kind), " or ".join(kinds)),
            (self.projects and out != width, f"{place}.n_embed", out, f"the decoder's width, {width}"),
            (depth < 1, f"{place}.depth", depth, "1 or more"),
            *(self.high.problems() if self.high else ()),
            *self.low.problems(),
            (self.kept < 1, f"{self.low.place}.select_layer", select, f"{-self.low.numbers.layers} or more, so that a block is kept"),
        ]

    def encoder(self) -> EncoderSpec:
        low = self._siglip()
        if self.high is None or self.concat is None:
            return replace(low, fit="letterbox", official=True)
        return HybridSpec(high=self._sam(self.high), low=low, concat=self.concat)

    def _sam(self, tower: _Tower[_SAM]) -> SAMSpec:
        found, size = tower.numbers, self.interpolate
        config = {
            "hidden_size": found.width,
            "num_hidden_layers": found.layers,
            "num_attention_heads": found.heads,
            "mlp_dim": int(found.width * found.mlp_ratio),
            "image_size": tower.params.image_size,
            "patch_size": found.patch_size,
            "output_channels": found.prompt_embed_dim,
            "window_size": 14,
            "global_attn_indexes": list(found.global_attn_indexes),
        }
        return SAMSpec(config=config, downsample_channels=found.downsample_channels, interpolate=None if size is None else (size[0], size[1]), **tower.params.statistics)

    def _siglip(self) -> SigLIPSpec:
        found = self.low.numbers
        config = {
            "hidden_size": found.width,
            "intermediate_size": int(found.width * found.mlp_ratio),
            "num_hidden_layers": self.kept,
            "num_attention_heads": found.heads,
            "image_size": self.low.params.image_size,
            "patch_size": found.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        }
        return SigLIPSpec(config=config, **self.low.params.statistics)

    def connector(self) -> ConnectorSpec:
        return projector(self.aligner.projector_type, self.aligner.depth)
