"""RefusalError: why a file is not read, in three parts: what was expected, what was found instead, what to do."""

from __future__ import annotations

from typing import final

_LONGEST = 80  # characters of a file's own text in a message

DAMAGED = "Copy or download it again; if it is still refused, save it again."
RESAVE = "Save the model's tensors with torch.save(model.state_dict(), path)."


@final
class RefusalError(ValueError):
    """Raised for a file that is not read. ``read`` puts the file's name in front of the message."""

    def __init__(self, expected: str, got: str, remedy: str = DAMAGED) -> None:
        super().__init__(f"expected {expected}, got {got}. {remedy}")


def brief(value: object) -> str:
    """``value`` in one short line that is safe to print; a container is shown by its type only."""
    if isinstance(value, str):
        text = value if value.isprintable() else ascii(value)
    elif value is None or isinstance(value, int | float):
        text = repr(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
