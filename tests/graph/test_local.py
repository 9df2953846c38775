"""Local encoders against their definitions, written out token by token."""

import pytest
import torch
from torch_geometric.utils import subgraph

from scanweave.graph import GINEncoder, MeanEncoder, RWFEncoder
from scanweave.graph.walks import Neighbours, random_walks, token_lengths

LENGTHS = token_lengths(3, 2, "cpu").tolist()


def tokens(edges, nodes):
    every = torch.arange(nodes)
    neighbours = Neighbours(edges, nodes)
    return random_walks(neighbours, every, every, 3, 2, 2), neighbours


def test_mean_is_that_of_the_set(random_graphs):
    x, edges, _ = random_graphs([11], channels=4)
    walks, neighbours = tokens(edges, 11)
    encoder = MeanEncoder(4, 6).double()
    out = encoder(x, walks, neighbours)
    assert out.shape == (11, 7, 6)
    with torch.no_grad():
        # without gradients repeated nodes stay, with weight zero
        torch.testing.assert_close(encoder(x, walks, neighbours), out)
    for root in range(11):
        for token in range(7):
            nodes = sorted(set(walks[root, token].flatten().tolist()))
            torch.testing.assert_close(out[root, token], encoder.lin(x[nodes]).mean(0))


@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("pool", ["mean", "root"])
def test_gin_runs_on_the_induced_subgraph(pool, edge_dim, random_graphs):
    x, edges, _ = random_graphs([11], channels=4)
    walks, neighbours = tokens(edges, 11)
    edge_attr = None if edge_dim is None else torch.randn(edges.size(1), 3, dtype=torch.float64)
    encoder = GINEncoder(4, 6, 2, edge_dim, pool=pool).double()
    out = encoder(x, walks, neighbours, edge_attr)
    for root in range(11):
        for token in range(7):
            nodes = torch.tensor(sorted(set(walks[root, token].flatten().tolist())))
            local, attr = subgraph(nodes, edges, edge_attr, True, 11)
            h = encoder.lin(x[nodes])
            for conv in encoder.convs:
                h = h + (conv(h, local) if attr is None else conv(h, local, attr)).relu()
            expected = h.mean(0) if pool == "mean" else h[nodes.tolist().index(root)]
            torch.testing.assert_close(out[root, token], expected)


def test_gin_on_walked_edges_lacks_the_others():
    pair = torch.cartesian_prod(torch.arange(5), torch.arange(5)).t()
    complete = pair[:, pair[0] != pair[1]]
    walks, neighbours = tokens(complete, 5)
    x = torch.randn(5, 4)
    encoder = GINEncoder(4, 6)
    induced = encoder(x, walks, neighbours)
    encoder.edges = "walked"
    walked = encoder(x, walks, neighbours)
    assert not torch.isclose(induced[:, 0], walked[:, 0]).all()
    torch.testing.assert_close(induced[:, -1], walked[:, -1])


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("edge_dim", [None, 2])
def test_rwf_rows(edge_dim, kernel_size, random_graphs):
    x, edges, _ = random_graphs([9], channels=4)
    walks, neighbours = tokens(edges, 9)
    attr = None if edge_dim is None else torch.randn(edges.size(1), 2, dtype=torch.float64)
    encoder = RWFEncoder(4, 6, window=2, kernel_size=kernel_size, edge_dim=edge_dim).double()
    out = encoder(x, walks, neighbours, attr)
    pairs = [tuple(pair) for pair in edges.t().tolist()]
    for root in range(9):
        for token, length in enumerate(LENGTHS):
            rows = []
            for walk in walks[root, token].tolist():
                h = []
                for i, v in enumerate(walk[: length + 1]):
                    back, near = walk[max(i - 2, 0) : i][::-1], 0.0
                    bits = [float(j < len(back) and back[j] == v) for j in (0, 1)]
                    if i > 1:
                        near = float((v, walk[i - 2]) in pairs or (walk[i - 2], v) in pairs)
                    row = encoder.lin(x[v]) + encoder.lin_bits(
                        torch.tensor([*bits, near], dtype=torch.float64)
                    )
                    if attr is not None and i and (walk[i - 1], v) in pairs:
                        row = row + encoder.lin_edge(attr[pairs.index((walk[i - 1], v))])
                    h.append(row.relu())
                h = torch.stack(h)
                if encoder.conv is not None:
                    h = encoder.conv(h.t().unsqueeze(0))[0].t().relu()
                rows.append(h)
            torch.testing.assert_close(out[root, token], torch.cat(rows).mean(0))


def test_rwf_tells_what_messages_cannot():
    # two triangles and a hexagon: all nodes look alike to message passing
    ring = torch.arange(6)
    hexagon = torch.stack([ring, (ring + 1) % 6])
    triangles = torch.stack([ring, torch.tensor([1, 2, 0, 4, 5, 3])])
    outs = {}
    rwf, mean = RWFEncoder(1, 8, window=3), MeanEncoder(1, 8)
    for name, edges in (("hexagon", hexagon), ("triangles", triangles)):
        walks, neighbours = tokens(torch.cat([edges, edges.flip(0)], 1), 6)
        for encoder in (rwf, mean):
            outs[name, encoder] = encoder(torch.ones(6, 1), walks, neighbours).mean((0, 1))
    torch.testing.assert_close(outs["hexagon", mean], outs["triangles", mean])
    assert not torch.isclose(outs["hexagon", rwf], outs["triangles", rwf]).all()


@pytest.mark.parametrize("make", [MeanEncoder, GINEncoder, RWFEncoder])
def test_nothing_to_encode(make):
    walks, neighbours = tokens(torch.empty(2, 0, dtype=torch.int64), 0)
    assert make(4, 6)(torch.empty(0, 4), walks, neighbours).shape == (0, 7, 6)


def test_rwf_with_a_kernel_and_edge_features_but_no_edges():
    walks, neighbours = tokens(torch.empty(2, 0, dtype=torch.int64), 2)
    encoder = RWFEncoder(4, 6, kernel_size=3, edge_dim=2)
    assert encoder(torch.ones(2, 4), walks, neighbours, torch.empty(0, 2)).isfinite().all()
    walks, neighbours = tokens(torch.empty(2, 0, dtype=torch.int64), 0)
    none = encoder(torch.ones(0, 4), walks, neighbours, torch.empty(0, 2))
    assert none.shape == (0, 7, 6)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (GINEncoder, {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (GINEncoder, {"edges": "all"}, "edges must be 'induced' or 'walked', got 'all'"),
        (GINEncoder, {"pool": "max"}, "pool must be 'mean' or 'root', got 'max'"),
        (RWFEncoder, {"window": 0}, "window must be at least 1, got 0"),
        (RWFEncoder, {"kernel_size": 2}, "kernel_size must be odd and at least 1, got 2"),
    ],
)
def test_refuses_settings(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(4, 6, **kwargs)


@pytest.mark.parametrize("make", [GINEncoder, RWFEncoder])
def test_edge_features_are_asked_for(make):
    walks, neighbours = tokens(torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match=r"edge_attr must be \(E, 3\) for this encoder, got None"):
        make(4, 6, edge_dim=3)(torch.ones(2, 4), walks, neighbours)
