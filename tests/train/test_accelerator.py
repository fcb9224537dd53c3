"""On an accelerator the same code gives the same numbers. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevatron.generate.engine import Engine
from bevatron.generate.request import Request
from bevatron.nn.decoder import Decoder
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import default_device, mesh, world
from bevatron.parallel.random_weights import fill
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.objectives import Pretrain
from bevatron.train.trainer import Trainer
from tests.generate import engine_models
from tests.specs import ALL

pytestmark = pytest.mark.skipif(default_device().type == "cpu", reason="no accelerator here")


def losses(spec: str, device: torch.device, precision: str, compiled: bool) -> list[float]:
    train = TrainConfig(
        steps=4, global_batch=8, micro_batch=4, precision=precision, compile=compiled
    )
    with world(device):
        layout = Layout()
        trainer = Trainer(
            ALL[spec],
            layout,
            mesh(layout, device),
            Pretrain(),
            seq_len=32,
            train=train,
            optimizer=OptimizerConfig(lr=1e-2),
            device=device,
        )
        trainer.fill_random(0)
        out = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(ALL[spec].vocab_size, (8, 33), generator=generator)
            out += trainer.step({"tokens": ids.to(device)}, 1e-2)
    return out


@pytest.mark.parametrize("spec", ALL)
def test_training_equals_the_cpu(spec: str) -> None:
    """fp32 without TF32: relative 1e-4 (another order of sums, four AdamW steps); bf16 2%."""
    expected = losses(spec, torch.device("cpu"), "fp32", False)
    assert losses(spec, default_device(), "fp32", False) == pytest.approx(expected, rel=1e-4)
    assert losses(spec, default_device(), "fp32", True) == pytest.approx(expected, rel=1e-4)
    rounded = losses(spec, default_device(), "bf16", False)
    assert rounded[::2] == pytest.approx(expected[::2], rel=2e-2)


@pytest.mark.parametrize("spec", ALL)
def test_logits_equal_the_cpu(spec: str) -> None:
    decoder = Decoder(ALL[spec])
    known = {p.name: p for p in ALL[spec].parameters()}
    for name, parameter in decoder.named_parameters():
        fill(parameter, known[name], ALL[spec], 0)
    ids = torch.randint(ALL[spec].vocab_size, (2, 12))
    with torch.inference_mode():
        expected = decoder.logits(ids)
        device = default_device()
        decoder, ids = decoder.to(device), ids.to(device)
        assert (decoder.logits(ids).cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", engine_models.KINDS)
def test_answers_equal_the_cpus(tmp_path: Path, kind: str) -> None:
    """Ragged prompts, in one batch."""
    engine_models.make(tmp_path / "hf", kind)
    requests = [Request(tuple(range(3, 3 + n)), 20, logprobs=0) for n in (1, 7, 30)]
    answers = []
    for device in (torch.device("cpu"), default_device()):
        with Engine.open(tmp_path / "hf", device=device) as engine:
            answers.append(engine.complete(requests))
    for expected, got in zip(*answers, strict=True):
        assert got.tokens == expected.tokens
        for a, b in zip(expected.logprobs, got.logprobs, strict=True):
            assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
