"""HiPPO matrices: states that hold the coefficients of the past in a basis of functions.

    c'(t) = A c(t) + B f(t)         c: coefficients of f up to t in N polynomials or waves

Signs are the stable ones. r[n] = sqrt(2 n + 1); b[n] is 1 at 0, sqrt(2) at even n, 0 at odd n:

    name    A[n, k]                                                    B[n]       what is kept
    legs    -r[n] r[k] below the diagonal, -(n + 1) on it              r[n]       all, uniformly
    legt    -r[n] r[k] / 2, times (-1)^(n - k) above the diagonal      r[n] / 2   a window of 2
    lagt    -1 below the diagonal, -1/2 on it                          1          exponential decay
    fout    frequencies pi j of pairs (2 j, 2 j + 1), minus b b^T      b[n]       a window of 2
    foud    frequencies 2 pi j of the pairs, minus I / 2               b[n]       decaying waves
    legsd   legs plus half of B B^T: its normal part                   r[n] / 2   all, roughly

Each is normal but for a term of low rank: A + sum P P^T = V diag(eigenvalues) V^H, with V unitary.

Letters: N state, R rank.
Source: Gu et al. 2020 (HiPPO), arXiv 2008.07669, appendix D; Gu et al. 2022 (How to train your
HiPPO), arXiv 2206.12037, section 3; Gu et al. 2022 (S4), arXiv 2111.00396, theorem 1.
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

HippoName = Literal["legs", "legt", "lagt", "fout", "foud", "legsd"]
HIPPO_NAMES: tuple[str, ...] = get_args(HippoName)
# an eigenvalue this small is the pair of constant functions of the Fourier bases
ZERO = 1e-4


class NormalPlusLowRank(NamedTuple):
    """A HiPPO matrix in the eigenvectors of its normal part; one of each conjugate pair.

    Attributes:
        eigenvalues: Of A + sum P P^T, complex128 (N / 2,), imaginary parts at least 0, ascending.
        P: V^H times the low-rank vectors, complex128 (R, N / 2); R is 2 for legt, else 1.
        B: V^H times B, complex128 (N / 2,).
        V: Eigenvectors, complex128 (N, N / 2), first component that is not 0 real and positive.
    """

    eigenvalues: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def _check(name: str, size: int, even: bool) -> None:
    if name not in HIPPO_NAMES:
        raise ValueError(f"name must be one of {', '.join(HIPPO_NAMES)}, got {name!r}")
    if size < 1 or (even and size % 2):
        rule = "even and at least 2" if even else "at least 1"
        raise ValueError(f"size must be {rule} for {name}, got {size}")


def _waves(size: int) -> np.ndarray:
    """b: the weights of the constant, of cosines (even places) and of sines."""
    b = np.where(np.arange(size) % 2 == 0, math.sqrt(2), 0.0)
    b[0] = 1
    return b


def _turning(size: int, unit: float) -> np.ndarray:
    """The skew part that turns the pair (2 j, 2 j + 1) at the frequency unit j."""
    A = np.zeros((size, size))
    cosine = np.arange(0, size, 2)
    A[cosine, cosine + 1] = -unit * np.arange(size // 2)
    A[cosine + 1, cosine] = unit * np.arange(size // 2)
    return A


@functools.cache
def _matrices(name: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (N, N), B (N,) and low-rank vectors (R, N) in float64."""
    n = np.arange(size)
    root, eye = np.sqrt(2 * n + 1.0), np.eye(size)
    if name in ("legs", "legsd"):
        A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
        if name == "legs":
            return A, root, np.sqrt(n + 0.5)[None]
        return A + 0.5 * np.outer(root, root), root / 2, np.zeros((1, size))
    if name == "legt":
        sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
        parts = np.stack([n % 2 == 1, n % 2 == 0]) * root / math.sqrt(2)
        return -0.5 * sign * np.outer(root, root), root / 2, parts
    if name == "lagt":
        ones = np.ones((size, size))
        return -np.tril(ones, -1) - 0.5 * eye, np.ones(size), np.full((1, size), math.sqrt(0.5))
    b = _waves(size)
    if name == "fout":
        return _turning(size, math.pi) - np.outer(b, b), b, b[None]
    return _turning(size, 2 * math.pi) - 0.5 * eye, b, np.zeros((1, size))


def hippo(name: HippoName, size: int) -> tuple[Tensor, Tensor]:
    """The matrices of c' = A c + B f, in float64 on the CPU.

    Args:
        name: One of `HIPPO_NAMES`.
        size: States N; even for the Fourier bases fout and foud.

    Returns:
        A (N, N) and B (N,).

    Raises:
        ValueError: the name is unknown or the size does not fit.

    Example:
        >>> hippo("lagt", 2)[0].tril().tolist()
        [[-0.5, 0.0], [-1.0, -0.5]]

    Source: Gu et al. 2022, arXiv 2206.12037, section 3; a window of w tokens takes a time step of
    2 / w, of legt and of fout.
    """
    _check(name, size, name in ("fout", "foud"))
    A, B, _ = _matrices(name, size)
    return torch.tensor(A, device="cpu"), torch.tensor(B, device="cpu")


@functools.cache
def _diagonalised(name: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    A, B, P = _matrices(name, size)
    normal = A + P.T @ P
    # the normal part is -c I plus a skew one; in float64, where float32 is not exact enough
    rates, V = np.linalg.eigh(-1j * (normal - np.diag(np.diag(normal))))
    rates, V = rates[size // 2 :], V[:, size // 2 :]
    if rates[0] < ZERO:
        # both of the pair are eigenvectors of one eigenvalue; these two are each other's conjugate
        rates[0], V[:, 0] = 0, 0
        V[0, 0], V[1, 0] = math.sqrt(0.5), math.sqrt(0.5) * 1j
    first = V[np.argmax(np.abs(V) > 1e-9, axis=0), np.arange(size // 2)]
    V = V * (np.abs(first) / first)
    return np.diag(normal).mean() + 1j * rates, P @ V.conj(), B @ V.conj(), V


def nplr(name: HippoName, size: int, *, clip: float | None = None) -> NormalPlusLowRank:
    """Write a HiPPO matrix as a normal one minus one of low rank, and diagonalise the normal one.

    With every vector followed by its conjugate, A = V (diag(eigenvalues) - sum P P^H) V^H: real
    states c are 2 Re(V h) of complex ones h.

    Args:
        name: One of `HIPPO_NAMES`.
        size: States N, even.
        clip: Bound of the imaginary part of B. S4 and S4D start from B clipped to 2, which holds
            down the few fastest states of legs.

    Returns:
        Eigenvalues, low-rank vectors, B and eigenvectors, complex128 on the CPU.

    Raises:
        ValueError: the name is unknown, the size is odd, or clip is not positive.

    Example:
        >>> nplr("foud", 4).eigenvalues.real.tolist()
        [-0.5, -0.5]

    Source: Gu et al. 2022, arXiv 2111.00396, theorem 1.
    """
    _check(name, size, True)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be positive, got {clip}")
    values, P, B, V = _diagonalised(name, size)
    if clip is not None:
        B = np.real(B) + 1j * np.clip(np.imag(B), -clip, clip)
    parts = (torch.tensor(v, device="cpu") for v in (values, P, B, V))
    return NormalPlusLowRank(*parts)
