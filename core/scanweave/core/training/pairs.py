"""Arguments given as name=value, for settings whose names a script cannot know."""

import ast
from collections.abc import Sequence
from typing import Any


def parse_pairs(pairs: Sequence[str], name: str, *, last_wins: bool = False) -> dict[str, Any]:
    """Read name=value texts; values are Python's, and what is none is text.

    Args:
        pairs: Texts such as "depth=4", "pattern=griffin" or "letters={'a': 'gla'}".
        name: What errors call them.
        last_wins: Whether an argument may come again, and replaces what came before.

    Raises:
        ValueError: a text is not name=value, or a name comes twice without `last_wins`.

    Example:
        >>> parse_pairs(["depth=4", "pattern=griffin"], "mixer_args")
        {'depth': 4, 'pattern': 'griffin'}
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, found, text = pair.partition("=")
        if not found or not key.isidentifier():
            raise ValueError(f"{name} must be name=value, got {pair!r}")
        if key in values and not last_wins:
            raise ValueError(f"{name} must name every argument once, got {key!r} twice")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values
