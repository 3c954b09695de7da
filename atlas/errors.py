"""What a user is told when something they gave cannot be used."""


class AtlasError(Exception):
    """Bad input or a missing part, in one sentence: what, where, and what to do.

    The command line prints the sentence and exits with status 2.
    """
