"""What `GraphMambaConv` refuses, and that it says what and why."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, SAGEConv

from scanweave.core import create_mixer
from scanweave.graph import GraphMambaConv

EDGES = torch.tensor([[0, 1], [1, 2]])
BATCH = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixer": None}, "conv must be a layer when mixer is None, got None for both"),
        ({"mixer": "mumba"}, "mixer must be one of .*bimamba.*, got 'mumba'"),
        ({"mixer": nn.GRU(8, 8)}, "mixer must be a name, a Mixer or None, got GRU"),
        ({"mixer": create_mixer("mamba", 4)}, "mixer must have d_model = channels = 8, got 4"),
        (
            {"mixer": create_mixer("mamba", 8), "mixer_kwargs": {"expand": 1}},
            "mixer_kwargs must be None unless mixer is a name",
        ),
        ({"bidirectional": False}, "bidirectional must be True .* got False for bimamba"),
        ({"order": "size"}, "order must be a function or one of .* got 'size'"),
        ({"order": ()}, "order must hold at least one"),
        ({"ties": "maybe"}, "ties must be 'noise', 'fresh' or 'index', got 'maybe'"),
        ({"num_perms": 0}, "num_perms must be at least 1, got 0"),
        ({"buckets": 0}, "buckets must be at least 1, got 0"),
        ({"eval_perms": -1}, "eval_perms must be at least 1, got -1"),
        ({"norm": "no_norm"}, "Could not resolve 'no_norm'"),
        ({"act": "no_act"}, "Could not resolve 'no_act'"),
    ],
)
def test_constructor(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GraphMambaConv(8, **kwargs)


def test_unknown_mixer_argument():
    with pytest.raises(TypeError, match="mixer 'bimamba' does not take heads"):
        GraphMambaConv(8, mixer_kwargs={"heads": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (torch.randn(4, 8), torch.randn(4, 8))}, "x must be one tensor, got a tuple of 2"),
        ({"x": torch.randn(4, 7)}, r"x must be \(n, 8\), got \(4, 7\)"),
        ({"x": torch.randn(1, 4, 8)}, r"x must be \(n, 8\), got \(1, 4, 8\)"),
        ({"batch": BATCH[:3]}, r"batch must be \(4,\) int64 like x: got \(3,\)"),
        ({"batch": BATCH.int()}, "batch must be .* got .* torch.int32"),
        ({"batch": BATCH - 1}, "batch must hold graph ids of at least 0, got -1"),
        ({"batch": BATCH, "batch_size": 1}, r"batch_size must be at least .* = 2, got 1"),
        ({"batch_size": 2}, "batch_size must be 1 when batch is None, got 2"),
        (
            {
                "batch": BATCH[:0],
                "x": torch.randn(0, 8),
                "edge_index": EDGES[:, :0],
                "batch_size": -1,
            },
            "batch_size must be at least 0, got -1",
        ),
        ({"edge_index": EDGES - 1}, r"edge_index must hold node ids in \[0, 4\), got -1 to 1"),
        ({"edge_index": EDGES + 2}, r"edge_index must hold node ids in \[0, 4\), got 2 to 4"),
        ({"edge_index": EDGES.float()}, r"edge_index must be \(2, E\) int64"),
        ({"edge_index": torch.eye(4)}, r"edge_index must be \(2, E\) int64"),
        (
            {"node_order": torch.zeros(3)},
            r"node_order must give one score per node: got \(3,\) for 4",
        ),
        ({"batch": BATCH.to("meta")}, "batch must be on cpu like x, got meta"),
        ({"edge_index": EDGES.to("meta")}, "edge_index must be on cpu like x, got meta"),
        ({"node_order": torch.zeros(4, device="meta")}, "node_order must be on cpu like x, got"),
        ({"node_order": torch.zeros(4, 2)}, r"node_order must give one score per node"),
    ],
)
def test_forward(arguments, message):
    conv = GraphMambaConv(8, SAGEConv(8, 8))
    with pytest.raises(ValueError, match=message):
        conv(**{"x": torch.randn(4, 8), "edge_index": EDGES, **arguments})


def test_order_function_of_the_wrong_length():
    conv = GraphMambaConv(8, order=lambda edges, batch, ties: ties[0, 1:])
    with pytest.raises(ValueError, match=r"<lambda> must give one score per node: got \(3,\)"):
        conv(torch.randn(4, 8), EDGES)


def test_conv_that_changes_the_width():
    conv = GraphMambaConv(8, SAGEConv(8, 6))
    with pytest.raises(ValueError, match=r"conv must keep the shape of x: got \(4, 6\)"):
        conv(torch.randn(4, 8), EDGES)


def test_conv_that_returns_something_else():
    conv = GraphMambaConv(8, GATConv(8, 8))
    with pytest.raises(
        ValueError, match=r"conv must return x or \(x, edge_attr\), got \['Tensor', 'tuple'"
    ):
        conv(torch.randn(4, 8), EDGES, return_attention_weights=True)


def test_edge_features_without_a_conv():
    with pytest.raises(ValueError, match="conv must be a layer to take edge_attr, got None"):
        GraphMambaConv(8)(torch.randn(4, 8), EDGES, edge_attr=torch.randn(2, 3))
