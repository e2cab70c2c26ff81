"""The loading machinery, proven with operators that keep every weight: the model must come out unchanged, to the bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numagraft.checkpoints import open_checkpoint
from numagraft.checkpoints.memory import skeleton_of
from numagraft.loading import ahead
from tests import models
from tests.grafting import graft_plain, load_plain, logits, skeleton_for


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("shards", ["50GB", "50KB"])
def test_logits_are_equal_to_the_bit(tmp_path: Path, family: str, tied: bool, lm_head: bool, shards: str) -> None:
    original = models.build(models.CONFIGS[family](tie_word_embeddings=tied))
    grafted = load_plain(models.save(original, tmp_path, max_shard_size=shards), lm_head=lm_head)
    assert torch.equal(logits(grafted), logits(original))
    assert grafted.num_parameters() == original.num_parameters()
    assert grafted.device == original.device and grafted.dtype == original.dtype


def test_progress_counts_every_byte_of_the_checkpoint(tmp_path: Path) -> None:
    path = models.save(models.build(models.qwen3_moe()), tmp_path)
    calls: list[tuple[int, int, str]] = []
    load_plain(path, progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in open_checkpoint(path).values())
    assert calls[-1][:2] == (total, total)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert any("experts.3.up_proj" in name for _, _, name in calls)


def test_experts_stream_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.save(models.build(models.qwen3_moe()), tmp_path)
    plain = importlib.import_module("tests.plain_operators")
    taken: list[tuple[str, int | None]] = []
    original = plain.PlainExperts.load
    monkeypatch.setattr(
        plain.PlainExperts,
        "load",
        lambda self, name, tensor, *, expert=None: (
            taken.append((name, expert)),
            original(self, name, tensor, expert=expert),
        ),
    )
    load_plain(path)
    assert sorted(taken) == sorted(
        (name, e) for name in ("gate_up_proj", "down_proj") for e in range(4) for _ in range(2)
    )


def test_a_converter_we_do_not_stream_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = models.build(models.qwen3_moe())
    path = models.save(original, tmp_path)
    monkeypatch.setattr("numagraft.preflight.merges_experts", lambda converter: False)
    assert torch.equal(logits(load_plain(path)), logits(original))


def test_a_model_in_memory(tmp_path: Path) -> None:
    for family, tied in [("llama", True), ("llama", False), ("qwen3_moe", False)]:
        model = models.build(models.CONFIGS[family](tie_word_embeddings=tied))
        expected, count = logits(model), model.num_parameters()
        skeleton = skeleton_of(model)
        assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
        assert graft_plain(model) is model
        assert torch.equal(logits(model), expected)
        assert model.num_parameters() == count


def test_smollm2(smollm2_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    from numagraft.checkpoints import load_tokenizer

    grafted = load_plain(smollm2_gguf)
    with open_checkpoint(smollm2_gguf) as source:
        skeleton = skeleton_for(source.config)
        source.bind(skeleton)
        original = AutoModelForCausalLM.from_config(source.config)
        original.load_state_dict({name: tensor.read() for name, tensor in source.items()}, strict=False)
        original.tie_weights()
    tokenizer = load_tokenizer(smollm2_gguf)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(logits(grafted, inputs["input_ids"]), logits(original.eval(), inputs["input_ids"]))
    answer = grafted.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 200 << 20), max_size=40))
def test_steps_are_told_ahead_each_once_and_in_order(sizes: list[int]) -> None:
    told: list[int] = []

    def step(index: int) -> Callable[[], int]:
        return lambda: told.append(index) or sizes[index]

    for index in ahead([step(i) for i in range(len(sizes))]):
        assert index in told  # before its turn
        waiting = sizes[index : told[-1]]  # all that is on its way but the last, which crossed the line
        assert sum(waiting) < (64 << 20) or told[-1] == index
        assert told[-1] == len(sizes) - 1 or sum(sizes[index : told[-1] + 1]) >= (64 << 20)
    assert told == list(range(len(sizes)))
