"""One fuzzing process: `python -m tests.fuzz.drive TARGET FOLDER SECONDS [--planted] [--seed=N]`. Needs atheris; never returns."""

from __future__ import annotations

import copy
import inspect
import json
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import atheris
import yaml

import numagraft.plans.plan_json
import numagraft.plans.verification
import numagraft.rulefile.ktransformers
import numagraft.rulefile.load
import numagraft.rulefile.manifest
import numagraft.rulefile.resolved
import numagraft.rulefile.template  # noqa: F401
from tests.fuzz import targets

#: of the whole process, torch and instrumentation included
RSS_MIB = 1536
MAX_LENGTH = 6_000


#: whose functions tell the fuzzer where an input went
INSTRUMENTED = (
    "numagraft.rulefile",
    "numagraft.plans",
    "numagraft.platform.plain",
    "numagraft.params",
    "numagraft.placement",
)


def instrument() -> int:
    """Instruments functions in place: atheris's import hook does not see through an editable install's finder."""
    seen: set[Any] = set()
    for name, module in list(sys.modules.items()):
        if not name.startswith((*INSTRUMENTED, "jinja2")):
            continue
        for value in list(vars(module).values()):
            inner = vars(value).values() if isinstance(value, type) and value.__module__ == name else ()
            for each in (value, *inner):
                each = (
                    getattr(each, "__func__", None)
                    or getattr(each, "fget", None)
                    or getattr(each, "func", None)
                    or each
                )
                each = inspect.unwrap(each) if callable(each) else each
                if isinstance(each, types.FunctionType) and each.__module__ == name and each.__code__ not in seen:
                    atheris.instrument_func(each)
                    seen.add(each.__code__)
    return len(seen)


def plant() -> None:
    """A bug behind a key and a value that no seed has together, for the fuzzer to prove that it would find one."""
    from numagraft.rulefile import document

    sound = document.read_rule

    def unsound(node: Any, **options: Any) -> Any:
        entry = sound(node, **options)
        if (entry.values.get("match") or {}).get("tower") == "audio":
            raise KeyError("planted")  # no seed says that
        return entry

    atheris.instrument_func(unsound)
    document.read_rule = unsound


class TreeMutator:
    """Changes values, and moves entries between files: bytes alone seldom stay YAML or JSON.

    Entries come from all seeds, and from `words`: per kind of mapping, the entries it may hold. A mapping is taken for the
    kind that knows all its keys, so that an entry mostly lands where it means something.
    """

    def __init__(
        self,
        load: Callable[[bytes], Any],
        dump: Callable[[Any], str],
        seeds: Sequence[bytes],
        words: Sequence[targets.Vocabulary] = (),
    ) -> None:
        self._load = load
        self._dump = dump
        self._words = [known for known in words if known.entries]
        self._pool = [entry for known in words for entry in known.entries]
        for seed in seeds:
            tree = self._tree(seed)
            self._pool += [(key, holder[key]) for holder, key in _places(tree) if isinstance(holder, dict)]

    def _tree(self, data: bytes) -> Any:
        if b"&" in data:  # aliases, bombs of them even: changed as bytes
            return None
        try:
            return self._load(data)
        except (ValueError, RecursionError, yaml.YAMLError):
            return None

    def _entries(self, holder: dict[Any, Any]) -> list[tuple[Any, Any]]:
        fitting = [known for known in self._words if known.keys >= {key for key in holder if isinstance(key, str)}]
        return [entry for known in fitting for entry in known.entries] or self._pool

    def __call__(self, data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        tree = self._tree(data) if draw.random() < 0.8 else None
        if not isinstance(tree, dict | list):
            return atheris.Mutate(data, max_size)
        for _ in range(draw.randint(1, 4)):
            places = list(_places(tree))
            if not places:
                break
            holder, key = draw.choice(places)
            chance = draw.random()
            if chance < 0.15:
                del holder[key]
            elif chance < 0.5 and isinstance(holder, dict):
                name, value = draw.choice(self._entries(holder) if draw.random() < 0.5 else self._pool)
                holder[name] = copy.deepcopy(value)
            elif chance < 0.7:
                holder[key] = copy.deepcopy(draw.choice(self._pool)[1])
            else:
                holder[key] = copy.deepcopy(draw.choice(ODD))
        try:
            return self._dump(tree).encode(errors="replace")[:max_size]
        except (ValueError, RecursionError, yaml.YAMLError):
            return data


#: values that are of the wrong kind somewhere, or at the edge of the right one
ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**63,
    10**40,
    1.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "cpu",
    "cuda:1",
    "cuda:²",
    "linear",
]
ODD += [
    "a.b:c",
    "(a+)+$",
    "[",
    "${vars.format}",
    "${runtime.nodes}",
    "${",
    ">=2",
    "0-2,5",
    "9-1",
    "1-99999999999",
    [],
    {},
    [[]],
    {"x": 1},
]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    stack = [tree]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            stack.append(holder[key])


def mutator(name: str) -> Callable[[bytes, int, int], bytes] | None:
    seeds = targets.seeds(name)
    if name == "plans":
        return TreeMutator(json.loads, json.dumps, seeds)
    if name == "rules":
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return TreeMutator(
            lambda data: yaml.load(data, loader),
            lambda tree: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
            seeds,
            targets.vocabulary(),
        )
    return None


def main() -> None:
    name, folder, seconds, *flags = sys.argv[1:]
    if "--planted" in flags:
        plant()
    work = Path(folder)
    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(targets.seeds(name)):
        (corpus / f"seed-{index:03d}").write_bytes(data)
    dictionary = work / "words.dict"
    escaped = ["".join(f"\\x{byte:02x}" for byte in word.encode()) for word in targets.words(name)]
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped))
    length = max([MAX_LENGTH, *(path.stat().st_size * 2 for path in corpus.iterdir())])
    arguments = [
        "numagraft-fuzz",
        str(corpus),
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={RSS_MIB}",
        "-timeout=20",
        f"-max_len={length}",
        f"-dict={dictionary}",
        f"-artifact_prefix={work}/",
        "-print_final_stats=1",
        "-verbosity=0",
        *(f"-seed={flag.removeprefix('--seed=')}" for flag in flags if flag.startswith("--seed=")),
    ]
    print(f"INFO: {instrument()} functions instrumented", file=sys.stderr)
    target = targets.TARGETS[name]
    chosen = mutator(name)
    options = {} if chosen is None else {"custom_mutator": chosen}
    for data in targets.seeds(name):
        targets.run(target, data)  # what is imported or built once is no input's doing
    atheris.Setup(arguments, lambda data: targets.run(target, data), enable_python_coverage=True, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
