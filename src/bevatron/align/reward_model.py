"""Reward models that score a run's own answers, on the run's ranks.

A reward model is a frozen companion of the trained model: placed at the run's layout, in its
precision, and counted in its memory. It reads its own token ids of an answer's conversation, by its
own tokenizer and chat template, so it may be of another family than the model that answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.align.reward_config import RewardConfig, RewardModel
from bevatron.align.rewards import Outside, Rewards
from bevatron.align.scorers import Asked
from bevatron.bridge.open_weights import open_weights, paper
from bevatron.chat.chat_messages import ChatError
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.nn.output_heads import last_token
from bevatron.parallel.companion import Companion
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.forward_pass import forward, micro_batches, sequence_scores
from bevatron.parallel.on_all_ranks import on_all
from bevatron.spec import Head
from bevatron.train.run_start import spec_named

Found = list[float | str | None]


class Judge(Companion):
    """A reward model of a run.

    Raises BevatronError if there is none at the path, or its scores are no reward."""

    of_batches = False

    def __init__(self, config: RewardModel, where: str) -> None:
        if not config.path:  # of a dry run, which has its sizes alone
            spec = spec_named(str(config.like))
            spec = replace(spec, head=Head("sequence_classification", ("reward",), pad_token_id=0))
            opened = paper(Path(str(config.like)), for_spec(spec), spec, "", "BF16")
            super().__init__(spec, opened, at_end=sequence_scores)
            return
        try:
            opened = open_weights(config.path)
        except BevatronError as error:
            raise BevatronError(f"{where}: {error}") from error
        head = opened.spec.head
        if head.kind != "sequence_classification":
            raise BevatronError(
                f"{where}: {config.path} has the head {head.kind}, but a reward model scores whole "
                "sequences; name a model of objective reward, or a sequence classifier"
            )
        if head.pad_token_id is None:
            raise BevatronError(
                f"{where}: {config.path} names no pad_token_id, so the ends of sequences cannot be "
                "told; set it in its config.json"
            )
        super().__init__(opened.spec, opened, at_end=sequence_scores)
        self.pad_token_id, self.where = head.pad_token_id, where
        self.weighing = _weighing(config, head.labels, where)
        if opened.source is None:
            raise BevatronError(f"{where}: {config.path} comes without a tokenizer; add one")
        self.examples = ChatExamples.open(opened.source)

    def scores(self, answers: Sequence[Asked] | None) -> Found:
        """A number for each answer, or why it has none. Collective; `answers`: on rank 0 alone."""
        main = dist.get_rank() == 0
        sequences, problems = on_all(lambda: self._encoded(answers or ()) if main else None)[0]  # type: ignore[misc]
        found: Found = list(problems)
        places = [i for i, problem in enumerate(problems) if problem is None]
        if places:
            rewards = self._forward(sequences) @ self.weighing
            for place, reward in zip(places, rewards, strict=True):
                found[place] = float(reward)
        return found

    def _encoded(
        self, answers: Sequence[Asked]
    ) -> tuple[list[NDArray[np.int64]], list[str | None]]:
        """The token ids of the answers that have some; and of each answer why it has none."""
        sequences, problems = [], list[str | None]()
        most = self.spec.max_position_embeddings
        for answer in answers:
            completion: Any = answer.text
            if not isinstance(answer.prompt, str):
                completion = [{"role": "assistant", "content": answer.text}]
            try:
                ids = self.examples.completion(answer.prompt, completion).ids
            except ChatError as error:
                problems.append(str(error))
                continue
            problem = None
            if len(ids) > most:
                problem = f"is longer than its context of {most:,} tokens"
            elif ids.max() >= self.spec.vocab_size:
                problem = f"has a token id that it does not know ({ids.max()})"
            problems.append(problem)
            if problem is None:
                sequences.append(ids)
        return sequences, problems

    def _forward(self, sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        """[sequences, labels], on all ranks: every data-parallel one computes its part."""
        placed, layout = self.placed, self.placed.layout
        unit = 2 * layout.cp * layout.tp  # that ranks cut a sequence into
        length = -(-max(map(len, sequences)) // unit) * unit
        each = -(-len(sequences) // (layout.dp * self.micro_batch)) * self.micro_batch
        tokens = np.full((each * layout.dp, length), self.pad_token_id, dtype=np.int64)
        for row, one in zip(tokens, sequences, strict=False):
            row[: len(one)] = one
        mine = slice(placed.dp_rank * each, (placed.dp_rank + 1) * each)
        ids = torch.from_numpy(tokens[mine]).to(placed.device)
        batch = {"last": last_token(ids, self.pad_token_id)}
        first = True
        if layout.cp > 1:
            ids, batch = ContextParallel(placed.mesh["cp"]).take(ids, batch)
            first = placed.mesh.get_local_rank("cp") == 0
        parts = micro_batches(ids, batch, self.micro_batch)
        ends = [one.end for one in forward(placed, parts, self.at_end)]
        whole = torch.zeros(len(tokens), len(self.weighing), device=placed.device)
        if placed.reports and first:  # the same on all ranks that share a sequence
            whole[mine] = torch.cat(ends).float()
        dist.all_reduce(whole)
        scores: NDArray[np.float64] = whole[: len(sequences)].double().cpu().numpy()
        return scores


def judges(configs: Sequence[RewardConfig]) -> dict[str, Companion]:
    """The reward models among some rewards, opened, by the names that the rewards have."""
    names = Rewards(configs, elsewhere(configs)).names
    return {
        names[number]: Judge(config, f"objective.rewards.{number}")
        for number, config in enumerate(configs)
        if isinstance(config, RewardModel)
    }


def elsewhere(configs: Sequence[RewardConfig]) -> dict[int, Outside]:
    """For `Rewards`, where nothing is scored yet: which of them are reward models."""

    def none(answers: Sequence[Asked]) -> Sequence[float | None]:
        raise NotImplementedError("a reward model scores where it is placed")

    return {i: none for i, config in enumerate(configs) if isinstance(config, RewardModel)}


def _weighing(config: RewardModel, labels: Sequence[str], where: str) -> NDArray[np.float64]:
    """What the scores [labels] are multiplied by before they are added up."""
    given: Mapping[str, float] = config.attributes
    if not given and len(labels) == 1:
        return np.ones(1)
    unknown = [name for name in given if name not in labels]
    if unknown or not given:
        what = f"it has no {', '.join(unknown)}" if unknown else "attributes is missing"
        raise BevatronError(
            f"{where}: {config.path} has the scores {', '.join(labels)}, and {what}; weigh these, "
            f"as in attributes: {{{labels[0]}: 1.0}}"
        )
    return np.array([given.get(label, 0.0) for label in labels])
