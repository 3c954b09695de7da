"""Text of prompts and labels as a person may be shown it."""


def visible(text: str) -> str:
    """The text with every character that cannot be printed, line ends too, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
