"""A native checkpoint with every kind of sublayer, written before kinds had files of their own
(commit 8394b6c), loads unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bevatron.bridge.open_native import open_native
from bevatron.generate.engine import Engine
from bevatron.generate.request import Request
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import Attention
from bevatron.spec.json import from_json, to_json
from bevatron.spec.sublayer import KINDS

FOLDER = Path(__file__).with_name("written_before")
CHECKPOINT = FOLDER / "checkpoint"
WRITTEN = json.loads((FOLDER / "answers.json").read_text())


def test_a_spec_that_was_written_before_is_written_again() -> None:
    text = (CHECKPOINT / "spec.json").read_text()
    spec = from_json(text)
    assert to_json(spec) == text
    kinds = {sublayer.kind for layer in spec.layers for _, sublayer in layer.present}
    assert kinds == {"attention", "mlp", "linear"} <= {*KINDS}
    assert any(not layer.present for layer in spec.layers)


def test_every_parameter_is_where_it_was() -> None:
    native = open_native(CHECKPOINT)
    stored = {name: entry.shape for name, entry in native.manifest.weights().items()}
    assert {p.name: p.shape for p in native.spec.parameters()} == stored


def test_it_computes_what_it_did() -> None:
    """The numbers may differ by what another CPU's order of sums does."""
    decoder, _ = load_decoder(CHECKPOINT)
    prompt = WRITTEN["prompt"]
    with torch.no_grad():
        logits = decoder.logits(torch.tensor([prompt]))[0, -1]
    assert logits.tolist() == pytest.approx(WRITTEN["logits"], abs=1e-5)
    with Engine.open(CHECKPOINT) as engine:
        answer = engine.complete([Request(tuple(prompt), len(WRITTEN["answer"]))])[0]
        position = engine.group.model.cache.bytes_per_position
    assert answer.tokens == WRITTEN["answer"]
    sublayers = [s for layer in engine.spec.layers for _, s in layer.present]
    assert position == sum(s.cache_bytes(4, 1) for s in sublayers) > 0


def test_ranks_that_do_not_divide_the_groups_keep_a_key_and_value_for_every_query_head() -> None:
    attention = Attention(12, 3, 8)
    assert [attention.cache(tp) for tp in (1, 3, 2, 4)] == [(3, 8), (1, 8), (6, 8), (3, 8)]
    assert attention.cache_bytes(2, 4) == 2 * 3 * 8 * 2
