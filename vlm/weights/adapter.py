"""LoRA as stock PEFT has it: adapter_config.json and adapter_model.safetensors, out and in."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError, ConfigurationError
from vlm.folders import free, new_folder
from vlm.weights.files import find_folder, read_file, read_json
from vlm.weights.strict import copy_rows

if TYPE_CHECKING:
    from vlm.llm.lora import LoRASpec
    from vlm.llm.mm_lora import MMLoRASpec
    from vlm.model import VLM

__all__ = ["export_adapters", "load_adapter", "read_settings", "write_adapters"]

PREFIX = "base_model.model."
"""In front of every name in an adapter file."""
SAID = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules")
"""Fields of adapter_config.json that become ours."""
SILENT = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout", "runtime_config", "loftq_config", "megatron_config"),
    *("megatron_core", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
}
"""Fields that change nothing here: about the training before, or about which modules, which the tensors' names say."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva")
"""`init_lora_weights` that left the base weights alone."""


# ---- in ------------------------------------------------------------------------------------------------------------------


def read_settings(path: str) -> dict[str, Any]:
    """rank, alpha, rslora and targets of an adapter folder.

    Raises CheckpointError where there is none, ConfigurationError naming what plain LoRA cannot express (DoRA, biases, whole modules, ranks by pattern, ...).
    """
    from peft import LoraConfig

    folder = find_folder(path)
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ConfigurationError(f"{folder} holds no adapter_config.json", cure="give the folder of an adapter that peft saved")
    written = read_json(file)
    if written.get("peft_type") != "LORA":
        raise ConfigurationError(f"the adapter {folder} is no LoRA", got=written.get("peft_type"), expected="LORA")
    plain = asdict(LoraConfig())
    refused = {name: value for name, value in written.items() if name not in (*SAID, *SILENT, "init_lora_weights") and value and value != plain.get(name)}
    if written.get("init_lora_weights", True) not in PLAIN_STARTS:
        refused["init_lora_weights"] = f"{written['init_lora_weights']} (it changed the base weights)"
    if refused:
        got = ", ".join(f"{name} {value}" for name, value in refused.items())
        raise ConfigurationError(
            f"the adapter {folder} is more than plain LoRA",
            got=got,
            expected="A and B of linears and embeddings",
            cure="merge it into its base model with peft, and give the merged folder as path",
        )
    targets: Any = written.get("target_modules")
    by_name = isinstance(targets, list) and not any(written.get(name) for name in ("layers_to_transform", "exclude_modules"))
    try:
        rank, alpha = int(written["r"]), float(written["lora_alpha"])
    except (KeyError, TypeError, ValueError) as problem:
        got = f"r {written.get('r')!r}, lora_alpha {written.get('lora_alpha')!r}"
        raise CheckpointError(f"{file} is damaged", got=got, expected="two numbers", cure="fetch the adapter again") from problem
    return {
        "rank": rank,
        "alpha": alpha,
        "rslora": bool(written.get("use_rslora", False)),
        "targets": tuple(sorted(targets)) if by_name else tuple(sorted({_module(name) for name, _ in _adapter_tensors(folder) if ".lora_" in name})),
    }


def load_adapter(part: nn.Module, layers: Mapping[str, Any], path: str) -> None:
    """Copy an adapter's tensors into peft's layers of a part; every one exactly once. The head's B may lack rows for added tokens, which become the mean of the others, as those of the head itself did.

    Raises CheckpointError naming missing, unexpected and mis-shaped keys.
    """
    from vlm.llm.lora import ADAPTER

    targets = {f"{module}.{_file_name(name, ADAPTER)}": parameter for module, layer in layers.items() for name, parameter in layer.named_parameters() if name.startswith("lora_")}
    inside: Any = getattr(part, "weights_key", lambda name: name)
    wrong: list[str] = []
    seen: set[str] = set()
    for file_name, tensor in _adapter_tensors(find_folder(path)):
        name = inside(file_name) or file_name
        target = targets.get(name)
        if ".lora_" not in name and _same_base(part, name, tensor):
            continue  # peft writes the base's embeddings along where the head or they carry LoRA
        if target is None:
            wrong.append(f"unexpected {file_name}")
        elif not copy_rows(target, tensor, grow=_has_tokens(name)):
            wrong.append(f"{file_name} {tuple(tensor.shape)} for {tuple(target.shape)}")
        seen.add(name)
    wrong += [f"missing {name}" for name in targets if name not in seen]
    if wrong:
        raise CheckpointError(
            f"the adapter {path} does not fit this part",
            got=f"{', '.join(wrong[:4])}{f', and {len(wrong) - 4} more' if len(wrong) > 4 else ''}",
            expected=f"{len(targets)} tensors",
            cure="give the base model that the adapter was trained on",
        )


def _same_base(part: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a tensor of the base model is the one that is there; it may lack rows for added tokens."""
    module, _, leaf = name.replace(".base_layer", "").rpartition(".")
    try:
        own = part.get_submodule(module)
    except AttributeError:
        return False
    value = getattr(own, leaf, None)
    return isinstance(value, Tensor) and len(tensor) <= len(value) and torch.equal(value[: len(tensor)], tensor.to(value))


def _has_tokens(name: str) -> bool:
    """Whether it is the head's B, which has a row per token."""
    return ".lora_B." in name and name.split(".")[0] in ("lm_head", "embed_out")


def _adapter_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name without peft's prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    file = next((folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds no adapter weights", expected="adapter_model.safetensors or adapter_model.bin", cure="fetch the adapter again")
    for name, tensor in read_file(str(file)):
        yield name.removeprefix(PREFIX), tensor


def _module(name: str) -> str:
    return name[: name.index(".lora_")]


def _file_name(name: str, adapter: str) -> str:
    """Name in one of peft's layers -> name in the file, where the adapter has no name."""
    return name.replace(f".{adapter}", "")


# ---- out -----------------------------------------------------------------------------------------------------------------


def export_adapters(source: str | Path, out: str | Path | None = None) -> list[str]:
    """Write the LoRAs and MM-LoRAs of a finished run as stock adapters; returns what was written, in words.

    source: folder of a run, a stage or an export of vlm. out: where to, new or empty; default: `source/export-peft`. Raises ConfigurationError as `write_adapters` does, and where `out` holds something.
    """
    from vlm.loading import load

    out = free(Path(out) if out is not None else Path(source) / "export-peft")
    model, _ = load(source)
    with new_folder(out) as partial:
        written = write_adapters(model, partial)
    return [f"{out / name}: {words}" for name, words in written.items()]


def write_adapters(model: "VLM", folder: Path) -> dict[str, str]:
    """One stock adapter per LoRA of the model, in `folder/NAME`, and per modality of an MM-LoRA, in `folder/NAME/MODALITY`; returns by NAME what was written, in words.

    Those of the decoder fit AutoModelForCausalLM, those of a CLIP or SigLIP tower its vision model. Raises ConfigurationError where the model has none, or one of a part that no class of others is.
    """
    found = dict(_adapters(model))
    if not found:
        raise ConfigurationError("this model has no LoRA", got=", ".join(model.spec.adapt) or "no adaptation", cure="nothing is left to export as an adapter once it is merged")
    stock = {name: _stock(model, name, spec, adapter) for name, (spec, adapter) in found.items()}
    return {name: _write(*stock[name], _settings(spec, adapter), spec.part, folder / name) for name, (spec, adapter) in found.items()}


def _adapters(model: "VLM") -> "Iterator[tuple[str, tuple[LoRASpec | MMLoRASpec, str]]]":
    """By the name of the folder: the adaptation, and what peft's layers call the adapter."""
    from vlm.llm.lora import ADAPTER, LoRASpec
    from vlm.llm.mm_lora import MMLoRASpec

    for name, spec in model.spec.adapt.items():
        if isinstance(spec, LoRASpec):
            yield name, (spec, ADAPTER)
        elif isinstance(spec, MMLoRASpec):
            yield from ((f"{name}/{modality}", (spec, modality)) for modality in spec.adapters)


def _settings(spec: "LoRASpec | MMLoRASpec", adapter: str) -> dict[str, Any]:
    """What adapter_config.json says of the values."""
    from vlm.llm.mm_lora import MMLoRASpec

    if isinstance(spec, MMLoRASpec):
        own = spec.settings(adapter)
        return {"r": own.r, "lora_alpha": own.lora_alpha, "lora_dropout": own.lora_dropout}
    assert spec.alpha is not None
    alpha = int(spec.alpha) if spec.alpha.is_integer() else spec.alpha  # peft computes with either
    return {"r": spec.rank, "lora_alpha": alpha, "lora_dropout": spec.dropout, "use_rslora": bool(spec.rslora)}


def _stock(model: "VLM", name: str, spec: "LoRASpec | MMLoRASpec", adapter: str) -> tuple[list[str], dict[str, Tensor], nn.Module]:
    """Module paths, tensors by file name, and the module that stands for the class of others."""
    part = model.part(spec)
    inner = "tower." if spec.part == "encoder" else ""
    base = part.get_submodule("tower") if inner and hasattr(part, "tower") else part
    layers = spec.layers(part)
    if spec.part == "connector" or any(not path.startswith(inner) for path in layers):
        raise ConfigurationError(
            f"the LoRA {name} has no stock form",
            got=f"part {spec.part}, {model.spec.encoder.use if inner else spec.part}",
            expected="a decoder's or a CLIP or SigLIP tower's",
            cure="merge it: `vlm merge`",
        )
    tensors = {
        f"{PREFIX}{path.removeprefix(inner)}.{_file_name(key, adapter)}": value.detach().cpu().contiguous()
        for path, layer in layers.items()
        for key, value in layer.named_parameters()
        if key.startswith("lora_") and adapter in key.split(".")
    }
    return [path.removeprefix(inner) for path in layers], tensors, base


def _write(paths: list[str], tensors: Mapping[str, Tensor], base: nn.Module, settings: Mapping[str, Any], part: str, folder: Path) -> str:
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    task = "CAUSAL_LM" if part == "llm" else None
    LoraConfig(**settings, target_modules=_short(paths, base), task_type=task, inference_mode=True).save_pretrained(str(folder))  # type: ignore[arg-type]
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"{len(tensors)} tensors for {'AutoModelForCausalLM' if part == 'llm' else type(base).__name__}"


def _short(paths: list[str], base: nn.Module) -> list[str]:
    """The last words of the paths, where they mean the same modules; the names that others write."""
    from vlm.llm.targets import outside_adapters

    words = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in outside_adapters(base) if path.rpartition(".")[2] in words}
    return words if meant == set(paths) else sorted(paths)
