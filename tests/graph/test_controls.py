"""PyG's GPS layers in our frame."""

import pytest
import torch

from scanweave.graph import gin_conv
from scanweave.graph.controls import GPS


@pytest.mark.parametrize("attn_type", ["multihead", "performer"])
@pytest.mark.parametrize("pooled", [False, True])
def test_shapes_and_gradients(attn_type, pooled, four_nodes):
    from torch_geometric.nn import global_mean_pool

    x, edge_index, batch = four_nodes
    pool = global_mean_pool if pooled else None
    model = GPS(16, 8, 2, 3, attn_type=attn_type, heads=2, pool=pool)
    out = model(x, edge_index, batch=batch, batch_size=2)
    assert out.shape == ((2, 3) if pooled else (4, 3))
    out.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_graphs_do_not_attend_to_each_other(four_nodes):
    x, edge_index, batch = four_nodes
    model = GPS(16, 8, 2, 3, heads=2).eval()
    alone = model(x[:2], edge_index[:, :2], batch=batch[:2], batch_size=1)
    torch.testing.assert_close(model(x, edge_index, batch=batch, batch_size=2)[:2], alone)


def test_weights_can_be_drawn_anew(four_nodes):
    x, edge_index, batch = four_nodes
    model = GPS(16, 8, 1, 3, heads=2).eval()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.reset_parameters()
        outputs.append(model(x, edge_index, batch=batch))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])
    assert repr(model).startswith("GPS(16, 3, ")


def test_edge_features_reach_the_convolution(four_nodes):
    x, edge_index, batch = four_nodes
    model = GPS(16, 8, 1, heads=2, conv=lambda width: gin_conv(width, edge_dim=2)).eval()
    one, other = (model(x, edge_index, torch.full((4, 2), v), batch) for v in (0.0, 1.0))
    assert not one.allclose(other)
    with pytest.raises(ValueError, match="edge_attr must be None: the convolutions of this model"):
        GPS(16, 8, 1, heads=2)(x, edge_index, torch.ones(4, 2), batch)


def test_refusals():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        GPS(16, 8, 0)
    with pytest.raises(ValueError, match="attn_type must be 'multihead' or 'performer', got 'x'"):
        GPS(16, 8, 1, attn_type="x")
    with pytest.raises(ValueError, match="heads must divide hidden_channels = 8, got 3"):
        GPS(16, 8, 1, heads=3)
