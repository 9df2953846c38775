"""Patterns: strings that say what a stack of layers is made of.

    m m m          three layers, one mixer each
    (m f)(w f)     two layers, each a mixer and then a feed-forward
    7*m a, m7a     seven layers and one
    2*(3*(m f) (a f))   the same four layers twice
    (m|w f)        a layer whose mixers m and w run side by side, then a feed-forward
    (S>m)          a layer whose m reads x + S(x), while only its own output joins the stream

Words are names of mixers or feed-forwards, or letters that stand for them; a word that is neither
is read letter by letter, each with a count behind it. Innermost parentheses are one layer, outer
ones group. Every word in a layer is one residual step, x + word(norm(x)), whichever parentheses are
around it: layers are what a stack's depth counts.

    Part            one residual step: its names, and how they are joined
    parse_pattern   string -> layers, each a tuple of parts
    format_pattern  layers -> string
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

_TOKENS = re.compile(r"\s*(\d+|[A-Za-z_]\w*|[()*|>])")


@dataclass(frozen=True)
class Part:
    """One residual step of a layer.

    Attributes:
        names: Words of the pattern, one unless they are joined.
        joint: "|" runs them side by side, ">" adds the first one's output to the second's input.
    """

    names: tuple[str, ...]
    joint: Literal["", "|", ">"] = ""


Layer = tuple[Part, ...]


def parse_pattern(pattern: str, known: Container[str]) -> list[Layer]:
    """Read a pattern.

    Args:
        pattern: As in this module's docstring.
        known: Words that have a meaning.

    Returns:
        The layers in their order, repetitions written out.

    Raises:
        ValueError: the pattern is empty, has an unknown word, or breaks the grammar.

    Example:
        >>> [len(layer) for layer in parse_pattern("2*(m f) a", {"m", "f", "a"})]
        [2, 2, 1]
    """
    reader = _Reader(pattern, known)
    layers = reader.sequence()
    if reader.place < len(reader.tokens):
        raise reader.error("no ')' without '('")
    if not layers:
        raise reader.error("at least one layer")
    return layers


def format_pattern(layers: Sequence[Layer]) -> str:
    """A pattern of these layers; equal neighbours are counted.

    Example:
        >>> format_pattern(parse_pattern("mm (m f)", {"m", "f"}))
        '2*m (m f)'
    """
    texts = []
    for layer in layers:
        text = " ".join(part.joint.join(part.names) for part in layer)
        plain = len(layer) == 1 and not layer[0].joint
        texts.append(text if plain else f"({text})")
    found: list[str] = []
    start = 0
    for i in range(1, len(texts) + 1):
        if i == len(texts) or texts[i] != texts[start]:
            found.append(texts[start] if i - start == 1 else f"{i - start}*{texts[start]}")
            start = i
    return " ".join(found)


class _Reader:
    """Recursive descent over the tokens of a pattern."""

    def __init__(self, pattern: str, known: Container[str]) -> None:
        self.pattern, self.known, self.place = pattern, known, 0
        self.tokens: list[str] = []
        at = 0
        text = pattern.rstrip()
        while at < len(text):
            match = _TOKENS.match(text, at)
            if match is None:
                raise self.error(f"words, numbers, '(', ')', '*', '|' and '>', not {text[at:]!r}")
            self.tokens.append(match[1])
            at = match.end()

    def error(self, rule: str) -> ValueError:
        return ValueError(f"pattern must have {rule}, got {self.pattern!r}")

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def sequence(self) -> list[Layer]:
        """Layers up to a closing parenthesis or the end."""
        layers: list[Layer] = []
        while self.peek() not in ("", ")"):
            count = self.count()
            if self.peek() == "(":
                layers += count * self.group()
            else:
                layers += count * [(part,) for part in self.parts()]
        return layers

    def group(self) -> list[Layer]:
        """What parentheses hold: one layer, or several if they hold parentheses."""
        self.take()
        end = self.place
        while end < len(self.tokens) and self.tokens[end] not in "()":
            end += 1
        innermost = end < len(self.tokens) and self.tokens[end] == ")"
        layers = self.sequence()
        if self.take() != ")":
            raise self.error("one more ')'")
        if not layers:
            raise self.error("something between '(' and ')'")
        return [tuple(part for layer in layers for part in layer)] if innermost else layers

    def count(self) -> int:
        if not self.peek().isdigit():
            return 1
        count = int(self.take())
        if self.take() != "*":
            raise self.error(f"'*' behind {count}")
        if count < 1:
            raise self.error("counts of at least 1")
        return count

    def parts(self) -> list[Part]:
        """A word, or words that are joined."""
        names = self.words()
        joint = self.peek()
        if joint not in ("|", ">"):
            return [Part((name,)) for name in names]
        groups = [names]
        while self.peek() == joint:
            self.take()
            groups.append(self.words())
        if any(len(group) > 1 for group in groups):
            raise self.error(f"single words around {joint!r}")
        names = [group[0] for group in groups]
        if self.peek() in ("|", ">") or (joint == ">" and len(names) != 2):
            raise self.error("either words joined by '|' or two by '>'")
        return [Part(tuple(names), joint)]

    def words(self) -> list[str]:
        word = self.take()
        if not (word and (word[0].isalpha() or word[0] == "_")):
            raise self.error(f"a word where {word or 'the end'!r} is")
        if word in self.known:
            return [word]
        letters = re.findall(r"([A-Za-z])(\d*)", word)
        if "".join(a + b for a, b in letters) != word or any(
            a not in self.known for a, _ in letters
        ):
            raise self.error(f"names and letters that are known, not {word!r}")
        return [letter for letter, times in letters for _ in range(int(times or 1))]
