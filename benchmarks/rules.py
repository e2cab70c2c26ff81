"""How long rules take: planning two large models from their configs alone, and matching names with time limits.

`python -m benchmarks.rules --json` prints one JSON object. Each planning runs in a fresh process, so that its memory is its
own; imports are not counted, building the skeleton is.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

#: sizes as published with the models
CONFIGS = {
    "qwen3_235b_a22b": (
        "qwen3_moe",
        {
            "num_hidden_layers": 94,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {}),  # transformers' defaults are DeepSeek-V3's sizes
}
NAMES, RULES = 60_000, 70


def plan(model: str) -> dict[str, float]:
    """Skeleton, rules and plan of one model on a machine with two nodes of 2 TiB."""
    from transformers import AutoConfig

    from numagraft import skeleton
    from numagraft.planning import make_plan
    from numagraft.platform import Platform
    from numagraft.registry import load_operator
    from numagraft.rulefile import load_rules

    for operator in ("linear", "experts"):
        load_operator(operator)
    model_type, changes = CONFIGS[model]
    config = AutoConfig.for_model(model_type, **changes)
    skeleton.model_class(config)  # imports the modelling code
    platform = Platform.virtual(2, cores_per_node=48, memory_per_node=2 << 40)
    begin = time.perf_counter()
    built = skeleton.build(config)
    skeleton_seconds = time.perf_counter() - begin
    rules = load_rules("auto", platform=platform, config=config)
    made = make_plan(built, rules, platform)
    seconds = time.perf_counter() - begin
    return {
        "plan_seconds": round(seconds, 3),
        "skeleton_seconds": round(skeleton_seconds, 3),
        "modules": len(made.modules),
        "packed_gib": round(sum(made.node_bytes.values()) / 2**30, 1),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def match() -> dict[str, float]:
    """Seconds for the patterns of RULES rules over NAMES names, each with its time limit."""
    from numagraft.rulefile.pattern import NamePattern, Names

    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj")
    layers = NAMES // 500
    names = [f"model.layers.{i}.{part}.{j}" for i in range(layers) for part in parts for j in range(100)][:NAMES]
    patterns = [rf"model\.layers\.({i}|{i + 60})\.mlp\.experts\..*" for i in range(RULES // 2)]
    patterns += [
        rf"^model\.layers\.([0-9]|[1-5][0-9])\.(?!mlp\.gate)[^.]+\..*{i}$" for i in range(RULES - len(patterns))
    ]
    begin = time.perf_counter()
    joined = Names.of(names)
    hits = sum(len(NamePattern.compile(pattern).scan(joined)) for pattern in patterns)
    return {
        "match_seconds": round(time.perf_counter() - begin, 3),
        "names": len(names),
        "rules": len(patterns),
        "hits": hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--one", choices=[*CONFIGS, "match"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(match() if options.one == "match" else plan(options.one)))
        return
    result: dict[str, object] = {}
    for name in (*CONFIGS, "match"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.rules", "--one", name], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        if name == "match":
            result |= found
        else:
            result[name] = found
    result["plan_seconds"] = max(result[name]["plan_seconds"] for name in CONFIGS)  # type: ignore[index]
    result["peak_rss_mib"] = max(result[name]["peak_rss_mib"] for name in CONFIGS)  # type: ignore[index]
    if not options.json:
        for name, value in result.items():
            print(f"{name}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
