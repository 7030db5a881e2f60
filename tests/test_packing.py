"""A packed stream gives every row what it would get alone: hidden states, log-probs and gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luffy import attention
from luffy.attention import Layout, Segment, per_row_attention
from luffy.data import Example
from luffy.data.problem import Problem
from luffy.errors import UserError
from luffy.groups import Group, Row
from luffy.model import Policy
from luffy.packing import pack


def tiny_lm(seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).float()


def group(prompt, *answers, advantages=None) -> Group:
    problem = Problem(
        id="p", data_source="s", messages=({"role": "user", "content": "?"},), answer="1", traces=(), extra={}
    )
    rows = [Row(token_ids=tuple(answer), text="") for answer in answers]
    for row, advantage in zip(rows, advantages or [1.0] * len(rows), strict=True):
        row.advantage = advantage
    return Group(example=Example(problem, tuple(prompt), ()), rows=rows)


GROUPS = [
    group([5, 6, 7], [10, 11, 12, 2], [13, 2], [2]),  # a row of one token puts nothing but its target into the batch
    group([8, 9], [20, 21, 22, 23, 24]),
    group([30, 31, 32, 33, 34, 35], [40, 2], [41, 42, 2]),
]


def logp_alone(lm, prompt, answer) -> torch.Tensor:
    """Oracle: one sequence, transformers' own sdpa attention, full logits."""
    lm.set_attn_implementation("sdpa")
    logits = lm(torch.tensor([[*prompt, *answer]])).logits[0].double()
    lm.set_attn_implementation(attention.NAME)
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


def test_of_a_prefix_is_learned_what_the_objective_says():
    lm = tiny_lm()
    policy = Policy(lm, temperature=1.0)
    made = group([5, 6, 7], [10, 11, 12, 13, 2], [20, 21, 22, 2], [30, 2])
    first, second, third = made.rows
    first.prefix, first.prefix_weight, first.weight, first.loss_id = 3, 0.0, 0.5, 1  # nothing is learned of it
    second.prefix, second.prefix_weight, second.prefix_loss, second.weight = 2, 0.1, 3, 2.0
    first.sampler_logp = (float("nan"),) * 3 + (-1.0, -2.0)
    [micro] = pack([made], lambda g: g.rows, 1000)
    assert micro.targets.tolist() == [13, 2, 20, 21, 22, 2, 30, 2]
    assert micro.loss_id.tolist() == [1, 1, 3, 3, 0, 0, 0, 0]
    assert micro.is_trace.tolist() == [False] * 2 + [True] * 2 + [False] * 4
    assert micro.token_weight.tolist() == pytest.approx([0.5, 0.5, 0.2, 0.2, 2.0, 2.0, 1.0, 1.0])
    assert micro.sampler_logp.tolist()[:2] == [-1.0, -2.0]
    assert micro.row.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    alone = [logp_alone(lm, [5, 6, 7], row.token_ids) for row in made.rows]
    want = torch.cat([alone[0][3:], alone[1], alone[2]])
    assert torch.allclose(policy(micro).double(), want, atol=1e-5)
    assert [row.num_targets for row in made.rows] == [2, 4, 2]


@pytest.mark.parametrize("budget", [1000, 12, 1])
def test_packed_log_probs_equal_those_of_single_sequences(budget):
    lm = tiny_lm()
    policy = Policy(lm, temperature=1.0)
    micros = pack(GROUPS, lambda g: g.rows, budget)
    got = {}
    with torch.no_grad():
        for micro in micros:
            got |= dict(zip(row_keys(micro), policy(micro).split(row_sizes(micro)), strict=True))
        want = {
            (g.example.prompt_ids, r.token_ids): logp_alone(lm, g.example.prompt_ids, r.token_ids)
            for g in GROUPS
            for r in g.rows
        }
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key].double(), value, atol=2e-5, rtol=0)


def row_keys(micro):
    """(prompt, answer) of each row of a micro-batch, recovered from what the model is fed."""
    keys, at = [], 0
    for size, prompt_end, start in row_spans(micro):
        keys.append((tuple(micro.token_ids[start:prompt_end].tolist()), tuple(micro.targets[at : at + size].tolist())))
        at += size
    return keys


def row_sizes(micro):
    return [size for size, _, _ in row_spans(micro)]


def row_spans(micro):
    """(targets, prompt end, prompt start) of each row: a row begins where `source` points at a prompt's last token."""
    ends = {segment.prompt_end - 1: segment for segment in micro.layout.segments}
    firsts = [n for n, source in enumerate(micro.source.tolist()) if source in ends]
    for first, following in zip(firsts, [*firsts[1:], micro.num_targets], strict=True):
        segment = ends[micro.source[first].item()]
        yield following - first, segment.prompt_end, segment.start


def test_gradients_do_not_depend_on_the_packing():
    def gradients(budget):
        lm = tiny_lm()
        for micro in pack(GROUPS, lambda g: g.rows, budget):
            Policy(lm, temperature=1.0)(micro).sum().backward()
        return {name: p.grad for name, p in lm.named_parameters()}

    alone = tiny_lm()
    sum(logp_alone(alone, g.example.prompt_ids, r.token_ids).sum() for g in GROUPS for r in g.rows).backward()
    for budget in (1000, 1):
        for name, grad in gradients(budget).items():
            torch.testing.assert_close(grad, dict(alone.named_parameters())[name].grad, atol=3e-4, rtol=1e-4)


def test_the_prompt_enters_once_and_the_last_token_not_at_all():
    [micro] = pack(GROUPS[:1], lambda g: g.rows, 1000)
    assert micro.token_ids.tolist() == [5, 6, 7, 10, 11, 12, 13]
    assert micro.positions.tolist() == [0, 1, 2, 3, 4, 5, 3]
    assert micro.targets.tolist() == [10, 11, 12, 2, 13, 2, 2]
    assert micro.source.tolist() == [2, 3, 4, 5, 2, 6, 2]


def test_budget_holds_and_nothing_is_lost():
    groups = [group(range(3, 13), *[[*range(3, 3 + n), 2] for n in (4, 9, 2, 7)]) for _ in range(5)]
    micros = pack(groups, lambda g: g.rows, 40)
    assert all(micro.num_tokens <= 40 for micro in micros)
    assert sum(micro.num_targets for micro in micros) == 5 * sum((5, 10, 3, 8))
    assert len(micros) < 10  # sharing prompts and first-fit: a batch a row would need 20


def test_only_the_chosen_rows_are_packed_with_their_own_coefficients():
    g = group([1, 2], [3, 4], [5], advantages=[0.0, -0.5])
    [micro] = pack([g], lambda g: [row for row in g.rows if row.advantage], 100)
    assert micro.targets.tolist() == [5]
    assert micro.advantages.tolist() == [-0.5]


def test_flex_rule_and_per_row_attention_agree():
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    layout = Layout([Segment(0, 5, [(5, 9), (9, 12)]), Segment(12, 15, [(15, 20)])], 20)
    q = torch.randn(1, 4, 20, 16)
    k, v = torch.randn(2, 1, 2, 20, 16)
    want = flex_attention(q, k, v, block_mask=layout.block_mask(q.device), enable_gqa=True)
    torch.testing.assert_close(per_row_attention(q, k, v, layout, None), want, atol=1e-5, rtol=1e-5)


def test_attention_that_is_not_plain_is_refused():
    layout = Layout([Segment(0, 5, [(5, 9), (9, 12)])], 12)
    assert layout.longest == 9
    attention.refuse_unknown(layout, sliding_window=9, position_ids=None)
    with pytest.raises(UserError, match="window is 8"):
        attention.refuse_unknown(layout, sliding_window=8)
    with pytest.raises(UserError, match="soft cap"):
        attention.refuse_unknown(layout, softcap=50.0)


def test_ranks_together_have_the_gradient_of_one_and_idle_ones_none():
    def gradients(ranks):
        lm = tiny_lm()
        for rank in range(ranks):
            for micro in pack(GROUPS, lambda g: g.rows, 1000, rank=rank, ranks=ranks):
                Policy(lm, temperature=1.0)(micro).sum().backward()
        return {name: p.grad for name, p in lm.named_parameters()}

    whole = gradients(1)
    for name, grad in gradients(9).items():
        torch.testing.assert_close(grad, whole[name], atol=3e-4, rtol=1e-4)
    [idle] = pack(GROUPS[1:2], lambda g: g.rows, 1000, rank=1, ranks=2)
    lm = tiny_lm()
    logp = Policy(lm, temperature=1.0)(idle)
    assert logp.shape == (0,)
    logp.sum().backward()  # connected, so that a sharded model gathers and reduces with the others
    assert all(not p.grad.any() for p in lm.parameters() if p.grad is not None)
    assert lm.get_decoder().layers[0].self_attn.q_proj.weight.grad is not None
