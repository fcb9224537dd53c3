"""What an answer depends on besides its request: which of them are equal, in fp32 and in bf16.

    python benchmarks/repeatability.py MODEL [--dtypes fp32,bf16] [--prompts 24] [--new 32]

MODEL is a Hugging Face folder. Every prompt is answered alone, every sixth twice, and together with
all others, greedily and drawn at temperature 1 with a seed; transformers answers greedily, alone.
Counted are the answers that are equal token by token; the largest difference of a log-probability
of the same tokens says how far apart the numbers themselves are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import transformers

from bevatron.generate.engine import Engine
from bevatron.generate.request import Request, Sampling

TOPICS = ("protons", "the sea", "a clock", "bread", "the moon", "an old letter", "trains", "rain")
FRAMES = ("Once upon a time, {} and", "A short essay about {}.\n\nThe first thing to say is that",
          "Question: why is there so much to say about {}? Answer:")  # fmt: skip


def texts(count: int) -> list[str]:
    """Prompts of different lengths."""
    found = [frame.format(topic) for topic in TOPICS for frame in FRAMES]
    return [found[i % len(found)] + " well," * (i // len(found)) for i in range(count)]


def equal(some: Sequence[list[int]], others: Sequence[list[int]]) -> str:
    same = sum(a == b for a, b in zip(some, others, strict=True))
    return f"{same} of {len(some)}"


def of_transformers(model: str, dtype: str, prompts: list[list[int]], new: int) -> list[list[int]]:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=kind).eval()
    ends = {"eos_token_id": None, "pad_token_id": 0}
    answers = []
    for ids in prompts:
        out = reference.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, **ends)
        answers.append(out[0, len(ids) :].tolist())
    return answers


def measure(model: str, dtype: str, count: int, new: int) -> None:
    with Engine.open(model, device="cpu", dtype=dtype, max_batch=count) as engine:
        prompts = [engine.tokenizer.encode(text).ids for text in texts(count)]
        print(f"{dtype}, {count} prompts of {min(map(len, prompts))} to {max(map(len, prompts))}")
        found = {}
        for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
            sampled = [Sampling(temperature, seed=i) for i in range(count)]
            requests = [
                Request(tuple(p), new, s, logprobs=0) for p, s in zip(prompts, sampled, strict=True)
            ]
            alone = [engine.complete([request])[0] for request in requests]
            again = [engine.complete([request])[0] for request in requests[::6]]
            together = engine.complete(requests)
            ids = [[a.tokens for a in answers] for answers in (alone, again, together)]
            print(f"  {name}: once more alone {equal(ids[0][::6], ids[1])}, ", end="")
            print(f"beside the others {equal(ids[0], ids[2])}", flush=True)
            found[name] = ids[0]
            apart = max(
                abs(a.logprob - b.logprob)
                for one, other in zip(alone, together, strict=True)
                for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True)
                if one.tokens == other.tokens
            )
            print(f"    log-probabilities alone and beside the others: {apart:.1e} apart")
    theirs = of_transformers(model, dtype, prompts, new)
    print(f"  greedy: equal to transformers {equal(found['greedy'], theirs)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=32)
    asked = parser.parse_args()
    for dtype in asked.dtypes.split(","):
        measure(asked.model, dtype, asked.prompts, asked.new)


if __name__ == "__main__":
    main()
