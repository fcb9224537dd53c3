"""Scoring answers by rewards, each in processes of its own, under a wall clock and a memory limit.

    with Rewards.open(config.objective.rewards) as rewards:
        scores = rewards.score(answers)          # float64 [n, rewards]; NaN: cannot be scored
        total = weighted(scores, rewards.weights)
        lines = rewards.notes()                  # what went wrong, a line for each kind of failure

A reward is the user's function or the model's text run through somebody's library (a parser of
mathematics, a checker of languages, a program under test), so it may hang, eat memory, end its
process, raise, or return nonsense. None of this reaches the run: the process is stopped, the answer
counts as one that cannot be scored (or the run stops with one message, as `failure` says), and the
next answer gets a new process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.align.code_reward import code_score
from bevatron.align.reward_config import Code, PythonReward, RewardConfig, RewardModel
from bevatron.align.scorers import Asked
from bevatron.errors import BevatronError, CheckFailed

PATIENCE = 180.0  # seconds by the clock, for a process to load its reward on a busy machine
MOST_REPLY = 64 << 20  # bytes
STALLS = 10  # times `seconds` that failing calls may take in one batch; what is left is not scored

Answer = Asked
Scores = NDArray[np.float64]
Outside = Callable[[Sequence[Answer]], Sequence[float | str | None]]  # a text: why it has none


class Failed(Exception):
    """Why answers have no score. `misshapen`: no single one of them is the reason."""

    def __init__(self, why: str, misshapen: bool = False) -> None:
        super().__init__(why)
        self.misshapen = misshapen


class Worker:
    """A process that has loaded one reward. Raises BevatronError if it cannot load it."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.socket, theirs = socket.socketpair()
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bevatron.align.reward_worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if isinstance(config, PythonReward) else subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                start_new_session=True,  # so that it and what it starts can be ended together
            )
        try:
            reply = self._asked(config.model_dump(), PATIENCE)
        except Failed as error:
            self.close()
            raise BevatronError(f"reward {config.label}: {error} while it is loaded") from error
        except BaseException:
            self.close()
            raise
        if "error" in reply:
            self.close()
            raise BevatronError(f"reward {config.label}: {reply['error']}")

    def score(self, answers: Sequence[Answer]) -> list[Any]:
        """A number, None, or what is wrong with it, for each. Raises Failed if there are none; then
        the process has ended if it could not go on."""
        try:
            reply = self._asked([asdict(answer) for answer in answers], self.config.seconds)
        except Failed:
            self.close()
            raise
        if "error" in reply:
            if reply.get("full"):
                self.close()
            raise Failed(reply["error"], bool(reply.get("misshapen")))
        scores = reply.get("scores")
        if not isinstance(scores, list) or len(scores) != len(answers):
            self.close()
            raise Failed("gives no list of scores")
        return scores

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        self.socket.close()
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _asked(self, what: Any, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        data = json.dumps(what, default=str).encode()  # str: dates of a table
        try:
            self.socket.settimeout(seconds)
            self.socket.sendall(len(data).to_bytes(8, "big") + data)
            size = int.from_bytes(self._exactly(8, until), "big")
            if size > MOST_REPLY:
                raise Failed("replies with too much")
            reply: dict[str, Any] = json.loads(self._exactly(size, until))
        except TimeoutError:
            raise Failed(f"takes more than {seconds:g} s") from None
        except OSError:
            raise Failed(self._end()) from None
        return reply

    def _exactly(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self.socket.settimeout(max(0.001, until - time.monotonic()))
            piece = self.socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise Failed(self._end())
            data += piece
        return bytes(data)

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(1.0)
            said = f"signal {-status}" if status < 0 else f"exit status {status}"
            return f"ends its process ({said})"
        return "closes its connection"


@dataclass
class Scored:
    """Of one reward and one batch: scores, and why some are missing."""

    scores: Scores
    problems: dict[int, str]
    left: int = 0  # not tried: too much time had been lost


class Rewards:
    """Several rewards of one run. A context; processes start when answers come.

    Args:
        outside: of rewards that are not computed here (a reward model), by their place in the list.
    Attributes:
        names: of the rewards, each one once.
        weights: [rewards].
        unscorable: answers that could not be scored because something failed, by reward, since the
            beginning.
    Raises BevatronError if a reward cannot be loaded (by `check`, or the first `score`).
    """

    def __init__(
        self, configs: Sequence[RewardConfig], outside: Mapping[int, Outside] | None = None
    ) -> None:
        self.configs, self.outside = list(configs), outside or {}
        seen: Counter[str] = Counter()
        self.names: list[str] = []
        for number, config in enumerate(self.configs):
            if isinstance(config, RewardModel) and number not in self.outside:
                raise BevatronError(
                    f"rewards.{number}: a reward model is scored by the run that has it on its "
                    "ranks, which this is not"
                )
            seen[config.label] += 1
            again = seen[config.label]
            self.names.append(config.label if again == 1 else f"{config.label}_{again}")
        self.weights: Scores = np.array([c.weight for c in self.configs], dtype=np.float64)
        self.unscorable: Counter[str] = Counter()
        self._idle: dict[int, list[Worker]] = {n: [] for n in range(len(self.configs))}
        self._notes: list[str] = []

    @classmethod
    def open(
        cls, configs: Sequence[RewardConfig], outside: Mapping[int, Outside] | None = None
    ) -> Rewards:
        """As the constructor, with every reward loaded once, so that a mistake is said at once."""
        made = cls(configs, outside)
        try:
            made.check()
        except BaseException:
            made.close()
            raise
        return made

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check(self) -> None:
        """Load every reward."""
        for number, config in enumerate(self.configs):
            if number not in self.outside and not isinstance(config, Code):
                self._give_back(number, self._worker(number))

    def score(self, answers: Sequence[Answer]) -> Scores:
        """[n, rewards], NaN for what cannot be scored. Raises BevatronError for a reward that may
        not fail, or that fails on all answers."""
        out = np.full((len(answers), len(self.configs)), np.nan)
        if not answers:
            return out
        for number, (config, name) in enumerate(zip(self.configs, self.names, strict=True)):
            found = self._scored(number, answers)
            out[:, number] = found.scores
            self._judge(config, name, found, answers)
        if np.isnan(out).all():
            names = ", ".join(self.names)
            self._notes.append(f"no answer of a batch of {len(out)} could be scored ({names})")
        return out

    def notes(self) -> list[str]:
        """What went wrong since the last call, a line for each reward and reason."""
        out, self._notes = self._notes, []
        return out

    def close(self) -> None:
        for workers in self._idle.values():
            while workers:
                workers.pop().close()

    def _scored(self, number: int, answers: Sequence[Answer]) -> Scored:
        config = self.configs[number]
        found = Scored(np.full(len(answers), np.nan), {})
        if number in self.outside:
            self._enter(found, range(len(answers)), list(self.outside[number](answers)))
            return found
        places: list[range] = [range(i, i + 1) for i in range(len(answers))]
        if not config.singly:
            try:
                self._enter(found, range(len(answers)), self._call(number, answers))
                return found
            except Failed as error:
                if len(answers) == 1 or error.misshapen:
                    found.problems = dict.fromkeys(range(len(answers)), str(error))
                    return found
            # One of them may be the reason: each is tried alone.
        lost = [0.0]

        def one(place: range) -> None:
            if lost[0] > STALLS * config.seconds:
                found.left += 1
                return
            began = time.monotonic()
            try:
                mine = [answers[i] for i in place]
                self._enter(found, place, self._call(number, mine))
            except Failed as error:
                lost[0] += time.monotonic() - began
                found.problems[place.start] = str(error)

        if config.processes == 1:
            for place in places:
                one(place)
        else:
            with ThreadPoolExecutor(config.processes) as threads:
                list(threads.map(one, places))
        return found

    def _call(self, number: int, answers: Sequence[Answer]) -> list[Any]:
        """Raises Failed."""
        config = self.configs[number]
        if isinstance(config, Code):
            return [code_score(config, answer.row, answer.text) for answer in answers]
        worker = self._worker(number)
        try:
            return worker.score(answers)
        finally:
            self._give_back(number, worker)

    def _worker(self, number: int) -> Worker:
        while idle := self._idle[number]:
            if not (worker := idle.pop()).ended:
                return worker
        return Worker(self.configs[number])

    def _give_back(self, number: int, worker: Worker) -> None:
        if not worker.ended:
            self._idle[number].append(worker)

    def _enter(self, found: Scored, place: range, scores: list[Any]) -> None:
        for i, score in zip(place, scores, strict=True):
            if isinstance(score, str):
                found.problems[i] = score
            elif score is not None:
                if math.isfinite(score):
                    found.scores[i] = score
                else:
                    found.problems[i] = f"returns {score}"

    def _judge(
        self, config: RewardConfig, name: str, found: Scored, answers: Sequence[Answer]
    ) -> None:
        """Say what failed; raise if it may not, or if everything did."""
        if not found.problems:
            return
        n = len(answers)
        self.unscorable[name] += len(found.problems) + found.left
        lines = []
        for reason, count in Counter(found.problems.values()).most_common():
            first = next(i for i, said in found.problems.items() if said == reason)
            text = " ".join(answers[first].text.split())[:60]
            which = f"all {n} answers" if count == n else f"{count} of {n} answers"
            lines.append(f"reward {name} {reason}: on {which}, such as {text!r}")
        if found.left:
            lines[-1] += (
                f"; {found.left} more were not scored, as this had taken "
                f"{STALLS * config.seconds:g} s"
            )
        if config.failure == "stop":
            raise CheckFailed(f"{lines[0]}; the run stops, as failure: stop says")
        if n > 1 and len(found.problems) + found.left == n:
            raise CheckFailed(f"{lines[0]}; nothing can be learned from that, so the run stops")
        self._notes += lines


def weighted(scores: Scores, weights: Scores) -> Scores:
    """[n]: the sum of each answer's rewards times their weights, over those that could be scored;
    NaN where none could."""
    total: Scores = np.nansum(scores * weights, axis=1)
    total[np.isnan(scores).all(axis=1)] = np.nan
    return total
