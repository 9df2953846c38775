"""The grammar of patterns."""

import pytest

from scanweave.core.stack import Part, format_pattern, parse_pattern

KNOWN = {"m", "f", "w", "a", "S", "mamba2", "gated_mlp"}


def one(name: str) -> tuple[Part, ...]:
    return (Part((name,)),)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("m", [one("m")]),
        ("mma", [one("m"), one("m"), one("a")]),
        ("m3 a m2", [one("m")] * 3 + [one("a")] + [one("m")] * 2),
        ("2*m3a", [one("m")] * 3 + [one("a")] + [one("m")] * 3 + [one("a")]),
        ("(m f)(w f)", [(*one("m"), *one("f")), (*one("w"), *one("f"))]),
        ("(mf)", [(*one("m"), *one("f"))]),
        ("2*(m a)", [(*one("m"), *one("a"))] * 2),
        ("2*((m f) a)", [(*one("m"), *one("f")), one("a")] * 2),
        ("((m))", [one("m")]),
        ("mamba2 gated_mlp", [one("mamba2"), one("gated_mlp")]),
        ("(m|w f)", [(Part(("m", "w"), "|"), *one("f"))]),
        ("m|w|a", [(Part(("m", "w", "a"), "|"),)]),
        ("2*m S>m", [one("m")] * 2 + [(Part(("S", "m"), ">"),)]),
        (" 2 * ( S > mamba2 ) ", [(Part(("S", "mamba2"), ">"),)] * 2),
    ],
)
def test_reads(pattern: str, expected: list[tuple[Part, ...]]):
    layers = parse_pattern(pattern, KNOWN)
    assert layers == expected
    assert parse_pattern(format_pattern(layers), KNOWN) == layers


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("", "at least one layer"),
        ("()", r"something between '\(' and '\)'"),
        ("m)", r"no '\)' without '\('"),
        ("(m", r"one more '\)'"),
        ("3m", r"'\*' behind 3"),
        ("0*m", "counts of at least 1"),
        ("m + a", "words, numbers"),
        ("mx", "names and letters that are known, not 'mx'"),
        ("m_2", "names and letters that are known, not 'm_2'"),
        ("m|", "a word where 'the end' is"),
        ("*m", r"a word where '\*' is"),
        ("m|w>a", r"either words joined by '\|' or two by '>'"),
        ("m>w>a", r"either words joined by '\|' or two by '>'"),
        ("mm|w", r"single words around '\|'"),
        ("m|ww", r"single words around '\|'"),
    ],
)
def test_refuses(pattern: str, rule: str):
    with pytest.raises(ValueError, match=rf"pattern must have .*{rule}.*, got "):
        parse_pattern(pattern, KNOWN)
