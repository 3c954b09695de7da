"""Which measured qualities of a dictionary are bad, in words: circuits through such a dictionary say little."""

LIMITS = {"explained_variance": 0.5, "loss_kept": 0.8}
_WORDS = {"explained_variance": "explained variance", "loss_kept": "loss kept"}


def faults(**measured: float | None) -> list[str]:
    """`explained variance -7.55` and the like, for what lies under its limit; nothing for what was not measured."""
    return [
        f"{_WORDS[name]} {value:.2f}"
        for name, limit in LIMITS.items()
        if (value := measured.get(name)) is not None and not value >= limit
    ]
