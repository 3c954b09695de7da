"""What a user is told when something they gave cannot be used."""


class AtlasError(Exception):
    """Bad input or a missing part, in one sentence: what, where, and what to do.

    The command line prints the sentence and exits with status 2.
    """


def cause(error: BaseException) -> str:
    """What another library raised, in the words that fit into a sentence: its kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
