"""The engine's scheduler: which tokens are computed next, and what becomes of the results.

Decoding sequences have the first rows of the cache, so that a step works on views of the cache. A
prompt is computed in chunks beside them, in small chunks while answers are decoded, and then joins
them. Of several requests with the same prompt, as reinforcement learning has them, one computes it;
the others wait for it, copy its rows, and decode the prompt's last token as if it were new. A
request is admitted if the cache has room for its tokens and RESERVE more. If the cache runs full
nevertheless, the latest requests are put off: they give back their rows, wait at the front of the
queue, and later compute their tokens again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bevatron.generate.answer_stream import Stream
from bevatron.generate.detokenize import TextStream, Vocabulary
from bevatron.generate.engine_step import Move, Output, Scores, Segment, Step
from bevatron.generate.kv_cache import CAPACITY
from bevatron.generate.request import NoRoom, Piece, Request, TokenLogprob
from bevatron.generate.sampling import Chooser, choose

RESERVE = 512  # tokens of an answer that room is set aside for
CHUNK = 1024  # prompt tokens of a step
BESIDE = 64  # and while answers run, which wait for it


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        tokens: the prompt and the answer so far; `computed`: how many of them the cache holds.
        goal: how many of them to compute before one is sampled; all but the last if none is.
        arrival: its number in the order of all.
        scored: what was found out about the prompt's tokens from the second one on.
    """

    request: Request
    stream: Stream
    chooser: Chooser
    text: TextStream | None
    tokens: list[int]
    goal: int
    arrival: int
    row: int = -1
    computed: int = 0
    scored: list[TokenLogprob] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Positions that are set aside for it. (The last token of an answer is not computed.)"""
        if self.text is None:
            return self.goal
        most = len(self.request.prompt) + self.request.max_new_tokens - 1
        return min(most, len(self.tokens) + RESERVE - 1)

    @property
    def answers(self) -> bool:
        """Whether tokens are sampled after its prompt."""
        return self.text is not None

    @property
    def fresh(self) -> bool:
        """Whether nothing of it is computed, and its prompt may be another one's as well."""
        prompt = len(self.request.prompt)
        whole = self.computed == 0 and len(self.tokens) == prompt > 1
        return whole and self.answers and not self.scores

    @property
    def scores(self) -> bool:
        """Whether its prompt's tokens are still to be scored."""
        unanswered = len(self.tokens) == len(self.request.prompt)
        return unanswered and self.request.prompt_logprobs is not None


class Scheduler:
    """Used by one thread.

    Args:
        max_batch: sequences that run at once; max_tokens: positions that the cache may have.
    """

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int, max_batch: int, max_tokens: int
    ) -> None:
        self.vocabulary, self.vocab_size = vocabulary, vocab_size
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []  # by row
        self.rows: list[Sequence | None] = []
        self.size, self.capacity = 0, 0  # of the cache: rows and positions
        self.moves: list[Move] = []
        self.finished = self.prompt_tokens = self.new_tokens = self.arrivals = 0
        self.before = (0, 0)  # size and capacity before the last step

    def add(self, stream: Stream, answers: bool) -> None:
        """A new request, at the end of the queue; one that is not answered is scored alone."""
        request = stream.request
        chooser = Chooser(request.sampling, request.prompt, self.vocab_size)
        tokens, text = list(request.prompt), None
        if answers:
            text = TextStream(
                self.vocabulary,
                tokens,
                request.stop_strings,
                request.skip_special_tokens,
                request.kept_tokens,
            )
        goal = len(tokens) - (not answers)
        self.arrivals += 1
        self.waiting.append(Sequence(request, stream, chooser, text, tokens, goal, self.arrivals))

    @property
    def running(self) -> list[Sequence]:
        return self.prefilling + self.decoding

    @property
    def cached_tokens(self) -> int:
        return sum(s.computed for s in self.running)

    # --- what comes next

    def next_step(self) -> Step | None:
        """None if there is nothing to do."""
        self._make_room()
        self._admit()
        segments = self._segments()
        if not segments and not self.decoding:
            return None
        needed = [s.computed + 1 for s in self.decoding]
        needed += [s.start + len(s.tokens) for s in segments]
        self.before = (self.size, self.capacity)
        self._grow(max(needed))
        moves, self.moves = self.moves, []
        return Step(
            self.size,
            self.capacity,
            moves,
            [s.tokens[-1] for s in self.decoding],
            [s.computed for s in self.decoding],
            segments,
        )

    def _admit(self) -> None:
        """Begin requests in their order, as long as rows times the longest one fit."""
        if not self.waiting:
            return
        running, row = len(self.running), 0
        longest = max((s.longest for s in self.running), default=0)
        while self.waiting and running < self.max_batch:
            sequence = self.waiting[0]
            while row < len(self.rows) and self.rows[row] is not None:
                row += 1
            longest = max(longest, sequence.longest)
            if running and max(row + 1, len(self.rows)) * longest > self.max_tokens:
                return
            self.waiting.popleft()
            running += 1
            if row == len(self.rows):
                self.rows.append(None)
            self.rows[row], sequence.row = sequence, row
            self.prefilling.append(sequence)

    def _make_room(self) -> None:
        """Put off who came last, as long as the next tokens of all do not fit."""
        while (running := self.running) and (
            len(self.rows) * max(len(s.tokens) for s in running) > self.max_tokens
        ):
            if None in self.rows:
                self._swap(self.rows.index(None), len(self.rows) - 1)
                self._drop_empty_rows()
            elif len(running) > 1:
                self._put_off(max(running, key=lambda s: s.arrival))
            else:
                return

    def _put_off(self, sequence: Sequence) -> None:
        self._leave(sequence)
        if sequence.scores:  # from the beginning, as nothing came of it yet
            sequence.scored, sequence.greedy = [], []
        sequence.row, sequence.computed = -1, 0
        sequence.goal = len(sequence.tokens) - (sequence.text is None)
        self.waiting.appendleft(sequence)

    def give_one_up(self) -> None:
        """There was not enough memory for the last step: end the request that asked for the most,
        so that all others can try again."""
        longer = self.capacity > self.before[1]
        self.size, self.capacity = self.before
        if self.prefilling and not longer:
            given_up = max(self.prefilling, key=lambda s: s.arrival)
        else:
            given_up = max(self.running, key=lambda s: len(s.tokens))
        self._leave(given_up)
        self.finished += 1
        given_up.stream.fail(
            NoRoom(
                f"there is not enough memory for this request, which has {len(given_up.tokens):,} "
                "tokens by now; ask for less, or start with a smaller max_batch or max_tokens"
            )
        )

    def _grow(self, needed: int) -> None:
        """Make the cache large enough, by doubling as long as that stays within the limit."""
        if len(self.rows) <= self.size and needed <= self.capacity:
            return
        longest = max(s.longest for s in self.running)
        rows, positions = max(1, self.size), max(CAPACITY, self.capacity)
        while rows < len(self.rows):
            rows *= 2
        while positions < needed:
            positions *= 2
        rows, positions = min(rows, self.max_batch), max(needed, min(positions, longest))
        if rows * positions > self.max_tokens:
            rows = len(self.rows)
            positions = max(needed, min(longest, self.max_tokens // rows))
        self.size, self.capacity = rows, positions

    def _segments(self) -> list[Segment]:
        left = BESIDE if self.decoding else CHUNK
        out, held = [], self._held_prompts()
        for s in self.prefilling:
            if s.fresh:
                if s.request.prompt in held:
                    continue  # it is copied when it is there
                held.add(s.request.prompt)
            start, end = s.computed, min(s.goal, s.computed + left)
            if start == end:
                break
            out.append(
                Segment(
                    s.row,
                    start,
                    s.tokens[start:end],
                    len(s.request.prompt),
                    sample=end == s.goal and s.text is not None,
                    targets=s.tokens[start + 1 : end + 1] if s.scores else [],
                    top=s.request.prompt_logprobs or 0,
                )
            )
            left -= end - start
        return out

    def _held_prompts(self) -> set[tuple[int, ...]]:
        """Those that the cache holds, or will hold when they are computed."""
        if not any(s.fresh for s in self.prefilling):
            return set()
        return {s.request.prompt for s in self.running if s.answers and not s.fresh}

    def _share(self) -> None:
        """Let those that wait for a prompt which another one has computed join those that decode,
        as if all but the last of its tokens were their own."""
        if not any(s.fresh for s in self.prefilling):
            return
        holders = {
            s.request.prompt: s
            for s in self.running
            if s.answers and s.computed >= len(s.request.prompt)
        }
        for s in [s for s in self.prefilling if s.fresh and s.request.prompt in holders]:
            length = len(s.request.prompt) - 1
            self.moves.append(Move(holders[s.request.prompt].row, s.row, length, True))
            s.computed = length
            self._join(s)

    # --- what came of it

    def take(self, step: Step, output: Output) -> None:
        """Go on with the results of the step that was last made."""
        sampled = list(self.decoding)
        for sequence in sampled:
            sequence.computed += 1
        scores = iter(output.scores)
        done = []
        for segment in step.prefill:
            held = self.rows[segment.row]
            assert held is not None
            held.computed += len(segment.tokens)
            self.prompt_tokens += len(segment.tokens)
            if segment.targets:
                _add_scores(held, segment, next(scores))
            if held.computed == held.goal:
                done.append(held)
        for sequence in done:
            if sequence.scores:
                sequence.stream.prompt_logprobs = [None, *sequence.scored]
            if sequence.text is None:
                sequence.stream.greedy = sequence.greedy
                self.end(sequence, Piece((), "", finish_reason="stop"))
            else:
                self._join(sequence)
                sampled.append(sequence)
        self._share()
        if sampled:
            self._choose(sampled, output.logits)

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> None:
        tokens = choose(logits, [s.chooser for s in sequences])
        logprobs = token_logprobs(logits, tokens, [s.request for s in sequences])
        for sequence, token, found in zip(sequences, tokens, logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.chooser.chose(token)
            self.new_tokens += 1
            piece = _piece(sequence, token, found)
            if piece.finish_reason is None:
                sequence.stream.put(piece)
            else:
                self.end(sequence, piece)

    def end(self, sequence: Sequence, last: Piece) -> None:
        """Free what the sequence holds, and end its stream."""
        self._leave(sequence)
        self.finished += 1
        sequence.stream.put(last)

    def cancel(self, streams: Iterable[Stream]) -> None:
        """End those of these that wait or run."""
        wanted = set(streams)
        for sequence in [s for s in [*self.waiting, *self.running] if s.stream in wanted]:
            self.end(sequence, Piece((), "", finish_reason="cancelled"))

    # --- rows of the cache

    def _join(self, sequence: Sequence) -> None:
        """From the prefilling ones to the decoding ones, whose rows are the first."""
        self.prefilling.remove(sequence)
        self._swap(sequence.row, len(self.decoding))
        self.decoding.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        if sequence in self.decoding:
            last = self.decoding.pop()
            if last is not sequence:  # it takes the place that becomes free
                self.moves.append(Move(last.row, sequence.row, last.computed, True))
                self.decoding[sequence.row] = self.rows[sequence.row] = last
                last.row, sequence.row = sequence.row, last.row
        else:
            self.prefilling.remove(sequence)
        self.rows[sequence.row] = None
        self._drop_empty_rows()

    def _drop_empty_rows(self) -> None:
        while self.rows and self.rows[-1] is None:
            self.rows.pop()

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        one, other = self.rows[a], self.rows[b]
        length = max(s.computed for s in (one, other) if s is not None)
        self.moves.append(Move(a, b, length, False))
        self.rows[a], self.rows[b] = other, one
        for row, held in ((a, other), (b, one)):
            if held is not None:
                held.row = row


def _piece(sequence: Sequence, token: int, found: TokenLogprob | None) -> Piece:
    request, text = sequence.request, sequence.text
    assert text is not None
    logprobs = () if found is None else (found,)
    if token in request.stop_tokens:
        return Piece((token,), text.finish(), logprobs, "stop")
    new, reason = text.add(token), None
    if len(sequence.tokens) - len(request.prompt) == request.max_new_tokens:
        new, reason = new + text.finish(), "length"
    return Piece((token,), new, logprobs, "stop" if text.stopped else reason)


def _add_scores(sequence: Sequence, segment: Segment, scores: Scores) -> None:
    tops = _pairs(scores.tokens, scores.top)
    for token, own, top in zip(segment.targets, scores.logprobs.tolist(), tops, strict=True):
        sequence.scored.append(TokenLogprob(token, own, top))
    sequence.greedy += scores.greedy.tolist()


def token_logprobs(
    logits: Tensor, tokens: list[int], requests: list[Request]
) -> list[TokenLogprob | None]:
    """Of the tokens chosen from logits [B, V], with as many likeliest ones as a request wants."""
    out: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [i for i, request in enumerate(requests) if request.logprobs is not None]
    if not rows:
        return out
    wide = logits[rows].float()
    if any(requests[i].tempered for i in rows):
        divisors = [requests[i].sampling.divisor if requests[i].tempered else 1.0 for i in rows]
        wide /= torch.tensor(divisors, device=wide.device)[:, None]
    logprobs = wide.log_softmax(-1)
    most = max(request.logprobs for request in requests if request.logprobs is not None)
    best = logprobs.topk(min(most, logits.shape[-1]))
    chosen = torch.tensor([tokens[i] for i in rows], device=wide.device)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    for i, found, top in zip(rows, own, _pairs(best.indices, best.values), strict=True):
        out[i] = TokenLogprob(tokens[i], found, top[: requests[i].logprobs])
    return out


def _pairs(tokens: Tensor, logprobs: Tensor) -> list[tuple[tuple[int, float], ...]]:
    both = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return [tuple(zip(a, b, strict=True)) for a, b in both]
