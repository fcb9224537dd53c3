"""Rewards as users write them, good and bad; the text of an answer says what goes wrong."""

import math
import os
import subprocess
import time


def matches(prompts, completions, completion_ids, answer, **columns):
    """TRL's signature."""
    pairs = zip(completions, answer, strict=True)
    return [None if text == "none" else float(text == a) for text, a in pairs]


def conversational(prompts, completions, completion_ids, **columns):
    """Of chats, completions are lists of messages, as TRL has them."""
    return [float(c[0]["role"] == "assistant" and c[0]["content"] == "yes") for c in completions]


def fails(prompts, completions, completion_ids, **columns):
    out = []
    for text in completions:
        if text == "sleeps":
            time.sleep(1000)
        if text == "loops":
            while True:
                pass
        if text == "child":
            subprocess.Popen(["sleep", "86399"])
            time.sleep(1000)
        if text == "eats":
            bytearray(8 << 30)
        if text == "crashes":
            os.kill(os.getpid(), 11)
        if text == "raises":
            raise KeyError("x")
        if text == "exits":
            raise SystemExit(3)
        out.append({"nan": math.nan, "inf": math.inf, "huge": 1e308, "text": "abc"}.get(text, 1.0))
    return out


def too_few(prompts, completions, completion_ids, **columns):
    return [1.0]


def no_list(prompts, completions, completion_ids, **columns):
    return 1.0
