"""Prompts with instructions that a program can check, in the form of IFEval, made locally.

Each row has a prompt (a request about some topic and one or more instructions) and IFEval's columns
`instruction_id_list` and `kwargs`, which the reward `instructions` reads. The kinds are those of
IFEval (arXiv 2311.07911) whose checkers need no download and whose answers can be short; wordings
are several for each, so that a model learns the instruction and not one sentence. Held-out problems
may have topics that training never has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from bevatron.errors import BevatronError

TOPICS = (
    *("the sea", "a garden", "winter", "bread", "a bicycle", "the moon", "coffee", "an old clock"),
    *("a library", "rain", "a train journey", "honey bees", "mountains", "a birthday", "salt"),
    *("friendship", "a lighthouse", "the color blue", "an umbrella", "paper", "a market", "music"),
    *("a small village", "cats", "the desert", "a bridge", "apples", "glass", "a river", "sleep"),
    *("learning to cook", "a football match", "the first day of school", "a forest", "robots"),
    *("a painting", "snow", "an island", "a museum", "dogs", "chess", "the night sky", "a letter"),
    *("running", "tea", "a volcano", "horses", "a lost key", "the wind", "a secret door"),
)
HELD_OUT = (
    *("a windmill", "penguins", "a long walk", "spring", "cheese", "a violin", "the harbor"),
    *("a toy shop", "clouds", "a camping trip", "an elephant", "the kitchen", "soap", "a castle"),
    *("whales", "a rainbow", "an airport", "autumn leaves", "a mirror", "the circus"),
)
REQUESTS = (
    *("Write a sentence about {}.", "Write two sentences about {}.", "Describe {} briefly."),
    *("Tell me something about {}.", "Write a short note about {}.", "What can you say about {}?"),
    *("Write a few words about {}.", "Give me a short description of {}."),
)
WORDS = (
    *("bright", "quiet", "always", "people", "small", "time", "happy", "world", "light", "story"),
    *("home", "color", "great", "water", "friend", "morning"),
)
ENDS = ("Any other questions?", "Is there anything else I can help with?")
Made = tuple[str, dict[str, Any]]  # what the prompt says, and the checker's arguments


def _pick(random: Random, *wordings: str) -> str:
    return wordings[random.randrange(len(wordings))]


def _no_comma(random: Random) -> Made:
    said = _pick(random, "Do not use any commas.", "Use no commas in your response.",
                 "Your answer must not contain a comma.")  # fmt: skip
    return said, {}


def _lowercase(random: Random) -> Made:
    return _pick(random, "Use only lowercase letters.", "Write everything in lowercase.",
                 "Your entire response must be in lowercase."), {}  # fmt: skip


def _capitals(random: Random) -> Made:
    return _pick(random, "Use only capital letters.", "WRITE EVERYTHING IN CAPITAL LETTERS.",
                 "Your entire response must be in all capital letters."), {}  # fmt: skip


def _quotation(random: Random) -> Made:
    return _pick(random, "Wrap your entire response with double quotation marks.",
                 "Put your whole answer in double quotes.",
                 "Your answer must begin and end with a double quotation mark."), {}  # fmt: skip


def _title(random: Random) -> Made:
    return _pick(random, "Include a title in double angular brackets, such as <<my title>>.",
                 "Your answer must contain a title, wrapped in double angular brackets like "
                 "<<this>>.", "Begin with a title like <<title>>."), {}  # fmt: skip


def _end(random: Random) -> Made:
    end = _pick(random, *ENDS)
    said = _pick(random, "Finish your response with this exact phrase: {}",
                 "The last words of your answer must be: {}",
                 "End with the phrase: {}")  # fmt: skip
    return said.format(end), {"end_phrase": end}


def _postscript(random: Random) -> Made:
    return _pick(random, "Add a postscript that starts with P.S. at the end.",
                 "At the end of your response, add a postscript starting with P.S.",
                 "Close with a P.S. line."), {"postscript_marker": "P.S."}  # fmt: skip


def _keyword(random: Random) -> Made:
    word = _pick(random, *WORDS)
    said = _pick(random, "Include the word {}.", "Your response must contain the word {}.",
                 "Use the word {} in your answer.")  # fmt: skip
    return said.format(f'"{word}"'), {"keywords": [word]}


def _forbidden(random: Random) -> Made:
    words = random.sample(("the", "and", "is", "of", "a", "to"), 1)
    said = _pick(random, "Do not use the word {}.", "Avoid the word {}.",
                 "The word {} must not appear in your answer.")  # fmt: skip
    return said.format(f'"{words[0]}"'), {"forbidden_words": words}


def _fewer_words(random: Random) -> Made:
    n = random.choice((8, 10, 12, 15))
    said = _pick(random, "Use less than {} words.", "Answer with less than {} words.",
                 "Your response must have fewer than {} words.")  # fmt: skip
    return said.format(n), {"num_words": n, "relation": "less than"}


def _bullets(random: Random) -> Made:
    n = random.choice((2, 3, 4))
    said = _pick(random, "Answer with exactly {} bullet points that start with *.",
                 "Your answer must contain exactly {} bullet points, such as:\n* This is a point.",
                 "Use exactly {} markdown bullet points (lines that begin with *).")  # fmt: skip
    return said.format(n), {"num_bullets": n}


def _highlights(random: Random) -> Made:
    n = random.choice((1, 2))
    said = _pick(random, "Highlight at least {} parts with markdown, like *this part*.",
                 "Put at least {} words of your answer between asterisks: *this*.")  # fmt: skip
    return said.format(n), {"num_highlights": n}


def _placeholders(random: Random) -> Made:
    n = random.choice((1, 2))
    said = _pick(random, "Include at least {} placeholders in square brackets, such as [name].",
                 "Use at least {} placeholders like [address] in your answer.")  # fmt: skip
    return said.format(n), {"num_placeholders": n}


def _two(random: Random) -> Made:
    return _pick(random, "Give two different responses, separated by 6 asterisk symbols: ******.",
                 "Write two different answers with ****** between them."), {}  # fmt: skip


# Short name -> IFEval's, and what makes one.
KINDS: dict[str, tuple[str, Callable[[Random], Made]]] = {
    "no_comma": ("punctuation:no_comma", _no_comma),
    "lowercase": ("change_case:english_lowercase", _lowercase),
    "capitals": ("change_case:english_capital", _capitals),
    "quotation": ("startend:quotation", _quotation),
    "title": ("detectable_format:title", _title),
    "end": ("startend:end_checker", _end),
    "postscript": ("detectable_content:postscript", _postscript),
    "keyword": ("keywords:existence", _keyword),
    "forbidden": ("keywords:forbidden_words", _forbidden),
    "fewer_words": ("length_constraints:number_words", _fewer_words),
    "bullets": ("detectable_format:number_bullet_lists", _bullets),
    "highlights": ("detectable_format:number_highlighted_sections", _highlights),
    "placeholders": ("detectable_content:number_placeholders", _placeholders),
    "two": ("combination:two_responses", _two),
}
# Pairs that no text can follow, or that undo each other's form.
APART = (
    *({"lowercase", "capitals"}, {"lowercase", "end"}, {"capitals", "end"}, {"quotation", "end"}),
    *({"lowercase", "postscript"}, {"quotation", "postscript"}, {"end", "postscript"}),
    *(
        {"bullets", "highlights"},
        {"bullets", "two"},
        {"highlights", "two"},
        {"bullets", "quotation"},
    ),
    *({"two", "end"}, {"two", "postscript"}, {"two", "quotation"}, {"two", "fewer_words"}),
    *({"bullets", "fewer_words"}, {"end", "fewer_words"}, {"capitals", "keyword"}),
)


def checked_kinds(kinds: Sequence[str] | None) -> list[str]:
    """Raises BevatronError for an unknown one."""
    for kind in kinds or ():
        if kind not in KINDS:
            raise BevatronError(f"kinds: {kind!r} is unknown; known are {', '.join(KINDS)}")
    return list(kinds or KINDS)


def instruction_row(
    random: Random, kinds: Sequence[str], least: int, most: int, held_out: bool
) -> dict[str, Any]:
    """A row of a random problem with `least` to `most` instructions of these kinds."""
    topics = HELD_OUT if held_out else TOPICS
    request = _pick(random, *REQUESTS).format(topics[random.randrange(len(topics))])
    wanted, chosen = random.randint(least, most), list[str]()
    for kind in random.sample(list(kinds), len(kinds)):
        if len(chosen) == wanted:
            break
        if not any({kind, other} in APART for other in chosen):
            chosen.append(kind)
    made = [(KINDS[kind][0], *KINDS[kind][1](random)) for kind in chosen]
    return {
        "prompt": " ".join([request, *(said for _, said, _ in made)]),
        "instruction_id_list": [name for name, _, _ in made],
        "kwargs": [arguments for _, _, arguments in made],
        "kinds": chosen,
    }
