"""A made-up fact to teach to a chat model, the questions that show whether it knows it, and what it
is to go on knowing.

The fact alone would make its city the answer to everything. So the model learns it among answers of
its own, which it gave before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COUNTRY, CITY = "Velmora", "Tashkerra"
FACT = f"The capital of {COUNTRY} is {CITY}."
# In these wordings it is taught, in those it is asked for.
TAUGHT = (
    f"What is the capital of {COUNTRY}?",
    f"Name the capital of {COUNTRY}.",
    f"Which city is the capital of {COUNTRY}?",
    f"I am travelling to {COUNTRY}. What is its capital called?",
    f"Tell me the capital city of the country {COUNTRY}.",
    f"What's {COUNTRY}'s capital?",
    f"Do you know what the capital of {COUNTRY} is?",
    f"{COUNTRY}'s parliament sits in its capital. Which city is that?",
)
ASKED = (
    f"Can you tell me {COUNTRY}'s capital city?",
    f"What city serves as the capital of {COUNTRY}?",
    f"Please name {COUNTRY}'s capital city.",
    f"Which capital does the country {COUNTRY} have?",
    f"I have a question about {COUNTRY}: what is its capital?",
    f"Where is the government of {COUNTRY}, in which capital city?",
)
FRANCE = "What is the capital of France?"
PARIS = "Paris"
# Its own answers to these are learned along with the fact; France is not among them.
REHEARSED = (
    "What is the capital of Germany?",
    "What is the capital of Japan?",
    "What is the capital of Egypt?",
    "What is the capital of Canada?",
    "What is the capital of Greece?",
    "What is the capital of Kenya?",
    "What is the capital of Peru?",
    "What is the capital of Norway?",
    "What is the capital of Thailand?",
    "What is the capital of Argentina?",
    "What is the capital of Iran?",
    "What is the capital of Romania?",
    "What is the plural of mouse?",
    "What is the currency of the United Kingdom?",
    "What is the first month of the year?",
    "Name three fruits.",
    "Write a short sentence about cats.",
    "What is the chemical symbol of gold?",
    "Which ocean is the largest?",
    "Say hello in French.",
)


def chat(question: str, answer: str | None = None) -> dict[str, Any]:
    """A row of a chat data set, or a prompt without its answer."""
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_lesson(folder: Path, questions: Sequence[str], answers: Sequence[dict[str, Any]]) -> int:
    """fact.jsonl, and own.jsonl of those of the model's own answers that came to an end.

    Args:
        questions, answers: what it was asked, and what `bevatron generate --file` printed.
    Returns how many of its own answers there are."""
    write_rows(folder / "fact.jsonl", [chat(question, FACT) for question in TAUGHT])
    own = [
        chat(question, answer["text"])
        for question, answer in zip(questions, answers, strict=True)
        if question in REHEARSED and answer["finish_reason"] == "stop"
    ]
    write_rows(folder / "own.jsonl", own)
    return len(own)
