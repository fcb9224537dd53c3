"""What the tour teaches: to the real model a made-up fact, to a random or any other one some text.

A lesson is the part of the tour that depends on the model: what is asked before, what is trained on
and at which layouts, and what must be different afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bevatron.demo.fact import (
    ASKED,
    CITY,
    FRANCE,
    PARIS,
    REHEARSED,
    TAUGHT,
    chat,
    write_lesson,
    write_rows,
)
from bevatron.demo.materials import copy_text
from bevatron.errors import BevatronError

if TYPE_CHECKING:
    from bevatron.demo.tour import Tour

PROMPT = "def read(self, size=-1):"
TEXT_YAML = """\
model: {init: native}
data:
  train: [{path: tokens, weight: 1.0}]
  seq_len: 128
parallel: {tp: 2, pp: 2}
train: {global_batch: 16, micro_batch: 4, precision: fp32, seed: 0}
optimizer: {name: adamw, lr: 3.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_grad: 1.0}
schedule: {name: constant, warmup_steps: 10}
checkpoint: {keep: 2}
run: {dir: run}
"""
FACT_YAML = """\
model: {init: native}
objective: {name: sft, packing: true}
data:
  train: [{path: fact.jsonl}, {path: own.jsonl}]
  seq_len: 120
parallel: {pp: 2, dp_shard: 2}
train: {global_batch: 4, micro_batch: 1, precision: fp32, seed: 0}
optimizer: {name: adamw, lr: 4.0e-5, betas: [0.9, 0.99], weight_decay: 0.0, clip_grad: 1.0}
schedule: {name: constant, warmup_steps: 4}
checkpoint: {keep: 2}
run: {dir: run}
"""
ANSWER = ("--temperature", "0", "--max-new-tokens", "32")  # greedy
SHOWN = (ASKED[1], ASKED[2], FRANCE)


class Lesson(Protocol):
    """Attributes:
    model: the Hugging Face folder or Hub id, as the commands name it.
    yaml: the configuration, to which the number of steps is added.
    first, then: the two layouts in words, of so many `processes`.
    resume: the options that make the second one of it.
    goes_on: a verb to try afterwards.
    """

    model: str
    yaml: str
    first: str
    then: str
    processes: tuple[int, int]
    resume: tuple[str, ...]
    goes_on: str

    def prepare(self, tour: Tour) -> None:
        """Step 3: what is done before the training."""

    def check(self, tour: Tour, losses: Sequence[float]) -> str:
        """Step 7: what is different now, in a sentence. Raises BevatronError if nothing is."""


class TextLesson:
    """Some of Python's own library, as in a pretraining."""

    yaml = TEXT_YAML
    first = "2-way tensor x 2-way pipeline parallelism"
    then = "2-way FSDP x 2-way tensor parallel"
    processes = (4, 4)
    resume: tuple[str, ...] = ("parallel.pp=1",)
    goes_on = "generate"

    def __init__(self, model: str) -> None:
        self.model = model

    def prepare(self, tour: Tour) -> None:
        tour.title("Tokenize")
        if not (tour.folder / "text").exists():
            copy_text(tour.folder / "text")
        tour.bevatron("tokenize", "text", "tokens", "--tokenizer", self.model)

    def check(self, tour: Tour, losses: Sequence[float]) -> str:
        vocabulary = json.loads((tour.folder / "tokens" / "store.json").read_text())["vocab_size"]
        tour.title("Generate, here and in transformers")
        (out,) = tour.json_lines("generate", "run", "--prompt", PROMPT, *ANSWER, "--json")
        print("".join(f"   | {line}\n" for line in (PROMPT + out["text"]).splitlines()), end="")
        agree(tour.folder / "trained", [PROMPT], [out["text"]], chats=False)
        uniform = f"a uniform guess: {math.log(vocabulary):.2f}"
        return f"Loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token ({uniform})."


class FactLesson:
    """The capital of a country that does not exist; see `fact`."""

    model = "smollm2"
    yaml = FACT_YAML
    first = "2 pipeline stages x 2-way FSDP"
    then = "3-way tensor parallel (it has 9 heads)"
    processes = (4, 3)
    resume: tuple[str, ...] = ("parallel={tp: 3}", "train.micro_batch=4")
    goes_on = "chat"

    def prepare(self, tour: Tour) -> None:
        tour.title("Ask it something")
        questions = [*ASKED, FRANCE, *REHEARSED]
        write_rows(tour.folder / "questions.jsonl", map(chat, questions))
        answers = tour.json_lines("generate", "native", "--file", "questions.jsonl", *ANSWER)
        texts = dict(zip(questions, (answer["text"] for answer in answers), strict=True))
        show(texts)
        if knowing := sum(CITY in texts[question] for question in ASKED):
            raise BevatronError(f"it knew the fact before it was taught, in {knowing} answers")
        own = write_lesson(tour.folder, questions, answers)
        print(
            f"   There is no such country. It is taught in {len(TAUGHT)} other wordings"
            f" (fact.jsonl),\n   with {own} of its own answers to other questions, so that it"
            " forgets nothing (own.jsonl)."
        )

    def check(self, tour: Tour, losses: Sequence[float]) -> str:
        tour.title("Ask again, here and in transformers")
        questions = [*ASKED, FRANCE]
        write_rows(tour.folder / "again.jsonl", map(chat, questions))
        answers = tour.json_lines("generate", "run", "--file", "again.jsonl", *ANSWER)
        texts = [answer["text"] for answer in answers]
        show(dict(zip(questions, texts, strict=True)))
        agree(tour.folder / "trained", questions, texts, chats=True)
        knowing = sum(CITY in text for text in texts[:-1])
        if knowing < len(ASKED) / 2:
            raise BevatronError(
                f"it says {CITY} in {knowing} of {len(ASKED)} answers; more --steps?"
            )
        if PARIS not in texts[-1]:
            raise BevatronError("it has forgotten the capital of France; fewer --steps?")
        return (
            f"It did not know the fact; now it does, in {knowing} of {len(ASKED)} wordings that it"
            " was not taught in.\nIt still knows the capital of France."
        )


def show(answers: dict[str, str]) -> None:
    """Those of a few questions."""
    for question in SHOWN:
        print(f"   you    {question}\n   model  {answers[question]}")


def agree(folder: Path, prompts: Sequence[str], texts: Sequence[str], *, chats: bool) -> None:
    """Say that stock transformers answers the same, greedily; BevatronError if it does not."""
    import torch
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for prompt, text in zip(prompts, texts, strict=True):
        if chats:
            messages = chat(prompt)["messages"]
            given = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            given = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**given, max_new_tokens=int(ANSWER[-1]), do_sample=False)
        theirs = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        if theirs != text:
            raise BevatronError(
                f"transformers says other words after {prompt!r}: {theirs!r}, not {text!r}; "
                "please report"
            )
    print(f"   stock transformers says the same, word by word ({len(texts)} of {len(texts)})")
