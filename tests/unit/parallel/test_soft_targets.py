"""A teacher's likeliest tokens, and the divergence from them: what the formula says, by hand and by autograd."""

import pytest
import torch
from torch import Tensor

from llmtrain.parallel.parts import VocabularyPart
from llmtrain.parallel.soft_targets import divergence, likeliest
from llmtrain.values.batch import SoftTargets

VOCABULARY = VocabularyPart(0, 23)


def drawn(seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(5, 23, generator=torch.Generator().manual_seed(seed)) * scale


def soft_targets(teacher_CV: Tensor, top_k: int, temperature: float) -> SoftTargets:
    found = likeliest(teacher_CV / temperature, VOCABULARY, top_k)
    return SoftTargets(*found, temperature, 0.5)


def by_hand(student_CV: Tensor, teacher_CV: Tensor, top_k: int, temperature: float) -> Tensor:
    """KL of the distributions whose less likely tokens are one class."""
    q_CV, p_CV = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher_CV, student_CV))
    places_CK = q_CV.argsort(-1, descending=True)[:, :top_k]
    classes = [
        torch.cat((each.gather(1, places_CK), 1 - each.gather(1, places_CK).sum(-1, True)), 1) for each in (q_CV, p_CV)
    ]
    if top_k == student_CV.shape[1]:
        classes = [each[:, :-1] for each in classes]
    q, p = classes
    return (q * (q.log() - p.log())).sum(-1)


@pytest.mark.parametrize("top_k", [1, 4, 22, 23])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradient_are_those_of_the_formula(top_k: int, temperature: float) -> None:
    student, teacher, scale = drawn(1).requires_grad_(), drawn(2), torch.rand(5)
    expected = by_hand(student, teacher, top_k, temperature)
    (gradient,) = torch.autograd.grad((expected * scale).sum(), student)
    targets = soft_targets(teacher, top_k, temperature)
    loss, found = divergence(student.detach(), VOCABULARY, targets, scale)
    assert found is not None
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert divergence(student.detach(), VOCABULARY, targets, None)[1] is None


def test_with_all_tokens_it_is_the_plain_divergence() -> None:
    student, teacher = drawn(1), drawn(2)
    loss, _ = divergence(student, VOCABULARY, soft_targets(teacher, 23, 1.0), None)
    plain = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(loss, plain)


def test_equal_predictions_diverge_by_nothing() -> None:
    loss, gradient = divergence(drawn(3), VOCABULARY, soft_targets(drawn(3), 4, 2.0), torch.ones(5))
    assert gradient is not None and loss.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_probabilities_add_up_to_one_and_are_the_teachers() -> None:
    teacher = drawn(4)
    log_probs, ids, log_rest = likeliest(teacher.clone(), VOCABULARY, 6)
    torch.testing.assert_close(log_probs.exp().sum(-1) + log_rest.exp(), torch.ones(5))
    torch.testing.assert_close(log_probs, teacher.log_softmax(-1).gather(1, ids))


@pytest.mark.parametrize("scale", [60.0, 400.0])
def test_certainty_makes_no_infinity(scale: float) -> None:
    """What the others have underflows, of the teacher, of the student, or of both."""
    for student, teacher in (
        (drawn(1, scale), drawn(2)),
        (drawn(1), drawn(2, scale)),
        (drawn(1, scale), drawn(2, scale)),
    ):
        loss, gradient = divergence(student, VOCABULARY, soft_targets(teacher, 3, 1.0), torch.ones(5))
        assert gradient is not None and loss.isfinite().all() and gradient.isfinite().all()
