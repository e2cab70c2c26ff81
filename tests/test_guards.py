"""A grafted model is an ordinary one, and what it cannot do raises before anything is changed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from numagraft.errors import UnsupportedOperationError
from numagraft.guards import is_grafted
from tests import models
from tests.grafting import graft_plain, load_plain, logits


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def original(request: pytest.FixtureRequest) -> Any:
    return models.build(models.CONFIGS[request.param](tie_word_embeddings=True))


@pytest.fixture(scope="module")
def grafted(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_plain(models.save(original, tmp_path_factory.mktemp("model")))


def everything(model: Any) -> dict[str, tuple[torch.dtype, torch.device, int]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (t.dtype, t.device, t.data_ptr()) for name, t in tensors}


REFUSED: dict[str, Callable[[Any], Any]] = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to(dtype=)": lambda m: m.to(dtype=torch.float16),
    "to like a tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    "cuda": lambda m: m.cuda(),
    "to cuda": lambda m: m.to("cuda:0"),
    "to meta": lambda m: m.to("meta"),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "train": lambda m: m.train(),
    "requires_grad_": lambda m: m.requires_grad_(),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict({}),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
}
ONLY_MODELS: dict[str, Callable[[Any], Any]] = {
    "save_pretrained": lambda m: m.save_pretrained("nowhere"),
    "push_to_hub": lambda m: m.push_to_hub("nobody/nothing"),
    "resize_token_embeddings": lambda m: m.resize_token_embeddings(7),
    "dequantize": lambda m: m.dequantize(),
}
PARTS: dict[str, Callable[[Any], Any]] = {
    "the model": lambda m: m,
    "the inner model": lambda m: m.model,
    "a decoder layer": lambda m: m.model.layers[1],
    "the layers": lambda m: m.model.layers,
    "an operator": lambda m: m.model.layers[0].self_attn.q_proj,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_changes(grafted: Any, part: str, what: str) -> None:
    before, expected = everything(grafted), logits(grafted)
    with pytest.raises(UnsupportedOperationError, match="a grafted model"):
        REFUSED[what](PARTS[part](grafted))
    assert everything(grafted) == before
    assert not grafted.training
    assert torch.equal(logits(grafted), expected)


@pytest.mark.parametrize("part", ["the model", "the inner model"])
@pytest.mark.parametrize("what", ONLY_MODELS)
def test_models_refuse(grafted: Any, part: str, what: str) -> None:
    with pytest.raises(UnsupportedOperationError, match="a grafted model"):
        ONLY_MODELS[what](PARTS[part](grafted))
    assert not Path("nowhere").exists()


ALLOWED: dict[str, Callable[[Any], Any]] = {
    "to the same device": lambda m: m.to("cpu"),
    "to the same dtype": lambda m: m.to(torch.float32),
    "to both": lambda m: m.to("cpu", torch.float32),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "eval": lambda m: m.eval(),
    "train(False)": lambda m: m.train(False),
    "requires_grad_(False)": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", ALLOWED)
def test_what_changes_nothing_passes(grafted: Any, part: str, what: str) -> None:
    before = everything(grafted)
    module = PARTS[part](grafted)
    assert ALLOWED[what](module) is module
    assert everything(grafted) == before


def test_a_model_of_mixed_dtypes_refuses_to_become_one(original: Any, tmp_path: Path) -> None:
    grafted = load_plain(models.save(original, tmp_path), dtype=torch.bfloat16)
    grafted.model.norm.weight.data = grafted.model.norm.weight.data.float()
    with pytest.raises(UnsupportedOperationError):
        grafted.to(torch.bfloat16)
    assert grafted.model.norm.weight.dtype is torch.float32


def test_numbers_are_those_of_the_original(original: Any, grafted: Any) -> None:
    assert grafted.num_parameters() == original.num_parameters()
    assert grafted.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    assert grafted.model.num_parameters() == original.model.num_parameters()
    assert grafted.num_parameters(only_trainable=True) == 0
    # the tied head is in memory twice now: as the embedding, and packed
    head = original.lm_head.weight.nbytes
    assert grafted.get_memory_footprint() == original.get_memory_footprint() + head


def test_it_is_still_of_its_class(original: Any, grafted: Any) -> None:
    assert isinstance(grafted, type(original))
    assert type(grafted).__name__ == type(original).__name__
    assert type(grafted).__module__ == type(original).__module__
    assert is_grafted(grafted) and not is_grafted(original)
    assert grafted.config.model_type == original.config.model_type
    assert not any(parameter.requires_grad for parameter in grafted.parameters())


def test_the_original_class_is_untouched(original: Any, grafted: Any) -> None:
    assert torch.equal(copy.deepcopy(original).lm_head.weight, original.lm_head.weight)
    assert not is_grafted(models.build(original.config).train().half())


def test_generation(original: Any, grafted: Any) -> None:
    prompts = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 8, 4, 3]])
    mask = (prompts != 0).long()
    common = {"input_ids": prompts, "attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        expected = original.generate(**common, do_sample=False, **options)
        assert torch.equal(grafted.generate(**common, do_sample=False, **options), expected)
    torch.manual_seed(3)
    expected = original.generate(**common, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(grafted.generate(**common, do_sample=True, top_k=20), expected)


def test_a_model_grafted_in_memory_is_guarded_too(original: Any, tmp_path: Path) -> None:
    grafted = graft_plain(models.build(original.config))
    for what in ("half", "deepcopy", "state_dict", "train"):
        with pytest.raises(UnsupportedOperationError):
            REFUSED[what](grafted)
    with pytest.raises(UnsupportedOperationError):
        grafted.save_pretrained(tmp_path)
