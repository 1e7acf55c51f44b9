"""The adapted decoder layer: a subclass, put on after construction, of whatever layer class the family has."""

from typing import Any

from torch import Tensor, nn

from vlm.llm.context import Scope, TokenContext

__all__ = ["AdaptedLayer", "adapt_layer"]


class AdaptedLayer(nn.Module):
    """Mixed in front of a family's decoder layer class; parameter names stay. Its forward lies inside transformers' checkpoint, so recomputation sees the context again."""

    scope: Scope
    layer_index: int
    window: int | None

    def forward(self, hidden_states: Tensor, context: TokenContext | None = None, **kwargs: Any) -> Tensor:
        if context is None:
            return super().forward(hidden_states, **kwargs)
        kwargs |= context.attention(self.window, self._first_key(context, _cache_of(kwargs)))
        with self.scope.use(context):
            out = super().forward(hidden_states, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _first_key(self, context: TokenContext, cache: Any) -> int:
        """Index in the row of the first key that the cache still holds: one of a sliding window forgets."""
        layers = getattr(cache, "layers", ())
        cached = layers[self.layer_index] if len(layers) > self.layer_index else None
        return int(cached.get_mask_sizes(context.order.shape[1])[1]) if cached is not None and getattr(cached, "is_sliding", False) else 0


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache, whatever the family calls it. Not `or`: an empty cache is falsy."""
    return next((kwargs[name] for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None), None)


def adapt_layer(layer: nn.Module, index: int, scope: Scope, config: Any) -> None:
    """Turn `layer` into its adapted form in place. config: the decoder's transformers config (sliding windows)."""
    base = type(layer)
    layer.__class__ = type("Adapted" + base.__name__, (AdaptedLayer, base), {})
    layer.scope, layer.layer_index, layer.window = scope, index, _window(config, index)  # type: ignore[assignment]  # on the instance: a class attribute would hide a submodule


def _window(config: Any, index: int) -> int | None:
    """Sliding window of a layer, None = full attention: from layer_types where the family has them, else one window for all layers."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] == "full_attention":
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)
