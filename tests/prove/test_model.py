"""The model whole against something else: numbers worked out by hand, textbook formulas written otherwise, published values."""

from __future__ import annotations

import cmath
import json
import math

import numpy as np
import pytest
from scipy.special import expit, softmax
from small_specs import GPU, LINKS

import planc
from planc.prove.execute import Machine
from planc.prove.holdings import holdings
from planc.prove.model import Sequence, Weights, Whole, activated, attend, expanded, projected, rms, rotate, route
from planc.verify import Draft

RNG = np.random.default_rng(5)


# --- one MoE layer on paper ------------------------------------------------------------------------------------------

#: two tokens of two values, two experts of width one, one head. Keys are zero, so a token sees its own value and the one cached
#: before it (zero) alike: half its value, times o = 2 I, so that h = x + x. The router gives token (0, 2) the logits (0, ln 3):
#: 1/4 and 3/4; the gate's SiLU(ln 3) = 3/4 ln 3 and u = 4 / (3 ln 3) multiply to 1, and `down` is what the expert says.
#:   x = (0, 1): h = (0, 2), expert 1 says (-4, 4), 3/4 of it is (-3, 3): (-3, 5)
#:   x = (1, 0): h = (2, 0), expert 0 says ( 4, 8), 3/4 of it is ( 3, 6): ( 5, 6)
PAPER_IN = np.array([[0.0, 1.0], [1.0, 0.0]])
PAPER_OUT = np.array([[-3.0, 5.0], [5.0, 6.0]])
LN3 = math.log(3.0)


def paper_weights(model: planc.spec.Model) -> Weights:
    weights = Weights(model, seed=0)
    half = np.eye(2) * LN3 / 2
    adds = math.sqrt(2 * model.layers)  # what a layer adds is scaled by the inverse
    weights._made.update(
        {
            "L0.attn.q": np.ones((1, 2, 2)),
            "L0.attn.k": np.zeros((1, 2, 2)),
            "L0.attn.v": np.eye(2)[None],
            "L0.attn.o": 2 * np.eye(2)[None] * adds,
            "L0.router": half,
            "L0.E0.gate": half[:, :1],
            "L0.E1.gate": half[:, 1:],
            "L0.E0.up": np.array([[2 / (3 * LN3)], [0.0]]),
            "L0.E1.up": np.array([[0.0], [2 / (3 * LN3)]]),
            "L0.E0.down": np.array([[4.0, 8.0]]) * adds,
            "L0.E1.down": np.array([[-4.0, 4.0]]) * adds,
        }
    )
    return weights


def paper_plan() -> planc.VerifiedPlan:
    """Expert 0 and the token of expert 1 on GPU 0, the others on GPU 1: both tokens travel."""
    spec = {
        "name": "paper",
        "model": {
            "name": "two",
            "layers": 1,
            "hidden": 2,
            "attention": {"heads": 1, "head_dim": 2},
            "moe": {"experts": 2, "top_k": 1, "intermediate": 1, "gated": True},
        },
        "cluster": {"name": "pair", "links": LINKS, "groups": [{"nodes": 1, "gpus_per_node": 2, "gpu": GPU}]},
        "workload": {"batch": 2, "isl": 1, "osl": 1},
        "parallelism": {"dp": 1, "pp": 1, "ep": 2, "tp": 1},
    }
    return planc.compile(planc.parse_spec(json.dumps(spec)))


def test_paper_against_the_model_whole() -> None:
    plan = paper_plan()
    whole = Whole(paper_weights(plan.spec.model))
    empty = np.zeros((1, 1, 2))
    sequences = [(Sequence({0: (empty, empty)}, 1), slice(n, n + 1)) for n in range(2)]
    assert whole.step(PAPER_IN, sequences) == pytest.approx(PAPER_OUT, abs=1e-14)
    assert whole.seen["L0.attn_add"] == pytest.approx(2 * PAPER_IN, abs=1e-14)
    assert [sequence.length for sequence, _ in sequences] == [2, 2]


def test_paper_against_the_plan() -> None:
    plan = paper_plan()
    draft = Draft(plan.spec, plan.parallelism, plan.reasons, plan.placement, plan.memory, plan.blocks, plan.notes)
    held = holdings(draft, paper_weights(plan.spec.model))
    for one in held:
        one.cache[0, 0] = [np.zeros((1, 2, 1, 2)), np.zeros((1, 2, 1, 2))]
    machine = Machine(draft, plan.blocks, held, planned=False)
    stream = machine.step([PAPER_IN])
    assert np.concatenate(stream) == pytest.approx(PAPER_OUT, abs=1e-14)
    size = 2 * 2  # two values of two bytes
    dispatch = plan.blocks.by_name["L0.dispatch"]
    combine = plan.blocks.by_name["L0.combine"]
    assert machine.moved.collectives[dispatch, 0].tolist() == [[0, size], [size, 0]]
    assert machine.moved.collectives[combine, 0].tolist() == [[0, size], [size, 0]]
    assert machine.moved.edges == {"dp": size}  # the second GPU's token to where the stream is collected


# --- parts against other ways of writing them, and published values ---------------------------------------------------


def test_activations() -> None:
    assert activated(np.array(1.0), np.array(1.0)) == pytest.approx(
        0.7310585786300049
    )  # SiLU(1), sigmoid(1) of any table
    assert activated(np.array(1.0), None) == pytest.approx(
        0.8411919906082768
    )  # tanh GELU of 1 (arXiv 1606.08415, eq. 2)
    assert activated(np.array(-1.0), None) == pytest.approx(-0.15880800939172324)
    up, gate = RNG.normal(size=(2, 50))
    assert activated(up, gate) == pytest.approx(up * gate * expit(gate), rel=1e-14)
    exact = up * 0.5 * np.array([1 + math.erf(v / math.sqrt(2)) for v in up])
    assert activated(up, None) == pytest.approx(exact, abs=1e-3)  # what the tanh approximates


def test_rms_norm() -> None:
    assert rms(np.array([3.0, 4.0]), np.ones(2)) == pytest.approx([0.8485281374, 1.1313708499])  # 3 and 4 over √12.5
    x, w = RNG.normal(size=(4, 6)), RNG.normal(size=6)
    other = np.array([w * row / math.sqrt(float(row @ row) / 6 + 1e-6) for row in x])
    assert rms(x, w) == pytest.approx(other, rel=1e-14)
    assert rms(x, None) is x


def test_rotary_positions_are_turns_of_complex_numbers() -> None:
    """RoFormer (arXiv 2104.09864): pair j turns by position · 10000^(-2j/d); scores depend on distances alone."""
    x, position = RNG.normal(size=(3, 2, 8)), np.array([0, 5, 1000])
    out = rotate(x, position)
    for t, head, j in np.ndindex(3, 2, 4):
        turned = complex(x[t, head, j], x[t, head, j + 4]) * cmath.exp(1j * position[t] * 10_000 ** (-2 * j / 8))
        assert complex(out[t, head, j], out[t, head, j + 4]) == pytest.approx(turned, abs=1e-12)
    assert (out[0] == x[0]).all()
    q, k = RNG.normal(size=(2, 1, 8))
    near = rotate(q, np.array([7])) @ rotate(k, np.array([3])).T
    assert near == pytest.approx(rotate(q, np.array([104])) @ rotate(k, np.array([100])).T, abs=1e-12)
    assert rotate(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(np.array([[0.5403023059, 0.8414709848]]))


def test_attention_by_loops() -> None:
    """Every query head over every key that it may see, with softmax by scipy."""
    assert softmax([1.0, 2.0, 3.0]) == pytest.approx([0.09003057, 0.24472847, 0.66524096])  # of any textbook
    q, k, v = RNG.normal(size=(3, 2, 4)), RNG.normal(size=(5, 2, 4)), RNG.normal(size=(5, 2, 6))
    out = attend(q, k, v, 2)
    for n, head in np.ndindex(3, 2):
        seen = 2 + n + 1
        share = softmax([q[n, head] @ k[s, head] / 2.0 for s in range(seen)])
        assert out[n, head] == pytest.approx(sum(share[s] * v[s, head] for s in range(seen)), abs=1e-13)
    keys = np.log([[[1.0]], [[2.0]], [[5.0]]])  # scores ln 1, ln 2, ln 5: shares 1/8, 2/8, 5/8
    assert attend(np.ones((1, 1, 1)), keys, np.array([[[8.0]], [[16.0]], [[24.0]]]), 2)[0, 0, 0] == pytest.approx(20.0)


def test_mla_as_deepseek_v2_absorbs_it() -> None:
    """arXiv 2405.04434, section 2.1: scores by latents, with the key's up-projection moved to the query, are the same."""
    plan = planc.load_spec("deepseek-v3-128gpu")
    a = plan.model.attention.model_copy(
        update={
            "heads": 2,
            "q_lora_rank": 6,
            "kv_lora_rank": 5,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 3,
        }
    )
    model = plan.model.model_copy(update={"attention": a, "hidden": 8})
    w = Weights(model, 3).attention(0)
    x = RNG.normal(size=(4, 8))
    q, latent, rope = projected(model, x, w, np.arange(4))
    assert latent.shape == (4, 5) and rope.shape == (4, 2)
    out = attend(q, *expanded(model, latent, rope, w, 2), 0)
    for n, head in np.ndindex(4, 2):
        absorbed = w["k_up"][head] @ q[n, head, :4]
        share = softmax([(absorbed @ latent[s] + q[n, head, 4:] @ rope[s]) / math.sqrt(6) for s in range(n + 1)])
        value = sum(share[s] * latent[s] for s in range(n + 1)) @ w["v_up"][head]
        assert out[n, head] == pytest.approx(value, abs=1e-12)


def test_gqa_shares_keys_among_neighbours() -> None:
    model = planc.load_spec("qwen3-235b-a22b").model
    a = model.attention.model_copy(update={"heads": 6, "kv_heads": 2, "head_dim": 4})
    k, v = expanded(model.model_copy(update={"attention": a}), *RNG.normal(size=(2, 3, 2, 4)), {}, 6)
    assert all((k[:, h] == k[:, h // 3 * 3]).all() and (v[:, h] == v[:, h // 3 * 3]).all() for h in range(6))
    assert (k[:, 0] != k[:, 3]).all()


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
def test_gate_by_loops(gate: str, groups: int, top_groups: int) -> None:
    """DeepSeek-V3, arXiv 2412.19437, equations 12 to 16, and the group limit of its section 2.1.2, choice by choice."""
    model = planc.load_spec("deepseek-v3-128gpu").model
    assert model.moe is not None
    update = {"experts": 8, "top_k": 3, "groups": groups, "top_groups": top_groups, "gate": gate, "gate_bias": True}
    model = model.model_copy(update={"moe": model.moe.model_copy(update=update)})
    w, bias = RNG.normal(size=(6, 8)), RNG.normal(size=8)
    x = RNG.normal(size=(20, 6))
    chosen, share = route(model, x, {"w": w, "bias": bias})
    for token in range(20):
        logits = [sum(x[token, i] * w[i, e] for i in range(6)) for e in range(8)]
        if gate == "softmax":
            scores = wanted = list(softmax([logit + b for logit, b in zip(logits, bias, strict=True)]))
        else:
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
            wanted = [s + b for s, b in zip(scores, bias, strict=True)]
        size = 8 // groups
        rank = sorted(range(groups), key=lambda g: -sum(sorted(wanted[g * size : (g + 1) * size])[-2:]))
        allowed = [e for e in range(8) if e // size in rank[:top_groups]]
        best = sorted(allowed, key=lambda e: -wanted[e])[:3]
        total = sum(scores[e] for e in best) if gate == "sigmoid" else 1.0
        assert chosen[token].tolist() == best
        assert share[token] == pytest.approx([scores[e] / total for e in best], rel=1e-12)
