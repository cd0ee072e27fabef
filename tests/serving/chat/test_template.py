"""Chat templates: the text that transformers makes of them, and how little a hostile one can do."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.data.instructions import Template
from builder.recipe import InstructionRecipe
from serving.bundle import open_bundle
from serving.bundle.model_settings import MAX_TEMPLATE
from serving.chat import ChatTemplate, RendererBusyError, TemplateError, chat_template, process, worker
from serving.chat.template import MAX_INPUT
from serving.errors import BundleError
from tests.closed_form import END, byte_tokenizer, chat_files, write_bundle

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# The forms of public models, written for this test; the commonest things that templates do are all in there.
FORMS = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set told = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set told = false %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user, assistant, user, ...') }}{% endif %}"
        "{% set text = '<<SYS>>\n' ~ told ~ '\n<</SYS>>\n\n' ~ message.content "
        "if loop.first and told else message.content %}"
        "{% if message.role == 'user' %}{{ bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' }}"
        "{% else %}{{ ' ' ~ text.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n"
        "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "alpaca": (
        "{%- macro header(name) -%}### {{ name }}:{%- endmacro -%}\n"
        "{%- for message in messages -%}\n"
        "    {%- if message['role'] == 'system' -%}\n{{ message['content'] | trim }}\n\n"
        "    {%- elif message['role'] == 'user' %}\n\n{{ header('Instruction') }}\n{{ message['content'] }}\n"
        "    {%- else %}\n\n{{ header('Response') }}\n{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{{ eos_token }}\n"
        "    {%- endif -%}\n{%- endfor -%}\n{%- if add_generation_prompt %}\n\n{{ header('Response') }}\n{% endif %}"
    ),
    "parts": (
        "{% set ns = namespace(turns=0) %}{% for m in messages %}{% set ns.turns = ns.turns + 1 %}"
        "[{{ m['role'] | upper }}]"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{{ part['text'] }}|{% endfor %}"
        "{% endif %}{% if ns.turns > 8 %}{% break %}{% endif %}{% endfor %}"
        "{{ messages | length }} {{ messages | tojson }}"
        "{{ dict(a=1) | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ thinking | default('no thinking') }}"
    ),
    "training": Template.of(InstructionRecipe(template="chat")).chat_template(),
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Who are you?"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "<Hi> & 'you'\n\n"}],
    "turns": [
        {"role": "user", "content": "Grüße, 世界 🙂"},
        {"role": "assistant", "content": "</s> Good day.  "},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}", "name": "eve"},
    ],
}


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    yield PreTrainedTokenizerFast(tokenizer_object=plain, **SPECIAL)


@pytest.mark.parametrize("name", FORMS)
def test_a_text_is_the_one_of_transformers(name: str, theirs: Any) -> None:
    template = ChatTemplate(FORMS[name], SPECIAL)
    for chat in CHATS.values():
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(
                chat, chat_template=FORMS[name], add_generation_prompt=prompt, tokenize=False
            )
            assert template.render(chat, add_generation_prompt=prompt) == wanted
        for ending in ("Sure, ", "Sure"):
            begun = [*chat, {"role": "assistant", "content": ending}]
            wanted = theirs.apply_chat_template(
                begun, chat_template=FORMS[name], continue_final_message=True, tokenize=False
            )
            # What the message shows again behind its own place, as `parts` does, is after the last one.
            got = template.render(begun, add_generation_prompt=False, continue_final_message=True)
            assert got.replace("\ue000continued\ue001 ", "CONTINUE_FINAL_MESSAGE_TAG ") == wanted
    template.close()


def test_variables_and_parts_reach_a_template(theirs: Any) -> None:
    template = ChatTemplate(FORMS["parts"], SPECIAL)
    chat = [{"role": "user", "content": ["a", "b"]}]
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    wanted = theirs.apply_chat_template(asked, chat_template=FORMS["parts"], tokenize=False, thinking="deep")
    assert template.render(chat, add_generation_prompt=False, variables={"thinking": "deep"}) == wanted
    template.close()
    strings = ChatTemplate("{{ messages[0].content }}", {})  # It knows no parts.
    assert strings.render(chat) == "a\nb"
    strings.close()
    loops = ChatTemplate(
        "{% for part in messages[0]['content'] %}<{{ part.text }}>{% endfor %}", {}
    )  # It knows no text.
    assert loops.render(chat) == "<a><b>" and loops.render([{"role": "user", "content": "c"}]) == "<c>"
    loops.close()


HOSTILE = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "a long range": ("{% for a in range(10**9) %}x{% endfor %}", "Range too big"),
    "a long text": ("{{ 'x' * (messages | length * 10**9) }}", "512 MiB"),
    "a long text when it is compiled": ("{{ 'x' * 10**9 }}", "512 MiB"),
    "a large number": ("{{ (messages | length + 9) ** (10**8) }}", "processor time"),
    "100 MB": ("{% for a in range(10000) %}{{ 'x' * 10000 }}{% endfor %}", "more than 1048576 characters"),
    "100 MB at once": ("{{ 'x' * (messages | length * 10**8) }}", "more than 1048576 characters"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "without end"),
    "doubling": (
        "{% set x = namespace(v='aaaa') %}{% for i in range(1000) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}",
        "(512 MiB|processor time)",
    ),
    "a filter": ("{{ 'a' | center(10**9) }}", "512 MiB"),
    "a format": ("{{ '%1000000000d' | format(1) }}", "512 MiB"),
    "a class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
    "a format's attributes": ("{{ raise_exception('{0.__class__}'.format(1) ~ '!') }}", "messages: !$"),
    "an attribute filter": ("{{ ('' | attr('__class__')) ~ raise_exception('seen') }}", "unsafe|seen|undefined"),
    "a namespace's class": ("{{ namespace(__class__=1) }}", "underscore"),
    "a changed list": ("{% set _ = messages.append(1) %}", "unsafe|not safely|immutable"),
    "an import": ("{% import 'os' as os %}", "fails"),
    "an include": ("{% include '/etc/passwd' %}", "fails"),
    "depth": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "without end|ended"),
    "no template": ("{% if", "in line 1"),
    "no such filter": ("{{ 1 | nothing }}", "in line 1: No filter"),
    "no such value": ("{{ nothing.at_all }}", "'nothing' is undefined"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_its_own_request_alone(name: str) -> None:
    source, problem = HOSTILE[name]
    template = ChatTemplate(source, SPECIAL)
    began = os.times()
    with pytest.raises(TemplateError, match=problem) as caught:
        template.render(CHATS["one"])
    used = os.times()
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)[:60]
    # This process has done next to nothing, and its children no more than they may.
    assert used.user + used.system - began.user - began.system < 0.5
    assert used.children_user + used.children_system - began.children_user - began.children_system < 4
    template.close()


def test_after_a_hostile_conversation_the_next_one_is_rendered() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.content == 'x' %}{{ 'x' * 10**9 }}{% elif m.content == 'y' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        "{{ m.content }}{% endfor %}",
        {},
    )
    for content in ("a", "x", "b", "y", "c"):
        if content in "xy":
            with pytest.raises(TemplateError):
                template.render([{"role": "user", "content": content}])
        else:
            assert template.render([{"role": "user", "content": content}]) == content
    began = time.monotonic()
    slow = template.threads.submit(template.render, [{"role": "user", "content": "y"}])
    assert template.threads.submit(template.render, [{"role": "user", "content": "d"}]).result() == "d"
    with pytest.raises(TemplateError, match="processor time"):
        slow.result()
    assert time.monotonic() - began < process.WALL_SECONDS
    template.close()


def test_raise_exception_says_its_own_sentence() -> None:
    template = ChatTemplate("{{ raise_exception('Only ' ~ messages[0].content ~ 'x' * 10**6) }}", {})
    with pytest.raises(TemplateError, match="refuses these messages: Only hi") as caught:
        template.render([{"role": "user", "content": "hi"}])
    assert len(str(caught.value)) < 700
    template.close()


def test_the_process_has_no_key_no_file_and_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_BUNDLE_API_KEYS", "secret-key")
    worked = process.TemplateProcess("{{ 1 }}", {})
    pid = worked._process.pid
    if sys.platform == "linux":
        assert b"secret-key" not in Path(f"/proc/{pid}/environ").read_bytes()
        limits = Path(f"/proc/{pid}/limits").read_text()
        soft = {line[:25].strip(): line[25:].split()[0] for line in limits.splitlines()}
        assert soft["Max address space"] == str(worker.MAX_MEMORY)
        assert [soft[f"Max {name}"] for name in ("open files", "file size", "processes")] == ["3", "0", "0"]
    worked.close()
    assert worked._process.returncode is not None and not worked.alive


def test_a_process_that_says_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WALL_SECONDS", 0.0001)
    template = ChatTemplate("{{ 1 }}", {})
    with pytest.raises(RendererBusyError, match="try again"):
        template.render(CHATS["one"])
    monkeypatch.setattr(process, "WALL_SECONDS", 30.0)
    assert template.render(CHATS["one"]) == "1"
    template.close()


def test_no_process_is_left() -> None:
    template = ChatTemplate("{{ 1 }}", {})
    template.render(CHATS["one"])
    (kept,) = template._idle
    template.close()
    assert not kept.alive and kept._process.poll() is not None
    gc.collect()


def test_too_long_a_conversation_is_not_rendered() -> None:
    template = ChatTemplate("{{ messages | length }}", {})
    with pytest.raises(TemplateError, match=f"at most {MAX_INPUT}"):
        template.render([{"role": "user", "content": "x" * MAX_INPUT}])
    template.close()


def test_where_a_bundle_keeps_its_template(tmp_path: Path) -> None:
    write_bundle(tmp_path / "none")
    assert chat_template(open_bundle(tmp_path / "none")) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "a{{ eos_token }}"}]
    files = {
        "key": chat_files("a{{ eos_token }}"),
        "list": chat_files(named, eos_token={"content": END, "special": True}),
        "file": {**chat_files("no"), "chat_template.jinja": b"a{{ eos_token }}"},
        "map": {
            "tokenizer_config.json": json.dumps({"chat_template": "a{{ eos_token }}"}).encode(),
            "special_tokens_map.json": json.dumps({"eos_token": END}).encode(),
        },
    }
    for name, extra in files.items():
        write_bundle(tmp_path / name, extra=extra)
        found = chat_template(open_bundle(tmp_path / name))
        assert found is not None and found.render(CHATS["one"]) == f"a{END}", name
        found.close()


@pytest.mark.parametrize(
    "extra", [chat_files(7), chat_files("x" * (MAX_TEMPLATE + 1)), {"tokenizer_config.json": b"[" * 9999}]
)
def test_a_template_that_is_none_is_refused(tmp_path: Path, extra: dict[str, bytes]) -> None:
    write_bundle(tmp_path / "bundle", extra=extra)
    with pytest.raises(BundleError):
        chat_template(open_bundle(tmp_path / "bundle"))


def test_what_ends_an_answer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_end|>2"])
    chatml = ChatTemplate(FORMS["chatml"], {}, end_ids=[256])
    assert chatml.end_token_ids(tokenizer) == (256, 257)
    llama = ChatTemplate(FORMS["llama2"], {"eos_token": END, "bos_token": END})
    assert llama.end_token_ids(tokenizer) == (256,)
    none = ChatTemplate("{{ messages[0].content }}", {})
    assert none.end_token_ids(tokenizer) == ()
    for template in (chatml, llama, none):
        template.close()


def test_nothing_imports_jinja2_before_a_template_is_rendered() -> None:
    code = "import sys, serving.cli, serving.entrypoints.http_app; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
