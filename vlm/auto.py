"""Registration with transformers' Auto classes. `import vlm.auto` is all a user of Auto classes needs."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlm.configuration import VLMConfig
from vlm.model import VLM
from vlm.processor import VLMProcessor

__all__ = ["VLM", "VLMConfig", "VLMProcessor"]

AutoConfig.register("vlm", VLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, VLM, exist_ok=True)
AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
