"""Orders, packing and the layer on a GPU against the CPU in float64."""

import copy

import pytest
import torch

from scanweave.graph import ORDERS, GMNConv, GraphMambaConv, gin_conv
from scanweave.graph.ordering import tie_noise
from scanweave.graph.walks import Neighbours, random_walks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_orders_are_the_same(name, random_graphs):
    _, edges, batch = random_graphs([40, 1, 17])
    ties = tie_noise(torch.arange(58), 2, 3)
    assert tie_noise(torch.arange(58, device="cuda"), 2, 3).cpu().equal(ties)
    scores = ORDERS[name](edges.cuda(), batch.cuda(), ties.cuda())
    assert scores.cpu().equal(ORDERS[name](edges, batch, ties))


@pytest.mark.parametrize("order", ["degree", "rcm"])
@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
def test_layer_and_gradients(mixer, order, random_graphs, assert_near):
    x, edges, batch = random_graphs([40, 0, 1, 17, 300])
    conv = GraphMambaConv(16, gin_conv(16), mixer, order=order, num_perms=2, norm="layer_norm")
    exact = copy.deepcopy(conv).double()
    fast = conv.cuda()
    leaf, twin = x.clone().requires_grad_(), x.float().cuda().requires_grad_()
    expected = exact(leaf, edges, batch)
    actual = fast(twin, edges.cuda(), batch.cuda(), batch_size=5)
    assert_near(actual, expected, name="output")
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (actual * weight.float().cuda()).sum().backward()
    assert_near(twin.grad, leaf.grad, dtype=torch.float32, gradient=True, name="x")
    wanted = dict(exact.named_parameters())
    for name, parameter in fast.named_parameters():
        assert_near(
            parameter.grad, wanted[name].grad, dtype=torch.float32, gradient=True, name=name
        )


def test_graph_ids_are_checked_when_they_are_read_anyway():
    x, edges = torch.randn(3, 16, device="cuda"), torch.zeros(2, 1, device="cuda").long()
    conv = GraphMambaConv(16).cuda()
    with pytest.raises(ValueError, match="batch must hold graph ids of at least 0, got -1"):
        conv(x, edges, torch.tensor([0, -1, 0], device="cuda"))


def test_noise_drawn_on_the_gpu_follows_its_seed():
    x, edges = torch.randn(30, 16, device="cuda"), torch.empty(2, 0, device="cuda").long()
    conv = GraphMambaConv(16, order="random", ties="fresh").cuda().train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(conv(x, edges))
    torch.testing.assert_close(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_walks_are_the_same(random_graphs):
    _, edges, _ = random_graphs([40, 1, 17])
    every = torch.arange(58)
    walks = random_walks(Neighbours(edges, 58), every, every, 4, 3, 2, seed=5)
    there = every.cuda()
    fast = random_walks(Neighbours(edges.cuda(), 58), there, there, 4, 3, 2, seed=5)
    assert fast.cpu().equal(walks)


@pytest.mark.parametrize("encoder", ["gin", "mean", "rwf"])
def test_token_layer_and_gradients(encoder, random_graphs, assert_near):
    x, edges, batch = random_graphs([40, 0, 1, 17])
    conv = GMNConv(16, 16, 3, 2, 2, encoder, gin_conv(16), resample=False)
    exact = copy.deepcopy(conv).double()
    fast = conv.cuda()
    leaf, twin = x.clone().requires_grad_(), x.float().cuda().requires_grad_()
    expected = exact(leaf, edges, batch)
    actual = fast(twin, edges.cuda(), batch.cuda(), batch_size=4)
    assert_near(actual, expected, name="output")
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (actual * weight.float().cuda()).sum().backward()
    assert_near(twin.grad, leaf.grad, dtype=torch.float32, gradient=True, name="x")
