# ruff: noqa: E501 (templates have long lines)
"""Chat templates and messages that harm: stopped within seconds, with one sentence."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest

from bevatron.chat import template_process
from bevatron.chat.chat_messages import ChatError
from bevatron.chat.chat_template import ChatTemplate
from bevatron.errors import BevatronError
from tests.chat.chat_templates import TEMPLATES, tokenizer

USER = [{"role": "user", "content": "x" * 1000}]
MEMORY = 1 << 30  # bytes that a template may take at the most, its own limits being far below


def refused(source: str, *words: str, chat: Any = USER, **variables: Any) -> str:
    """The message with which a template is refused: one printable line, soon, with little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    start = time.thread_time()
    with pytest.raises(ChatError) as caught:
        ChatTemplate({"default": source}, tokenizer(), where="hf/t.jinja").render(chat, **variables)
    assert time.thread_time() - start < 15
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert own - before < MEMORY
    # A child begins with the size of its parent, which therefore counts as its largest.
    stopped = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert stopped <= max(largest, own, MEMORY // 2) + (1 << 20)
    message = str(caught.value)
    assert message.startswith("hf/t.jinja: ") and message.isprintable() and len(message) < 600
    assert all(word in message for word in words), message
    return message


SSTI = [
    "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ ('' | attr('__cla' ~ 'ss__')).x }}",
    "{{ ['']|map(attribute='__class__')|map(attribute='__mro__')|list }}",
    "{{ range.__globals__.x }}",
    "{{ namespace.__init__.__globals__['os'].system('true') }}",
    "{{ raise_exception.call.__globals__.x }}",
    "{{ strftime_now.call('%Y') }}",
    "{{ messages.append.__self__.x }}",
    "{{ messages[0].get.owner.x }}",
    "{{ self.__init__.__globals__.x }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].x }}",
    "{{ joiner.__init__.x }}",
    "{% for i in [1] %}{{ loop.__init__.__globals__.x }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__.x }}{{ m.call.x }}",
    "{{ m.x }}{% import 'os' as m %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{% block b %}{% endblock %}",
    "{{ '{0.__class__.__mro__}'.format('')[0].x }}",
    "{{ ('{0.__class__.x}'.format)(1) }}",
    "{{ ''.format.__self__.x }}",
    "{{ '%s'.__mod__(1) }}",
    "{{ config.items() }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 1}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ 'x'.encode().decode() }}",
    "{{ dict.fromkeys.__globals__.x }}",
    "{{ messages | random }}",
    "{{ messages | xmlattr }}",
]


@pytest.mark.parametrize("source", SSTI)
def test_fault_66_no_way_out_of_a_template(source: str) -> None:
    refused(source)


def test_fault_66_values_of_python_never_get_in() -> None:
    with pytest.raises(ChatError, match="Path, which JSON does not have"):
        ChatTemplate({"default": "{{ x }}"}, tokenizer()).render(USER, x=Path("/"))


LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% macro f() %}{% for i in range(9) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% for i in 'ab' if n %}{{ f(n-1) }}{% endfor %}{% endmacro %}{{ f(50) }}",
    "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9) | list }}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% for i in range(99999) %}{{ 5.5 in range(99999) }}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | sort | list %}{% endfor %}",
    "{% set ns = namespace(a=[1, 1], b=[1, 1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a]"
    " %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == 1 }}{{ ns.a == ns.b }}",
    "{% set ns = namespace(a=(1, 1)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}"
    "{% endfor %}{{ {ns.a: 1} }}",
    "{% set ns = namespace(a=(1, 1)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}"
    "{% endfor %}{{ {}.get(ns.a) }}",
    "{% set ns = namespace(a=(1, 1)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}"
    "{% endfor %}{{ [ns.a, ns.a] | unique | list }}",
    "{% set ns = namespace(a=(1, 1), b=(1, 1)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a)"
    " %}{% set ns.b = (ns.b, ns.b) %}{% endfor %}{{ ns.a in ([ns.b] | map('default')) }}",
    "{% set ns = namespace(a=()) %}{% for i in range(99999) %}{% set ns.a = (ns.a,) %}{% endfor %}"
    "{{ {ns.a: 1} }}",
    "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}"
    "{{ ns.a == [ns.a] }}",
    "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}{% for j in range(99) %}"
    "{% if 'b' in s %}{% endif %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}{{ s.count('ab') }}{% endfor %}",
    "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}{{ s == s ~ '' }}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 5 | round(-1000000000) }}{{ 5.0 | round(10000000, 'ceil') }}",
    "{{ (1).__pow__(9) }}",
]


@pytest.fixture
def tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time on the processor, for tests that take a tenth of it."""
    monkeypatch.setattr(template_process, "SECONDS", template_process.SECONDS / 10)


@pytest.mark.usefixtures("tenth")
@pytest.mark.parametrize("source", LOOPS, ids=range(len(LOOPS)))
def test_fault_67_templates_that_would_never_end(source: str) -> None:
    refused(source)


GIANTS = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ ((1, 2) * 10 ** 10) | length }}",
    "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s.replace('a', 'aaaaaaaa') %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s | replace('', 'aaaaaaaa') %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s.join(['a'] * 9) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = range(9) | join(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = '%s%s%s' % (ns.s, ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = '%(a)s%(a)s%(a)s' | format(a=ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = '{0}{0}{0}'.format(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='\\n') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s | indent(999, true, true) ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% endfor %}{{ ns.a | tojson }}",
    "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% endfor %}{{ '%s' % ns.a }}{{ ns.a | string }}",
    "{% set ns = namespace(a={'x': 1}) %}{% for i in range(60) %}"
    "{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a.items() | list | tojson }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%-+ #01000000000d' % 1 }}",
    "{{ '%1000000000s' | format('a') }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, '1000000000') }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ '{x:.1000000000f}'.format(x=1) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}{{ 'a'.rjust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ 'a\\tb'.expandtabs(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\\nb' | indent(1000000000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ strftime_now('%_1000000000d') }}",
    "{{ ('<' * 100000 | e) * 1000 }}",
    "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "{% set s %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
    "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set ns.a = [ns.a, messages[0].content | list] %}{% endfor %}",
    "{{ ('a ' * 3000000).split() }}",
    "x" * 600_000,
]


@pytest.mark.usefixtures("tenth")
@pytest.mark.parametrize("source", GIANTS, ids=range(len(GIANTS)))
def test_fault_68_templates_that_would_fill_the_memory(source: str) -> None:
    refused(source)


@pytest.mark.slow
def test_faults_67_68_with_all_of_the_budget() -> None:
    for source in (*LOOPS, *GIANTS):
        refused(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a\n{% if %}", "line 2"),
        ("{{ messages", "line 1"),
        ("\n\n{% for m in messages %}", "line 3"),
        ("{% nonsense %}", "nonsense"),
        ("{{ 'a' | }}", "line 1"),
        ("{{ x | frobnicate }}", "frobnicate"),
        ("{{ '" + "\x1b[2J" + "' | nofilter('\x1b') }}", "nofilter"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "parsed"),
        ("{{ " + "a." * 5000 + "b }}", "deeply"),
        ("{{ " + "not " * 5000 + "b }}", ""),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, ""),
    ],
    ids=range(11),
)
def test_fault_69_templates_with_mistakes_say_where(source: str, says: str) -> None:
    refused(source, says)


def test_fault_70_a_missing_template_says_what_to_do(tmp_path: Path) -> None:
    from bevatron.bridge.open_weights import open_weights
    from tests.bridge.hf_folders import make

    folder = make(tmp_path / "hf")
    (folder / "chat_template.jinja").unlink()
    opened = open_weights(folder)
    assert ChatTemplate.of(opened, tokenizer()) is None
    with pytest.raises(ChatError, match=r"has no chat template.*--prompt.*--chat-template FILE"):
        ChatTemplate.needed(opened, tokenizer())
    with pytest.raises(ChatError, match=r"nowhere\.jinja: cannot be read"):
        ChatTemplate.needed(opened, tokenizer(), "nowhere.jinja")
    (tmp_path / "own.jinja").write_text("{{ messages[0].role }}")
    own = ChatTemplate.needed(opened, tokenizer(), tmp_path / "own.jinja")
    assert own.render(USER) == "user"
    for bad in ("[1]", '{"chat_template": 5}', '{"chat_template": [{"name": "default"}]}', "{"):
        (folder / "tokenizer_config.json").write_text(bad)
        if bad == "[1]":
            assert ChatTemplate.of(open_weights(folder), tokenizer()) is None
            continue
        with pytest.raises(BevatronError, match=r"tokenizer_config\.json"):
            ChatTemplate.of(open_weights(folder), tokenizer())


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        (None, "messages is missing, expected a list"),
        ("hello", "messages is a text, expected a list"),
        ({"role": "user"}, "expected a list of objects"),
        (["hello"], r"messages\[0\] is a text"),
        ([None], r"messages\[0\] is missing"),
        ([*USER, {"content": "x"}], r"messages\[1\].role is missing"),
        ([{"role": 5, "content": "x"}], r"messages\[0\].role is a number"),
        ([{"role": "wizard", "content": "x"}], r"role is 'wizard', expected one of system, dev"),
        ([{"role": "<|eot_id|>", "content": "x"}], "role is '<|eot_id|>'"),
        ([{"role": "user"}], "content is missing, expected a text"),
        ([{"role": "user", "content": None}], "content is missing"),
        ([{"role": "user", "content": 5}], "content is a number"),
        ([{"role": "user", "content": {"a": 1}}], "content is an object"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": [5]}], r"content\[0\]"),
        ([{"role": "assistant", "content": "", "tool_calls": 5}], "tool_calls is no list"),
        ([{"role": "user", "content": "x", "y": {1, 2}}], "set, which JSON does not have"),
        ([{"role": "user", "content": "x", "y": {5: 1}}], "a key that is no text"),
    ],
)
@pytest.mark.parametrize("name", ["llama2", "llama31", "nanochat"])
def test_fault_72_messages_that_are_none_are_named(name: str, messages: Any, says: str) -> None:
    template = ChatTemplate({"default": TEMPLATES[name]}, tokenizer(), {"bos_token": "<s>"})
    for do in (template.render, template.encode):
        with pytest.raises(ChatError, match=says.replace("|", r"\|")):
            do(messages)


def test_fault_72_what_templates_refuse_is_said() -> None:
    said = refused("{{ raise_exception('no\\n\x1b[2Jway') }}", "refuses this", "no")
    assert "\x1b" not in said
    refused("{{ raise_exception('x' * 100000) }}", "...")
    template = ChatTemplate({"default": TEMPLATES["llama2"]}, tokenizer(), {"bos_token": "<s>"})
    with pytest.raises(ChatError, match="Roles must alternate"):
        template.render([*USER, *USER])


def test_fault_72_deep_and_shared_values_are_refused() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    template = ChatTemplate({"default": "{{ messages }}{{ tools }}"}, tokenizer())
    with pytest.raises(ChatError, match="nested more than"):
        template.render([{"role": "user", "content": "x", "y": deep}])
    for tools, says in [(5, "tools is a number"), ([5], r"tools\[0\]"), ([{"name": 5}], "name")]:
        with pytest.raises(ChatError, match=says):
            template.render(USER, tools=tools)
    with pytest.raises(ChatError, match="no place for tools"):
        ChatTemplate({"default": TEMPLATES["nanochat"]}, tokenizer()).render(
            USER, tools=[{"name": "x"}]
        )


def test_long_chats_are_within_the_budget() -> None:
    """A chat of a million characters and one of five thousand messages."""
    for name in ("llama31", "llama_nemotron", "nanochat"):
        template = ChatTemplate({"default": TEMPLATES[name]}, tokenizer(), {"bos_token": "<s>"})
        long = [{"role": "user", "content": "word " * 200_000}]
        assert len(template.render(long)) > 900_000
        turns = [{"role": r, "content": "a < b"} for r in ("user", "assistant")] * 2500
        assert template.render(turns).count("a < b") == 5000
