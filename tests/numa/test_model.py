"""Models, end to end, on real nodes. The only tests here that import torch: half a minute in an emulated guest, and more
memory than most topologies have. `large-nodes` has it."""

from __future__ import annotations

import pytest

from numagraft.errors import PlacementError

from .syscalls import BIND, PAGE, mbind, pages_by_node

pytestmark = [pytest.mark.numa, pytest.mark.slow, pytest.mark.timeout(600)]

TOKENS = [[1, 5, 9, 30, 77, 3]]
MOVE = 2  # MPOL_MF_MOVE


def rules(experts: object, linear: object) -> dict:
    def rule(role: str, placement: object) -> dict:
        kwargs = {"format": "bf16", "placement": placement}
        return {"id": role, "match": {"role": role}, "replace": {"class": role, "kwargs": kwargs}}

    return {"schema": 1, "runtime": {"pages": "4k"}, "rules": [rule("experts", experts), rule("linear", linear)]}


@pytest.fixture(scope="module")
def saved(full_nodes, tmp_path_factory):
    """A mixture of experts on disk, and what it answers without numagraft."""
    import torch

    from tests import models

    original = models.build(models.qwen3_moe(hidden_size=128, moe_intermediate_size=256))
    with torch.no_grad():
        expected = original(torch.tensor(TOKENS)).logits
    return models.save(original, tmp_path_factory.mktemp("model")), expected


@pytest.fixture(scope="module")
def on_one_node(saved, full_nodes):
    """Its logits with everything on the first node."""
    bound = {"policy": "bind", "nodes": [full_nodes[0]]}
    model, logits, _ = loaded(saved[0], bound, bound)
    check_pages(model, full_nodes, {full_nodes[0]})
    return logits


def loaded(path, experts: object, linear: object) -> tuple:
    """(model, its logits, what it generates)."""
    import torch

    from numagraft import load_and_optimize

    model = load_and_optimize(path, rules(experts, linear))
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        logits = model(tokens).logits
    return model, logits, model.generate(tokens, max_new_tokens=3, do_sample=False)


def check_pages(model, full_nodes, used: set[int]) -> None:
    """By the kernel's own word, module by module."""
    seen = set()
    for name, module in model.named_modules():
        for buffer in module.buffers_placed() if hasattr(module, "buffers_placed") else ():
            asked = full_nodes[buffer.nodes[0]]
            assert pages_by_node(buffer.address, buffer.bytes) == {asked: buffer.bytes // PAGE}, name
            seen.add(asked)
    assert seen == used


def remote_bytes(model) -> tuple[int, int]:
    """(bytes read, of them remote) of all operators so far."""
    stats = [module.stats() for module in model.modules() if hasattr(module, "buffers_placed")]
    return sum(each.bytes_read for each in stats), sum(each.remote_bytes for each in stats)


@pytest.mark.parametrize(("experts", "linear"), [("mirror", "mirror"), ("shard", "shard"), ("mirror", "shard")])
def test_a_mixture_of_experts_is_grafted_and_proven(saved, on_one_node, full_nodes, experts, linear):
    import torch

    path, expected = saved
    grafted, logits, generated = loaded(path, experts, linear)
    assert torch.linalg.norm(logits - expected) <= 2e-2 * torch.linalg.norm(expected), "bf16 weights"
    # the same weights and inputs on one node: sums in another order, rounded to bf16 between layers at worst
    assert torch.linalg.norm(logits - on_one_node) <= 2e-3 * torch.linalg.norm(on_one_node)
    assert generated.shape == (1, 9)

    report = grafted.placement_report()
    assert report.ok, str(report)
    by_rule: dict[str, dict[int, int]] = {}
    for row in report.rows:
        assert row.verdict == "as asked"
        by_rule.setdefault(row.rule_id, {})[row.node] = row.asked_bytes
        if {"experts": experts, "linear": linear}[row.rule_id] == "mirror":
            assert row.replicas == (len(full_nodes),) * 2
    assert all(set(nodes) == set(full_nodes) for nodes in by_rule.values())
    if experts == "mirror":
        assert len(set(by_rule["experts"].values())) == 1
    check_pages(grafted, full_nodes, set(full_nodes))
    bytes, remote = remote_bytes(grafted)
    assert bytes > 0 and remote == 0


def test_a_misplaced_replica_shows_in_the_models_report_and_counters(saved, full_nodes):
    """Loading verifies; what is moved afterwards shows in the next report, and from then on in the counters."""
    import torch

    grafted, logits, _ = loaded(saved[0], "mirror", "mirror")
    module = next(module for module in grafted.modules() if hasattr(module, "buffers_placed"))
    victim = list(module.buffers_placed())[-1]
    right, wrong = full_nodes[victim.nodes[0]], full_nodes[0]
    assert right != wrong
    mbind(victim.address, victim.bytes, BIND, [wrong], MOVE)
    report = grafted.placement_report()
    assert not report.ok
    with pytest.raises(PlacementError, match=f"asked for node {right} are on node {wrong}"):
        report.require()
    before = remote_bytes(grafted)[1]
    with torch.no_grad():
        again = grafted(torch.tensor(TOKENS)).logits
    assert torch.equal(again, logits), "slower, and no other numbers"
    assert remote_bytes(grafted)[1] > before == 0
