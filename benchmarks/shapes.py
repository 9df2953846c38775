"""Sizes at which the ops are measured: those of image, language, graph and control models.

Letters: B batch, L length, D channels, N state, S packed sequences.
"""

import itertools
import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One size of one op.

    Attributes:
        name: What `--shapes` takes.
        batch: B; 1 when packed.
        length: L; of all tokens when packed.
        dim: D; of the block's input and output for a mixer.
        state: N, 0 where there is none.
        gate: Whether there is a z.
        packed: Shortest and longest sequence of a packed row; (0, 0) is a dense batch.
        width: Taps of the convolution.
        head: Channels of a head, 0 where there are no heads.
        grid: Rows and columns of a grid of tokens, L in all; (0, 0) where there is none.
        mixer: Name in the registry of mixers, for the op `mixer`.
        small: So little work that launches take most of the time: replayed as a graph as well.
    """

    name: str
    batch: int
    length: int
    dim: int
    state: int = 16
    gate: bool = True
    packed: tuple[int, int] = (0, 0)
    width: int = 4
    head: int = 0
    grid: tuple[int, int] = (0, 0)
    mixer: str = ""
    small: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether sequences of different lengths share one row."""
        return self.packed[1] > 0

    def toy(self) -> "Shape":
        """The same kind of problem, small enough to run everywhere in no time."""
        length = 30 if self.is_packed else min(self.length, 11)
        return replace(
            self,
            batch=min(self.batch, 2),
            length=12 if self.grid[0] else length,
            grid=(3, 4) if self.grid[0] else (0, 0),
            dim=8,
            head=min(self.head, 4),
            state=min(self.state, 4),
            packed=(2, 12) if self.is_packed else (0, 0),
        )

    def ends(self) -> list[int]:
        """Where packed sequences start and end: lengths are uniform in `packed`, seed fixed."""
        rng = random.Random(0)
        lengths: list[int] = []
        while sum(lengths) < self.length:
            lengths.append(min(rng.randint(*self.packed), self.length - sum(lengths)))
        return [0, *itertools.accumulate(lengths)]


VIM = Shape("vim_s", 128, 197, 768)
GRAPH = Shape("graph", 1, 100_000, 192, packed=(10, 3000))
LM = Shape("lm", 8, 4096, 2048)
LONG = Shape("long", 1, 131_072, 768)
LONG_1024 = Shape("long_1024", 1, 131_072, 1024)
LONG_256 = Shape("long_256", 1, 131_072, 256)
RL = Shape("rl", 64, 60, 256, small=True)
VIM_CPU = Shape("vim_b2", 2, 197, 384)
LM_CPU = Shape("lm_b1", 1, 4096, 256)
GRAPH_CPU = Shape("graph_4747", 1, 4747, 96, packed=(10, 500))

# one row of 128 images per direction of a cross scan
SS2D = (
    Shape("ss2d_56", 512, 3136, 192, state=1, gate=False),
    Shape("ss2d_14", 512, 196, 768, state=1, gate=False),
)
# feature maps of a vision model at 224 pixels: its first stage and its third
GRIDS = (
    Shape("ss2d_56", 128, 3136, 192, state=1, gate=False, grid=(56, 56)),
    Shape("ss2d_14", 128, 196, 768, state=1, gate=False, grid=(14, 14)),
)
GRID_CPU = Shape("ss2d_28_b2", 2, 784, 192, state=1, gate=False, grid=(28, 28))
STEPS = tuple(
    Shape(f"step_b{batch}", batch, 1, 256, small=True) for batch in (1, 16, 64, 256, 1024, 4096)
)
SSD_STEPS = tuple(replace(s, dim=512, state=64, gate=False, head=64) for s in STEPS[::2])
# Mamba-2 and Hydra, whose heads have 64 channels
SSD_LM = Shape("lm", 8, 4096, 2048, state=128, gate=False, head=64)
SSD_VIM = Shape("vim_s", 128, 197, 1536, state=64, gate=False, head=64)
SSD_GRAPH = replace(GRAPH, state=64, gate=False, head=64)
SSD_RL = Shape("rl", 64, 60, 512, state=64, gate=False, head=64, small=True)
# GLA, whose states are square, and RWKV-6, both of 2048 channels
GLA_LM = replace(SSD_LM, head=128)
GLA_LM_CPU = Shape("lm_b1", 1, 512, 256, state=64, gate=False, head=64)
RWKV_LM = replace(SSD_LM, state=64)
SSD_LM_CPU = Shape("lm_b1", 1, 1024, 512, state=64, gate=False, head=64)
SSD_VIM_CPU = Shape("vim_b2", 2, 197, 384, state=64, gate=False, head=64)


def _blocks(base: Shape, *mixers: str) -> tuple[Shape, ...]:
    return tuple(
        replace(base, name=f"{base.name}.{m}", mixer=m, state=16 if "mamba" in m else 0)
        for m in mixers
    )


def _stateless(*shapes: Shape) -> tuple[Shape, ...]:
    return tuple(replace(shape, state=0) for shape in shapes)


# op -> device type -> shapes
SHAPES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "selective_scan": {
        "cuda": (VIM, *SS2D, LM, LONG, GRAPH, RL),
        "cpu": (VIM_CPU, LM_CPU, RL, GRAPH_CPU),
    },
    "bidirectional_selective_scan": {
        "cuda": (VIM, GRAPH),
        "cpu": (VIM_CPU, GRAPH_CPU),
    },
    "path_selective_scan": {"cuda": GRIDS, "cpu": (GRID_CPU,)},
    "causal_conv1d": {
        "cuda": _stateless(VIM, LM, GRAPH, RL),
        "cpu": _stateless(VIM_CPU, LM_CPU, RL, GRAPH_CPU),
    },
    "bidirectional_conv": {
        "cuda": _stateless(VIM, GRAPH),
        "cpu": _stateless(VIM_CPU, GRAPH_CPU),
    },
    "selective_scan_step": {"cuda": STEPS, "cpu": STEPS[:3:2]},
    "causal_conv1d_step": {"cuda": _stateless(*STEPS), "cpu": _stateless(*STEPS[:3:2])},
    "gated_linear_scan_step": {"cuda": SSD_STEPS, "cpu": SSD_STEPS[:2]},
    "ssd": {"cuda": (SSD_LM, SSD_GRAPH, SSD_RL), "cpu": (SSD_LM_CPU, SSD_RL)},
    "bidirectional_ssd": {"cuda": (SSD_VIM, SSD_GRAPH), "cpu": (SSD_VIM_CPU,)},
    "gated_linear_attention": {"cuda": (GLA_LM, SSD_GRAPH, SSD_RL), "cpu": (GLA_LM_CPU,)},
    "rwkv6": {"cuda": (RWKV_LM, SSD_RL), "cpu": (GLA_LM_CPU,)},
    "linear_scan": {"cuda": _stateless(LM, LONG_1024, GRAPH), "cpu": _stateless(LM_CPU)},
    "linear_scan_constant": {
        "cuda": _stateless(LM, LONG_1024, GRAPH, RL),
        "cpu": _stateless(LM_CPU),
    },
    "wkv": {"cuda": _stateless(LM, GRAPH, RL), "cpu": _stateless(LM_CPU, RL)},
    "fft_conv": {"cuda": _stateless(LM, LONG_256), "cpu": _stateless(LM_CPU)},
    "rms_norm_gated": {"cuda": _stateless(LM), "cpu": _stateless(LM_CPU)},
    "layer_norm": {
        "cuda": _stateless(Shape("vmamba_56", 128, 3136, 96), Shape("vmamba_7", 128, 49, 768)),
        "cpu": _stateless(VIM_CPU),
    },
    "rms_norm": {
        "cuda": _stateless(Shape("vim_s", 128, 197, 384)),
        "cpu": _stateless(VIM_CPU),
    },
    "mixer": {
        "cuda": (
            *_blocks(
                Shape("vim_s", 128, 197, 384),
                *("mamba", "bimamba", "attention_bidirectional", "gated_cnn_bidirectional"),
            ),
            *_blocks(Shape("rl", 64, 60, 128, small=True), "mamba", "attention", "gated_cnn"),
        ),
        "cpu": _blocks(Shape("vim_b2", 2, 197, 192), "mamba", "bimamba", "attention", "gated_cnn"),
    },
}


def shapes_of(op: str, device: str, toy: bool) -> tuple[Shape, ...]:
    """Shapes of an op on a device type; at toy size, those of every device."""
    table = SHAPES[op]
    if not toy:
        return table[device]
    every = {shape.name: shape.toy() for shapes in table.values() for shape in shapes}
    return tuple(every.values())
