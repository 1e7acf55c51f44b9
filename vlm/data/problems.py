"""What can be wrong with data, in words that stay the same: for counting, in `vlm data check` and while training."""

from vlm.errors import DataError

__all__ = ["KINDS", "kind_of"]

_SAID = {
    "placeholder count": ("pictures and placeholders differ", "not in reading order"),
    "role": ("has the unknown role", "no assistant turn", "no answer is to be learnt", "is a picture in a turn of", "are not pairs", "must be pairs", "has no answer", "brings pictures of its own"),
    "outside of the root": ("leads out of",),
    "remote": ("is not a file",),
    "missing picture": ("is not there", "there is no such picture file", "no member is the picture", "cannot read picture"),
    "too large": ("too large", "too thin", "nested too deeply", "an integer of too many digits"),
    "too long": ("is too long", "tokens, which does not fit", "is supervised"),
    "unsupported": ("is not taken",),
    "empty": ("holds 0 bytes", "is empty", "no turns", "has no text", "holds no samples", "leaves nothing of it"),
    "unreadable picture": ("the picture is truncated or corrupt", "is not a picture", "not a picture file", "is not base64", "which of its values is white", "is not a path"),
    "not JSON": ("not JSON", "is not UTF-8", "from byte 0 on", "half a character", "not an object"),
    "unreadable file": ("cannot be read", "is cut", "is damaged", "is not a tar file", "is compressed with", "goes on behind the end", "was changed"),
}  # fmt: skip
KINDS = (*_SAID, "other")
"""All kinds of problems."""


def kind_of(error: DataError) -> str:
    """One of KINDS: what the error says of itself, else what its sentence says."""
    if error.kind != "other":
        return error.kind
    return next((kind for kind, phrases in _SAID.items() if any(phrase in error.what for phrase in phrases)), "other")
