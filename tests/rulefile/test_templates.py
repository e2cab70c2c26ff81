"""Templates: facts in, rules out with the template's lines; nothing else gets out, and nothing takes long."""

from __future__ import annotations

import time

import pytest

from numagraft.errors import RuleError
from numagraft.platform import Gpu, Platform
from numagraft.rulefile import load_rules
from numagraft.rulefile.template import facts, render

from .writing import ONE_NODE, write

SPLIT = """schema: 1
description: {{ platform.nodes | length }} nodes, {{ platform.isa | join(' ') }}
rules:
{% set each = 12 // (gpus | length) %}
{% for gpu in gpus %}
  - id: layers-{{ gpu.index }}
    match: {role: decoder_layer, layers: {{ gpu.index * each }}-{{ (gpu.index + 1) * each - 1 }}}
    replace: {class: torch, device: "{{ gpu.device }}"}
{% endfor %}
"""


def with_gpus(count: int) -> Platform:
    from dataclasses import replace

    gpus = tuple(Gpu(f"0000:{i}b:00.0", "nvidia", "x", memory_bytes=24 << 30) for i in range(count))
    return replace(Platform.virtual(2), gpus=gpus)


def fails(tmp_path, text: str, platform=ONE_NODE) -> str:
    path = write(tmp_path, text, "rules.yaml.j2")
    begin = time.monotonic()
    with pytest.raises(RuleError) as caught:
        load_rules(path, platform=platform)
    assert time.monotonic() - begin < 8
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_layers_are_split_over_the_gpus_there_are(tmp_path):
    path = write(tmp_path, SPLIT, "rules.yaml.j2")
    found = load_rules(path, platform=with_gpus(3))
    assert found.description == "2 nodes, avx2 scalar"
    assert [(rule.id, rule.replace.device, sorted(rule.match.layers)[0]) for rule in found.rules] == [
        ("layers-0", "cuda:0", 0),
        ("layers-1", "cuda:1", 4),
        ("layers-2", "cuda:2", 8),
    ]


def test_places_name_the_template_line_and_the_rendered_line(tmp_path):
    path = write(tmp_path, SPLIT, "rules.yaml.j2")
    found = load_rules(path, platform=with_gpus(3))
    assert [(rule.location.line, rule.location.rendered) for rule in found.rules] == [(6, 4), (6, 7), (6, 10)]
    text = fails(tmp_path, SPLIT.replace("match: {role", "match: {roll"), with_gpus(2))
    assert "rules.yaml.j2:7:13 (rendered line 5): unknown key 'roll' in match" in text
    assert "rules.yaml.j2:7:13 (rendered line 8): unknown key 'roll' in match" in text


def test_a_line_from_a_value_keeps_the_line_before():
    rendered = render("a\n{{ 'x\ny' }}\nb\n", file="x", platform=ONE_NODE)
    assert rendered.text == "a\nx\ny\nb\n"
    assert rendered.lines == (1, 1, 3, 4, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema: 1\n{% for x in %}", "rules.yaml.j2:2:1: bad template: "),
        ("schema: 1\n\n{{ nothing }}", "rules.yaml.j2:3:1: bad template: 'nothing' is undefined"),
        ("schema: 1\n{{ model.layers }}", "templates know: platform, gpus, and model where a model is given"),
        ("{{ 1 / 0 }}", "rules.yaml.j2:1:1: bad template: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "rules.yaml.j2:1:1: the template is refused: "),
        ("{{ platform.__init__.__globals__ }}", "rules.yaml.j2:1:1: "),
        ("{{ self.__init__ }}", "rules.yaml.j2:1:1: "),
        ("{{ ''|attr('__class__')|attr('mro') }}", "rules.yaml.j2:1:1: "),
        ("{{ '{0.__class__}'.format(1) }}", "rules.yaml.j2:1:1: the template is refused: "),
        ("{% include '/etc/passwd' %}", "rules.yaml.j2:1:1: bad template: "),
        ("{% import 'os' as os %}", "rules.yaml.j2:1:1: bad template: "),
        ("{{ 'a' * 300000000 }}", "the template "),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "the template takes more than 1 second"),
        ("{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}", "the template renders to "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the template "),
        ("{{ 9 ** (9 ** 9) }}", "the template "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "rules.yaml.j2"),
        ("a\x1c1\x1d", "a control character in the template"),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    assert said in fails(tmp_path, text)


def test_the_facts_are_those_of_the_platform():
    known = facts(Platform.virtual(4, sockets=2, cores_per_node=3, memory_per_node=5 << 30, isa=("amx",)))
    assert [node["socket"] for node in known["platform"]["nodes"]] == [0, 0, 1, 1]
    assert {node["cores"] for node in known["platform"]["nodes"]} == {3}
    assert (known["platform"]["nodes_per_socket"], known["platform"]["cores"]) == (2, 12)
    assert "amx" in known["platform"]["isa"] and known["gpus"] == [] and "model" not in known
