"""What a mirror buys, and whether `auto` makes one: by predicted figures and by room, and the plan says both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from numagraft.doctor.measurement import Measurement
from numagraft.planning import make_plan
from numagraft.plans.mirroring import LEAST_GAIN, MirrorGains
from numagraft.plans.prediction import predict
from numagraft.plans.rates import FORK_JOIN_PER_NODE_S, FORK_JOIN_S, Load, Rates
from numagraft.platform import Platform
from numagraft.rulefile import load_rules
from numagraft.runtime import RuntimeLayout
from tests.topologies import machines

from .small import dense, moe

GIB = 1 << 30
#: many small layers: fork-joins over nodes cost as much as reading the weights
MANY_CALLS = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 16, "head_dim": 128}
MANY_CALLS |= {"num_attention_heads": 16, "num_key_value_heads": 4}
#: a few large ones: reading is all
LARGE = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 2, "head_dim": 1024}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 16}


def auto(model, platform, **more):
    return make_plan(model, load_rules("auto", platform=platform, config=model.config, **more), platform)


def policies(plan):
    """Of the modules that `auto` does not keep on one node because they are small."""
    placed = [module.placement for module in plan.modules if module.placement is not None]
    return {placement.policy for placement in placed if "than its fork-join costs" not in placement.reason}


def reasons(plan):
    return {module.placement.reason for module in plan.modules if module.placement is not None}


def rates(*, bandwidth=(100e9, 100e9), threads=(8, 8), operations=(1e12, 1e12), remote=0.5):
    nodes = range(len(bandwidth))
    return Rates(
        dict(zip(nodes, bandwidth, strict=True)),
        dict(zip(nodes, operations, strict=True)),
        dict(zip(nodes, threads, strict=True)),
        "given",
        "avx2",
        remote,
    )


def test_the_figures_by_hand():
    load = Load(bytes=10**9, operations=2e9, calls=100, added_values=5 * 10**6)
    gains = MirrorGains.of(rates(), load)
    alone = 1e9 / 2 / 100e9 + 100 * (FORK_JOIN_S + FORK_JOIN_PER_NODE_S)
    own = 1e9 / 100e9 + 100 * FORK_JOIN_S
    assert gains.decode.shard_tokens_per_s == gains.decode.mirror_tokens_per_s == pytest.approx(1 / alone)
    assert gains.callers.mirror_tokens_per_s == pytest.approx(2 / own)
    assert gains.callers.shard_tokens_per_s == pytest.approx(1 / alone)
    # each shard writes its sums and reads one of each node, half of them remote at half the speed
    adding = 4 * 5e6 * (1 + 0.5 + 0.5 / 0.5) / 100e9
    assert gains.prefill.mirror_tokens_per_s == pytest.approx(2e12 / 2e9)
    assert gains.prefill.shard_tokens_per_s == pytest.approx(1 / (2e9 / 2e12 + adding))
    assert gains.prefill.share > LEAST_GAIN and "prefill divided by tokens over 2 nodes" in gains.reasons()[0]


def test_the_control_nothing_to_gain():
    gains = MirrorGains.of(rates(), Load(bytes=100 * 10**9, operations=2e11, calls=1))
    assert gains.prefill.share == 0 and gains.callers.share < LEAST_GAIN
    assert gains.reasons() == ()
    assert "0.0% in prefill" in gains.too_little() and "less than the 5%" in gains.too_little()
    assert len(gains.facts()) == 4  # what it is good for is said all the same


def test_uneven_nodes_gain_more_from_copies():
    """Shards wait for the slowest node; callers on their own nodes do not wait for each other."""
    load = Load(bytes=10**10, operations=2e10, calls=10)
    even, uneven = (MirrorGains.of(rates(bandwidth=b), load) for b in ((100e9, 100e9), (100e9, 50e9)))
    assert uneven.callers.share > even.callers.share + 0.3


@pytest.mark.parametrize("name", ["dual-epyc-9654-nps4", "dual-xeon-8480-snc4", "dual-xeon-e5-2680v4"])
def test_auto_mirrors_where_it_pays_and_there_is_room(name):
    platform = machines.platform(name)
    plan = auto(dense(**MANY_CALLS), platform)
    gains = predict(plan, platform).mirror
    assert gains.callers.share >= LEAST_GAIN
    assert policies(plan) == {"mirror"}
    (reason,) = {text for text in reasons(plan) if "copies" in text}
    assert reason.startswith(f"auto: {gains.nodes} copies, one per node: ")
    for figure in (gains.callers.mirror_tokens_per_s, gains.callers.shard_tokens_per_s):
        assert f"{figure:,.0f}" in reason
    assert f"{gains.nodes} callers served at once" in reason and "on each node instead of" in reason


def test_auto_shards_where_copies_gain_too_little():
    platform = machines.platform("dual-xeon-e5-2680v4")
    plan = auto(dense(**LARGE), platform)
    gains = predict(plan, platform).mirror
    assert 0 <= gains.callers.share < LEAST_GAIN
    assert policies(plan) == {"shard"}
    (reason,) = reasons(plan)
    assert reason == f"auto: {gains.too_little()}"
    assert "less than the 5% that 2 times the memory must bring" in reason


def test_auto_shards_all_where_copies_do_not_fit():
    """The same model and machine; one node has too little. Not some modules: those would need both nodes again."""
    roomy = machines.platform("dual-xeon-e5-2680v4")
    model = dense(**MANY_CALLS)
    copy = predict(auto(model, roomy), roomy).mirror.copy_bytes
    nodes = tuple(replace(node, free_bytes=int(copy * 1.1), total_bytes=2 * copy) for node in roomy.nodes)
    nodes = tuple(replace(node, reclaimable_bytes=0) if hasattr(node, "reclaimable_bytes") else node for node in nodes)
    tight = replace(roomy, nodes=nodes)
    layout = RuntimeLayout.from_platform(tight)
    assert all(0.8 * node.free_bytes < copy for node in layout.nodes)
    plan = auto(model, tight)
    assert policies(plan) == {"shard"}
    (reason,) = {text for text in reasons(plan) if "copy" in text}
    assert "a copy on each of 2 nodes takes" in reason and "80% of what is free on node 0 is" in reason
    assert "it would have bought: " in reason and "2 callers served at once" in reason


def test_one_node_holds_one_copy():
    platform = machines.platform("one-node")
    plan = auto(dense(**MANY_CALLS), platform)
    assert predict(plan, platform).mirror is None
    assert policies(plan) == {"bind"}
    assert any(text == "auto: there is one usable node" for text in reasons(plan))


def test_a_mirror_that_was_asked_for_says_what_it_buys():
    platform = machines.platform("dual-xeon-e5-2680v4")
    plan = auto(dense(**LARGE), platform, overrides=["vars.placement=mirror"])
    text = next(reason for reason in reasons(plan) if "as asked" in reason)
    for fact in predict(plan, platform).mirror.facts():
        assert fact in text


def test_experts_add_up_their_shards_and_linears_do_not():
    platform = Platform.virtual(2, cores_per_node=4, memory_per_node=64 * GIB)
    mixture = auto(moe(hidden_size=1024, moe_intermediate_size=512), platform)
    added = {module.operator: module.added_per_token for module in mixture.modules}
    assert added == {"experts": 1024, "linear": 0}
    table = {each.policy: each for each in predict(mixture, platform).alternatives}
    assert table["mirror"].prefill_tokens_per_s > table["shard"].prefill_tokens_per_s


def test_measured_bandwidth_decides(monkeypatch):
    """What `numagraft doctor --measure` saved: the same machine with one slow node gains more from copies."""
    live = replace(Platform.virtual(2, cores_per_node=4, memory_per_node=64 * GIB), live=True)
    layout = RuntimeLayout.from_platform(live)

    def measured(slow: float) -> None:
        found = Measurement("x", (0, 1), (0, 1), (4, 4), ((100.0, 30.0), (20.0, slow)), ((90.0,) * 2,) * 2, 1, 1, 1.0)
        monkeypatch.setattr(Measurement, "load", classmethod(lambda cls, platform, path=None: found))

    measured(100.0)
    even = Rates.of(layout, live)
    assert even.bandwidth == {0: 100e9, 1: 100e9} and even.remote_share == pytest.approx(0.25)
    assert "measured it here" in even.source
    measured(40.0)
    slow = Rates.of(layout, live)
    load = Load(bytes=10**10, operations=2e10, calls=10)
    assert MirrorGains.of(slow, load).callers.share > MirrorGains.of(even, load).callers.share + 0.2
    assert MirrorGains.of(slow, load).reasons() and not MirrorGains.of(even, load).reasons()


@pytest.mark.parametrize("name", sorted(machines.MACHINES))
def test_on_every_machine_auto_mirrors_all_or_nothing(name):
    platform = machines.platform(name)
    model = dense(**MANY_CALLS)
    plan = auto(model, platform)
    assert len(policies(plan)) == 1
    assert all(text.startswith("auto: ") for text in reasons(plan))


def test_the_command_shows_what_copies_buy():
    import json

    from rich.console import Console

    from numagraft.cli.plan_command import _plain, _prediction_table

    platform = machines.platform("dual-epyc-9654-nps4")
    found = predict(auto(dense(**MANY_CALLS), platform), platform)
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(_prediction_table(found))
    text = capture.get()
    assert "A copy on every node (mirror) would buy" in text
    assert "prefill divided by tokens over 8 nodes" in text and "8 callers served at once" in text
    assert "on each node instead of" in text
    data = json.loads(json.dumps(_plain(found)))["mirror"]
    assert data["nodes"] == 8 and data["copy_bytes"] > 1 << 28
    assert data["callers"]["mirror_tokens_per_s"] > data["callers"]["shard_tokens_per_s"]
    one = machines.platform("one-node")
    assert _plain(predict(auto(dense(**MANY_CALLS), one), one))["mirror"] is None
