"""Mixture of experts: every token goes through the few feed-forwards that a router gives it.

    logits  = router(x)                                E experts
    p       = softmax(logits)
    y       = sum over the k chosen e of weight[e] expert[e](x)

Three routers. "topk" takes the k largest p and weighs by p (renormalised to sum 1 if asked for).
"switch" is k = 1. "sinkhorn" takes k = 1 by an assignment that gives all experts alike in training,
by the largest logit otherwise, and weighs by sigmoid(logit). The first two add to the gradient, in
training, that of

    balance * E sum_e f[e] mean(p[e])                  f: share of the choices that fell on e

without adding to the loss that one sees. What that loss is multiplied by before its backward (a
gradient scaler's scale, one over a step's micro-batches) `scale_balance` tells, as `core.training`
does by itself. All tokens are routed (dropless), unless in training a capacity says how many times
its even share an expert takes; later tokens beyond it are passed by.

Letters: T tokens, D model channels, F hidden channels, E experts, k choices a token.

Source: Fedus et al. 2021 (Switch), arXiv 2101.03961, section 2; Lieber et al. 2024 (Jamba),
arXiv 2403.19887; Anthony et al. 2024 (BlackMamba), arXiv 2402.01771 (Sinkhorn).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.checks import computing_dtype, without_autocast
from .feed_forward import ACTIVATIONS, hidden_width

Router = Literal["topk", "switch", "sinkhorn"]
# factor of the logits, and rounds; after 8 rounds of 4096 random tokens and 8 experts no expert
# is more than 2 % from its share
SHARPNESS, ROUNDS = 2.0, 8


class _AddGradient(torch.autograd.Function):
    """y as it is; its backward also gives `loss` the gradient `scale`."""

    @staticmethod
    def forward(ctx, y, loss, scale):
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, ctx.saved_tensors[0], None


def scale_balance(model: nn.Module, scale: float) -> None:
    """Say what the loss is multiplied by before its backward, for the balancing gradients.

    It holds for forwards from now on, until it is said anew.

    Args:
        model: Whose mixtures of experts are told; any module.
        scale: For instance 1 / 4 where a step adds up four micro-batches' gradients; times
            `GradScaler.get_scale()` with a scaler.
    """
    for part in model.modules():
        if isinstance(part, MoE):
            part.loss_scale.fill_(scale)


def sinkhorn(logits: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Log of a plan whose rows sum to 1 and whose columns have nearly equal sums.

    Args:
        logits: Scores, (T, E).
        rounds: Times that columns and then rows are scaled.

    Returns:
        (T, E), without gradient.
    """
    plan = (SHARPNESS * logits.detach()).log_softmax(-1)
    for _ in range(rounds):
        plan = (plan - plan.logsumexp(0, keepdim=True)).log_softmax(-1)
    return plan


class MoE(nn.Module):
    """Experts and their router.

    On a GPU the eager dropless form reads the experts' token counts back once a call; in a compiled
    graph every expert runs on every token instead, so compile with a capacity.

    Args:
        d_model: Channels D.
        num_experts: Experts E.
        top_k: Experts k that a token goes through; 1 for "switch" and "sinkhorn".
        router: "topk", "switch" or "sinkhorn".
        renormalize: Let the k weights of a token sum to 1.
        capacity: In training, tokens an expert takes at most, in units of k T / E, padding being
            counted in T; None is all.
        router_bias: Let the router's map have a bias.
        balance: Factor of the balancing gradient in training, which `scale_balance` multiplies.
        expand: Hidden channels F = expand * d_model of an expert.
        activation: Of the experts, a name in `ACTIVATIONS`.
        gated: Experts are gated, as `GatedMLP`, or not, as `MLP`, both without bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive or does not fit the router, or a name is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 8,
        top_k: int = 1,
        router: Router = "topk",
        renormalize: bool = False,
        capacity: float | None = None,
        router_bias: bool = False,
        balance: float = 0.01,
        expand: float = 8 / 3,
        activation: str = "silu",
        gated: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if router not in ("topk", "switch", "sinkhorn"):
            raise ValueError(f"router must be 'topk', 'switch' or 'sinkhorn', got {router!r}")
        most = num_experts if router == "topk" else 1
        if num_experts < 1 or not 1 <= top_k <= most:
            raise ValueError(
                f"top_k must be from 1 to {most} for {num_experts} experts and router {router!r}, "
                f"got {top_k}"
            )
        if capacity is not None and capacity <= 0:
            raise ValueError(f"capacity must be above 0, got {capacity}")
        if balance < 0:
            raise ValueError(f"balance must be at least 0, got {balance}")
        hidden = hidden_width(d_model, expand, activation)
        self.num_experts, self.top_k, self.kind = num_experts, top_k, router
        self.renormalize, self.capacity, self.balance = renormalize, capacity, balance
        self.act, self.gated = ACTIVATIONS[activation], gated
        dd = {"device": device, "dtype": dtype}
        self.router = nn.Linear(d_model, num_experts, bias=router_bias, **dd)
        width = 2 * hidden if gated else hidden
        self.up = nn.Parameter(torch.empty(num_experts, width, d_model, **dd))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, hidden, **dd))
        self.loss_scale: Tensor
        scale = torch.ones((), device=device)
        # a tensor, as compiled graphs would fix a number
        self.register_buffer("loss_scale", scale, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, each expert as `nn.Linear` would."""
        self.loss_scale.fill_(1)
        self.router.reset_parameters()
        for weight in (self.up, self.down):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def route(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            x: Tokens, (T, D).
            real: False at tokens that are not to be counted, (T,) bool.

        Returns:
            Chosen experts (T, k), their weights (T, k), and the balancing loss, a scalar that is 1
            where all experts are used alike; weights and loss in float32 or wider.
        """
        dtype = computing_dtype(x, self.router.weight)
        with without_autocast(x):
            bias = self.router.bias
            bias = None if bias is None else bias.to(dtype)
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype), bias)
        p = logits.softmax(-1)
        if self.kind == "sinkhorn":
            scores = logits if real is None else logits.masked_fill(~real.unsqueeze(-1), 0)
            chosen = (sinkhorn(scores) if self.training else logits).argmax(-1, keepdim=True)
            weight = logits.gather(-1, chosen).sigmoid()
        else:
            weight, chosen = p.topk(self.top_k, -1)
            if self.renormalize:
                weight = weight / weight.sum(-1, keepdim=True)
        hits = F.one_hot(chosen, self.num_experts).sum(1).to(dtype)
        if real is not None:
            keep = real.unsqueeze(-1)
            hits, p = hits * keep, p * keep
        share = hits.sum(0) / hits.sum().clamp(min=1)
        total = x.shape[0] if real is None else real.sum()
        mean = p.sum(0) / (max(total, 1) if isinstance(total, int) else total.clamp(min=1))
        return chosen, weight, self.num_experts * (share * mean).sum()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Send every token through its experts.

        Args:
            x: Tokens, (..., D).
            mask: True at real tokens, (...) bool; others give 0 and take no place.

        Returns:
            (..., D), dtype of the experts' products.
        """
        rows = x.reshape(-1, x.shape[-1])
        real = None if mask is None else mask.reshape(-1)
        chosen, weight, loss = self.route(rows, real)
        if real is not None:
            chosen = chosen.masked_fill(~real.unsqueeze(-1), self.num_experts)
        if self.training and self.capacity is not None:
            y = self._bounded(rows, chosen, weight)
        elif torch.compiler.is_compiling():
            y = self._everywhere(rows, chosen, weight)
        else:
            y = self._sorted(rows, chosen, weight)
        if self.training and self.balance and self.kind != "sinkhorn" and loss.requires_grad:
            # a copy: the next micro-batch may be scaled before this one's backward
            scale = self.loss_scale.to(torch.float32, copy=True)
            y = _AddGradient.apply(y, (self.balance * loss).float(), scale)
        return y.reshape(x.shape)

    def _expert(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """One expert on (n, D), or all on (E, n, D)."""
        h = x @ up.mT.to(x.dtype)
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = self.act(gate) * h
        else:
            h = self.act(h)
        return h @ down.mT.to(h.dtype)

    def _sorted(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Every expert on the tokens that chose it, gathered by expert."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts + 1).tolist()
        pieces = x[order // self.top_k].split(counts)
        found = [
            self._expert(piece, self.up[e], self.down[e]) if len(piece) else piece
            for e, piece in enumerate(pieces[:-1])
        ]
        dtype = next((v.dtype for v, n in zip(found, counts, strict=False) if n), x.dtype)
        found = [v.to(dtype) for v in found] + [torch.zeros_like(pieces[-1], dtype=dtype)]
        # back to the tokens' order, then added: the same sums in every run
        y = torch.cat(found)[order.argsort()].unflatten(0, chosen.shape)
        return (y * weight.to(y.dtype).unsqueeze(-1)).sum(1)

    def _everywhere(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Every expert on every token, for graphs whose sizes must not depend on values."""
        y = self._expert(x.unsqueeze(0), self.up, self.down)  # (E, T, D)
        spread = weight.new_zeros(x.shape[0], self.num_experts + 1).scatter_add(1, chosen, weight)
        return (y * spread[:, :-1].T.unsqueeze(-1).to(y.dtype)).sum(0)

    def _bounded(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Experts on equally many places; tokens that find none are passed by."""
        assert self.capacity is not None
        tokens, k = chosen.shape
        experts = self.num_experts
        places = max(1, math.ceil(self.capacity * tokens * k / experts))
        # first choices of all tokens come before second ones
        flat = chosen.T.flatten()
        hits = F.one_hot(flat, experts + 1)
        rank = (hits.cumsum(0) * hits).sum(-1) - 1
        slot = torch.where(
            (rank < places) & (flat < experts), flat * places + rank, experts * places
        )
        token = torch.arange(tokens, device=x.device).repeat(k)
        held = x.new_zeros(experts * places + 1, x.shape[-1]).index_copy(0, slot, x[token])
        y = self._expert(held[:-1].unflatten(0, (experts, places)), self.up, self.down).flatten(
            0, 1
        )
        y = torch.cat([y, y.new_zeros(1, y.shape[-1])])[slot].unflatten(0, (k, tokens))
        return (y * weight.T.to(y.dtype).unsqueeze(-1)).sum(0)
