"""The settings of supervised finetuning."""

from __future__ import annotations

from typing import Literal

from bevatron.data.labelled_examples import Labelled
from bevatron.data.tokenizer import OpenTokenizer
from bevatron.parallel.layout import check_documents
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.head_kinds import ExamplesKind


class SftKind(ExamplesKind):
    """Learns conversations, completions of prompts, and texts."""

    reads = "bevatron.align.sft_feed:SftFeed"
    minimises = "bevatron.align.sft:Sft"

    name: str = "sft"
    assistant_only_loss: bool = True
    """Of messages, learn what the assistant says and the end of its turn; false: all of them."""
    completion_only_loss: bool = True
    """Of a prompt and its completion, learn the completion; false: the prompt as well."""
    packing: bool = False
    """Examples share samples, as many as fit (best fit decreasing); each sees itself alone, so the
    loss is that of examples apart. false: each has a sample, filled up with padding."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """An example of more than `data.seq_len` tokens ends the run before it begins, loses its end
    (and is left out if nothing to learn is left), or is left out. How many are is said."""
    chat_template: str | None = None
    """A file with a chat template, in place of the tokenizer's own."""
    learn_unmasked: bool = False
    """Learn every token of token stores that do not say which ones are to be learned."""

    def labelled(self, opened: OpenTokenizer, config: RunConfig, spec: ModelSpec) -> Labelled:
        from bevatron.align.chat_rows import ChatRows
        from bevatron.data.chat_examples import ChatExamples

        if self.packing:
            check_documents(spec, config.data.seq_len, "objective.packing")
        examples = ChatExamples.open(
            opened.file,
            chat_template=self.chat_template,
            assistant_only=self.assistant_only_loss,
            completion_only=self.completion_only_loss,
        )
        return ChatRows(
            examples,
            config.data.seq_len,
            packing=self.packing,
            too_long=self.too_long,
            learn_unmasked=self.learn_unmasked,
        )
