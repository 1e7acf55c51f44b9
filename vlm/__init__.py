"""vlm: vision-language models from exchangeable parts, trained by one YAML.

Names are lazy (PEP 562): importing the package costs milliseconds and imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlm.compat import cure_torchvision

if TYPE_CHECKING:
    from vlm import connectors, encoders, llm, objectives
    from vlm.eval.run import evaluate
    from vlm.generate import answer
    from vlm.loading import load
    from vlm.train.check import check_run as check
    from vlm.train.config import RunSpec
    from vlm.train.stages import fit
    from vlm.train.stages import report_run as report

__all__ = ["answer", "check", "compose", "connectors", "encoders", "evaluate", "fit", "llm", "load", "objectives", "report"]

cure_torchvision()

_PLACES = {
    "answer": ("vlm.generate", "answer"),
    "check": ("vlm.train.check", "check_run"),
    "evaluate": ("vlm.eval.run", "evaluate"),
    "fit": ("vlm.train.stages", "fit"),
    "load": ("vlm.loading", "load"),
    "report": ("vlm.train.stages", "report_run"),
}


def compose(config: str, *overrides: str) -> "RunSpec":
    """A run from the name or path of a YAML and overrides such as "model.encoder=clip_l_336" or "stages.align.batch=64". Raises ConfigurationError with all problems at once."""
    from vlm.composition import compose as compose_schema
    from vlm.train.config import RunSpec

    return compose_schema(RunSpec, config, overrides)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, attribute = _PLACES[name]
        return getattr(importlib.import_module(module), attribute)
    if name in ("connectors", "encoders", "llm", "objectives"):
        return importlib.import_module(f"vlm.{name}")
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
