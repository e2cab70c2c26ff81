"""Every bundled preset: well-formed, with a manifest, and planned for every family on every machine whose shape is known."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from numagraft import presets, registry
from numagraft.errors import PlanError, RuleError
from numagraft.planning import make_plan
from numagraft.platform import CpuModel, Gpu, Platform
from numagraft.rulefile import load_rules
from tests.roles import families

TOPOLOGIES = Path(__file__).resolve().parents[1] / "topologies"
DUMPS = sorted(path for path in TOPOLOGIES.rglob("*.tar.*"))
NAMES = presets.names()
REPRESENTATIVE = (
    "Llama",
    "Gemma 3",
    "GPT-2",
    "Qwen3-MoE",
    "Qwen3-Next",
    "Mixtral",
    "DeepSeek-V3",
    "gpt-oss",
    "Llama 4",
    "Jamba",
)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setitem(registry.OPERATORS, "linear", "tests.planning.packing_stand_ins:LinearStandIn")
    monkeypatch.setitem(registry.OPERATORS, "experts", "tests.planning.packing_stand_ins:ExpertsStandIn")
    registry.operator_table.cache_clear()
    yield
    registry.operator_table.cache_clear()


def machine(vendor: str, isa: str, nodes: int, sockets: int, *, arch: str = "x86_64", gpus: int = 0) -> Platform:
    made = Platform.virtual(nodes, sockets=sockets, cores_per_node=16, memory_per_node=1 << 40, isa=(isa,))
    cpu = CpuModel(arch=arch, vendor=vendor, features=made.cpu.features)
    cards = tuple(Gpu(f"0000:{i}b:00.0", "nvidia", "x", memory_bytes=1 << 40) for i in range(gpus))
    return replace(made, cpu=cpu, gpus=cards)


MACHINES = {
    "platform/xeon-amx-snc": machine("Intel", "amx", 4, 2),
    "platform/xeon-amx": machine("Intel", "amx", 2, 2),
    "platform/xeon-avx512": machine("Intel", "avx512_vnni", 2, 2),
    "platform/epyc-nps": machine("AMD", "avx512_vnni", 8, 2),
    "platform/epyc-nps1": machine("AMD", "avx2", 2, 2),
    "platform/dual-xeon-avx2": machine("Intel", "avx2", 2, 2),
    "platform/arm-many-core": machine("ARM", "scalar", 2, 2, arch="aarch64"),
    "platform/one-node": machine("Intel", "amx", 1, 1),
    "platform/multi-node": machine("Hygon", "avx2", 4, 2),
    "platform/gpu-cpu-experts": machine("Intel", "amx", 2, 2, gpus=1),
    "platform/multi-gpu-cpu-experts": machine("AMD", "avx2", 2, 2, gpus=3),
}


@cache
def dump(path: Path) -> Platform:
    """The dumped machine with memory enough: what is tested is its shape."""
    found = Platform.from_dump(path)
    roomy = tuple(
        replace(node, total_bytes=1 << 43, free_bytes=1 << 43) if node.has_memory else node for node in found.nodes
    )
    return replace(found, nodes=roomy)


def plan(title: str, rules, platform: Platform):
    model = families.build(title)
    loaded = load_rules(rules, platform=platform, config=model.config)
    return make_plan(model, loaded, platform)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_well_formed_and_has_a_manifest(name):
    preset = presets.find(name)
    assert preset.source.kind == "bundled"
    manifest = preset.manifest()
    assert manifest["memory"] and manifest["firmware"]
    assert (manifest["status"] == "measured") == bool(manifest["validated_on"])
    for entry in manifest["validated_on"]:
        assert entry["prefill_tokens_per_s"] > 0 and entry["decode_tokens_per_s"] > 0 and "/" not in entry["model"]
    platform = MACHINES.get(name, MACHINES["platform/one-node"])
    if name.startswith("platform/") and "gpu" not in name:
        with pytest.raises(RuleError, match="no rules"):
            load_rules({"extends": name, "schema": 1}, platform=platform)
        return
    rules = load_rules(name, platform=platform)
    assert rules.description and rules.rules


@pytest.mark.parametrize("name", MACHINES)
def test_auto_chooses_by_capability_and_says_why_not_the_others(name):
    chosen = presets.choose_part("platform/auto", MACHINES[name])
    if "gpu" in name:
        assert chosen.name in ("platform/xeon-amx", "platform/epyc-nps1")
        ranked = {candidate.name: candidate for candidate in presets.rank(MACHINES[name])}
        assert ranked[name].fits and "never moves layers to a GPU by itself" in ranked[name].why
    else:
        assert chosen.name == name
        assert all(candidate.why and not candidate.fits for candidate in chosen.others)


def test_auto_chooses_the_family():
    chosen = presets.choose_part("family/auto", MACHINES["platform/one-node"], families.build("Qwen3-MoE").config)
    assert (chosen.name, chosen.why) == ("family/qwen3-moe", "model_type qwen3_moe")
    chosen = presets.choose_part("family/auto", MACHINES["platform/one-node"], families.build("Jamba").config)
    assert chosen.name == "family/generic"
    assert "no preset for jamba" in chosen.why


def test_every_family_preset_names_model_types_that_transformers_knows():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for name in presets.names():
        for requirement in presets._requires(name):
            if requirement.key == "model_type":
                assert set(requirement.value) <= set(CONFIG_MAPPING_NAMES), name


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("title", REPRESENTATIVE)
def test_every_platform_preset_is_planned_for_families(name, title):
    made = plan(title, {"extends": ["family/auto", name]}, MACHINES[name])
    if title in families.MIXTURES and title != "Jamba":
        assert any(module.rule_id == "experts" and module.node_bytes for module in made.modules)
    if "gpu" in name:
        assert any(device.startswith("cuda") for device in made.device_bytes)
        assert not any(module.rule_id == "linear" for module in made.modules)


@pytest.mark.parametrize("path", DUMPS, ids=lambda path: path.name)
@pytest.mark.parametrize("title", ("Llama", "Qwen3-MoE", "Gemma 3"))
def test_auto_is_planned_on_every_dump(path, title):
    made = plan(title, "auto", dump(path))
    assert made.modules and sum(made.node_bytes.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", DUMPS, ids=lambda path: path.name)
@pytest.mark.parametrize("title", families.FAMILIES)
def test_every_preset_on_every_dump_plans_or_says_what_it_requires(path, title):
    model_type = families.build(title).config.model_type
    for name in NAMES:
        extends = ["family/auto", name] if name.startswith("platform") else [name, "platform/auto"]
        if presets.unmet(name, dump(path), model_type):
            continue  # that it is refused is tested on one machine and family
        assert plan(title, {"extends": [name] if name == "auto" else extends}, dump(path)).kept_bytes > 0


def test_a_preset_whose_requirements_fail_is_refused():
    with pytest.raises(PlanError, match="requires model_type mixtral, found llama"):
        plan("Llama", "family/mixtral", MACHINES["platform/one-node"])
    with pytest.raises(PlanError, match=r"requires numa_nodes >=2, found 1"):
        plan("Llama", {"extends": ["family/auto", "platform/xeon-amx"]}, MACHINES["platform/one-node"])


def test_presets_come_from_the_path_and_cannot_take_ours(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    text = "schema: 1\nextends: family/generic\nvars: {format: int4}\n"
    (folder / "small.yaml").write_text(text)
    (folder / "sub" / "deep.yaml.j2").write_text(text)
    ours = tmp_path / "platform"
    ours.mkdir()
    (ours / "one-node.yaml").write_text(text)
    monkeypatch.setenv(presets.PATH_VARIABLE, f"{folder}:{ours}:/nowhere")
    assert {"mine/small", "mine/sub/deep"} <= set(presets.names())
    assert presets.find("platform/one-node").source.kind == "bundled"
    rules = load_rules("mine/small", platform=MACHINES["platform/one-node"])
    assert rules.rule("linear").replace.kwargs["format"] == "int4"
    assert load_rules("mine/sub/deep", platform=MACHINES["platform/one-node"]).vars["format"] == "int4"


def test_a_shared_preset_never_names_code(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = "schema: 1\nrules:\n  - match: {role: linear}\n    replace: {class: os.system}\n"
    (folder / "evil.yaml").write_text(text)
    monkeypatch.setenv(presets.PATH_VARIABLE, str(folder))
    with pytest.raises(RuleError, match="presets can never"):
        load_rules("mine/evil", platform=MACHINES["platform/one-node"], trust_code=True)
    (folder / "path.yaml").write_text("schema: 1\nextends: ./evil.yaml\n")
    with pytest.raises(RuleError, match="a preset may extend presets only"):
        load_rules("mine/path", platform=MACHINES["platform/one-node"])


def test_dumps_are_there():
    assert len(DUMPS) >= 5 and all(tarfile.is_tarfile(path) for path in DUMPS)
