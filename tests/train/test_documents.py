"""Documents packed into one sequence are trained on as if each were alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.checkpoint.rank_boxes import local
from bevatron.nn import attention_kernels
from bevatron.nn.decoder import Decoder
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.train.objectives import Pretrain, Samples
from tests.processes import Pool
from tests.specs import ALL
from tests.train_steps import Case, make_trainer, samples

Gradients = dict[str, Tensor]


def packed(case: Case, dense: bool) -> tuple[float, Gradients, Gradients, Samples]:
    """Loss and gradients of a step's packed samples as the trainer has them; its weights."""
    before, attention_kernels.DENSE = attention_kernels.DENSE, {"cpu": 2**20 if dense else 0}
    try:
        trainer = make_trainer(case)
        batch = samples(trainer, 0, documents=True)
        ids, extra = trainer.objective.batch(batch)
        (count,) = trainer.objective.count(extra)
        loss = trainer.runner.step(ids, extra, torch.tensor([1.0 / count])) / count
    finally:
        attention_kernels.DENSE = before
    parameters = trainer.placed.parameters
    weights = {n: local(p.detach()) for n, p in parameters.items()}
    return float(loss), {n: local(p.grad) for n, p in parameters.items()}, weights, batch


def apart(spec: str, weights: Gradients, batch: Samples) -> tuple[float, Gradients]:
    """The same of every document in a sequence of its own, without masks."""
    decoder = Decoder(ALL[spec])
    decoder.load_state_dict(weights, strict=False)
    decoder.tie()
    total, count = torch.zeros(()), 0
    for tokens, documents in zip(batch["tokens"], batch["documents"], strict=True):
        for number in documents.unique():
            document = tokens[documents == number]
            if len(document) > 1:
                logits = decoder.logits(document[None, :-1])[0]
                total = total + F.cross_entropy(logits, document[1:], reduction="sum")
                count += len(document) - 1
    (total / count).backward()
    return float(total.detach() / count), {n: p.grad for n, p in decoder.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "tiled"])
@pytest.mark.parametrize("spec", ALL)
def test_packed_documents_equal_documents_apart(pool: Pool, spec: str, dense: bool) -> None:
    """fp32, relative 1e-5: the loss, and each parameter's gradient by norm of the difference."""
    loss, got, weights, batch = pool.run(1, packed, Case(spec), dense)[0]
    assert len(batch["documents"].unique()) > 4, "the test needs several documents"
    expected, gradients = apart(spec, weights, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert set(got) == set(gradients)
    for name, gradient in gradients.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_no_token_predicts_the_next_document() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    documents = torch.tensor([[0, 0, 1, 1, 2]])
    ids, batch = Pretrain().batch({"tokens": tokens, "documents": documents})
    assert ids.tolist() == [[5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[6, IGNORE, 8, IGNORE]]
    assert batch["documents"].tolist() == [[0, 0, 1, 1]]
    assert Pretrain().count(batch) == (2,)
