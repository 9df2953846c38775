"""Modules that make node encodings into features: what stands between `AddLapPE` and a model.

LapPEEncoder   a set of (entry, eigenvalue) pairs of every node -> a vector
RWSEEncoder    return probabilities of walks -> a vector
"""

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import reset
from torch_geometric.typing import OptTensor


class LapPEEncoder(nn.Module):
    r"""p_v = sum over eigenvectors of MLP([entry at v, eigenvalue]), blind to signs by training.

    In training every eigenvector of every graph gets a random sign, from torch's generator: the
    sign that an eigensolver gave means nothing.

    Args:
        out_channels: Size of the encoding.
        flip_signs: Flip signs in training.

    Source: Kreuzer et al. 2021, arXiv 2106.03893; Lim et al. 2022, arXiv 2202.13013.
    """

    def __init__(self, out_channels: int, flip_signs: bool = True):
        super().__init__()
        self.out_channels, self.flip_signs = out_channels, flip_signs
        self.mlp = nn.Sequential(
            nn.Linear(2, 2 * out_channels),
            nn.ReLU(),
            nn.Linear(2 * out_channels, out_channels),
            nn.ReLU(),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset(self.mlp)

    def forward(
        self, lap_pe: Tensor, lap_values: Tensor, batch: OptTensor = None, batch_size: int = 1
    ) -> Tensor:
        """Encode nodes.

        Args:
            lap_pe: Entries of k eigenvectors, (n, k), zeros for those that do not exist.
            lap_values: Their eigenvalues at every node, (n, k); `AddLapPE(k, add_values=True)`
                stores both.
            batch: Graph of every node, (n,) int64; one graph when absent.
            batch_size: Number of graphs; 1 when `batch` is absent.

        Returns:
            (n, out_channels).

        Raises:
            ValueError: entries and eigenvalues differ in shape.
        """
        if lap_pe.dim() != 2 or lap_pe.shape != lap_values.shape:
            raise ValueError(
                "lap_values must match lap_pe in (n, k): "
                f"got {tuple(lap_values.shape)}, lap_pe is {tuple(lap_pe.shape)}"
            )
        there = (lap_pe != 0) | (lap_values != 0)
        if self.training and self.flip_signs:
            shape = (batch_size, lap_pe.size(1))
            signs = 1 - 2 * torch.randint(2, shape, device=lap_pe.device).to(lap_pe.dtype)
            lap_pe = lap_pe * (signs if batch is None else signs[batch])
        h = self.mlp(torch.stack([lap_pe, lap_values], -1))
        return (h * there.unsqueeze(-1)).sum(1)


class RWSEEncoder(nn.Module):
    """Batch norm and a linear layer on the return probabilities that `AddRWSE` stores.

    Args:
        num_steps: Their number k.
        out_channels: Size of the encoding.
    """

    def __init__(self, num_steps: int, out_channels: int):
        super().__init__()
        self.num_steps, self.out_channels = num_steps, out_channels
        self.norm = nn.BatchNorm1d(num_steps)
        self.lin = nn.Linear(num_steps, out_channels)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.norm.reset_parameters()
        self.lin.reset_parameters()

    def forward(self, rwse: Tensor) -> Tensor:
        """Encodings (n, out_channels) from probabilities (n, num_steps)."""
        return self.lin(self.norm(rwse))
