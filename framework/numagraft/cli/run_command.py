"""`numagraft run`: plan, graft, prove, and answer one prompt with a grafted model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numagraft.cli.console import open_console
from numagraft.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from numagraft.planning import Plan

@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of one answer; prefill ends with the first new token."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first over the seconds they took; 0 when there was only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    def to_json(self) -> dict[str, float]:
        return {
            **asdict(self),
            "prefill_tokens_per_second": round(self.prefill_tokens_per_second, 2),
            "decode_tokens_per_second": round(self.decode_tokens_per_second, 2),
        }


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    stream_to: Any = None,
) -> tuple[str, Speed]:
    """Greedy answer to tokenised `inputs`; text is written to `stream_to` as it comes."""
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        """Notes when each token came; prints only where a stream was given."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            prompt = self.next_tokens_are_prompt
            super().put(value)
            if not prompt:
                self.times.append(time.perf_counter())

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stream_to is not None:
                stream_to.write(text + ("\n" if stream_end else ""))
                stream_to.flush()

    streamer = TimedStreamer()
    started = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    text = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    speed = Speed(
        prompt_tokens=prompt_tokens,
        new_tokens=len(streamer.times),
        prefill_seconds=streamer.times[0] - started,
        decode_seconds=streamer.times[-1] - streamer.times[0],
    )
    return text, speed


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> dict[str, torch.Tensor]:
    """Token ids and mask of a prompt, through the tokenizer's chat template unless `raw` or it has none."""
    if raw or not tokenizer.chat_template:
        return dict(tokenizer(prompt, return_tensors="pt"))
    messages = [{"role": "user", "content": prompt}]
    return dict(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )


def refuse_unfit_tokens(ids: torch.Tensor, model: str) -> None:
    """Raises CheckpointError where a prompt became no tokens: without files transformers makes an empty tokenizer."""
    if not ids.numel():
        raise CheckpointError(
            f"the tokenizer of {model} makes no tokens of the prompt: put tokenizer.json and tokenizer_config.json beside "
            "the weights"
        )


def run(
    model: Annotated[str, typer.Argument(help="A local directory, a GGUF file, or a hub id.", metavar="MODEL")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask; '-' reads standard input.")],
    rules: Annotated[str, typer.Option("--rules", "-r", help="A rule file, a preset's name, or 'auto'.")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value of the rules: vars.format=int8.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Carry out the plan in this file (`numagraft plan -o`), in place of rules.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many new tokens.")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Graft MODEL by RULES, prove the placement, and stream the answer to a prompt."""
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ConfigurationError("the prompt is empty: give --prompt TEXT, or '-' and text on standard input")
    talk = not (as_json or quiet)

    from transformers.utils import logging as transformers_logging

    from numagraft.api import load_and_optimize
    from numagraft.checkpoints import load_tokenizer
    from numagraft.cli.loading_bar import LoadingBar

    transformers_logging.set_verbosity_error()
    console = open_console(stderr=not talk)
    started = time.perf_counter()
    prepared: list[tuple[PreTrainedTokenizerBase, dict[str, torch.Tensor]]] = []
    with LoadingBar(console, shown=talk) as bar:

        def before_reading(made: Plan) -> None:
            if talk:
                bar.show_plan(made)
            # what is wrong with the tokenizer is told before minutes of loading, not after
            tokenizer = load_tokenizer(model)
            inputs = encode(tokenizer, prompt, raw=raw)
            refuse_unfit_tokens(inputs["input_ids"], model)
            prepared.append((tokenizer, inputs))

        grafted = load_and_optimize(
            model,
            rules=rules,
            overrides=tuple(settings or ()),
            progress=bar,
            on_plan=before_reading,
            plan=plan,
        )
    load_seconds = time.perf_counter() - started
    report = grafted.placement_report()
    if talk:
        console.print(report)
    tokenizer, inputs = prepared[0]
    text, speed = answer(
        grafted, tokenizer, inputs, max_new_tokens=max_new_tokens, stream_to=None if as_json else sys.stdout
    )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": str(Path(model)),
                    "text": text,
                    "load_seconds": round(load_seconds, 3),
                    **speed.to_json(),
                    "placement": report.to_json(),
                }
            )
        )
    elif talk:
        console.print(
            f"\n[bold]{speed.decode_tokens_per_second:.1f} tokens/s[/] decode ({speed.new_tokens} tokens), "
            f"{speed.prefill_tokens_per_second:.1f} tokens/s prefill ({speed.prompt_tokens} tokens), "
            f"loaded in {load_seconds:.1f} s"
        )


def register(app: typer.Typer) -> None:
    app.command("run")(run)
