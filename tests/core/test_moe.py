"""Mixture of experts: routers, capacity, balance, and its forms against a loop over tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanweave.core.stack import MLP, GatedMLP, MoE, scale_balance
from scanweave.core.stack.moe import sinkhorn

Check = Callable[..., None]


def build(**config: Any) -> MoE:
    return MoE(6, **{"num_experts": 5, "expand": 2, "dtype": torch.float64, **config})


def by_token(moe: MoE, x: Tensor) -> Tensor:
    """One token and one expert after the other."""
    chosen, weight, _ = moe.route(x)
    rows = []
    for token, own, scale in zip(x, chosen.tolist(), weight, strict=True):
        y = torch.zeros_like(token)
        for e, w in zip(own, scale, strict=True):
            h = moe.up[e] @ token
            if moe.gated:
                gate, h = h.chunk(2)
                h = moe.act(gate) * h
            else:
                h = moe.act(h)
            y = y + w * (moe.down[e] @ h)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config",
    [
        {"top_k": 2},
        {"top_k": 3, "renormalize": True, "gated": False, "activation": "relu2"},
        {"router": "switch"},
        {"router": "sinkhorn", "activation": "gelu"},
        {"num_experts": 1},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_equals_a_loop(assert_near: Check, config: dict[str, Any], training: bool):
    moe = build(balance=0, **config).train(training)
    x = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    expected = by_token(moe, x)
    given = [x, *moe.parameters()]
    g = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, g, materialize_grads=True)
    chosen, weight, _ = moe.route(x)
    forms = [moe(x), moe._everywhere(x, chosen, weight)]
    if training:
        moe.capacity = 100.0
        forms.append(moe(x))
    for actual in forms:
        assert_near(actual, expected)
        found = torch.autograd.grad(actual, given, g, retain_graph=True, materialize_grads=True)
        for a, e in zip(found, wanted, strict=True):
            assert_near(a, e, gradient=True)


@pytest.mark.parametrize("gated", [True, False])
def test_one_expert_is_a_feed_forward(assert_near: Check, gated: bool):
    moe = build(num_experts=1, gated=gated)
    kind = GatedMLP if gated else MLP
    plain = kind(6, expand=2, activation="silu", bias=False, dtype=torch.float64)
    first = "gate_up" if gated else "up"
    plain.load_state_dict({f"{first}.weight": moe.up[0], "down.weight": moe.down[0]})
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    assert_near(moe.eval()(x), plain(x))


def test_padding_takes_no_place(assert_near: Check):
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    mask = torch.rand(2, 8) < 0.5
    mask[0, 0] = True
    for config in ({"top_k": 2}, {"router": "switch"}):
        moe = build(**config)
        y = moe.eval()(x, mask)
        assert not y[~mask].any()
        assert_near(y[mask], moe(x[mask]))
        real = moe.route(x.flatten(0, 1), mask.flatten())[2]
        assert_near(real, moe.route(x[mask])[2])
        moe.train().capacity = 0.6
        y = moe(x, mask)
        assert not y[~mask].any()
        # as many places as for 16 tokens, filled by the real ones alone
        moe.capacity = 0.6 * 16 / int(mask.sum())
        assert_near(y[mask], moe(x[mask]))


def test_capacity_passes_later_tokens_by(assert_near: Check):
    moe = build(router="switch", capacity=0.5)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 100
    x = torch.rand(20, 6, dtype=torch.float64)
    y = moe(x)
    # every token wants expert 2, which takes ceil(0.5 * 20 / 5) of them
    assert_near(y[:2], by_token(moe, x[:2]))
    assert not y[2:].any()
    assert moe.eval()(x)[2:].any()


def test_balance_adds_its_gradient_only(assert_near: Check):
    x = torch.randn(30, 6, dtype=torch.float64)
    moe = build(top_k=2, balance=0.0)
    plain = moe(x)
    g = torch.randn_like(plain)
    (without,) = torch.autograd.grad(plain, moe.router.weight, g)
    (alone,) = torch.autograd.grad(moe.route(x)[2], moe.router.weight)
    moe.balance = 0.3
    y = moe(x)
    assert torch.equal(y, plain)
    (with_it,) = torch.autograd.grad(y, moe.router.weight, g)
    assert_near(with_it, without + 0.3 * alone)
    (frozen,) = torch.autograd.grad(moe.eval()(x), moe.router.weight, g)
    assert_near(frozen, without)


def test_balance_is_scaled_as_the_loss(assert_near: Check):
    """As a quarter of the loss, one of four micro-batches, and as a scaled one."""
    x = torch.randn(30, 6, dtype=torch.float64)
    moe = build(top_k=2, balance=0.3)
    g = torch.randn(30, 6, dtype=torch.float64)
    (whole,) = torch.autograd.grad(moe(x), moe.router.weight, g)
    scale_balance(nn.Sequential(moe), 0.25)
    y = moe(x)
    # the next micro-batch is scaled otherwise
    scale_balance(moe, 1024)
    (quarter,) = torch.autograd.grad(y, moe.router.weight, 0.25 * g)
    assert_near(4 * quarter, whole)
    (large,) = torch.autograd.grad(moe(x), moe.router.weight, 1024 * g)
    assert_near(large / 1024, whole)
    assert "loss_scale" not in moe.state_dict()
    moe.reset_parameters()
    assert moe.loss_scale == 1


def test_compiled_balance_is_scaled(assert_near: Check):
    moe = build(top_k=2, balance=0.3, capacity=8.0)
    x = torch.randn(30, 6, dtype=torch.float64)
    (whole,) = torch.autograd.grad(moe(x).sum(), moe.router.weight)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for scale in (1, 8, 0.5):
        scale_balance(compiled, scale)
        (found,) = torch.autograd.grad(scale * compiled(x).sum(), moe.router.weight)
        assert_near(found, scale * whole)


def test_balancing_loss_is_one_where_all_are_used_alike():
    moe = build(num_experts=6, router="switch", dtype=torch.float32)
    with torch.no_grad():
        moe.router.weight.copy_(20 * torch.eye(6))
    x = torch.eye(6).repeat(4, 1)
    chosen, _, loss = moe.route(x)
    assert chosen.squeeze(1).tolist() == list(range(6)) * 4
    torch.testing.assert_close(loss, torch.ones(()))
    assert moe.route(torch.eye(6)[:1].repeat(8, 1))[2] > 5


def test_balance_learns_to_spread():
    torch.manual_seed(3)
    moe = build(num_experts=4, router="switch", balance=1.0, dtype=torch.float32)
    x = torch.randn(256, 6)
    with torch.no_grad():
        moe.router.weight[0] += 2 * x.mean(0) / x.mean(0).norm()
        x = x + 3 * x.mean(0) / x.mean(0).norm()
    before = F.one_hot(moe.route(x)[0].squeeze(1), 4).float().mean(0).max()
    optimizer = torch.optim.Adam([moe.router.weight], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (0 * moe(x)).sum().backward()
        optimizer.step()
    after = F.one_hot(moe.route(x)[0].squeeze(1), 4).float().mean(0).max()
    assert before > 0.6
    assert after < 0.4


def test_sinkhorn_gives_every_expert_its_share():
    plan = sinkhorn(torch.randn(4096, 8) + torch.tensor([3.0, 0, 0, 0, 0, 0, 0, -3])).exp()
    torch.testing.assert_close(plan.sum(1), torch.ones(4096))
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 512.0), atol=10, rtol=0)
    moe = MoE(6, num_experts=4, router="sinkhorn")
    with torch.no_grad():
        moe.router.weight[1] += 1
    x = torch.randn(400, 6) + 1
    assert F.one_hot(moe.eval().route(x)[0].squeeze(1), 4).sum(0).max() > 250
    assert F.one_hot(moe.train().route(x)[0].squeeze(1), 4).sum(0).max() < 160


def test_routes_in_float32_under_autocast():
    moe = MoE(6, num_experts=3, top_k=2)
    x = torch.randn(5, 6)
    expected = moe.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        for a, e in zip(moe.route(x), expected, strict=True):
            assert torch.equal(a, e)
        y = moe(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert moe.router.weight.grad is not None
    assert torch.isfinite(moe.router.weight.grad).all()


def test_no_tokens():
    moe = build(top_k=2)
    for capacity in (None, 1.0):
        moe.capacity = capacity
        assert moe(torch.zeros(0, 3, 6, dtype=torch.float64)).shape == (0, 3, 6)


@pytest.mark.parametrize("capacity", [None, 1.25])
def test_compiles(assert_near: Check, capacity: float | None):
    moe = build(top_k=2, capacity=capacity, balance=0)
    x = torch.randn(9, 6, dtype=torch.float64)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), moe(x))


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"router": "hash"}, "router must be 'topk', 'switch' or 'sinkhorn', got 'hash'"),
        ({"top_k": 6}, "top_k must be from 1 to 5 for 5 experts and router 'topk', got 6"),
        ({"top_k": 0}, "top_k must be from 1 to 5"),
        ({"top_k": 2, "router": "switch"}, "top_k must be from 1 to 1 .*'switch', got 2"),
        ({"num_experts": 0}, "top_k must be from 1 to 0 for 0 experts"),
        ({"capacity": 0}, "capacity must be above 0, got 0"),
        ({"balance": -1}, "balance must be at least 0, got -1"),
        ({"activation": "tanh"}, "activation must be one of gelu, .*, got 'tanh'"),
        ({"expand": 0.1}, r"expand \* d_model must be at least 1, got 0"),
    ],
)
def test_refusals(config: dict[str, Any], rule: str):
    with pytest.raises(ValueError, match=rule):
        build(**config)
