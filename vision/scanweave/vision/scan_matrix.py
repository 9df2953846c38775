"""The selective scan as a matrix between tokens: for looking at what a model reads.

    y_t     = sum_s M[t, s] u_s
    M[t, s] = sum_n C[t, n] exp(A[n] (delta_{s + 1} + ... + delta_t)) delta_s B[s, n]    s <= t
    M[t, t] also has D

Letters: B batch, L tokens, E channels, N state.

    ScanMatrix   the matrix of one direction: whole, or averaged over channels block by block

Source: Ali, Zimerman & Wolf 2024, The Hidden Attention of Mamba Models, arXiv 2403.01590,
    section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# rows at a time: few enough that E of them fit beside one another at 3136 tokens (77 MB with 96)
_ROWS = 64


@dataclass
class ScanMatrix:
    """M of one scan, made when it is asked for.

    Attributes:
        delta: Time steps after softplus, (B, L, E), in the order of the scan.
        A: Decay rates, (E, N), negative.
        B: Input vectors, (B, L, N).
        C: Read-out vectors, (B, L, N).
        D: Skip weights, (E,).
        place: Step at which the scan meets every token of the result, (T,); a scan may also meet
            padding, which is no token.
    """

    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    place: Tensor

    def whole(self) -> Tensor:
        """(B, E, T, T), rows and columns in the order of tokens."""
        delta = self.delta
        matrix = delta.new_zeros(delta.shape[0], delta.shape[2], delta.shape[1], delta.shape[1])
        for start in range(0, delta.shape[1], _ROWS):
            inside = self._inside(start)
            end = start + inside.shape[2]
            matrix[:, :, start:end, start:end] = inside
            if start:
                after, until = self._earlier(start)
                matrix[:, :, start:end, :start] = after @ until
        return matrix[:, :, self.place][..., self.place]

    def size(self) -> Tensor:
        """Mean over channels of |M|, (B, T, T), without ever holding E such matrices."""
        delta = self.delta
        matrix = delta.new_zeros(delta.shape[0], delta.shape[1], delta.shape[1])
        for start in range(0, delta.shape[1], _ROWS):
            inside = self._inside(start).abs().mean(1)
            end = start + inside.shape[1]
            matrix[:, start:end, start:end] = inside
            if start:
                after, until = self._earlier(start)
                if self.A.shape[1] == 1:
                    # |a b| = |a| |b|: channels are summed by one product, 60 times faster
                    after, until = after.abs().squeeze(-1), until.abs().squeeze(-2)
                    earlier = after.transpose(1, 2) @ until / delta.shape[2]
                else:
                    earlier = (after @ until).abs_().mean(1)
                matrix[:, start:end, :start] = earlier
        return matrix[:, self.place][..., self.place]

    def _inside(self, start: int) -> Tensor:
        """Rows and columns from `start` on, up to `_ROWS` of them: (B, E, Q, Q)."""
        here = slice(start, start + _ROWS)
        delta = self.delta[:, here].transpose(1, 2)
        total = delta.cumsum(-1)
        # log decay between s and t, at most 0 where s <= t
        span = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
        inside = torch.zeros_like(span)
        for n in range(self.A.shape[1]):
            pair = self.C[:, here, n].unsqueeze(-1) * self.B[:, here, n].unsqueeze(-2)
            inside += torch.exp(span * self.A[:, n, None, None]) * pair.unsqueeze(1)
        inside = (inside * delta.unsqueeze(-2)).tril()
        inside.diagonal(dim1=2, dim2=3).add_(self.D.unsqueeze(-1))
        return inside

    def _earlier(self, start: int) -> tuple[Tensor, Tensor]:
        """Factors of the columns left of these rows: (B, E, Q, N) and (B, E, N, start)."""
        # both decay towards the edge between them, so that neither overflows
        after = self.delta[:, start : start + _ROWS].cumsum(1).unsqueeze(-1)
        reads = self.C[:, start : start + _ROWS].unsqueeze(2)
        delta = self.delta[:, :start]
        until = (delta.sum(1, keepdim=True) - delta.cumsum(1)).clamp(min=0).unsqueeze(-1)
        writes = delta.unsqueeze(-1) * self.B[:, :start].unsqueeze(2)
        return (
            (torch.exp(self.A * after) * reads).transpose(1, 2),
            (torch.exp(self.A * until) * writes).permute(0, 2, 3, 1),
        )
