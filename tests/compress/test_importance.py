"""Scores are what hooks on transformers' modules say, by the definitions, at every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bevatron.bridge.convert import import_checkpoint
from bevatron.compress.importance import measure
from bevatron.compress.importance_scores import Scores, expected
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from tests.bridge.hf_folders import MAKERS
from tests.compress.calibration import SAMPLES, SEQ_LEN, measured_at, scores_at, write_tokens
from tests.specs import HETEROGENEOUS

STATISTICS = {
    "mean": lambda x, axis: x.abs().mean(axis),
    "l2": lambda x, axis: x.square().sum(axis).sqrt(),
    "var": lambda x, axis: x.var(axis, unbiased=False),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("text") / "tokens")


def save_hf(folder: Path, kind: str, **changes) -> Path:
    """A random model of transformers, without a tokenizer."""
    torch.manual_seed(0)
    model = MAKERS[kind](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def ids_of(tokens: Path) -> torch.Tensor:
    """The samples' tokens, targets included."""
    sampler = Sampler([(TokenStore.open(tokens), 1.0)], SEQ_LEN, 0)
    return torch.from_numpy(sampler.samples(np.arange(SAMPLES)))


def reference(folder: Path, tokens: Path, batch: str, sequence: str) -> dict[str, torch.Tensor]:
    """Every activation kept whole, in fp64, then aggregated by the definitions."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    head_dim = getattr(model.config, "head_dim", None) or (
        model.config.hidden_size // model.config.num_attention_heads
    )
    kept: dict[str, list[torch.Tensor]] = {}

    def keep_input(name):
        return lambda module, args: kept.setdefault(name, []).append(args[0])

    def keep_output(name):
        return lambda module, args, out: kept.setdefault(name, []).append(out)

    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        attention.o_proj.register_forward_pre_hook(keep_input(f"layers.{i}.attention.heads"))
        down = getattr(mlp, "down_proj", None) or mlp.fc2
        down.register_forward_pre_hook(keep_input(f"layers.{i}.mlp.neurons"))
        layer.register_forward_pre_hook(keep_input(f"in.{i}"))
        layer.register_forward_hook(keep_output(f"out.{i}"))
        layer.input_layernorm.register_forward_hook(keep_output(f"norm.{i}.a"))
        layer.post_attention_layernorm.register_forward_hook(keep_output(f"norm.{i}.m"))
    model.model.norm.register_forward_hook(keep_output("norm.final"))  # NanoChat's runs twice
    with torch.no_grad():
        model(ids_of(tokens)[:, :-1])

    def aggregate(x: torch.Tensor) -> torch.Tensor:
        return STATISTICS[batch](STATISTICS[sequence](x, 1), 0)

    out, channels, influence = {}, 0, []
    for name, values in kept.items():
        if name.endswith("heads"):
            out[name] = aggregate(values[0].unflatten(-1, (-1, head_dim)).norm(dim=-1))
        elif name.endswith("neurons"):
            out[name] = aggregate(values[0])
        elif name.startswith("norm"):
            channels = channels + sum(aggregate(v) for v in values)
    for i in range(len(model.model.layers)):
        x, y = kept[f"in.{i}"][0], kept[f"out.{i}"][0]
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        influence.append(1 - cosine.mean())
    return {**out, "embedding.channels": channels, "layers.block_influence": torch.stack(influence)}


def assert_close(found, wanted, tolerance: float = 1e-5) -> None:
    assert set(found) >= set(wanted)
    for name, values in wanted.items():
        a, b = np.asarray(found[name], dtype=np.float64), np.asarray(values, dtype=np.float64)
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()), name


@pytest.mark.parametrize(
    ("kind", "aggregation"),
    [
        ("llama", "l2,mean"),
        ("llama", "var,l2"),
        ("llama", "mean,var"),
        ("nemotron", "l2,mean"),
        ("nanochat", "l2,mean"),
    ],
)
def test_scores_are_those_of_hooks_on_transformers_modules(kind, aggregation, tokens, tmp_path):
    folder = save_hf(tmp_path / "hf", kind)
    batch, sequence = aggregation.split(",")
    scores = measure(folder, [tokens], samples=SAMPLES, seq_len=SEQ_LEN, aggregation=aggregation)
    wanted = reference(folder, tokens, batch, sequence)
    assert set(scores.tensors) == set(wanted)
    assert_close(scores.tensors, wanted)
    for name, values in wanted.items():
        kept = len(values) // 2
        theirs = set(values.argsort(descending=True)[:kept].tolist())
        assert set(np.argsort(-scores.tensors[name])[:kept].tolist()) == theirs, name


def test_a_loss_without_layers_is_that_of_transformers_without_them(tokens, tmp_path):
    folder = save_hf(tmp_path / "hf", "llama")
    import_checkpoint(folder, tmp_path / "native")
    options = {"samples": SAMPLES, "loss_samples": 5, "seq_len": SEQ_LEN}
    scores = measure(tmp_path / "native", [tokens], layers="spans", spans=[1, 2], **options)
    ids = ids_of(tokens)[:5]

    def loss(without: range) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
        layers = [x for i, x in enumerate(model.model.layers) if i not in without]
        model.model.layers = torch.nn.ModuleList(layers)
        model.config.num_hidden_layers = len(layers)
        with torch.no_grad():
            logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    assert scores.loss == pytest.approx(loss(range(0)), abs=1e-5)
    assert scores.loss_without() == pytest.approx([loss(range(i, i + 1)) for i in range(3)])
    assert scores.loss_without(2) == pytest.approx([loss(range(i, i + 2)) for i in range(2)])
    assert scores.spans == [2]


@pytest.mark.parametrize(
    ("spec", "aggregation", "layout"),
    [
        ("heterogeneous", "l2,mean", Layout(tp=2, sequence_parallel=True)),
        ("heterogeneous", "var,l2", Layout(tp=2, sequence_parallel=False)),
        ("nanochat", "mean,var", Layout(tp=2)),
        ("heterogeneous", "l2,mean", Layout(pp=2)),
        ("nemotron", "l2,l2", Layout(dp_shard=2)),
        ("heterogeneous", "l2,mean", Layout(pp=2, dp_shard=2)),
        ("heterogeneous", "l2,var", Layout(tp=2, dp_replicate=2)),
        pytest.param(
            *("heterogeneous", "l2,mean", Layout(pp=2, tp=2, schedule="zbv")),
            marks=pytest.mark.slow,  # with four processes, where there are two cores
        ),
    ],
    ids=str,
)
def test_scores_do_not_depend_on_the_layout(spec, aggregation, layout, tokens, pool):
    """7 samples: two data-parallel ranks have unequal shares."""
    [alone] = pool.run(1, scores_at, spec, tokens, aggregation, Layout())
    ranks = pool.run(layout.world_size, scores_at, spec, tokens, aggregation, layout)
    for found in ranks:
        assert_close(found, alone)
        assert_close(alone, found)
        for name, values in alone.items():
            if name.startswith("layers.") and values.ndim and len(values) > 1:
                kept = len(values) // 2
                mine, theirs = (set(np.argsort(-t[name])[:kept].tolist()) for t in (found, alone))
                assert mine == theirs, name
    if spec == "heterogeneous":
        assert alone["layers.block_influence"][4] == 0  # the layer of no sublayers
        assert {n: t.shape for n, t in alone.items() if n in expected(HETEROGENEOUS)} == (
            expected(HETEROGENEOUS)
        )


def test_a_checkpoint_is_measured_by_several_processes_as_by_one(tokens, tmp_path, pool):
    folder = save_hf(tmp_path / "hf", "llama", tie_word_embeddings=True)
    layout = Layout(pp=2, tp=2)
    alone = measure(folder, [tokens], samples=SAMPLES, seq_len=SEQ_LEN, layers="loss")
    for tensors, metadata in pool.run(4, measured_at, folder, tokens, layout):
        assert_close(tensors, dict(alone.tensors))
        assert {**metadata, "loss": ""} == {**alone.metadata, "loss": ""}
        assert float(metadata["loss"]) == pytest.approx(float(alone.metadata["loss"]), abs=1e-5)


def test_taps_leave_no_trace(tokens, tmp_path):
    """Twice gives the same bits, and a file survives its way through disk."""
    folder = save_hf(tmp_path / "hf", "llama")
    options = {"samples": SAMPLES, "seq_len": SEQ_LEN}
    first, second = (measure(folder, [tokens], **options) for _ in range(2))
    first.write(tmp_path / "scores")
    again = Scores.read(tmp_path / "scores")
    assert again.metadata.items() >= second.metadata.items()
    for name, values in second.tensors.items():
        np.testing.assert_array_equal(values, again.tensors[name])
    other = measure(folder, [tokens], seed=1, **options)
    assert any((other.tensors[n] != t).any() for n, t in first.tensors.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1000}, r"has \d+ samples of 16 tokens, 1000 were asked for"),
        ({"aggregation": "max,mean"}, "expected BATCH,SEQUENCE of mean, l2, var"),
        ({"layers": "ppl"}, "expected one of bi, loss, spans"),
        ({"layers": "spans", "spans": [3]}, "span of 3 layers cannot be left out of 3"),
        ({"spans": [1]}, "go with layers spans"),
        ({"seq_len": 65}, "context has 64 tokens"),
        ({"layout": Layout(cp=2)}, "no context parallelism"),
    ],
)
def test_what_cannot_be_measured_is_said(options, message, tokens, tmp_path):
    folder = save_hf(tmp_path / "hf", "llama")
    with pytest.raises(BevatronError, match=message):
        measure(folder, [tokens], **{"samples": SAMPLES, "seq_len": SEQ_LEN, **options})


def test_tokens_of_another_vocabulary_or_tokenizer_are_refused(tokens, tmp_path):
    folder = save_hf(tmp_path / "hf", "llama", vocab_size=32)
    with pytest.raises(BevatronError, match="the model has a vocabulary of 32"):
        measure(folder, [tokens], samples=SAMPLES, seq_len=SEQ_LEN)
    from tests.train.tiny_run import prepare

    run = prepare(tmp_path / "run")
    other = save_hf(tmp_path / "other", "llama", vocab_size=300)
    file = run / "tokenizer" / "tokenizer.json"
    (other / "tokenizer.json").write_bytes(file.read_bytes())
    assert measure(other, [run / "tokens"], samples=4, seq_len=SEQ_LEN).metadata["samples"] == "4"
    with pytest.raises(BevatronError, match="was made with the tokenizer toy"):
        measure(other, [tokens], samples=SAMPLES, seq_len=SEQ_LEN)


def test_a_model_of_another_head_has_scores_but_no_loss(tokens, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "hf")
    options = {"samples": SAMPLES, "seq_len": SEQ_LEN}
    scores = measure(tmp_path / "hf", [tokens], **options)
    assert "loss" not in scores.metadata and scores.heads(1).shape == (4,)
    with pytest.raises(BevatronError, match="needs the loss of a language model"):
        measure(tmp_path / "hf", [tokens], layers="loss", **options)
