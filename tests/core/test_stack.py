"""Stacks from patterns and presets, and the wrappers they are made of."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from torch import Tensor, nn

from scanweave.core import Mixer, create_mixer, create_stack, mixer_info
from scanweave.core.stack import PRESETS, SharedTransformer, Stack
from scanweave.core.training import load_checkpoint, param_groups, save_checkpoint

Check = Callable[..., None]
DIM = 16
# few experts and short windows, so that presets are small and windows matter
LITTLE: dict[str, dict[str, Any]] = {
    "jamba": {"letters": {"e": ["moe", {"num_experts": 3, "top_k": 2}]}},
    "moe_mamba": {"letters": {"e": ["moe", {"num_experts": 3, "router": "switch"}]}},
    "samba": {"letters": {"w": ["local_attention", {"window": 3}]}},
    "griffin": {"letters": {"w": ["local_attention", {"window": 3}]}, "depth": 4},
    "hymba": {
        "letters": {"w": ["local_attention", {"window": 3, "prefix": 2, "expand": 2}]},
        "meta_tokens": 2,
    },
    "zamba2": {"depth": 9, "letters": {"S": ["shared", {"lora_rank": 2}]}},
}


def build(pattern: str, **config: Any) -> Mixer:
    stack = create_stack(pattern, DIM, dtype=torch.float64, **config).eval()
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return stack


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_step_pack_and_continue(assert_near: Check, name: str):
    stack, x = build(name, **LITTLE.get(name, {})), draw(2, 11, DIM)
    whole = stack(x)
    with torch.no_grad():
        state, parts = stack.init_state(2), []
        for t in range(11):
            y, state = stack.step(x[:, t], state)
            parts.append(y)
    assert_near(torch.stack(parts, 1), whole)
    first, state = stack(x[:, :4], return_state=True)
    assert_near(torch.cat([first, stack(x[:, 4:], state=state)], 1), whole)
    packed = stack(x[:1], cu_seqlens=pack((4, 0, 7)))
    assert_near(packed, torch.cat([stack(x[:1, :4]), stack(x[:1, 4:])], 1))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_both_ways(assert_near: Check, name: str):
    stack, x = build(name, bidirectional=True, **LITTLE.get(name, {})), draw(2, 9, DIM)
    assert not stack.causal
    whole = stack(x)
    x.requires_grad_()
    (g,) = torch.autograd.grad(stack(x)[0, 0].sum(), x)
    assert g[0, 8].any()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    masked = stack(x, mask=mask)
    assert_near(masked[1], whole[1])
    assert_near(masked[:1, :5], stack(x[:1, :5]))
    packed = stack(x[:1], cu_seqlens=pack((5, 0, 4)))
    assert_near(packed, torch.cat([stack(x[:1, :5]), stack(x[:1, 5:])], 1))


def test_presets_are_documented():
    for name, preset in PRESETS.items():
        assert "arXiv" in preset.paper, name
        assert create_stack(name, 64, device="meta").d_model == 64


def test_depth_cuts_and_repeats():
    assert create_stack("(g f)(g f)(w f)", 8, depth=2).pattern == "2*(g f)"
    assert create_stack("griffin", 8, depth=7).pattern == "2*(g f) (w f) 2*(g f) (w f) (g f)"
    assert create_stack("zamba", 8, depth=4).pattern == "2*m (S>m) m"


def test_layers_are_residual(assert_near: Check):
    stack = build("(m f) w", final_norm=False)
    layers: Any = stack.layers
    (first, second), third = layers[0], layers[1][0]
    x = draw(2, 5, DIM)
    y = x + first.body(first.norm(x))
    y = y + second.body(second.norm(y))
    y = y + third.body(third.norm(y))
    assert_near(stack(x), y)


def test_sources_enter_the_body_only(assert_near: Check):
    stack = build("(a>m)", final_norm=False)
    step: Any = stack.layers[0][0]  # type: ignore[index]
    x = draw(2, 5, DIM)
    t = step.source(step.norm_source(x))
    assert_near(stack(x), x + step.body(step.norm(x + t)))


@pytest.mark.parametrize("merge", ["add", "norm", "concat"])
def test_merges(assert_near: Check, merge: str):
    both = create_mixer(
        "parallel", DIM, mixers=["lru", "retnet"], merge=merge, norm_eps=1e-3, dtype=torch.float64
    )
    x = draw(2, 5, DIM)
    a, b = (m(x) for m in both.parts)  # type: ignore[operator, union-attr]
    if merge == "add":
        expected = a + b
    elif merge == "norm":
        scaled = [v / (v.square().mean(-1, keepdim=True) + 1e-3).sqrt() for v in (a, b)]
        expected = both.out_proj((scaled[0] + scaled[1]) / 2)  # type: ignore[operator]
    else:
        normed = torch.cat([nn.functional.layer_norm(v, (DIM,)) for v in (a, b)], -1)
        expected = both.out_proj(normed)  # type: ignore[operator]
    assert_near(both(x), expected)


def test_parallel_heads_share_one_projection():
    heads: Any = create_mixer(
        "parallel", DIM, mixers=["mamba", ["attention", {"expand": 2}]], merge="norm"
    )
    assert heads.out_proj.in_features == 2 * DIM
    assert not any("out_proj" in k for k in heads.mixers.state_dict())
    assert not heads.recurrent
    heads.reset_parameters()


def test_bidirectional_is_two_mixers(assert_near: Check):
    both: Any = create_mixer("bidirectional", DIM, mixer="rg_lru", dtype=torch.float64)
    x = draw(2, 7, DIM)
    assert_near(both(x), both.forth(x) + both.back(x.flip(1)).flip(1))
    tied: Any = create_mixer("bidirectional", DIM, mixer="rg_lru", tied=True)
    assert sum(p.numel() for p in tied.parameters()) == sum(
        p.numel() for p in tied.forth.parameters()
    )


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_shared_blocks_count_once():
    one, three = (create_stack(f"{n}*(S>m)", DIM) for n in (1, 3))
    own = size(create_mixer("mamba", DIM)) + DIM + DIM * DIM  # norm and linear of a place
    assert size(three) - size(one) == 2 * own
    adapted = create_stack("3*(S>m)", DIM, letters={"S": ["shared", {"lora_rank": 2}]})
    assert size(adapted) - size(three) == 3 * 2 * (DIM + 2 * 4 * DIM)
    two = create_stack("3*(S>m)", DIM, letters={"S": ["shared", {"num_blocks": 2}]})
    blocks = [s.attention.out_proj for s in two.modules() if isinstance(s, SharedTransformer)]
    assert blocks[0] is blocks[2]
    assert blocks[0] is not blocks[1]


def test_adapters_start_at_nothing(assert_near: Check):
    config = {"lora_rank": 2, "lora_attention": True}
    plain = create_stack("2*(S>m)", DIM)
    adapted = create_stack("2*(S>m)", DIM, letters={"S": ["shared", config]})
    kept = {k.replace(".base", ""): k for k in adapted.state_dict()}
    renamed = {kept[k]: v for k, v in plain.state_dict().items()}
    adapted.load_state_dict(renamed, strict=False)
    x = torch.randn(2, 5, DIM)
    assert_near(adapted(x), plain(x))
    adapted.reset_parameters()
    assert not torch.allclose(adapted(x), plain(x))


def test_capitals_tie_weights(assert_near: Check):
    stack = build("M M m")
    bodies = [step.body for layer in stack.layers for step in layer]  # type: ignore[union-attr]
    assert bodies[0] is bodies[1]
    assert bodies[0] is not bodies[2]
    x = draw(1, 6, DIM)
    _, state = stack(x[:, :3], return_state=True)
    assert_near(stack(x[:, 3:], state=state), stack(x)[:, 3:])
    assert not torch.allclose(state["0.0.body.h"], state["1.0.body.h"])


def test_ties_survive_copies_and_checkpoints(tmp_path, assert_near: Check):
    stack = create_stack("2*(S>m) W W", DIM)
    twin = copy.deepcopy(stack)
    assert size(twin) == size(stack)
    save_checkpoint(tmp_path / "step", stack)
    other = create_stack("2*(S>m) W W", DIM)
    load_checkpoint(tmp_path / "step", other)
    x = torch.randn(2, 5, DIM)
    for model in (twin, other):
        assert_near(model(x), stack(x))


@pytest.mark.parametrize("both", [False, True])
def test_meta_tokens_are_tokens_before(assert_near: Check, both: bool):
    """Also those of packed sequences, empty ones, and masked ones."""
    stack = build("(m|a f) m", meta_tokens=3, bidirectional=both)
    bare = build("(m|a f) m", bidirectional=both)
    weights = stack.state_dict()
    meta = weights.pop("meta_tokens")
    bare.load_state_dict(weights, strict=True)
    x = draw(2, 7, DIM)
    expected = bare(torch.cat([meta.expand(2, -1, -1), x], 1))[:, 3:]
    assert_near(stack(x), expected)
    packed = stack(x[:1], cu_seqlens=pack((0, 3, 0, 4)))
    pieces = [stack(x[:1, :3]), stack(x[:1, 3:])]
    assert_near(packed, torch.cat(pieces, 1))
    mask = torch.tensor([[False, True, True, False, True, True, False], [True] * 7])
    assert_near(stack(x, mask=mask)[:1, mask[0]], stack(x[:1, mask[0]]))
    (g,) = torch.autograd.grad(stack(x).sum(), [stack.get_parameter("meta_tokens")])
    assert g.any()


def test_full_attention_grows_and_says_so(assert_near: Check):
    stack, x = build("m a A A"), draw(2, 9, DIM)
    assert not stack.recurrent
    with pytest.raises(ValueError, match="state needs a recurrent mixer, attention is not one"):
        stack.state_spec()
    state, parts = stack.init_state(2), []
    for t in range(9):
        y, state = stack.step(x[:, t], state)
        parts.append(y)
    assert_near(torch.stack(parts, 1), stack(x))
    assert state["3.0.body.k"].shape[1] == 9
    assert build("m w").recurrent


def test_padding_may_hold_anything():
    stack = build("(m f)(w f)(a>m)")
    x = draw(2, 6, DIM)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    x[~mask] = float("nan")
    y = stack(x.requires_grad_(), mask=mask)
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stack.parameters())


def test_resets_everything():
    stack = create_stack("(m|w f) (S>g) n e", DIM, meta_tokens=1, merge="norm")
    before = {k: v.clone() for k, v in stack.state_dict().items()}
    with torch.no_grad():
        for p in stack.parameters():
            p.fill_(7)
    stack.reset_parameters()
    for name, v in stack.state_dict().items():
        assert not v.eq(7).any(), name
        assert abs(v.std(unbiased=False) - before[name].std(unbiased=False)) < 1, name


def test_keeps_rates_from_decay():
    stack = create_stack("(m f) (g f) (l f)", DIM)
    decayed = {id(p) for g in param_groups(stack, 0.1) if g["weight_decay"] for p in g["params"]}
    names = [n for n, p in stack.named_parameters() if id(p) not in decayed]
    ends = ("A_log", "recurrent_param", "norm.weight", "dt_proj.bias")
    assert all(any(n.endswith(end) for n in names) for end in ends)


def test_one_stack_in_another(assert_near: Check):
    inner = {"i": ["stack", {"pattern": "(g f)"}]}
    outer, x = build("2*i w", letters=inner), draw(1, 6, DIM)
    assert outer.recurrent
    _, state = outer(x[:, :2], return_state=True)
    assert_near(outer(x[:, 2:], state=state), outer(x)[:, 2:])


def test_compiles(assert_near: Check):
    stack = create_stack("(g f)(w|m f)(S>m)", DIM, merge="norm", meta_tokens=2)
    x = torch.randn(2, 6, DIM)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), stack(x))


def test_channel_mixes_have_states(assert_near: Check):
    stack, x = build("2*(rwkv6 k)"), draw(2, 6, DIM)
    assert stack.recurrent
    assert any(name.startswith("1.1.body.") for name in stack.state_spec())
    state, parts = stack.init_state(2), []
    for t in range(6):
        y, state = stack.step(x[:, t], state)
        parts.append(y)
    assert_near(torch.stack(parts, 1), stack(x))
    values, outputs = stack.core(x)
    assert_near(stack.matrix(x) @ values, outputs)
    both = build("(rwkv6 k)", bidirectional=True)
    packed = both(x[:1], cu_seqlens=pack((2, 4)))
    assert_near(packed, torch.cat([both(x[:1, :2]), both(x[:1, 2:])], 1))


@pytest.mark.parametrize("both", [False, True])
def test_deep_layers_know_how_deep_they_lie(both: bool):
    stack: Any = create_stack("3*(rwkv6 k) (m|rwkv4)", DIM, bidirectional=both)
    found = [step.body for layer in stack.layers for step in layer]
    places = [(m.layer, m.num_layers) for m in (*found[:6], found[6].parts[1])]
    assert places == [(i, 4) for i in (0, 0, 1, 1, 2, 2, 3)]
    given = create_stack("r r", DIM, letters={"r": ["rwkv6", {"layer": 1, "num_layers": 6}]})
    assert {m.layer for m in given._mixers().values()} == {1}  # type: ignore[attr-defined]


def test_layer_norms(assert_near: Check):
    stack: Any = build("(m f)", norm_kind="layer", norm_eps=1e-3)
    (first, second), x = stack.layers[0], draw(2, 5, DIM)

    def norm(part: Any, v: Tensor) -> Tensor:
        return nn.functional.layer_norm(v, (DIM,), part.weight, part.bias, 1e-3)

    y = x + first.body(norm(first.norm, x))
    y = y + second.body(norm(second.norm, y))
    assert_near(stack(x), norm(stack.norm, y))
    kinds = {type(m) for m in create_stack("h3_hybrid", DIM).modules()}
    assert nn.LayerNorm in kinds
    stack.reset_parameters()
    assert not stack.norm.bias.any()


def test_names():
    assert mixer_info("stack").causal
    assert not mixer_info("stack_bidirectional").causal
    both = create_stack("m w n retnet", DIM, bidirectional=True)
    names = [m.info.name for m in both._mixers().values()]
    expected = ["bimamba", "attention_bidirectional", "bidirectional", "retnet_bidirectional"]
    assert names == expected


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: create_stack("m", 8, depth=0), "depth must be at least 1, got 0"),
    (lambda: create_stack("m", 8, meta_tokens=-1), "meta_tokens must be at least 0, got -1"),
    (
        lambda: create_stack("grifin", 8),
        "names and letters that are known, not 'grifin', .*; presets are samba, .*griffin",
    ),
    (
        lambda: create_stack("m", 8, norm_kind="batch"),
        "norm_kind must be 'rms' or 'layer', got 'batch'",
    ),
    (lambda: create_stack("(m|f)", 8), r"pattern must have mixers around '\|', got 'f'"),
    (lambda: create_stack("(m|S)", 8), r"pattern must have mixers around '\|', got 'S'"),
    (lambda: create_stack("hydra", 8), "pattern must have causal mixers only, got 'hydra'"),
    (
        lambda: create_stack("S", 8, letters={"S": ["shared", {"num_blocks": 0}]}),
        "num_blocks must be at least 1, got 0",
    ),
    (
        lambda: create_stack("S", 8, letters={"S": ["shared", {"lora_rank": -1}]}),
        "lora_rank must be at least 0, got -1",
    ),
    (
        lambda: create_stack("m", 8, letters={"m": ["mamba", 3]}),
        r"entry must be a name or \(name, arguments\), got \['mamba', 3\]",
    ),
    (
        lambda: create_stack("m", 8, letters={"m": ["mamba", {}, 1]}),
        "entry must be a name or",
    ),
    (
        lambda: create_mixer("parallel", 8, merge="mean"),
        "merge must be 'add', 'norm' or 'concat', got 'mean'",
    ),
    (lambda: create_mixer("parallel", 8, mixers=[]), "mixers must be at least one, got none"),
    (
        lambda: create_mixer("parallel", 8, mixers=["hydra"]),
        "mixers must be causal, got 'hydra'",
    ),
    (
        lambda: create_mixer("bidirectional", 8, merge="norm"),
        "merge must be 'add' or 'concat', got 'norm'",
    ),
    (
        lambda: create_mixer("bidirectional", 8, mixer="hydra"),
        "mixer must be causal, got 'hydra'",
    ),
]


@pytest.mark.parametrize(("call", "rule"), REFUSED)
def test_refusals(call: Callable[[], object], rule: str):
    with pytest.raises(ValueError, match=rule):
        call()


def test_states_must_fit():
    stack = Stack(8, pattern="m w")
    x, state = torch.randn(2, 3, 8), stack.init_state(2)
    with pytest.raises(ValueError, match=r"state must hold \['0\.0\.body\.conv', .*7\.0\.body\.h"):
        stack(x, state={**state, "7.0.body.h": state["0.0.body.h"]})
    part = {k: v for k, v in state.items() if k.startswith("0")}
    with pytest.raises(ValueError, match=r"state must hold .*'1\.0\.body\.v'\], got \['0"):
        stack(x, state=part)
    with pytest.raises(ValueError, match=r"state\['h'\] must be \(2, 16, 16\)"):
        stack(x, state={**state, "0.0.body.h": state["0.0.body.h"][:1]})
    with pytest.raises(ValueError, match=r"x must be \(B, 8\), got \(2, 3, 8\)"):
        stack.step(x, state)
    with pytest.raises(TypeError, match="mixer 'stack' does not take layers"):
        create_stack("m", 8, layers=3)
    with pytest.raises(TypeError, match="'gated_mlp' does not take width; it takes expand, "):
        create_stack("f", 8, letters={"f": ["gated_mlp", {"width": 3}]})
