"""What a graph gets does not depend on its batch, however batches are made, drawn or compiled."""

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader, DynamicBatchSampler
from torch_geometric.nn import SAGEConv, global_mean_pool
from torch_geometric.transforms import Compose
from torch_geometric.utils import subgraph

from scanweave.core import list_mixers
from scanweave.graph import (
    ORDERS,
    AddNodeOrder,
    AddWalkTokens,
    GMNConv,
    GraphMamba,
    GraphMambaConv,
    GraphMambaNet,
)

SIZES = [9, 14, 7, 1]
EVERY_MIXER = [*list_mixers(), "bimamba_separate"]


def layer(mixer="bimamba", dtype=torch.float64, **kwargs):
    conv = GraphMambaConv(16, SAGEConv(16, 16), mixer, num_perms=2, **kwargs)
    return conv.to(dtype).eval()


def with_other_mates(x, edges, batch, other_edges, other_batch, number):
    """The same batch with every graph but `number` replaced."""
    mates = batch != number
    x = torch.where(mates.unsqueeze(1), torch.randn_like(x), x)
    own = edges[:, batch[edges[0]] == number]
    others = other_edges[:, (other_batch[other_edges] != number).all(0)]
    return x, torch.cat([own, others], 1), torch.where(mates, other_batch, batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mixer", EVERY_MIXER)
def test_other_mates_do_not_change_a_bit(mixer, dtype, random_graphs):
    x, edges, batch = random_graphs(SIZES)
    x = x.to(dtype)
    conv = layer(mixer, dtype)
    before = conv(x, edges, batch, batch_size=4)
    other = random_graphs(SIZES, seed=1)[1]
    after = conv(*with_other_mates(x, edges, batch, other, batch, 1), batch_size=4)
    assert after[batch == 1].equal(before[batch == 1])
    assert not after[batch == 0].equal(before[batch == 0])


@pytest.mark.parametrize("order", sorted(set(ORDERS) - {"index"}))
def test_mates_of_other_sizes_do_not_change_a_bit(order, random_graphs):
    # as many nodes in all: matrix products of other heights add up in another order
    x, edges, batch = random_graphs([9, 14, 8])
    _, other, other_batch = random_graphs([9, 3, 1, 18], seed=1)
    conv = layer(order=order)
    before = conv(x, edges, batch, batch_size=4)
    after = conv(*with_other_mates(x, edges, batch, other, other_batch, 0), batch_size=4)
    assert after[:9].equal(before[:9])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mixer", EVERY_MIXER)
def test_alone_and_together_agree_to_rounding(mixer, dtype, limit, random_graphs):
    x, edges, batch = random_graphs(SIZES)
    x = x.to(dtype)
    conv = layer(mixer, dtype)
    together = conv(x, edges, batch)
    for number in range(4):
        nodes = (batch == number).nonzero().squeeze(1)
        own = subgraph(nodes, edges, relabel_nodes=True, num_nodes=31)[0]
        torch.testing.assert_close(conv(x[nodes], own), together[nodes], atol=limit, rtol=limit)


@pytest.fixture
def graphs(random_graphs):
    made = []
    for size in (5, 1, 9, 3, 12, 2):
        x, edges, _ = random_graphs([size], channels=4, seed=size)
        made.append(Data(x=x, edge_index=edges, number=size))
    return made


def outputs(model, loader, stored):
    """Output of every graph, by its size."""
    found = {}
    for batch in loader:
        further = {name: batch[name] for name in stored}
        out = model(
            *(batch.x, batch.edge_index),
            batch=batch.batch,
            batch_size=batch.num_graphs,
            **further,
        )
        found |= dict(zip(batch.number.tolist(), out, strict=True))
    return found


@pytest.mark.parametrize("kind", [GraphMamba, GraphMambaNet])
def test_loaders_and_samplers_give_each_graph_the_same(kind, graphs):
    model = kind(4, 8, 2, 3, pool=global_mean_pool, order="rcm").double().eval()
    transform = Compose([AddNodeOrder("rcm"), AddWalkTokens()])
    ready = [transform(graph.clone()) for graph in graphs]
    # the layers break ties by seeds of their own; a stored order is one for all of them
    stored = ["node_order"] + (["walk_index"] if kind is GraphMambaNet else [])
    loaders = [
        DataLoader(ready, 6),
        DataLoader(ready, 2, shuffle=True),
        DataLoader(ready, batch_sampler=DynamicBatchSampler(ready, max_num=14, mode="node")),
    ]
    expected = outputs(model, loaders[0], stored)
    assert len(expected) == 6
    for loader in loaders[1:]:
        found = outputs(model, loader, stored)
        for number, out in found.items():
            torch.testing.assert_close(out, expected[number], atol=1e-12, rtol=1e-12)


def test_a_batch_is_left_as_it_is(graphs):
    batch = Batch.from_data_list(graphs)
    before = {name: value.clone() for name, value in batch.to_dict().items() if name != "number"}
    GraphMambaNet(4, 8, 2).double()(batch.x, batch.edge_index, batch=batch.batch)
    GraphMamba(4, 8, 2).double()(batch.x, batch.edge_index, batch=batch.batch)
    assert all(batch[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("stored", [False, True])
def test_model_compiles_whole_with_changing_sizes(stored, random_graphs):
    torch.compiler.reset()
    # every order that is plain tensor code, in one
    orders = ("degree", "pagerank", "random", "index")
    model = GraphMamba(4, 8, 2, 3, pool=global_mean_pool, order=orders, num_perms=2).eval()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for sizes in ([5, 3, 9], [4, 11]):
        x, edges, batch = random_graphs(sizes, channels=4)
        score = torch.rand(x.size(0)) if stored else None
        arguments = (x.float(), edges, None, None, batch, len(sizes))
        torch.testing.assert_close(
            compiled(*arguments, node_order=score), model(*arguments, node_order=score)
        )


@pytest.mark.parametrize("encoder", ["mean", "rwf"])
def test_token_layer_compiles_whole_with_changing_sizes(encoder, random_graphs):
    torch.compiler.reset()
    conv = GMNConv(4, 8, 2, 2, 2, encoder, SAGEConv(4, 8)).eval()
    compiled = torch.compile(conv, dynamic=True, fullgraph=True, backend="eager")
    for sizes in ([5, 3, 9], [4, 11]):
        x, edges, batch = random_graphs(sizes, channels=4)
        arguments = {"x": x.float(), "edge_index": edges, "batch": batch, "batch_size": len(sizes)}
        torch.testing.assert_close(compiled(**arguments), conv(**arguments))


def test_neighbourhoods_of_seeds_run_as_one_graph(random_graphs):
    # what a NeighborLoader gives: seeds first, edges towards them, no graph ids
    x, edges, _ = random_graphs([40], channels=4)
    seeds = torch.tensor([7, 3, 20])
    near = torch.cat([seeds, edges[0, torch.isin(edges[1], seeds)]])
    nodes = torch.cat([seeds, near[~torch.isin(near, seeds)].unique()])
    local = torch.full((40,), -1)
    local[nodes] = torch.arange(nodes.numel())
    own = local[edges[:, torch.isin(edges[1], seeds) & torch.isin(edges[0], nodes)]]
    for model in (GraphMamba(4, 8, 1, 2), GraphMambaNet(4, 8, 1, 2)):
        model = model.double().eval()
        out = model(x[nodes], own)[: seeds.numel()]
        assert out.shape == (3, 2)
        assert out.equal(model(x[nodes], own)[: seeds.numel()])
