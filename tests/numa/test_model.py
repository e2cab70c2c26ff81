"""One model, end to end, on real nodes. The only test here that imports torch: half a minute in an emulated guest."""

from __future__ import annotations

import pytest

from .syscalls import PAGE, pages_by_node

pytestmark = [pytest.mark.numa, pytest.mark.slow, pytest.mark.timeout(900)]

RULES = {
    "schema": 1,
    "runtime": {"pages": "4k"},
    "rules": [
        {
            "id": "experts",
            "match": {"role": "experts"},
            "replace": {"class": "experts", "kwargs": {"format": "bf16", "placement": "mirror"}},
        },
        {
            "id": "linear",
            "match": {"role": "linear"},
            "replace": {"class": "linear", "kwargs": {"format": "bf16", "placement": "shard"}},
        },
    ],
}


def test_a_mixture_of_experts_is_grafted_and_proven(full_nodes, tmp_path):
    import torch

    from numagraft import load_and_optimize
    from tests import models

    original = models.build(models.qwen3_moe(hidden_size=128, moe_intermediate_size=256))
    tokens = torch.tensor([[1, 5, 9, 30, 77, 3]])
    with torch.no_grad():
        expected = original(tokens).logits
    path = models.save(original, tmp_path)
    grafted = load_and_optimize(path, RULES)
    with torch.no_grad():
        logits = grafted(tokens).logits
    assert torch.linalg.norm(logits - expected) <= 2e-2 * torch.linalg.norm(expected)
    generated = grafted.generate(tokens, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 9)

    report = grafted.placement_report()
    assert report.ok, str(report)
    print(report)
    by_rule: dict[str, dict[int, int]] = {}
    for row in report.rows:
        assert row.verdict == "as asked"
        by_rule.setdefault(row.rule_id, {})[row.node] = row.asked_bytes
    assert set(by_rule["experts"]) == set(full_nodes) and len(set(by_rule["experts"].values())) == 1
    assert set(by_rule["linear"]) == set(full_nodes)

    # by the kernel's own word, module by module
    for name, module in grafted.named_modules():
        for buffer in module.buffers_placed() if hasattr(module, "buffers_placed") else ():
            assert set(pages_by_node(buffer.address, buffer.bytes)) == {full_nodes[buffer.nodes[0]]}, name
            assert buffer.bytes % PAGE == 0
