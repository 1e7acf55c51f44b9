"""Features among text embeddings, out of place."""

import torch
from torch import Tensor

from vlm.errors import DataError

__all__ = ["put_features", "type_from_ids"]


def put_features(embeddings: Tensor, features: Tensor, vision: Tensor, *, dummy: bool = False) -> Tensor:
    """Put features (N, D) at the N places where `vision` (B, S) is true, row by row, into embeddings (B, S, D).

    dummy: the features are of a picture that no row holds; nothing is put, and they join the graph with a zero gradient at this very place, so that gradients arrive in the same order as with
    pictures (feasibility section 11). Raises DataError where the counts differ.
    """
    places, given = int(vision.sum()), 0 if dummy else len(features)
    if places != given:
        raise DataError(
            "features and picture placeholders of a micro-batch differ in number",
            got=f"{given} features",
            expected=f"{places} placeholder tokens",
            cure="make rows with the processor, which counts them by the encoder's layout",
        )
    spliced = embeddings.masked_scatter(vision[..., None], features[:given].to(embeddings.dtype))
    return spliced + 0.0 * features.sum().to(embeddings.dtype) if dummy else spliced


def type_from_ids(input_ids: Tensor, placeholder: int) -> Tensor:
    """(B, S) int64 token types where the caller gave none: 1 where the placeholder id stands."""
    return (input_ids == placeholder).to(torch.int64)
