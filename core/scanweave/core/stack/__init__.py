"""Stacks of mixers and feed-forwards: hybrids from pattern strings, and published ones by name.

    create_stack("samba", 512, depth=24)          a preset
    create_stack("12*(m f) (w f)", 512)           a pattern, see `parse_pattern`

A stack is a mixer ("stack", "stack_bidirectional"), and so are the wrappers it is made of
("parallel", "bidirectional"): every domain takes them by name.
"""

from .feed_forward import MLP, GatedMLP
from .moe import MoE, scale_balance
from .pattern import Part, format_pattern, parse_pattern
from .presets import LETTERS, PRESETS, Preset
from .shared import SharedTransformer
from .stack import BidirectionalStack, Stack, create_stack
from .wrappers import Bidirectional, Parallel

__all__ = [
    "LETTERS",
    "MLP",
    "PRESETS",
    "Bidirectional",
    "BidirectionalStack",
    "GatedMLP",
    "MoE",
    "Parallel",
    "Part",
    "Preset",
    "SharedTransformer",
    "Stack",
    "create_stack",
    "format_pattern",
    "parse_pattern",
    "scale_balance",
]
