from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from torch import nn

from numagraft.errors import ConfigurationError
from numagraft.stats import operator_stats


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = SimpleNamespace(nodes=(), calls=0, seconds=0.0, bytes_read=0, remote_bytes=0)

    def stats(self) -> SimpleNamespace | None:
        return self.counts

    def run(self, seconds: float, read: int, remote: int) -> None:
        self.counts.calls += 1
        self.counts.seconds += seconds
        self.counts.bytes_read += read
        self.counts.remote_bytes += remote


class Silent(nn.Module):
    def stats(self) -> None:
        return None


def model() -> nn.Module:
    made = nn.ModuleDict({"a": Counting(), "b": Counting(), "c": Silent(), "kept": nn.ReLU(), "d": Counting()})
    rules = {"a": "linears", "b": "linears", "c": "elsewhere", "kept": "keeps", "d": "experts"}
    made.numagraft_plan = SimpleNamespace(
        modules=[SimpleNamespace(name=name, rule_id=rule, operator="linear") for name, rule in rules.items()]
    )
    return made


def test_modules_of_a_rule_add_up():
    made = model()
    made["a"].run(0.5, 10**9, 0)
    made["b"].run(1.5, 10**9, 5 * 10**8)
    linears, experts = operator_stats(made).rules
    assert (linears.rule_id, linears.modules, linears.calls, linears.seconds) == ("linears", 2, 2, 2.0)
    assert linears.gbps == pytest.approx(1.0) and linears.remote_share == pytest.approx(0.25)
    assert experts.gbps == 0.0 and experts.remote_share == 0.0


def test_since_is_what_happened_in_between():
    made = model()
    made["d"].run(1.0, 100, 0)
    before = operator_stats(made)
    made["d"].run(0.25, 50, 50)
    (linears, experts) = operator_stats(made).since(before).rules
    assert (experts.calls, experts.seconds, experts.bytes_read, experts.remote_share) == (1, 0.25, 50, 1.0)
    assert linears.calls == 0
    other = model()
    other.numagraft_plan.modules.pop()
    with pytest.raises(ConfigurationError, match="of another model"):
        operator_stats(other).since(before)


def test_it_prints_and_serialises():
    made = model()
    made["a"].run(0.5, 2**30, 0)
    table = operator_stats(made)
    text = str(table)
    assert "linears" in text and "1.00 GiB" in text and "0.500 s" in text and "elsewhere" not in text
    assert json.loads(json.dumps(table.to_json()))["rules"][0]["bytes_read"] == 2**30
    assert [module["name"] for module in table.to_json()["modules"]] == ["a", "b", "d"]


def test_an_ordinary_model_has_none():
    with pytest.raises(ConfigurationError, match="was not grafted"):
        operator_stats(nn.ReLU())
