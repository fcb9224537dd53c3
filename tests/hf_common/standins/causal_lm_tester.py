"""What a checkout's module of this name brings, as far as the tests of an sdist have need of it."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch

from .test_configuration_common import ConfigTester
from .test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin


class CausalLMModelTester:
    """Classes, sizes and inputs. `get_config` is to be given."""

    base_model_class = causal_lm_class = config_class = None
    question_answering_class = sequence_classification_class = token_classification_class = None

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.is_training, self.batch_size, self.seq_length, self.num_labels = True, 4, 7, 3
        self.vocab_size, self.hidden_size = 99, 32
        self.num_hidden_layers, self.num_attention_heads = 2, 4
        self.pad_token_id, self.bos_token_id, self.eos_token_id = 0, 1, 2

    @property
    def all_model_classes(self) -> list[Any]:
        return [
            self.base_model_class,
            self.causal_lm_class,
            self.question_answering_class,
            self.sequence_classification_class,
            self.token_classification_class,
        ]

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(ids).tril()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class CausalLMModelTest(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin
):
    """All tests of the mixins that an sdist has, and that of configurations."""

    model_tester_class = model_tester = None

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.all_model_classes = self.model_tester.all_model_classes

    def test_config(self) -> None:
        ConfigTester(self, config_class=self.model_tester.config_class).run_common_tests()
