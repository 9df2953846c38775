"""The gated graph convolution of Graph-Mamba's published layers, which updates edge features too.

GatedGCNConv      the convolution
gated_gcn_conv    what makes it from a width, for `GraphMamba(conv=...)`
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj, OptTensor


class GatedGCNConv(MessagePassing):
    r"""Sum over neighbours with a gate for every edge and channel.

    .. math::
        \hat{\mathbf{e}}_{ij} &= \mathbf{D} \mathbf{h}_i + \mathbf{E} \mathbf{h}_j
            + \mathbf{C} \mathbf{e}_{ij}, \quad
        \eta_{ij} = \sigma(\hat{\mathbf{e}}_{ij}) \\
        \mathbf{h}'_i &= \mathrm{ReLU}\Big(\mathrm{Norm}\Big(\mathbf{A} \mathbf{h}_i +
            \frac{\sum_j \eta_{ij} \odot \mathbf{B} \mathbf{h}_j}
            {\sum_j \eta_{ij} + 10^{-6}}\Big)\Big) \\
        \mathbf{e}'_{ij} &= \mathbf{e}_{ij} + \mathrm{ReLU}(\mathrm{Norm}(\hat{\mathbf{e}}_{ij}))

    The node output has no residual: :class:`GraphMambaConv` adds it, so that inside of it this is
    the local part of Graph-Mamba's block.

    Args:
        channels: Size of node and edge features.
        dropout: Dropout probability of the updated edge features.

    Shapes:
        - **input:** node features :math:`(|\mathcal{V}|, F)`, edge indices
          :math:`(2, |\mathcal{E}|)`, edge features :math:`(|\mathcal{E}|, F)` *(optional)*
        - **output:** node features :math:`(|\mathcal{V}|, F)`; with edge features a pair of those
          and of updated edge features

    Source: Bresson & Laurent 2017, arXiv 1711.07553; Dwivedi et al. 2023, arXiv 2003.00982.
    """

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__(aggr="add")
        self.channels, self.dropout = channels, dropout
        self.lin_A = nn.Linear(channels, channels)
        self.lin_B = nn.Linear(channels, channels)
        self.lin_C = nn.Linear(channels, channels)
        self.lin_D = nn.Linear(channels, channels)
        self.lin_E = nn.Linear(channels, channels)
        self.norm_x = nn.BatchNorm1d(channels)
        self.norm_e = nn.BatchNorm1d(channels)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        super().reset_parameters()
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    def forward(
        self, x: Tensor, edge_index: Adj, edge_attr: OptTensor = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the convolution.

        Args:
            x: Node features, (n, channels).
            edge_index: Edges in any form that PyG takes; (2, E) with edge features.
            edge_attr: Edge features, (E, channels); zeros when absent.

        Raises:
            ValueError: edge features have another width.
        """
        if edge_attr is not None and edge_attr.size(-1) != self.channels:
            raise ValueError(
                f"edge_attr must be (E, {self.channels}), got {tuple(edge_attr.shape)}; "
                "map it to that width first"
            )
        bias = self.lin_C.bias if edge_attr is None else None
        edge = None if edge_attr is None else self.lin_C(edge_attr)
        # without features the third map is its bias alone, the same for every edge
        to = self.lin_D(x) if bias is None else self.lin_D(x) + bias
        hat = self.edge_updater(edge_index, to=to, at=self.lin_E(x), edge=edge)
        sums = self.propagate(edge_index, value=self.lin_B(x), hat=hat)
        total, gates = sums.split(self.channels, 1)
        out = F.relu(self.norm_x(self.lin_A(x) + total / (gates + 1e-6)))
        if edge_attr is None:
            return out
        change = F.relu(self.norm_e(hat)) if hat.size(0) else hat
        return out, edge_attr + F.dropout(change, self.dropout, self.training)

    def edge_update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, to_i: Tensor, at_j: Tensor, edge: OptTensor
    ) -> Tensor:
        """The gate before its sigmoid, (E, channels)."""
        return to_i + at_j if edge is None else to_i + at_j + edge

    def message(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value_j: Tensor, hat: Tensor
    ) -> Tensor:
        """Gated values and the gates, (E, 2 channels): both are summed at once."""
        gate = torch.sigmoid(hat)
        return torch.cat([gate * value_j, gate], 1)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.channels})"


def gated_gcn_conv(channels: int) -> nn.Module:
    """`GatedGCNConv`, which wants edge features of the model's width, or none."""
    return GatedGCNConv(channels)
