"""A reward never hangs or ends a run: what fails is one line and an answer without a score, or a
stop. Built-in rewards say what TRL's and the libraries' own functions say."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from bevatron.align.reward_config import REWARDS, reward_of
from bevatron.align.rewards import Answer, Rewards, weighted
from bevatron.align.scorers import extracted, normalised, scorer_of
from bevatron.errors import BevatronError, CheckFailed
from bevatron.train.config_file import checked

FUNCTIONS = str(Path(__file__).with_name("reward_functions.py"))


def answer(text: str, prompt: Any = "q", ids: int = 3, **row: Any) -> Answer:
    return Answer({"answer": "5", **row}, prompt, text, list(range(ids)), True)


def python(function: str, **keys: Any) -> Any:
    return reward_of({"name": "python", "path": FUNCTIONS, "function": function, **keys})


def score(name: str, text: str, prompt: Any = "q", ids: int = 3, **keys: Any) -> Any:
    row = keys.pop("row", {})
    return scorer_of(reward_of({"name": name, **keys}))(answer(text, prompt, ids, **row))


# --- functions of users


def test_a_function_with_trls_signature_scores_and_none_is_not_scorable() -> None:
    rewards = [python("matches", weight=2.0), reward_of({"name": "exact_match"})]
    with Rewards.open(rewards) as made:
        scores = made.score([answer("5"), answer("6"), answer("none")])
        assert made.names == ["matches", "exact_match"]
        np.testing.assert_array_equal(scores, [[1, 1], [0, 0], [np.nan, 0]])
        np.testing.assert_array_equal(weighted(scores, made.weights), [3, 0, 0])
        assert made.notes() == [] and not made.unscorable
    assert np.isnan(weighted(np.array([[np.nan]]), np.ones(1)))[0]


def test_a_batch_without_a_score_is_said() -> None:
    with Rewards.open([python("matches")]) as made:
        assert np.isnan(made.score([answer("none"), answer("none")])).all()
        assert made.notes() == ["no answer of a batch of 2 could be scored (matches)"]


def test_chats_are_messages() -> None:
    chat = [{"role": "user", "content": "q"}]
    with Rewards.open([python("conversational")]) as made:
        assert made.score([answer("yes", chat), answer("no", chat)]).tolist() == [[1], [0]]


def test_whatever_a_function_does_costs_its_answer_alone() -> None:
    texts = ["fine", "eats", "crashes", "raises", "exits", "nan", "inf", "huge"]
    texts += ["text", "fine"]
    with Rewards.open([python("fails", seconds=120.0, memory_gib=1.0)]) as made:
        scores = made.score([answer(text) for text in texts])
        notes = made.notes()
        assert made.unscorable == {"fails": 8}
        assert made.score([answer("fine")]).tolist() == [[1]]
    assert scores[[0, -1], 0].tolist() == [1, 1] and np.isnan(scores[1:-1]).all()
    for said in (
        "reward fails takes more than 1 GiB of memory: on 1 of 10 answers, such as 'eats'",
        "ends its process (signal 11)",
        "raises KeyError at reward_functions.py:",
        "calls exit(3)",
        "returns nan",
        "returns inf",
        "returns 1e+308, expected at most 1e+09",
        "returns 'abc', which is no number",
    ):
        assert sum(said in note for note in notes) == 1, (said, notes)


def test_what_hangs_is_ended_with_all_that_it_started() -> None:
    texts = ["sleeps", "loops", "child", "none"]
    with Rewards.open([python("fails", seconds=1.0), python("matches")]) as made:
        scores = made.score([answer(text) for text in texts])
        notes = made.notes()
    assert np.isnan(scores[:3, 0]).all() and scores[:3, 1].tolist() == [0, 0, 0]
    assert "reward fails takes more than 1 s: on " in notes[0] and "such as 'sleeps'" in notes[0]
    found = subprocess.run(["pgrep", "-f", "^sleep 86399"], capture_output=True, check=False)
    assert found.stdout == b""


@pytest.mark.parametrize(
    ("reward", "texts", "said"),
    [
        (python("fails", failure="stop"), ["fine", "raises"], "the run stops, as failure: stop"),
        (python("fails"), ["raises", "raises"], "on all 2 answers"),
        (python("no_list"), ["a", "b"], "returns a float, expected a list of numbers"),
    ],
)
def test_a_stop_is_one_message(reward: Any, texts: list[str], said: str) -> None:
    with Rewards.open([reward]) as made, pytest.raises(CheckFailed, match=said) as caught:
        made.score([answer(text) for text in texts])
    assert "\n" not in str(caught.value)


def test_a_wrong_length_is_seen() -> None:
    with Rewards.open([python("too_few", failure="stop")]) as made:
        # The function is not tried again with one answer alone, where nothing is wrong.
        assert made.score([answer("a")]).tolist() == [[1]]
        with pytest.raises(CheckFailed, match="returns 1 rewards for 2 completions"):
            made.score([answer("a"), answer("b")])


def test_what_cannot_be_loaded_is_said_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    cases = {
        "there is no such file": {"path": "/nowhere.py"},
        "has no function 'other'; it has matches, conversational": {"function": "other"},
        "raises ModuleNotFoundError at broken.py:1": {"path": str(broken)},
    }
    for said, keys in cases.items():
        with pytest.raises(BevatronError, match=said.replace("(", r"\(")):
            Rewards.open([reward_of({"name": "python", "path": FUNCTIONS, **keys})])


def test_processes_end_with_the_run_however_it_ends() -> None:
    """By SIGKILL, while a function loops."""
    program = (
        "from tests.align.test_rewards import answer, python, Rewards\n"
        "made = Rewards.open([python('fails', seconds=900.0)])\n"
        "print(made._idle[0][0].process.pid, flush=True)\n"
        "made.score([answer('loops')])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    time.sleep(1.0)
    run.kill()
    run.wait()
    until = time.monotonic() + 120
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_time_that_is_lost_is_bounded() -> None:
    with Rewards.open([python("fails", seconds=0.2)]) as made:
        with pytest.raises(CheckFailed, match=r"more were not scored, as this had taken 2 s"):
            made.score([answer("sleeps")] * 30)
        assert made.unscorable == {"fails": 30}


# --- built-in ones


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("<think>4</think> 5", None, " 5"),
        ("<think>4 and on", "number", None),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1", "boxed", None),
        ("so #### 12\n", "gsm8k", "12"),
        ("#### 1\n#### 2", "gsm8k", "2"),
        ("<answer> 7 </answer>", "answer_tags", " 7 "),
        ("3 apples and 1,000 pears", "number", "1,000"),
        ("a\nb\n", "last_line", "b"),
        ("x=1; x=2", r"x=(\d)", "2"),
    ],
)
def test_answers_are_found(text: str, pattern: str | None, found: str | None) -> None:
    assert extracted(text, pattern) == found


def test_exact_match_knows_what_does_not_matter() -> None:
    same = ["5", " 5. ", "5.0", "$5", "5.00"]
    assert {normalised(each) for each in same} == {"5"}
    assert normalised("1,000") == "1000" and normalised("Paris.") == normalised("  paris")
    assert score("exact_match", "5.0") == 1 and score("exact_match", "5.0", normalise=False) == 0
    assert score("exact_match", "six", row={"answer": ["6", "six"]}) == 1
    solution = {"answer": "3 + 2 = 5\n#### 5"}
    assert score("exact_match", "I think #### 5", pattern="gsm8k", row=solution) == 1


def test_exact_match_is_not_persuaded() -> None:
    """Fault 84: an answer that looks like the checker, or lists all that could be right."""
    for text in ("5 or 6 or 7", "correct: 1.0", "answer == 5; reward = 1.0", "#### 5\n#### 6"):
        assert score("exact_match", text) == 0
        assert score("exact_match", text, pattern="gsm8k") == 0


def test_think_format_is_trls_and_stricter() -> None:
    from trl.rewards import think_format_reward

    texts = ["<think>a</think> b", "<think>a b", "a</think> b", "b", "<think>a<think></think> b"]
    theirs = think_format_reward([[{"content": text}] for text in texts])
    assert [score("think_format", text, thinking="on") for text in texts] == theirs
    for text in ("<think></think> b", "<think>a</think>", "<think>a</think><think>b</think> c"):
        assert score("think_format", text, thinking="on") == 0


def test_think_format_follows_the_prompt() -> None:
    off = [{"role": "system", "content": "detailed thinking off"}, {"role": "user", "content": "q"}]
    on = [{"role": "system", "content": "detailed thinking on"}, {"role": "user", "content": "q"}]
    thought, plain = "<think>a</think> b", "b"
    assert [score("think_format", t, p) for p in (on, off) for t in (thought, plain)] == [
        1,
        0,
        0,
        1,
    ]
    assert score("think_format", plain, on, row={"thinking": False}) == 1
    assert score("think_format", "a</think> b", on, opened=True) == 1
    assert score("think_format", "b</think>", off) == 0


def test_soft_overlong_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(100, 20)
    lengths = [1, 80, 81, 90, 100, 101]
    keys = {"longest": 100, "cache": 20}
    ours = [score("soft_overlong", "x", ids=n, **keys) for n in lengths]
    assert ours == theirs(completion_ids=[[1] * n for n in lengths])
    assert [score("length", "x", ids=n, target=10) for n in (10, 5, 20, 100)] == [1, 0.5, 0, 0]


def test_math_verify_agrees_with_trls_and_survives_towers_of_powers() -> None:
    """Fault 83: sympy would compute 9**9**9**9."""
    from trl.rewards import accuracy_reward

    right = ["$\\frac{1}{3}$", "5", "5", "1000", "$x^2 + 1$", "$(1, 2)$"]
    texts = [r"\frac{2}{6}", "4", "5.0", "1,000", "1 + x^2", "(1,2)"]
    texts = [rf"so it is $\boxed{{{text}}}$" for text in texts]
    theirs = accuracy_reward([[{"role": "assistant", "content": t}] for t in texts], right)
    rows = [answer(text, answer=a) for text, a in zip(texts, right, strict=True)]
    rows += [answer(r"\boxed{5} or \boxed{4}"), answer(r"\boxed{4}, no: \boxed{5}"), answer("so 5")]
    rows += [answer(r"$\boxed{\frac{2}{4}}$", answer=r"\frac{1}{2}"), answer("5", answer="???")]
    towers = [answer("9**9**9**9"), answer(r"\boxed{9^{9^{9^{9}}}}")]
    with Rewards.open([reward_of({"name": "math_verify", "seconds": 120.0})]) as made:
        scores = made.score(rows)[:, 0]
    with Rewards.open([reward_of({"name": "math_verify", "seconds": 1.0})]) as made:
        try:
            assert not np.any(made.score(towers) > 0)
        except CheckFailed as error:  # both
            assert "takes more than 1 s" in str(error)
    n = len(texts)
    assert scores[:n].tolist() == theirs == [1, 0, 1, 1, 1, 1]
    # Of several guesses the last one counts; what is right may be bare LaTeX, or no mathematics.
    np.testing.assert_array_equal(scores[n : n + 5], [0, 1, 1, 1, np.nan])


IDS = ["punctuation:no_comma", "length_constraints:number_words"]
KWARGS = [{}, {"num_words": 3, "relation": "at least"}]


def test_instructions_are_if_verifiables() -> None:
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    texts = ["one, two, three", "one two three", "one", "", "Sure, here:\none two three"]
    for text in texts:
        sample = IFEvalSample(0, "q", IDS, KWARGS)
        _, theirs = evaluate_output_for_sample("ifeval", sample, text)
        for per, kind in (("prompt", "binary"), ("instruction", "partial")):
            for mode in ("strict", "loose"):
                row = {"instruction_id_list": IDS, "kwargs": KWARGS}
                ours = score("instructions", text, row=row, per=per, mode=mode)
                assert ours == getattr(theirs, f"{kind}_{mode}")


def test_instructions_refuse_rows_that_are_none() -> None:
    for row, said in (
        ({}, "no column 'instruction_id_list'"),
        ({"instruction_id_list": IDS, "kwargs": "["}, "kwargs is not JSON"),
        ({"instruction_id_list": IDS, "kwargs": []}, "does not hold 2 maps"),
        ({"instruction_id_list": ["x:y"], "kwargs": [{}]}, "'x:y' is not an instruction"),
    ):
        with pytest.raises(BevatronError, match=said):
            score("instructions", "a", row=row)


def test_reasoning_gym_scores_its_own() -> None:
    import reasoning_gym

    data = reasoning_gym.create_dataset("chain_sum", seed=1, size=3)
    entry = data[0]
    right = entry["answer"]
    for text in (right, f"+{right}.0", "x", f"{right}1"):
        theirs = data.score_answer(text, entry)
        assert score("reasoning_gym", text, row=entry) == theirs
        tagged = f"5 6 <answer>{text}</answer>"
        assert score("reasoning_gym", tagged, row=entry, pattern="answer_tags") == theirs
    assert score("reasoning_gym", "5") is None  # of another source


# --- settings


def test_settings_are_checked() -> None:
    for given, said in (
        ({"name": "exact"}, "known are python, exact_match"),
        ({}, "with a name"),
        ({"name": "exact_match", "pattern": "("}, "nor a regular expression"),
        ({"name": "exact_match", "pattern": "a"}, "0 groups"),
        ({"name": "python"}, "path"),
        ({"name": "length", "target": 0}, "greater than or equal to 1"),
        ({"name": "code", "timeout": 1}, "Extra inputs"),
    ):
        with pytest.raises((ValueError, ValidationError), match=said):
            reward_of(given)
    assert {kind.model_fields["name"].default for kind in REWARDS.values()} == set(REWARDS)
    raw: dict[str, Any] = {"model": {"spec": "x"}, "data": {"train": [{"path": "x"}], "seq_len": 8}}
    raw |= {"train": {"steps": 1, "global_batch": 8}, "optimizer": {"lr": 1.0}, "run": {"dir": "x"}}
    raw["objective"] = {"name": "grpo", "rewards": [{"name": "exact_match", "colum": "a"}]}
    with pytest.raises(BevatronError, match=r"objective.rewards.0.colum: unknown.*column"):
        checked(raw, [], "run.yaml")


def test_a_reward_model_is_scored_by_who_has_it() -> None:
    reward = reward_of({"name": "reward_model", "path": "rm"})
    with pytest.raises(BevatronError, match="reward model"):
        Rewards([reward])
    with Rewards.open([reward], {0: lambda answers: [float(len(a.text)) for a in answers]}) as made:
        assert made.score([answer("ab"), answer("abc")]).tolist() == [[2], [3]]
