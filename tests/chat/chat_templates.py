# ruff: noqa: E501 (templates have long lines)
"""Chat templates in the conventions of published models, and a tokenizer that has their tokens.

Written for these tests after the models' documentation: the same markers, order and whitespace.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system_message = false %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system turn is always there: it has the dates. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n"}}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You may call functions. Answer with JSON that calls one.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("No first user message to put the tools into") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Here are functions. Answer with JSON that calls one.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
                {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {%- if builtin_tools is defined %}
            {{- "<|eom_id|>" }}
        {%- else %}
            {{- "<|eot_id|>" }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

NEMOTRON = """{{ '<extra_id_0>System' }}{% for message in messages %}{% if message['role'] == 'system' %}
{{ '\n' + message['content'].strip() }}{% if tools or contexts %}{{ '\n' }}{% endif %}{% endif %}{% endfor %}
{% if tools %}{% for tool in tools %}{{ '\n<tool> ' + tool|tojson + ' </tool>' }}{% endfor %}{% endif %}{{ '\n\n' }}
{% for message in messages %}{% if message['role'] == 'user' %}
{{ '<extra_id_1>User\n' + message['content'].strip() + '\n' }}{% elif message['role'] == 'assistant' %}
{{ '<extra_id_1>Assistant\n' + message['content'].strip() + '\n' }}{% elif message['role'] == 'tool' %}
{{ '<extra_id_1>Tool\n' + message['content'].strip() + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{'<extra_id_1>Assistant\n'}}{%- endif %}"""

LLAMA_NEMOTRON = """{{- bos_token }}
{%- set ns = namespace(system='', thinking=true) %}
{%- if messages[0]['role'] == 'system' %}
  {%- set ns.system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
  {%- if '/no_think' in ns.system %}
    {%- set ns.system = ns.system.replace('/no_think', '').strip() %}{% set ns.thinking = false %}
  {%- endif %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + ns.system }}
{%- if tools is not none %}
  {{- '\\n\\n<AVAILABLE_TOOLS>[' }}{% for t in tools %}{{- (t.function if t.function is defined else t) | tojson }}{{- ', ' if not loop.last else '' }}{% endfor %}{{- ']</AVAILABLE_TOOLS>' }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' + message.content.replace('/no_think', '') + '<|eot_id|>' }}
  {%- elif message.role == 'tool' %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n<TOOL_RESPONSE>[' + message.content + ']</TOOL_RESPONSE><|eot_id|>' }}
  {%- elif message.role == 'assistant' %}
    {%- set content = message.content or '' %}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + content }}
    {%- if message.tool_calls %}
      {{- '<TOOLCALL>[' }}{% for c in message.tool_calls %}{{- '{"name": "' ~ c.function.name ~ '", "arguments": ' ~ c.function.arguments | tojson ~ '}' }}{{- ', ' if not loop.last }}{% endfor %}{{- ']</TOOLCALL>' }}
    {%- endif %}
    {{- '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- if not ns.thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

NANOCHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|user_start|>' + message['content'] + '<|user_end|>' }}"
    "{% elif message['role'] == 'assistant' %}<|assistant_start|>"
    "{% generation %}{{ message['content'] + '<|assistant_end|>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Unknown role ' ~ message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)

TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama31": LLAMA31,
    "nemotron": NEMOTRON,
    "llama_nemotron": LLAMA_NEMOTRON,
    "nanochat": NANOCHAT,
}
TOKENS = {
    "llama2": ("<s>", "</s>"),
    "nemotron": ("<s>", "</s>"),
    "nanochat": ("<|bos|>", "<|assistant_end|>"),
}
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>")
SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<extra_id_0>",
    "<extra_id_1>",
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
]


@lru_cache
def tokenizer(names: tuple[str, ...] = tuple(SPECIALS)) -> Any:
    """Byte-level BPE of this file's text, with all special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([__file__], trainer)
    return made


def of_family(name: str) -> tuple[str, str]:
    """bos and eos of a template's family."""
    return TOKENS.get(name, LLAMA3_TOKENS)


def save_tokenizer(folder: Path, name: str) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers writes them."""
    reference(name).save_pretrained(folder)


@lru_cache
def reference(name: str) -> Any:
    """transformers' tokenizer with a template."""
    import transformers

    bos, eos = of_family(name)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token=bos, eos_token=eos, chat_template=TEMPLATES[name]
    )
