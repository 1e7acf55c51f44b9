"""Arithmetic of a step, reckoned from the layout, and what share of the device's peak it is (MFU, Chowdhery et al. 2022, appendix B). What checkpointing computes again does not count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm.llm import decoder as decoders
from vlm.model import VLM
from vlm.structure import hollow

__all__ = ["Arithmetic", "arithmetic_of", "peak_of"]

PEAKS = {"H200": 989, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165, "3090": 71}
"""TFLOP/s of dense bf16 products by a part of the device's name, from the vendor's data sheets."""


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs, forward and backward, a multiply-add being two. token: of the decoder's layers. supervised: of the head. picture: encoder and connector. pair: of attention, per pair of a token and one that it may see."""

    token: float
    supervised: float
    picture: float
    pair: float

    def step(self, tokens: float, documents: float, supervised: float, pictures: float) -> float:
        """FLOPs of a step. The documents are taken as equally long, which reckons a little too few pairs."""
        return tokens * self.token + supervised * self.supervised + pictures * self.picture + self.pair * tokens * tokens / (2 * max(documents, 1.0))

    def speed(self, record: Mapping[str, Any], seconds: float, peak: float | None) -> dict[str, float]:
        """tflops of one rank, and mfu where the device's `peak` FLOP/s are known. record: of the step. seconds: over all ranks."""
        done = self.step(record["tokens"], record["samples"], record["supervised"], record["pictures"]) / seconds
        return {"tflops": round(done / 1e12, 4)} | ({"mfu": round(done / peak, 4)} if peak else {})


def arithmetic_of(model: VLM) -> Arithmetic:
    """Of a model as it is trained: weights without gradient cost a forward pass and the way back to what lies below."""
    config = model.config.text_config
    ends = {id(parameter) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for parameter in part.parameters()}
    matrices = [parameter for parameter in model.llm.parameters() if len(_shape(parameter)) > 1 and id(parameter) not in ends]
    head = model.get_output_embeddings().parameters()
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return Arithmetic(
        token=sum(_passes(parameter) * _size(parameter) for parameter in matrices),
        supervised=sum(_passes(parameter) * _size(parameter) for parameter in head if len(_shape(parameter)) > 1),
        picture=_seeing(model),
        pair=3 * 4.0 * heads * len(decoders.layers(model.llm)),
    )


def _passes(parameter: torch.nn.Parameter) -> float:
    """FLOPs per number of a matrix and token: forward, back to the input, and to the matrix itself where it is trained."""
    return 6.0 if parameter.requires_grad else 4.0


def _shape(parameter: torch.nn.Parameter) -> Sequence[int]:
    return getattr(parameter, "ds_shape", parameter.shape)


def _size(parameter: torch.nn.Parameter) -> int:
    return int(torch.Size(_shape(parameter)).numel())


def _seeing(model: VLM) -> float:
    """Encoder and connectors for one picture, counted on the meta device. A frozen encoder runs forward only."""
    spec = model.spec
    with hollow():
        encoder, parts = spec.encoder.build(), [part.build(spec.encoder, link).requires_grad_(False) for part, link in model.chain]  # torch's counter looks for graphs else
    pictures = [spec.encoder.dummy().to(torch.device("meta"))]
    with torch.no_grad():
        with FlopCounterMode(display=False) as of_encoder:
            features = encoder(pictures, model.reads)
        with FlopCounterMode(display=False) as of_parts:
            for part in parts:
                features = part(features)
    trained = any(parameter.requires_grad for parameter in model.encoder.parameters())
    return of_encoder.get_total_flops() * (3.0 if trained else 1.0) + of_parts.get_total_flops() * 3.0


def peak_of(device: torch.device) -> float | None:
    """FLOP/s of the device's bf16 products, None where nobody has said."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)
