"""The contract of an adaptation: one file that changes a decoder, or another part, after its construction."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import nn

from vlm.errors import ConfigurationError
from vlm.figures import Figure, Seen

if TYPE_CHECKING:
    from vlm.llm.context import Scope

__all__ = ["AdaptationSpec", "Part", "beside", "check_claims", "check_order"]

Part = Literal["llm", "encoder", "connector"]


@dataclass(frozen=True, kw_only=True)
class AdaptationSpec:
    """Configuration of one adaptation. since: the stage in which it enters (default: the first).

    Adaptations are applied in the order of `place`: 0 duplicates (modality_experts), 1 inner weights (lora, mm_lora), 2 FFN replacement (moe), 3 layer (mod).
    mergeable: whether weights/merge.py can compute it into the weights.
    part: what is changed, and what the methods below are handed as `decoder`: the decoder, or for an adaptation that says so the encoder or the whole chain of connectors (link name -> connector).
    """

    use: ClassVar[str]
    place: ClassVar[int] = 1
    part: ClassVar[Part] = "llm"
    mergeable: ClassVar[bool] = False
    since: str | None = None

    @property
    def order(self) -> tuple[int, bool]:
        """Where it comes among others: by `place`, and behind those whose claims it leaves alone."""
        return self.place, self.takes_rest

    @property
    def takes_rest(self) -> bool:
        """Whether it takes what the claims of others leave."""
        return False

    def plan(self, llm_config: Any) -> Sequence[str]:
        """Claims: paths of the decoder's modules that this adaptation owns, before anything is built; raises ConfigurationError."""
        return ()

    def build(self, decoder: nn.Module, scope: "Scope") -> None:
        """Change the structure; a replaced module is kept as `source` until `initialise`."""
        raise NotImplementedError

    def initialise(self, decoder: nn.Module) -> None:
        """First values, drawn or copied from `source`, which is dropped. Called once, with all parameters gathered."""
        raise NotImplementedError

    def projector(self) -> str | None:
        """A file with first values of the first connector, which came with the adaptation's own."""
        return None

    def release(self, decoder: nn.Module) -> None:
        """Drop every `source`: values come from a checkpoint."""

    def form(self) -> Self:
        """What config.json keeps of it: everything but where first values came from."""
        return self

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        """Parameter groups that it adds, by path below its part: {"moe.router": [...]}."""
        raise NotImplementedError

    def breaks(self) -> Sequence[str]:
        """The equalities of DESIGN rule 3 that do not hold, each with the setting under which they do."""
        return ()

    def figures(self, part: nn.Module, seen: Seen) -> Iterable[Figure]:
        """What a run's report shows of it. part: the trained part that it changed, in evaluation mode, without gradients."""
        return ()


def beside(own: Mapping[str, list[nn.Parameter]], added: Iterable[Mapping[str, list[nn.Parameter]]]) -> dict[str, list[nn.Parameter]]:
    """A part's own parameter groups without the parameters that adaptations added, and those under the adaptations' paths."""
    found: dict[str, list[nn.Parameter]] = {}
    for groups in added:
        for path, parameters in groups.items():
            found.setdefault(path, []).extend(parameters)
    taken = {id(parameter) for parameters in found.values() for parameter in parameters}
    for path, parameters in own.items():
        found.setdefault(path, []).extend(parameter for parameter in parameters if id(parameter) not in taken)
    return found


def check_claims(claims: Mapping[str, Sequence[str]]) -> None:
    """claims: adaptation -> what its `plan` claims. Raises ConfigurationError where one claims what another owns."""
    names = list(claims)
    for index, name in enumerate(names):
        for other in names[:index]:
            clash = next(((mine, theirs) for mine in claims[name] for theirs in claims[other] if f"{mine}.".startswith(f"{theirs}.") or f"{theirs}.".startswith(f"{mine}.")), None)
            if clash:
                raise ConfigurationError(
                    f"the adaptations {other} and {name} claim the same module of the decoder",
                    got=f"{clash[1]} and {clash[0]}",
                    expected="each module in one of them",
                    cure=f"take it out of what {name} or {other} targets",
                )


def check_order(entering: Mapping[str, AdaptationSpec]) -> None:
    """entering: adaptations in the order in which stages bring them. Raises ConfigurationError where a checkpoint's model would be built in another order, and have other keys."""
    names = list(entering)
    for index, name in enumerate(names):
        for other in names[:index]:
            first, then = entering[other], entering[name]
            if first.part == then.part and first.order > then.order:
                raise ConfigurationError(
                    f"the adaptation {name} enters after {other}, which is built on top of it",
                    expected=f"{name} in the same stage as {other} or an earlier one",
                    cure=f"change `since` of {name} or of {other}",
                )
