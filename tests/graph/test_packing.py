"""Packed sequences against a plain sort, and every adjacency form against the edge list."""

import itertools

import pytest
import torch
from torch_geometric import EdgeIndex
from torch_geometric.utils import to_torch_coo_tensor, to_torch_csc_tensor, to_torch_csr_tensor

from scanweave.core.ops import checks
from scanweave.graph import GraphMamba, packing
from scanweave.graph.mixing import shared_sequences
from scanweave.graph.ordering import lexsort
from scanweave.graph.packing import (
    count_nodes,
    edges_of,
    pack_nodes,
    places_in_graphs,
    reverse_sequences,
    split_sequences,
    to_nodes,
    to_sequences,
)

# torch announces, once per process, that sparse tensors are young and unchecked
pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")

BATCH = torch.tensor([3, 0, 0, 3, 1, 0, 3, 3])
COUNTS = [3, 1, 0, 4, 0]


def packed(perms: int = 2):
    scores = torch.tensor([2.0, 1.0, 1.0, 0.0, 5.0, 0.5, 2.0, 2.0])
    ties = torch.stack([torch.randperm(8) for _ in range(perms)])
    borders = places_in_graphs(BATCH, 5)[1]
    return scores, ties, pack_nodes([scores], ties, BATCH, borders)


def test_counts_places_and_borders():
    assert count_nodes(BATCH, 5).tolist() == COUNTS
    places, borders = places_in_graphs(BATCH, 5)
    assert places.tolist() == [0, 0, 1, 1, 0, 2, 2, 3]
    assert borders.tolist() == [0, 3, 4, 4, 8, 8]
    assert borders.dtype == torch.int32
    places, borders = places_in_graphs(BATCH * 0, 1)
    assert places.tolist() == list(range(8))
    assert borders.tolist() == [0, 8]
    assert places_in_graphs(BATCH[:0], 0)[1].tolist() == [0]


def test_pack_sorts_by_graph_score_and_tie():
    scores, ties, sequences = packed()
    expected = [
        sorted(range(8), key=lambda v: (int(BATCH[v]), float(scores[v]), int(row[v])))
        for row in ties
    ]
    assert sequences.nodes.view(2, 8).tolist() == expected
    assert sequences.cu_seqlens.tolist() == [0, 3, 4, 4, 8, 8, 11, 12, 12, 16, 16]
    assert sequences.cu_seqlens.dtype == torch.int32


def test_places_undo_nodes():
    _, _, sequences = packed(3)
    assert sequences.nodes[sequences.places].equal(torch.arange(8).expand(3, 8))


def test_pack_takes_scores_of_each_permutation():
    ties = torch.zeros(2, 3, dtype=torch.int64)
    scores = torch.tensor([[0, 1, 2], [2, 1, 0]])
    one = torch.zeros(3, dtype=torch.int64)
    sequences = pack_nodes([scores], ties, one, places_in_graphs(one, 1)[1])
    assert sequences.nodes.tolist() == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize("perms", [1, 3])
@pytest.mark.parametrize("limit", [6, 2**20, 2**28, 2**40])
@pytest.mark.parametrize("parts", [0, 4])
def test_known_ranges_join_sorts_and_change_nothing(limit, perms, parts, monkeypatch):
    borders = places_in_graphs(BATCH, 5)[1]
    scores = [torch.tensor([5, 1, 0, 5, 1, 0, 5, 4]) * ((limit - 1) // 5), torch.randn(perms, 8)]
    ties = torch.stack([2**32 - 1 - torch.randperm(8) for _ in range(perms)])
    ties[:, 3] = ties[:, 0]  # stays in place
    buckets = (torch.randint(parts, (perms, 8)), parts) if parts else None
    sorts = []
    monkeypatch.setattr(packing, "lexsort", lambda *keys: sorts.append(len(keys)) or lexsort(*keys))
    for used in (scores[:1], scores, scores[::-1]):
        known = [limit if score is scores[0] else None for score in used]
        apart = pack_nodes(used, ties, BATCH, borders, buckets)
        joined = pack_nodes(used, ties, BATCH, borders, buckets, known)
        assert all(a.equal(b) for a, b in zip(apart, joined, strict=True))
    # graph | score | tie, with a score of unknown range behind the first or before it
    groups = 5 * perms * max(parts, 1)
    assert sorts[::2] == [3, 4, 4]
    fits = groups * limit < 2**31
    assert sorts[1::2] == [1 if fits else 2, 3, 3 if limit <= 2**31 else 4]


def test_reverse_turns_every_sequence_around():
    _, _, sequences = packed()
    back = reverse_sequences(sequences)
    ends = sequences.cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        assert back.nodes[start:end].tolist() == sequences.nodes[start:end].flip(0).tolist()
    assert back.nodes[back.places].equal(torch.arange(8).expand(2, 8))


@pytest.mark.parametrize("perms", [1, 3])
def test_gathers_are_each_others_gradients(perms):
    _, _, sequences = packed(perms)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8 * perms, 3, dtype=torch.float64, requires_grad=True)
    assert to_sequences(x, sequences).equal(x[sequences.nodes])
    torch.testing.assert_close(to_nodes(y, sequences), y[sequences.places].mean(0))
    torch.testing.assert_close(to_nodes(to_sequences(x, sequences), sequences), x)
    for function, value in ((to_sequences, x), (to_nodes, y)):
        assert torch.autograd.gradcheck(lambda v: function(v, sequences), value)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda v: function(v, sequences), value)  # noqa: B023


def test_split_gives_every_layer_its_own():
    scores, ties, _ = packed(6)
    borders = places_in_graphs(BATCH, 5)[1]
    whole = pack_nodes([scores], ties, BATCH, borders)
    for part, rows in zip(split_sequences(whole, 3), ties.split(2), strict=True):
        alone = pack_nodes([scores], rows, BATCH, borders)
        assert all(a.equal(b) for a, b in zip(part, alone, strict=True))


@pytest.mark.parametrize("buckets", [1, 3])
def test_borders_are_not_read_back(buckets, random_graphs, monkeypatch):
    # a read would make the host wait for a GPU, in every layer
    x, edges, batch = random_graphs([6, 0, 9], channels=8)
    model = GraphMamba(8, 8, 2, 3, mixer="mamba", num_perms=2, buckets=buckets).double()

    def refuse(self):
        raise AssertionError(f"{self.shape} was read")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    for own in shared_sequences(model.convs, x, edges, batch, 3, None):
        checks.check_cu_seqlens_values(own.cu_seqlens, 30)
        with pytest.raises(AssertionError, match="was read"):
            checks.check_cu_seqlens_values(own.cu_seqlens.clone(), 30)


def test_nothing_to_pack():
    none = torch.empty(0, dtype=torch.int64)
    sequences = pack_nodes([none], none.view(1, 0), none, places_in_graphs(none, 2)[1])
    assert sequences.cu_seqlens.tolist() == [0, 0, 0]
    assert reverse_sequences(sequences).nodes.numel() == 0


EDGES = torch.tensor([[0, 3, 1, 2, 2], [1, 0, 2, 3, 2]])


class FakeSparseTensor:
    """The one method of `torch_sparse.SparseTensor` that counts here."""

    def __init__(self, row, col):
        self.row, self.col = row, col

    def coo(self):
        return self.row, self.col, None


def transposed(form: str):
    flipped = EDGES.flip(0)
    if form == "sparse_tensor":
        return FakeSparseTensor(*flipped)
    makers = {"coo": to_torch_coo_tensor, "csr": to_torch_csr_tensor, "csc": to_torch_csc_tensor}
    return makers[form](flipped, size=(4, 4))


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "sparse_tensor"])
def test_edges_of_every_form_are_the_same(form):
    found = edges_of(transposed(form))
    assert found.dtype == torch.int64
    assert sorted(found.t().tolist()) == sorted(EDGES.t().tolist())


def test_edges_of_edge_index():
    found = edges_of(EdgeIndex(EDGES, sparse_size=(4, 4)))
    assert type(found) is torch.Tensor
    assert found.equal(EDGES)


def test_edges_of_an_uncoalesced_matrix_leaves_it_alone():
    matrix = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(5), (4, 4))
    assert not matrix.is_coalesced()
    edges_of(matrix)
    assert not matrix.is_coalesced()


@pytest.mark.parametrize("wrong", [torch.eye(4), EDGES.float(), EDGES[0], EDGES.t()])
def test_edges_of_refuses_dense_matrices(wrong):
    with pytest.raises(ValueError, match=r"edge_index must be \(2, E\) int64 or a sparse matrix"):
        edges_of(wrong)


def test_edges_of_refuses_other_objects():
    with pytest.raises(ValueError, match="edge_index must be a tensor or sparse, got list"):
        edges_of([[0], [1]])
