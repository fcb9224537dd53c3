"""transformers' own tests of a causal language model and its heads, on Llama-Nemotron: with layers
that are alike, and with layers of every kind. Skipped where those tests are not (`theirs.py`)."""

from __future__ import annotations

import unittest
from typing import Any
from unittest.mock import patch

import pytest
from transformers.models.auto import modeling_auto

from bevatron import hf
from tests.hf_common import theirs
from tests.nn.llama_nemotron_reference import block

try:
    tester, splitting = theirs.load("causal_lm_tester", "test_tensor_parallel_mixin")
except theirs.MissingError as reason:
    pytest.skip(str(reason), allow_module_level=True)

HEADS = {
    "": "Model",
    "FOR_CAUSAL_LM_": "ForCausalLM",
    "FOR_QUESTION_ANSWERING_": "ForQuestionAnswering",
    "FOR_SEQUENCE_CLASSIFICATION_": "ForSequenceClassification",
    "FOR_TOKEN_CLASSIFICATION_": "ForTokenClassification",
}
splitting.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # not only the models that they chose


class DifferingTester(tester.CausalLMModelTester):  # type: ignore[misc, name-defined]
    """What their tests ask of a model: its classes and a small configuration."""

    config_class = hf.DeciLMConfig
    base_model_class = hf.DeciLMModel
    causal_lm_class = hf.DeciLMForCausalLM
    question_answering_class = hf.DeciLMForQuestionAnswering
    sequence_classification_class = hf.DeciLMForSequenceClassification
    token_classification_class = hf.DeciLMForTokenClassification
    blocks = (block(2, 2.0), block(1, 12.0))

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        self.num_hidden_layers, self.num_attention_heads = len(self.blocks), 4

    def get_config(self) -> hf.DeciLMConfig:
        return hf.DeciLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            block_configs=[dict(each) for each in self.blocks],
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )


class MixedTester(DifferingTester):
    """A first layer without attention, 2 and 4 KV heads, matrices instead, an empty layer."""

    blocks = (
        block(None, 2.0),
        block(2, 2.0),
        block("linear", "linear"),
        block(None, None),
        block(1, 4.0),
    )


def left_out(why: str) -> Any:
    """A test of theirs that is about something else."""
    return unittest.skip(why)(lambda _: None)


class Common(tester.CausalLMModelTest):  # type: ignore[misc, name-defined]
    """All of their tests but those that are named here and below, with the reason."""

    test_bc_cache_name_forward = left_out("either name of the cache is taken without a warning")

    def setUp(self) -> None:
        super().setUp()
        for kind, head in HEADS.items():  # they know by a class's name what it is
            names = getattr(modeling_auto, f"MODEL_{kind}MAPPING_NAMES")
            self.enterContext(patch.dict(names, {hf.DeciLMConfig.model_type: f"DeciLM{head}"}))

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        """Theirs takes the same number of KV heads for every layer."""
        heads = config.num_attention_heads
        attentions = [b.attention for b in config.block_configs if b.attention.is_attention]
        self.assertGreaterEqual(len(past_key_values.layers), len(attentions))
        for layer, attention in zip(past_key_values.layers, attentions, strict=False):
            kv = heads // attention.n_heads_in_group
            self.assertEqual(layer.keys.shape, (batch_size, kv, seq_length, config.head_dim))
            self.assertEqual(layer.values.shape, layer.keys.shape)

    def _check_cache_for_generate(
        self, batch_size: int, cache: Any, seq_length: int, config: Any
    ) -> None:
        """As it may be called since 5.24."""
        self._check_past_key_values_for_generate(batch_size, cache, seq_length, config)


class DeciLMDifferingTest(Common, unittest.TestCase):
    model_tester_class = DifferingTester


class DeciLMMixedTest(Common, unittest.TestCase):
    model_tester_class = MixedTester

    test_num_layers_is_small = left_out("one layer of each kind makes five")
    has_attentions = False  # from some layers only, the others have None
