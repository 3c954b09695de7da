"""Text of prompts and labels: whether it can be stored, and how a person may be shown it."""

import re

HALF = "half a character (a lone surrogate)"
_SURROGATE = re.compile("[\ud800-\udfff]")


def has_half(text: str) -> bool:
    """Whether the text holds half a character, which no store takes."""
    return _SURROGATE.search(text) is not None


def visible(text: str) -> str:
    """The text with every character that cannot be printed, line ends too, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
