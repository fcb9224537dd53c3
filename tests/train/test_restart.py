"""What a restart changes: for every key of the configuration the run goes on bit for bit, or the
start says in a true line what the change does, or it is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.read_boxes import hash_file
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError
from bevatron.train.config import BranchConfig, RunConfig
from bevatron.train.config_file import checked, load_config
from bevatron.train.config_reference import every_key
from bevatron.train.launch import layout_of
from bevatron.train.launch import work as train_
from bevatron.train.restart import EFFECTS, allows, compare, effect_of, lines, refuse
from bevatron.train.run_start import Start
from bevatron.train.trainer import Trainer
from tests.commands import bevatron as command
from tests.faults.refusal import contents
from tests.processes import Pool
from tests.train.tiny_run import SPEC, metrics, prepare

# --- every key ------------------------------------------------------------------------------------

MUON, DISTILL = "optimizer.name=muon", "objective={name: distill, teacher: a}"
LABELLED = "objective={name: token_classification, labels: [a]}"
REINFORCED = "objective={name: grpo, rewards: [{name: exact_match}]}"
PREFERRED = "objective={name: dpo, reference: a}"
TOOLS = "objective.environment={tools: [calculator]}"
CURRICULUM = "objective.problems={curriculum: {}}"
VALIDATED = "data.validation=[{path: held-out}]"
# Key -> another value of it, and what both configurations have besides.
OTHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "recipe.name": ("b", ("recipe={name: a, what: a}",)),
    "recipe.what": ("b", ("recipe={name: a, what: a}",)),
    "recipe.source": ("b", ("recipe={name: a, what: a}",)),
    "recipe.from": ("b", ("recipe={name: a, what: a}",)),
    "recipe.world": ("2", ("recipe={name: a, what: a}",)),
    "prune.hidden_size": ("8", ()),
    "prune.intermediate_size": ("8", ()),
    "prune.num_attention_heads": ("8", ()),
    "prune.num_layers": ("8", ()),
    "prune.drop_layers": ("'8'", ()),
    "model.init": ("b", ("model={init: a}",)),
    "model.like": ("b", ("model={init: a}",)),
    "model.spec.depth": ("2", ("model.spec={depth: 1}", "optimizer.name=adamw")),
    "model.spec.vocab_size": ("9", ("model.spec={depth: 1}", "optimizer.name=adamw")),
    "model.spec.rules": ("july_2026", ("model.spec={depth: 1}", "optimizer.name=adamw")),
    "model.init_std": ("0.1", ()),
    "model.depth_scaled": ("true", ()),
    "tokenizer": ("b", ("tokenizer=a",)),
    "objective.name": ("question_answering", ()),
    "objective.z_loss": ("0.1", ()),
    "objective.teacher": ("b", (DISTILL,)),
    "objective.teacher_like": ("b", (DISTILL,)),
    "objective.logits": ("b", ("objective={name: distill, logits: a}",)),
    "objective.states.layers": ("{0: 1}", (DISTILL, "objective.states={layers: all}")),
    "objective.states.embedding": ("true", (DISTILL, "objective.states={layers: all}")),
    "objective.states.loss": ("mse", (DISTILL, "objective.states={layers: all}")),
    "objective.states.weight": ("2.0", (DISTILL, "objective.states={layers: all}")),
    "objective.states.project": ("true", (DISTILL, "objective.states={layers: all}")),
    "objective.divergence": ("jsd", (DISTILL,)),
    "objective.temperature": ("2.0", (DISTILL,)),
    "objective.top_k": ("2", (DISTILL,)),
    "objective.ce": ("0.5", (DISTILL,)),
    "objective.labels": ("[b]", (LABELLED,)),
    "objective.problem_type": (
        "regression",
        ("objective={name: sequence_classification, labels: [a]}",),
    ),
    "objective.new_head": ("true", (LABELLED,)),
    "objective.label_all_tokens": ("true", (LABELLED,)),
    "objective.join_words": ("true", (LABELLED,)),
    "objective.stride": ("2", ("objective.name=question_answering",)),
    "objective.attributes": ("[b]", ("objective={name: reward, attributes: [a]}",)),
    "objective.margin": ("b", ("objective.name=reward",)),
    "objective.center_rewards_coefficient": ("0.1", ("objective.name=reward",)),
    "objective.mixture": ("0.3", (DISTILL, "objective.divergence=jsd")),
    "objective.teacher_top_k": ("2", ("objective={name: on_policy_distill, teacher: a}",)),
    "objective.assistant_only_loss": ("false", ("objective.name=sft",)),
    "objective.completion_only_loss": ("false", ("objective.name=sft",)),
    "objective.packing": ("true", ("objective.name=sft",)),
    "objective.too_long": ("drop", ("objective.name=sft",)),
    "objective.chat_template": ("b", ("objective.name=sft",)),
    "objective.learn_unmasked": ("true", ("objective.name=sft",)),
    "objective.beta": ("0.3", (PREFERRED,)),
    "objective.sft_loss_weight": ("0.3", (PREFERRED,)),
    "objective.preference_avg_log_probs": ("true", (PREFERRED,)),
    "objective.reference": ("b", (PREFERRED,)),
    "objective.reference_like": ("b", (PREFERRED,)),
    "objective.precompute_reference": ("true", (PREFERRED,)),
    "objective.label_smoothing": ("0.1", (PREFERRED,)),
    "objective.robust": ("true", (PREFERRED, "objective.label_smoothing=0.1")),
    "objective.gamma": ("0.6", ("objective.name=simpo",)),
    "objective.eta": ("2.0", ("objective.name=rpo",)),
    "objective.preference_loss_weight": ("2.0", ("objective.name=rpo",)),
    "objective.responses": ("3", ("objective.name=rpo",)),
    "objective.default_chosen_reward": ("1.0", ("objective.name=rpo",)),
    "objective.default_rejected_reward": ("1.0", ("objective.name=rpo",)),
    "objective.environment.tools": ("[python]", (REINFORCED, TOOLS)),
    "objective.environment.form": ("nanochat", (REINFORCED, TOOLS)),
    "objective.environment.path": ("b", (REINFORCED, "objective.environment={path: a}")),
    "objective.environment.function": ("b", (REINFORCED, "objective.environment={path: a}")),
    "objective.environment.turns": ("2", (REINFORCED, TOOLS)),
    "objective.environment.seconds": ("2.0", (REINFORCED, TOOLS)),
    "objective.environment.memory_gib": ("2.0", (REINFORCED, TOOLS)),
    "objective.environment.allow_unguarded": ("true", (REINFORCED, TOOLS)),
    "objective.use_bias_correction_kl": ("false", (REINFORCED,)),
    "objective.problems.column": ("b", (REINFORCED, "objective.problems={}")),
    "objective.problems.template": ("b", (REINFORCED, "objective.problems={}")),
    "objective.problems.system": ("b", (REINFORCED, "objective.problems={}")),
    "objective.problems.chat": ("true", (REINFORCED, "objective.problems={}")),
    "objective.problems.curriculum.column": ("b", (REINFORCED, CURRICULUM)),
    "objective.problems.curriculum.drop_from": ("0.8", (REINFORCED, CURRICULUM)),
    "objective.problems.curriculum.drop_below": ("0.1", (REINFORCED, CURRICULUM)),
    "objective.problems.curriculum.start": ("0.5", (REINFORCED, CURRICULUM)),
    "objective.problems.curriculum.end": ("0.2", (REINFORCED, CURRICULUM)),
    "objective.problems.curriculum.width": ("0.1", (REINFORCED, CURRICULUM)),
    "objective.problems.curriculum.steps": ("4", (REINFORCED, CURRICULUM)),
    "objective.rewards": ("[{name: math_verify}]", (REINFORCED,)),
    "objective.num_generations": ("4", (REINFORCED,)),
    "objective.num_generations_eval": ("4", (REINFORCED,)),
    "objective.max_completion_length": ("4", (REINFORCED,)),
    "objective.top_p": ("0.9", (REINFORCED,)),
    "objective.min_p": ("0.1", (REINFORCED,)),
    "objective.stop_strings": ("[b]", (REINFORCED,)),
    "objective.mask_truncated_completions": ("true", (REINFORCED,)),
    "objective.dynamic_sampling": ("2", (REINFORCED,)),
    "objective.solved_at": ("2.0", (REINFORCED,)),
    "objective.steps_per_generation": ("2", (REINFORCED,)),
    "objective.num_iterations": ("2", (REINFORCED,)),
    "objective.importance_sampling_correction": ("false", (REINFORCED,)),
    "objective.importance_sampling_mode": ("token_mask", (REINFORCED,)),
    "objective.importance_sampling_clip_max": ("3.0", (REINFORCED,)),
    "objective.max_logp_difference": ("1.0", (REINFORCED,)),
    "objective.engine.tp": ("2", (REINFORCED, "objective.engine={}")),
    "objective.engine.pp": ("2", (REINFORCED, "objective.engine={}")),
    "objective.engine.replicas": ("2", (REINFORCED, "objective.engine={}")),
    "objective.engine.max_batch": ("2", (REINFORCED, "objective.engine={}")),
    "objective.loss": ("grpo", (REINFORCED,)),
    "objective.scale_rewards": ("none", (REINFORCED,)),
    "objective.epsilon": ("0.1", (REINFORCED,)),
    "objective.epsilon_high": ("0.3", (REINFORCED,)),
    "objective.delta": ("2.0", (REINFORCED,)),
    "data.train": ("[{path: b}]", ()),
    "data.stages": ("[{from_step: 9, train: [{path: b}]}]", ()),
    "data.validation": ("[{path: b}]", (VALIDATED,)),
    "data.seq_len": ("8", ()),
    "data.document_mask": ("true", ()),
    "data.allow_other_tokenizer": ("true", ()),
    "parallel.tp": ("2", ()),
    "parallel.pp": ("2", ()),
    "parallel.dp_shard": ("2", ()),
    "parallel.dp_replicate": ("2", ()),
    "parallel.cp": ("2", ()),
    "parallel.sequence_parallel": ("false", ()),
    "parallel.schedule": ("gpipe", ()),
    "parallel.virtual_stages": ("2", ()),
    "parallel.split": ("[1, 1]", ()),
    "parallel.shard": ("gradients", ()),
    "train.steps": ("16", ("schedule.name=cosine",)),
    "train.global_batch": ("8", ()),
    "train.micro_batch": ("1", ()),
    "train.precision": ("bf16", ()),
    "train.recompute": ("full", ()),
    "train.compile": ("true", ()),
    "train.device": ("cpu", ()),
    "train.freeze": ("[embed.*]", ()),
    "train.seed": ("1", ()),
    "train.val_every": ("2", (VALIDATED,)),
    "train.val_batches": ("2", (VALIDATED,)),
    "optimizer.name": ("muon", ()),
    "optimizer.lr": ("2.0e-3", ()),
    "optimizer.betas": ("[0.9, 0.99]", ()),
    "optimizer.eps": ("1e-7", ()),
    "optimizer.weight_decay": ("0.2", ()),
    "optimizer.no_decay": ("[norm]", ()),
    "optimizer.lr_scale": ("{head: 2.0}", ()),
    "optimizer.clip_grad": ("0.5", ()),
    "optimizer.muon.momentum": ("0.9", (MUON,)),
    "optimizer.muon.momentum_start": ("0.9", (MUON,)),
    "optimizer.muon.momentum_warmup": ("9", (MUON,)),
    "optimizer.muon.iterations": ("4", (MUON,)),
    "optimizer.muon.dtype": ("fp32", (MUON,)),
    "optimizer.muon.scale": ("moonshot", (MUON,)),
    "schedule.name": ("cosine", ()),
    "schedule.warmup_steps": ("9", ()),
    "schedule.min_lr": ("1.0e-4", ("schedule.name=linear",)),
    "schedule.decay_steps": ("4", ("schedule.name=wsd",)),
    "schedule.decay_fraction": ("0.5", ("schedule.name=wsd",)),
    "schedule.decay": ("cosine", ("schedule.name=wsd", "schedule.decay_steps=3")),
    "checkpoint.every": ("3", ()),
    "checkpoint.keep": ("5", ()),
    "checkpoint.keep_every": ("3", ()),
    "checkpoint.weights_every": ("3", ()),
    "checkpoint.weights_keep": ("3", ()),
    "checkpoint.async": ("true", ()),
    "checkpoint.export": ("b", ()),
    "safety.on_nonfinite": ("skip", ()),
    "safety.on_spike": ("skip", ()),
    "safety.spike_sigma": ("7.0", ()),
    "safety.spike_window": ("64", ()),
    "safety.max_skips": ("7", ()),
    "safety.max_rewinds": ("7", ()),
    "safety.hang_timeout_s": ("7.0", ()),
    "safety.check_replicas_every": ("1", ()),
    "safety.replay_every": ("2", ()),
    "log.every": ("2", ()),
    "log.tensorboard": ("true", ()),
    "log.trackio": ("true", ()),
    "log.wandb": ("true", ()),
    "log.project": ("b", ()),
    "log.name": ("b", ()),
    "log.peak_tflops": ("1.0", ()),
    "run.dir": ("b", ()),
    "run.branch_from.run": ("b", ("run.branch_from={run: a, step: 1}",)),
    "run.branch_from.step": ("2", ("run.branch_from={run: a, step: 1}",)),
}
ROPE = {"theta": "2.0e4", "kind": "yarn", "factor": "4.0", "truncate": "true"}
ROPE |= {"original_max_position_embeddings": "16", "attention_factor": "2.0"}
ROPE |= dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), "9.0")
OVERRIDDEN = "model.override={max_position_embeddings: 32, rope: {factor: 2.0}}"
OTHERS |= {f"model.override.rope.{name}": (to, (OVERRIDDEN,)) for name, to in ROPE.items()}
OTHERS["model.override.max_position_embeddings"] = "64", (OVERRIDDEN,)
ADAPTED = ("model={init: a}", "adapter={kind: lora}")
VALUES = {"kind": "dora", "rank": "2", "alpha": "2.0", "rslora": "true", "targets": "[q]"}
VALUES |= {"init": "b", "layers": "0-1", "fused": "true", "whole": "[embed.*]"}
OTHERS |= {f"adapter.{name}": (to, ADAPTED) for name, to in VALUES.items()}
KEYS = [key for key in every_key() if ".N." not in key.path]
LEAVES = [key.path for key in KEYS if key.section is None or key.listed]
# What no number depends on, and what only a real run can be asked.
QUIET = [key for key in LEAVES if effect_of(key).kind == "nothing"]


def config_of(*overrides: str) -> RunConfig:
    raw = {
        "model": {"spec": "a"},
        "data": {"train": [{"path": "a"}], "seq_len": 16},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "constant"},
        "run": {"dir": "a"},
    }
    return checked(raw, overrides, "the case")


def saved(config: RunConfig, step: int = 4, **state: Any) -> Start:
    """As a step of this configuration would be continued from."""
    known = {"step": step, "tokens": 0, "samples": step * config.train.global_batch}
    return Start(SPEC, None, Path("a/step-00000004"), "llama", state=known | state, config=config)


def said_of(old: RunConfig, new: RunConfig, step: int = 4, **state: Any) -> list[str]:
    return lines(compare(saved(old, step, **state), new, "hash of {}".format), [], old, new)


def test_every_key_of_the_configuration_has_an_effect() -> None:
    assert set(OTHERS) == set(LEAVES)
    assert set(EFFECTS) <= {key.path for key in KEYS}
    for key in LEAVES:
        assert any(key == name or key.startswith(name + ".") for name in EFFECTS), key


@pytest.mark.parametrize("key", LEAVES)
def test_a_key_that_changed_is_said_refused_or_changes_nothing(key: str) -> None:
    value, base = OTHERS[key]
    old = config_of(*base)
    other = [f"{key}={value}"]
    if key == "objective.name":
        other = ["objective={name: question_answering}"]
    new = config_of(*base, *other)
    changes, kind = compare(saved(old), new, "hash of {}".format), effect_of(key).kind
    said = lines(changes, [], old, new)
    if kind == "nothing" or key == "tokenizer":  # which only steps with one of their own have
        assert said == ["as it was saved: bit for bit the same numbers"]
        return
    assert {c.key == key or c.key.startswith(key + ".") for c in changes} == {True}
    assert said[0].startswith(key) and ("bit for bit" in said[-1]) == (kind in ("aside", "origin"))
    if kind == "fixed":
        with pytest.raises(BevatronError, match=rf"other values of {key}.*--allow-changed={key}"):
            refuse("a", changes, allowed=False)
        refuse("a", changes, allowed={key.partition(".")[0]})
    else:
        refuse("a", changes, allowed=False)


def test_what_nothing_reads_is_no_change() -> None:
    """Muon's settings under AdamW, the shape of a decay that the schedule has not."""
    for override in ("optimizer.muon.momentum=0.9", "schedule.decay=cosine", "schedule.min_lr=1e-5",
                     "schedule.decay_fraction=0.5"):  # fmt: skip
        assert compare(saved(config_of()), config_of(override), str) == []


@pytest.mark.parametrize(
    ("base", "changed", "step", "expected"),
    [
        (("schedule.name=cosine",), ("train.steps=16",), 8,
         "is another from step 9 on: 0.0004025 (step 8 had 0)"),
        (("schedule.name=cosine",), ("train.steps=9",), 8,
         "stays at 0, which step 8 had, so the steps from here on change no weights"),
        (("schedule.name=cosine",), ("train.steps=16",), 4,
         "is another from step 5 on: 0.0007778, would have had 0.0003087 (step 4 had 0.0005)"),
        (("schedule={name: wsd, decay_steps: 2}",), ("train.steps=16",), 4,
         "goes on as in a run of the new values from the beginning (step 7 has 0.001, would have "
         "had 0.0005)"),
        (("schedule={name: wsd, decay_steps: 2}",), ("train.steps=16",), 7,
         "is another from step 8 on: 0.001, would have had 0 (step 7 had 0.0005)"),
        ((), ("train.steps=16",), 8, "as it was saved: bit for bit the same numbers"),
        ((), ("optimizer.lr=2e-3",), 4,
         "is another from step 5 on: 0.002, would have had 0.001 (step 4 had 0.001)"),
        ((), ("schedule.warmup_steps=2",), 4, "the learning rate goes on as before"),
    ],
)  # fmt: skip
def test_rates_are_compared_by_their_values(
    base: tuple[str, ...], changed: tuple[str, ...], step: int, expected: str
) -> None:
    said = said_of(config_of(*base), config_of(*base, *changed), step)
    assert len(said) == 1 and expected in said[0], said


def test_which_steps_are_saved_matters_where_a_run_may_rewind() -> None:
    base, other = "safety.on_spike=rewind", "checkpoint.every=3"
    assert compare(saved(config_of()), config_of(other), str) == []
    said = said_of(config_of(base), config_of(base, other))
    assert said[0].startswith("checkpoint.every 500 -> 3: a rewind") and "bit for bit" in said[1]


def test_data_and_teachers_count_by_their_content() -> None:
    old = config_of("data.train=[{path: a}, {path: b, weight: 2.0}]", VALIDATED)
    known = {"data": {"a": "1", "b": "2"}, "validation": {"held-out": "3"}}
    here = {"x": "1", "y": "2", "z": "3"}.__getitem__
    moved = config_of(
        "data.train=[{path: x}, {path: y, weight: 2.0}]", "data.validation=[{path: z}]"
    )
    assert compare(saved(old, **known), moved, here) == []
    for train in ("[{path: y}, {path: x, weight: 2.0}]", "[{path: x}, {path: y}]",
                  "[{path: x}, {path: z, weight: 2.0}]"):  # fmt: skip
        keys = [c.key for c in compare(saved(old, **known), config_of(f"data.train={train}",
                VALIDATED), here)]  # fmt: skip
        assert keys == ["data.train"]
    taught, elsewhere = config_of(DISTILL), config_of("objective={name: distill, teacher: b}")
    assert compare(saved(taught, companions={"teacher": "f"}), elsewhere, here) == []


def test_changes_are_allowed_by_name() -> None:
    assert allows(True, "optimizer.lr") and not allows(False, "optimizer.lr")
    assert allows({"optimizer"}, "optimizer.lr") and allows({"optimizer.lr"}, "optimizer.lr")
    assert not allows({"optimizer.l"}, "optimizer.lr") and not allows(set(), "optimizer.lr")


# --- real restarts --------------------------------------------------------------------------------

Outcome = tuple[str, list[tuple[int, float, float]]]


def restart(
    folder: Path, run: str, options: list[str], allowed: Any = False, reset_at: int | None = None
) -> Outcome:
    """Go on with a run; what was said, an error included, and the steps in its metrics."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        config = load_config(Path("run.yaml"), [f"run.dir={run}", *options])
        try:
            train_(config, layout_of(config, dist.get_world_size()), allowed, reset_at)
        except BevatronError as error:
            print(f"error: {error}", file=said)
        return said.getvalue(), metrics(Path(run))


def restarts(folder: Path, cases: Mapping[str, tuple[str, list[str], Any]]) -> dict[str, Outcome]:
    """Each from a copy of a run's step 2, to step 4 unless it says otherwise."""
    out = {}
    for name, (run, options, allowed) in cases.items():
        shutil.copytree(folder / run, folder / name)
        out[name] = restart(folder, name, options, allowed)
    return out


def base_runs(folder: Path) -> dict[str, Outcome]:
    """`fp32` and `bf16`: two of four steps."""
    found = {}
    for precision in ("fp32", "bf16"):
        found[precision] = restart(folder, precision, [f"train.precision={precision}"])
        shutil.rmtree(folder / precision / "step-00000004")
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> tuple[Path, dict[str, Outcome]]:
    folder = prepare(tmp_path_factory.mktemp("restart"))
    text = (folder / "run.yaml").read_text().replace("steps: 6", "steps: 4")
    (folder / "run.yaml").write_text(text)
    return folder, pool.run(1, base_runs, folder)[0]


def test_what_is_said_to_change_nothing_changes_nothing(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """All those keys at once, in a real run."""
    folder, base = work
    skipped = ("run.dir", "log.trackio", "log.wandb")
    quiet = [key for key in QUIET if key not in skipped and not key.startswith("objective")]
    options = [f"{key}={OTHERS[key][0]}" for key in quiet if not key.startswith("recipe.")]
    options += ["data.validation=[{path: tokens}]", "recipe={name: a, what: b}"]
    said, steps = pool.run(1, restarts, folder, {"quiet": ("fp32", options, False)})[0]["quiet"]
    assert len(steps) == 3 and set(steps) <= set(base["fp32"][1])  # log.every=2 drops one
    assert "data.validation" in said and "bit for bit the same numbers" in said, said


def test_the_model_and_tokenizer_of_a_run_are_its_own(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """Another origin is not read, the start says so, and no step claims it."""
    folder, base = work
    shutil.copytree(folder / "tokenizer", folder / "other", dirs_exist_ok=True)
    changed = ["model={init: elsewhere}", "tokenizer=other"]
    said, steps = pool.run(1, restarts, folder, {"origin": ("fp32", changed, False)})[0]["origin"]
    assert steps == base["fp32"][1]
    assert (
        "step 2: model.init elsewhere is not read: the run goes on from step-00000002 (which "
        "began with spec.json)"
    ) in said
    assert "tokenizer other is not read" in said and "bit for bit the same numbers" in said
    for config in (load_config(folder / "origin/step-00000004/config.yaml", []),
                   RunConfig.model_validate(starts(folder / "origin")[-1]["config"])):  # fmt: skip
        assert (config.model.init, config.model.spec) == (None, "spec.json")
        assert config.tokenizer == "tokenizer"


def starts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def weights(step: Path, prefix: str) -> dict[str, torch.Tensor]:
    manifest = read_manifest(step)
    read = box_reader(step, manifest, prefix)
    return {
        name.removeprefix(prefix): read(name.removeprefix(prefix), (0,) * len(t.shape), t.shape)
        for name, t in manifest.tensors.items()
        if name.startswith(prefix)
    }


def test_the_master_weights_win_wherever_they_are(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """Precision changed at a restart whose updates change nothing: what is saved is what the step
    held in full, and bf16 on from fp32 and back loses no bit."""
    folder, _ = work
    still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0.0", "train.steps=3"]
    allowed = frozenset({"train.precision", "optimizer"})
    cases = {
        "widened": ("bf16", [*still, "train.precision=fp32"], allowed),
        "narrowed": ("fp32", [*still, "train.precision=bf16"], allowed),
    }
    found = pool.run(1, restarts, folder, cases)[0]
    widened = folder / "widened/step-00000003"
    masters = weights(folder / "bf16/step-00000002", "optimizer/master/")
    assert all(torch.equal(x, masters[n]) for n, x in weights(widened, "model/").items())
    assert not weights(widened, "optimizer/master/"), "fp32 weights are the masters"
    full = weights(folder / "fp32/step-00000002", "model/")
    narrowed = folder / "narrowed/step-00000003"
    assert all(torch.equal(x, full[n]) for n, x in weights(narrowed, "optimizer/master/").items())
    assert (
        "step 2: train.precision bf16 -> fp32: computes so from here on, from the step's fp32 "
        "masters"
    ) in found["widened"][0]
    for said, _ in found.values():
        assert "bit for bit" not in said and "error" not in said


def test_a_changed_batch_goes_on_where_the_data_was(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """4 samples a step, then 8, then 2, across a stage: every sample comes once, in the order that
    the stage's first sample decides; the position is saved in samples."""
    folder, _ = work
    shutil.copytree(folder / "tokens", folder / "more")
    seen, said = pool.run(1, batches, folder)[0]
    state = json.loads((folder / "batches/step-00000007/train_state.json").read_text())
    assert (state["samples"], state["batches"]) == (36, [[0, 0, 4], [2, 8, 8], [5, 32, 2]])
    a, b = (TokenStore.open(folder / name) for name in ("tokens", "more"))
    sampler = Sampler([(a, 1.0)], 16, 0, later=[(8 + 2 * 8, [(a, 1.0), (b, 1.0)])])
    assert np.array_equal(seen, sampler.samples(np.arange(36)))
    assert (
        "train.global_batch 8 -> 2: gradients are of so many samples from here on; the data "
        in said
    )
    assert "goes on at sample 32" in said and "bit for bit" not in said


def batches(folder: Path) -> tuple[NDArray[np.int64], str]:
    """The samples that a run takes of which each start has another global batch, in order, and
    what the last start said."""
    taken, step = [], Trainer.step

    def stepping(self: Trainer, samples: Any, *args: Any, **more: Any) -> Any:
        taken.append(samples["tokens"].numpy())
        return step(self, samples, *args, **more)

    stages = "data.stages=[{from_step: 4, train: [{path: tokens}, {path: more}]}]"
    for steps, size in ((2, 4), (5, 8), (7, 2)):
        options = [stages, f"train.steps={steps}", f"train.global_batch={size}"]
        with patch.object(Trainer, "step", stepping):
            said, _ = restart(folder, "batches", options, frozenset({"train.global_batch"}))
    return np.concatenate(taken), said


def test_a_step_of_before_there_were_batches_goes_on(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """Its position is its own global batch times its steps."""
    folder, _ = work
    shutil.copytree(folder / "fp32", folder / "older")
    step = folder / "older/step-00000002"
    state = json.loads((step / "train_state.json").read_text())
    for key in ("batches", "validation"):
        del state[key]
    (step / "train_state.json").write_text(json.dumps(state))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["train_state.json"] = hash_file(step / "train_state.json")
    (step / "manifest.json").write_text(json.dumps(manifest))
    case = {"older-goes-on": ("older", ["train.global_batch=2"], frozenset({"train"}))}
    said, steps = pool.run(1, restarts, folder, case)[0]["older-goes-on"]
    assert "the data goes on at sample 8" in said and len(steps) == 4
    state = json.loads((folder / "older-goes-on/step-00000004/train_state.json").read_text())
    assert (state["samples"], state["batches"]) == (12, [[0, 0, 4], [2, 8, 2]])


def test_what_is_refused_names_its_keys_and_runs_when_it_is_allowed_by_name(
    work: tuple[Path, dict[str, Outcome]],
) -> None:
    folder, base = work
    options = ("train", "run.yaml", "run.dir=named", "optimizer.clip_grad=0.5", "data.seq_len=8")
    shutil.copytree(folder / "fp32", folder / "named")
    keys = "data.seq_len,optimizer.clip_grad"
    status, said = command(folder, *options)
    assert status == 2 and "run was started with other values of data.seq_len, optimizer" in said
    assert said.rstrip().endswith(f"--allow-changed={keys}")
    for allowed, word in ((["--allow-changed=data"], "of optimizer.clip_grad;"),
                          (["--allow-changed=optimiser"], "did you mean optimizer?"),
                          (["--allow-changed", "data,optimizer.lrr"],
                           "did you mean optimizer.lr?")):  # fmt: skip
        status, said = command(folder, *options, *allowed)
        assert status == 2 and word in said
    assert metrics(folder / "named") == base["fp32"][1]
    for more in (["--allow-changed", keys], ["--allow-changed"]):
        shutil.rmtree(folder / "named")
        shutil.copytree(folder / "fp32", folder / "named")
        status, said = command(folder, "train", *more, *options[1:])
        assert status == 0 and "optimizer.clip_grad 1.0 -> 0.5: gradients are clipped there" in said
        assert "data.seq_len 16 -> 8: samples are cut otherwise" in said
        assert "bit for bit" not in said


def branches(folder: Path) -> dict[str, Outcome]:
    """Of steps 2 of both runs, as they were and otherwise."""
    out = {}
    for precision in ("fp32", "bf16"):
        options = [f"train.precision={precision}", f"run.branch_from={{run: {precision}, step: 2}}"]
        out[precision] = restart(folder, f"branch-{precision}", options)
    other = ["run.branch_from={run: fp32}", "train.steps=5", "optimizer.clip_grad=0.5",
             "train.global_batch=2", "model={init: elsewhere}", "data.seq_len=8"]  # fmt: skip
    out["other"] = restart(folder, "branch-other", other)
    shutil.move(folder / "fp32", folder / "gone")
    out["again"] = restart(folder, "branch-fp32", ["train.steps=5"])
    shutil.move(folder / "gone", folder / "fp32")
    out["refused"] = restart(folder, "branch-fp32", ["train.steps=6", "optimizer.clip_grad=0.5"])
    return out


def test_a_branch_is_the_continuation_of_another_runs_step(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """Bit for bit, in a folder of its own that needs the other one no more; what is changed is
    said, and what a later start of the branch changes is refused."""
    folder, base = work
    before = {run: contents(folder / run) for run in ("fp32", "bf16")}
    found = pool.run(1, branches, folder)[0]
    for precision in ("fp32", "bf16"):
        said, steps = found[precision]
        assert steps == base[precision][1][2:], said
        assert f"from {precision}/step-00000002, step 2" in said
        assert "step 2: as it was saved: bit for bit the same numbers" in said
        assert contents(folder / precision) == before[precision], "the other run is as it was"
    branch = folder / "branch-fp32"
    assert [p.name for p in sorted(branch.glob("step-*"))] == ["step-00000004", "step-00000005"]
    state = json.loads((branch / "step-00000004/train_state.json").read_text())
    assert (state["samples"], state["tokens"]) == (16, 4 * 4 * 16)
    config = load_config(branch / "step-00000005/config.yaml", [])
    assert config.run.branch_from == BranchConfig(run="fp32", step=2)
    assert config.model.spec == "spec.json"
    assert starts(branch)[0]["from"] == "fp32/step-00000002"
    said, steps = found["other"]
    assert [step for step, *_ in steps] == [3, 4, 5]
    for word in ("optimizer.clip_grad 1.0 -> 0.5: gradients", "on at sample 8", "seq_len 16 -> 8",
                 "model.init elsewhere is not read: the run goes on from fp32/"):  # fmt: skip
        assert word in said, said
    assert "bit for bit" not in said
    said, steps = found["again"]
    assert "bit for bit" in said and [step for step, *_ in steps] == [3, 4, 5]
    assert "started with other values of optimizer.clip_grad;" in found["refused"][0]


def test_a_branch_that_cannot_be_is_refused_before_anything_is_made(
    work: tuple[Path, dict[str, Outcome]],
) -> None:
    folder, _ = work
    shutil.copytree(folder / "fp32", folder / "damaged")
    weights = folder / "damaged/step-00000002/model/rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    for branch, more, word in (
        ("{run: fp32, step: 3}", (), "fp32 has not step 3; its steps are: 2"),
        ("{run: tokens}", (), "tokens has not a step; its steps are: none"),
        ("{run: nothing}", (), "nothing does not exist"),
        ("{run: fp32}", ("train.steps=2",), "has taken 2 steps, and train.steps is 2; raise"),
        ("{run: new}", (), "new is run.dir itself"),
        ("{run: damaged}", (), "damaged/step-00000002 is damaged: "),
    ):
        status, said = command(folder, "train", "run.yaml", "run.dir=new",
                               f"run.branch_from={branch}", *more)  # fmt: skip
        assert status == 2 and said.startswith("error: run.branch_from: ") and word in said, said
        assert not (folder / "new").exists()
    status, said = command(folder, "train", "run.yaml", "run.dir=weights", "train.steps=1",
                           "model={init: bf16/step-00000002}")  # fmt: skip
    assert status == 0 and "is a step of a run, of which the weights are taken" in said, said


def resets(folder: Path) -> dict[str, Outcome]:
    """From step 2 on with a fresh optimizer, at once and in two starts; and another optimizer."""
    out = {}
    for name, parts in {"at-once": [(4, 2)], "in-two": [(3, 2), (4, None)]}.items():
        shutil.copytree(folder / "fp32", folder / name)
        for steps, at in parts:
            options = [f"train.steps={steps}", "optimizer.betas=[0.9, 0.95]"]
            out[f"{name}-{steps}"] = restart(folder, name, options, False, at)
    shutil.copytree(folder / "fp32", folder / "muon")
    muon = ["optimizer.name=muon", "train.steps=3"]
    out["refused"] = restart(folder, "muon", muon, True)
    out["muon"] = restart(folder, "muon", muon, frozenset({"optimizer"}), 2)
    shutil.copytree(folder / "in-two", folder / "later")
    out["later"] = restart(folder, "later", ["train.steps=5"], False, 2)
    return out


def test_a_reset_optimizer_is_as_before_its_first_update(
    work: tuple[Path, dict[str, Outcome]], pool: Pool
) -> None:
    """Moments, and how many updates they count as, also after a later save; all else goes on. A
    worker that is started again after that does not reset it again."""
    folder, base = work
    found = pool.run(1, resets, folder)[0]
    said, steps = found["at-once-4"]
    assert "step 2: the optimizer's state is as before its first update" in said
    assert "bit for bit" not in said
    assert steps[:3] == base["fp32"][1][:3] and steps[3] != base["fp32"][1][3]
    assert found["in-two-4"][1] == steps and "bit for bit" in found["in-two-4"][0]
    step = folder / "in-two/step-00000003"
    first, second = (weights(step, f"optimizer/{name}/") for name in ("exp_avg", "exp_avg_sq"))
    for name, mean in first.items():  # (1 - 0.9) g and (1 - 0.95) g^2 of one gradient
        torch.testing.assert_close(mean.square() * 0.05, second[name] * 0.01)
    assert json.loads((step / "train_state.json").read_text())["optimizer_since"] == 2
    assert "another optimizer; --reset-optimizer goes on without its state" in found["refused"][0]
    assert "error" not in found["muon"][0] and len(found["muon"][1]) == 3
    assert "had been reset before, and is not again" in found["later"][0]


def test_resetting_nothing_is_refused(work: tuple[Path, dict[str, Outcome]]) -> None:
    options = ("run.dir=fresh", "--reset-optimizer")
    status, said = command(work[0], "train", "run.yaml", *options)
    assert status == 2 and said.startswith("error: --reset-optimizer: there is no step to go on")
    assert not (work[0] / "fresh").exists()
