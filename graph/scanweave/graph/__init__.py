"""Sequence mixers as PyTorch Geometric layers: packed, in a chosen node order.

    GraphMambaConv   the layer, a drop-in for `torch_geometric.nn.GPSConv`
    GraphMamba       a stack of them, in the style of PyG's `BasicGNN`
    GMNConv          Graph Mamba Networks: subgraph tokens of every node, then nodes
    GraphMambaNet    the whole of that network
    NodeHead, …      heads for nodes, graphs and links
    GatedGCNConv     the local convolution of Graph-Mamba, which updates edge features
    degree_order, …  node orders: plain functions (see `orders.py`)
    AddNodeOrder     transform: compute an order once per graph
    AddWalkTokens    transform: draw the walks of subgraph tokens once per graph
    AddLapPE, …      transforms: Laplacian eigenvectors, return probabilities of walks
    LapPEEncoder, …  modules that make features of those
    graphgym         (a module to import) registrations for PyG's GraphGym
    digit_graphs     handwritten digits as pixel graphs; needs no download

`python -m scanweave.graph.train` trains a graph classifier.
"""

import warnings

try:
    with warnings.catch_warnings():
        # PyG scripts a class while it is imported, and new torch versions warn about that
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        import torch_geometric.nn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "scanweave.graph needs torch-geometric: pip install 'scanweave[graph]'"
    ) from error

from .centrality import eigenvector_order, kcore_order, ppr_order
from .conv import GraphMambaConv
from .datasets import GraphSplits, load_splits
from .digits import digit_graphs
from .encoders import LapPEEncoder, RWSEEncoder
from .encodings import AddLapPE, AddRWSE
from .gated_gcn import GatedGCNConv, gated_gcn_conv
from .gmn import GMNConv
from .heads import GraphHead, LinkHead, NodeHead
from .hilbert import hilbert_scores
from .local import ENCODERS, GINEncoder, MeanEncoder, RWFEncoder
from .model import GraphMamba, gcn_conv, gin_conv
from .net import GraphMambaNet
from .ordering import (
    Order,
    bfs_order,
    degree_order,
    index_order,
    pagerank_order,
    random_order,
    rcm_order,
)
from .orders import ORDERS
from .separate import SeparateBiMamba
from .spectral import fiedler_order
from .transforms import AddNodeOrder, AddWalkTokens

__all__ = [
    "ENCODERS",
    "ORDERS",
    "AddLapPE",
    "AddNodeOrder",
    "AddRWSE",
    "AddWalkTokens",
    "GINEncoder",
    "GMNConv",
    "GatedGCNConv",
    "GraphHead",
    "GraphMamba",
    "GraphMambaConv",
    "GraphMambaNet",
    "GraphSplits",
    "LapPEEncoder",
    "LinkHead",
    "MeanEncoder",
    "NodeHead",
    "Order",
    "RWFEncoder",
    "RWSEEncoder",
    "SeparateBiMamba",
    "bfs_order",
    "degree_order",
    "digit_graphs",
    "eigenvector_order",
    "fiedler_order",
    "gated_gcn_conv",
    "gcn_conv",
    "gin_conv",
    "hilbert_scores",
    "index_order",
    "kcore_order",
    "load_splits",
    "pagerank_order",
    "ppr_order",
    "random_order",
    "rcm_order",
]
