"""The registered ops and positional arguments for them, as exported programs call them."""

from typing import Any

import torch
from tests.core.op_cases import LENGTHS, conv_inputs, pack, pair_inputs, scan_inputs
from torch import Tensor

SCAN = torch.ops.scanweave.selective_scan.default
SCAN_BACKWARD = torch.ops.scanweave.selective_scan_backward.default
STEP = torch.ops.scanweave.selective_scan_step.default
CONV = torch.ops.scanweave.short_conv.default
CONV_BACKWARD = torch.ops.scanweave.short_conv_backward.default


def scan_args(
    directions: int = 1,
    packed: bool = False,
    bare: bool = False,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple:
    """Arguments of the registered scan."""
    given = pair_inputs(
        1 if packed else 2,
        11,
        4,
        3,
        groups=2,
        sequences=5 if packed else None,
        dtype=dtype,
        device=device,
    )
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
    lists = [list(given[name][:directions]) for name in names]
    if bare:
        lists[5:] = [[], [], []]
    z = None if bare else given["z"]
    cu = pack(LENGTHS, device) if packed else None
    return (*lists, z, cu, [False, True][:directions], not bare, training)


def step_args(bare: bool = False, device: str = "cpu") -> tuple:
    """Arguments of the registered step, of which the state is changed."""
    given = scan_inputs(2, 1, 4, 3, groups=2, dtype=torch.float32, device=device)
    x, dt, A, B, C, D, z, bias, state = (v.detach() for v in given.values())
    x, dt, B, C, z = (v[:, 0] for v in (x, dt, B, C, z))
    return (state, x, dt, A, B, C, *((None,) * 3 if bare else (D, z, bias)), not bare)


def conv_args(
    packed: bool = False, bare: bool = False, reverse: bool = False, device: str = "cpu"
) -> tuple:
    """Arguments of the registered convolution."""
    given = conv_inputs(
        1 if packed else 2,
        11,
        4,
        3,
        sequences=5 if packed else None,
        dtype=torch.float32,
        device=device,
    )
    x, weight, bias, state = given.values()
    cu = pack(LENGTHS, device) if packed else None
    if bare:
        return (x, weight, None, None, cu, 1, reverse, False)
    return (x, weight, bias, state, cu, 2, reverse, True)


def without_grad(args: tuple) -> tuple:
    def plain(v: Any) -> Any:
        if isinstance(v, list):
            return [plain(u) for u in v]
        return v.detach() if isinstance(v, Tensor) else v

    return tuple(plain(v) for v in args)
