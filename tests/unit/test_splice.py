"""Features stand in reading order among the embeddings, and each is counted."""

import pytest
import torch

from vlm.errors import DataError
from vlm.splice import put_features


def test_splice_puts_features_in_reading_order_and_counts_them() -> None:
    embeddings, features = torch.zeros(2, 3, 2), torch.arange(1.0, 7.0).view(3, 2)
    vision = torch.tensor([[False, True, False], [True, False, True]])
    assert put_features(embeddings, features, vision)[vision].tolist() == features.tolist()
    assert not embeddings.any()
    for wrong in (features[:2], torch.zeros(4, 2)):
        with pytest.raises(DataError, match=rf"got {len(wrong)} features; expected 3 placeholder tokens"):
            put_features(embeddings, wrong, vision)
