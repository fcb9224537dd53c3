"""llama.cpp's own converter: run_converter.py SOURCE, for the process of the environment that has
what it needs. SOURCE is llama.cpp's.

Reads JSON from standard input: {"folders": {name: path}}. Writes GGUF files into those folders and
prints one line of JSON per folder: {"name", "file"}, or {"name", "error"}.

Tokenizers are not what is tested, and the converter takes few of them (a byte-level one of a DeciLM
only with 128,256 tokens, of a Nemotron none), so all are converted as GPT-2's."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys


def main() -> None:
    source = sys.argv[1]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2
    TextModel._set_vocab_llama_hf = TextModel._set_vocab_gpt2
    for name, folder in json.load(sys.stdin)["folders"].items():
        file = f"{folder}/model.gguf"
        sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", "f32"]
        said = {"name": name, "file": file}
        try:
            with contextlib.redirect_stdout(sys.stderr):
                runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
        except BaseException as error:
            if not (isinstance(error, SystemExit) and not error.code):
                said = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
