"""`bevatron chat`, driven through a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bevatron.chat.answer_parts import Said
from bevatron.errors import BevatronError
from bevatron.generate.conversation import Conversation
from bevatron.generate.terminal_text import harmless, show
from tests.chat.chat_templates import reference
from tests.generate.talkers import answer_of_transformers, make_parrot, make_talker

PROMPT = ">>> "
WAIT_S = 1200
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Screen:
    """`bevatron chat` in a pseudoterminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        env = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm"}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            command = [sys.executable, "-m", "bevatron", "chat", *arguments]
            os.execve(sys.executable, command, env)
        self.seen = ""

    def until(self, text: str) -> str:
        """What is shown up to `text`, which has to come."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.plain():
            assert time.monotonic() < deadline, self.seen
            ready, _, _ = select.select([self.fd], [], [], 1.0)
            if ready:
                try:
                    data = os.read(self.fd, 4096)
                except OSError:  # it has ended
                    data = b""
                assert data, self.seen
                self.seen += data.decode("utf-8", "replace")
        shown, _, rest = self.plain().partition(text)
        self.seen = rest
        return shown

    def more(self) -> None:
        """Wait until a part of an answer is shown."""
        while not self.plain().strip():
            assert select.select([self.fd], [], [], WAIT_S)[0], "nothing is shown"
            self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")

    def plain(self) -> str:
        return ESCAPES.sub("", self.seen).replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def say(self, text: str) -> str:
        """A line; returns what is shown until the next prompt."""
        self.type(text + "\n")
        return self.until(PROMPT).partition("\n")[2]  # without the echo

    def interrupt(self) -> str:
        """Ctrl-C, once what was shown is being waited after; what is shown until the prompt."""
        time.sleep(1.0)
        self.type("\x03")
        return self.until(PROMPT)

    def end(self) -> int:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 4096)
                except OSError:
                    continue
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An answer of it never ends within the time of a test, however fast the machine is."""
    folder = tmp_path_factory.mktemp("talker") / "hf"
    return make_talker(folder, "llama3", context=100_000_000)


@pytest.fixture
def screen(talker: Path, tmp_path: Path) -> Iterator[Screen]:
    screen = Screen(tmp_path, str(talker), "--temperature", "0", "--max-new-tokens", "8")
    screen.until(PROMPT)
    yield screen
    try:
        os.kill(screen.pid, signal.SIGKILL)
        os.waitpid(screen.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    os.close(screen.fd)


def test_a_conversation_in_a_terminal(screen: Screen, talker: Path, tmp_path: Path) -> None:
    def saved() -> list[dict[str, str]]:
        assert "saved" in screen.say("/save chat.json")
        return list(json.loads((tmp_path / "chat.json").read_text())["messages"])

    shown = screen.say("Hello there")
    assert re.search(r"8 tokens, [\d.]+ tokens/s, first after [\d.]+ s; cut off", shown)
    said = saved()
    assert [m["role"] for m in said] == ["user", "assistant"]
    template = reference("llama3").apply_chat_template(said[:1], add_generation_prompt=True)
    want = answer_of_transformers(talker, list(template["input_ids"]), 8)
    assert said[1]["content"] == reference("llama3").decode(want)
    assert harmless(said[1]["content"]).split("\n")[0] in shown

    # commands
    assert "/retry" in screen.say("/help")
    assert "no command /nonsense" in screen.say("/nonsense")
    assert "temperature 0" in screen.say("/set")
    assert "temperature is -1" in screen.say("/set temperature -1")
    assert "no setting heat" in screen.say("/set heat 5")
    assert "Be brief" in screen.say("/system Be brief")
    assert saved()[0] == {"role": "system", "content": "Be brief"}
    screen.say("/retry")
    assert [m["role"] for m in saved()] == ["system", "user", "assistant"]
    assert saved()[2] != said[1], "the system prompt is heard"

    # many lines
    screen.type("one \\\n")
    screen.until("... ")
    screen.say("two")
    screen.type('"""\n')
    screen.until("... ")
    screen.type("three\n")
    screen.until("... ")
    screen.say('four"""')
    screen.say(" /five")
    users = [m["content"] for m in saved() if m["role"] == "user"]
    assert users == ["Hello there", "one \ntwo", "three\nfour", "/five"]
    assert "taken back: /five" in screen.say("/undo")
    assert len(saved()) == 7

    # Ctrl-C ends an answer and keeps the conversation
    assert "max_new_tokens 9000000" in screen.say("/set max_new_tokens 9000000")
    screen.type("Tell me more\n")
    screen.until("Tell me more")
    screen.more()
    assert "interrupted" in screen.interrupt()
    assert [m["role"] for m in saved()[-2:]] == ["user", "assistant"]
    screen.say("/set max_new_tokens 4")
    assert "4 tokens" in screen.say("Go on")
    screen.type("half a line")
    screen.until("half a line")
    assert "Ctrl-D or /quit ends" in screen.interrupt()
    screen.type("\x04")
    assert screen.end() == 0
    history = tmp_path / "state" / "bevatron" / "chat_history"
    assert "Hello there" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_conversations_are_saved_loaded_and_forgotten(screen: Screen, tmp_path: Path) -> None:
    old = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert "loaded 3 messages" in screen.say("/load old.json")
    assert "8 tokens" in screen.say("And now?")
    assert "saved 5 messages" in screen.say("/save chat.json")
    assert "forgotten" in screen.say("/reset")
    assert "nothing to answer" in screen.say("/retry")
    screen.say("/save chat.json")
    assert json.loads((tmp_path / "chat.json").read_text())["messages"] == old[:1]
    assert "nowhere.json" in screen.say("/load nowhere.json")
    (tmp_path / "precious.json").write_text("[5]")
    assert "exists and is not a conversation" in screen.say("/save precious.json")
    screen.type("/quit\n")
    assert screen.end() == 0


@pytest.mark.slow  # it trains a model
def test_tools_are_called_and_their_results_heard(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    chat = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": ""}]
    chat[1]["tool_calls"] = [call]
    chat += [{"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]
    folder = make_parrot(tmp_path / "hf", [chat], tools=[tool])
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    screen = Screen(tmp_path, str(folder), "--tools", "tools.json", "--max-new-tokens", "60")
    screen.until(PROMPT)
    screen.type("Rome?\n")
    shown = screen.until("weather gives> ")
    assert 'calls weather(city="Rome")' in shown and "TOOLCALL" not in shown
    assert "Sunny." in screen.say("sun")
    screen.say("/save chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant", "tool", "assistant"]
    assert saved[1]["tool_calls"][0]["function"] == call["function"]
    screen.say("/reset")
    screen.type("Rome?\n")  # and a result that never comes
    screen.until("weather gives> ")
    assert "taken back" in screen.interrupt()
    screen.type("\x04")
    assert screen.end() == 0


def test_what_a_terminal_would_obey_is_made_visible() -> None:
    evil = "\x1b]0;title\x07 \x1b[2J\x9b31m a\rb\x08 \u202edcba \x7f ok\tnew\n"
    assert harmless(evil) == "␛]0;title␇ ␛[2J�31m a␍b␈ �dcba ␡ ok\tnew\n"
    assert harmless("é 数学 🙂 \u200d\u0301") == "é 数学 🙂 \u200d\u0301"

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Tty(), io.StringIO()
    show(evil, terminal)
    show(evil, file)
    assert "\x1b" not in terminal.getvalue()
    assert file.getvalue() == evil, "a file gets what the model said"


def test_the_oldest_turns_leave_first_and_the_system_prompt_stays() -> None:
    chat = Conversation(max_new_tokens=10)
    chat.system = "s"
    for word in ("a", "b", "c"):
        chat.say(word * 20)
        chat.answer(Said(word * 20))
    chat.say("d" * 20)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        return [ord(c) for m in messages for c in m["content"]]

    assert chat.fitting(encode, 200)[1] == 0
    ids, dropped = chat.fitting(encode, 100)
    assert dropped == 4 and bytes(ids).decode() == "s" + "c" * 40 + "d" * 20
    assert len(chat.messages) == 8, "nothing is forgotten"
    with pytest.raises(BevatronError, match="needs 21 tokens; the model can hold 24"):
        chat.fitting(encode, 24)
