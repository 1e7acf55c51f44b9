"""The contract of an adaptation: one file that changes a decoder after its construction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from vlm.llm.context import Scope

__all__ = ["AdaptationSpec"]


@dataclass(frozen=True, kw_only=True)
class AdaptationSpec:
    """Configuration of one adaptation. since: the stage in which it enters (default: the first).

    Adaptations are applied in the order of `place`: 0 duplicates (modality_experts), 1 inner weights (lora, mm_lora), 2 FFN replacement (moe), 3 layer (mod).
    """

    use: ClassVar[str]
    place: ClassVar[int] = 1
    since: str | None = None

    def plan(self, llm_config: Any) -> Sequence[str]:
        """Claims: paths of the decoder's modules that this adaptation owns, before anything is built; raises ConfigurationError."""
        return ()

    def build(self, decoder: nn.Module, scope: "Scope") -> None:
        """Change the structure; a replaced module is kept as `source` until `initialise`."""
        raise NotImplementedError

    def initialise(self, decoder: nn.Module) -> None:
        """First values, drawn or copied from `source`, which is dropped. Called once, with all parameters gathered."""
        raise NotImplementedError

    def release(self, decoder: nn.Module) -> None:
        """Drop every `source`: values come from a checkpoint."""

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        """Parameter groups that it adds, by path below `llm`: {"moe.router": [...]}."""
        raise NotImplementedError

    def breaks(self) -> Sequence[str]:
        """The equalities of DESIGN rule 3 that do not hold, each with the setting under which they do."""
        return ()
