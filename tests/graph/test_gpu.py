"""Orders, packing and the layer on a GPU against the CPU in float64."""

import copy

import pytest
import torch

from scanweave.graph import (
    ORDERS,
    AddLapPE,
    AddNodeOrder,
    AddRWSE,
    AddWalkTokens,
    GMNConv,
    GraphMamba,
    GraphMambaConv,
    gin_conv,
    hilbert_scores,
)
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


@pytest.mark.parametrize("order", ["degree", "index", "pagerank", "random", "stored"])
@pytest.mark.parametrize(("mixer", "ties"), [("bimamba", "noise"), ("mamba", "fresh")])
def test_host_never_waits_when_sizes_are_given(mixer, ties, order, random_graphs, never_waiting):
    x, edges, batch = random_graphs([40, 0, 1, 17])
    x, edges, batch = x.float().cuda().requires_grad_(), edges.cuda(), batch.cuda()
    score = torch.rand(58, device="cuda") if order == "stored" else None
    name = "degree" if order == "stored" else order
    model = GraphMamba(16, 16, 2, 3, mixer=mixer, order=name, ties=ties, num_perms=2).cuda()

    def step() -> torch.Tensor:
        out = model(x, edges, batch=batch, batch_size=4, node_order=score)
        return torch.autograd.grad((out * out).sum(), [x, *model.parameters()])[0]

    step()  # compiles kernels, which may wait
    with never_waiting():
        found = step()
    assert found.isfinite().all()


def test_a_training_step_is_captured_as_a_graph(random_graphs):
    x, edges, batch = random_graphs([40, 1, 17])
    x, edges, batch = x.float().cuda(), edges.cuda(), batch.cuda()
    model = GraphMamba(16, 16, 2, 3, norm="layer_norm").cuda()
    parameters = list(model.parameters())

    def step() -> list[torch.Tensor]:
        out = model(x, edges, batch=batch, batch_size=3)
        return list(torch.autograd.grad((out * out).sum(), parameters))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("perms", [1, 4])
def test_batch_mates_change_little_and_one_launch_does_all_orders(perms, random_graphs):
    x, edges, batch = random_graphs([300, 7, 90])
    x, edges, batch = x.float().cuda(), edges.cuda(), batch.cuda()
    conv = GraphMambaConv(16, gin_conv(16), order="random", num_perms=perms).cuda().eval()
    together = conv(x, edges, batch)
    start = 0
    for number, size in enumerate((300, 7, 90)):
        own = batch[edges[0]] == number
        alone = conv(x[start : start + size], edges[:, own] - start)
        torch.testing.assert_close(together[start : start + size], alone, atol=1e-5, rtol=1e-5)
        start += size


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_adjacencies(layout, random_graphs):
    x, edges, batch = random_graphs([40, 17])
    edges = edges.unique(dim=1)
    x, edges, batch = x.float().cuda(), edges.cuda(), batch.cuda()
    matrix = torch.sparse_coo_tensor(edges.flip(0), torch.ones_like(edges[0]).float(), (57, 57))
    adjacency = matrix.coalesce() if layout == torch.sparse_coo else matrix.to_sparse(layout=layout)
    conv = GraphMambaConv(16, None, order="pagerank").cuda().eval()
    torch.testing.assert_close(conv(x, adjacency, batch), conv(x, edges, batch))


def test_transforms_give_what_they_give_on_a_cpu(random_graphs):
    from torch_geometric.data import Data

    x, edges, _ = random_graphs([60])
    pos = torch.rand(60, 3)
    data = Data(x=x.float(), edge_index=edges, pos=pos)
    there = data.clone().cuda()
    for order in ("rcm", "fiedler", "hilbert", ["degree", "data.score"]):
        data.score = there.score = torch.arange(60)
        there.score = there.score.cuda()
        add = AddNodeOrder(order)
        assert add(there).node_order.cpu().equal(add(data).node_order)
    walks = AddWalkTokens(3, 2, 2, seed=1)
    assert walks(there).walk_index.cpu().equal(walks(data).walk_index)
    assert hilbert_scores(pos.cuda()).cpu().equal(hilbert_scores(pos))
    for encode, name in ((AddLapPE(5), "lap_pe"), (AddRWSE(6), "rwse")):
        torch.testing.assert_close(encode(there)[name].cpu(), encode(data)[name])


def test_autocast_keeps_close_and_returns_its_dtype(random_graphs):
    x, edges, batch = random_graphs([40, 17, 5])
    x, edges, batch = x.float().cuda(), edges.cuda(), batch.cuda()
    conv = GraphMambaConv(16, gin_conv(16), norm="layer_norm").cuda().eval()
    exact = conv(x, edges, batch, batch_size=3)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = conv(x, edges, batch, batch_size=3)
    off = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < off < 0.02


def test_one_large_graph_against_the_same_in_float64():
    nodes = 20_000
    torch.manual_seed(0)
    edges = torch.randint(0, nodes, (2, 4 * nodes), device="cuda")
    x = torch.randn(nodes, 16, device="cuda")
    conv = GraphMambaConv(16, gin_conv(16), norm="layer_norm").cuda().eval()
    exact = copy.deepcopy(conv).double()
    with torch.no_grad():
        fast, slow = conv(x, edges), exact(x.double(), edges)
    assert (fast - slow).norm() < 1e-5 * slow.norm()


def test_tokens_of_a_large_graph_in_pieces():
    nodes = 5_000
    edges = torch.randint(0, nodes, (2, 4 * nodes), device="cuda")
    x = torch.randn(nodes, 16, device="cuda", requires_grad=True)
    conv = GMNConv(16, 16, 3, 2, 2, "rwf", resample=False).cuda()
    peaks, grads = [], []
    for size in (None, 500):
        conv.token_chunk_size = size
        torch.cuda.reset_peak_memory_stats()
        out = conv(x, edges)
        grads.append(torch.autograd.grad((out * out).sum(), x)[0])
        peaks.append(torch.cuda.max_memory_allocated())
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)
    assert peaks[1] < 0.6 * peaks[0]
