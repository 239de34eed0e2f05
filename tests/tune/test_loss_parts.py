"""What is read off a distillation loss, on literal numbers."""

import pytest
import torch
import torch.nn.functional as F

from hf_recipe.tune.loss_parts import LossParts, softened_by
from hf_recipe.tune.teacher_weight import TermWeights, judge_weights


def test_the_temperature_is_read_off_logits_and_log_probabilities():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    for temperature in (0.5, 1.0, 4.0):
        log_q = F.log_softmax(logits / temperature, -1)
        assert softened_by(logits, log_q) == pytest.approx(temperature, rel=1e-5)
    assert softened_by(logits, F.log_softmax(logits**2, -1)) is None
    assert softened_by(logits, log_q[:1]) is None
    assert softened_by(torch.zeros(2, 3), F.log_softmax(torch.zeros(2, 3), -1)) is None


class Linear(torch.nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


def seen(loss_of):
    torch.manual_seed(0)
    model, x, y = Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    parts = LossParts()
    with parts.watching(model):
        loss = loss_of(model(x)["logits"], torch.randn(6, 3), y)
    return parts, parts.weights(loss)


def test_the_weights_are_the_loss_s_derivatives():
    def loss(z, t, y):
        soft = F.kl_div((z / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
        return 0.25 * F.cross_entropy(z, y) + 0.75 * 9 * soft

    parts, found = seen(loss)
    assert found == pytest.approx({"temperature": 3, "kl_weight": 6.75, "entropy_weight": 0.25})
    assert (parts.averaged, parts.misgiven) == (0, "")


def test_a_loss_of_another_form_has_no_weights():
    def twice(z, t, y):
        soft = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
        return F.cross_entropy(z, y) + F.cross_entropy(z[:3], y[:3]) + soft

    assert seen(twice)[1] == {}
    assert seen(lambda z, t, y: F.mse_loss(z, t))[1] == {}


def test_a_mean_over_classes_and_a_target_without_softmax_are_noted():
    parts, _ = seen(lambda z, t, y: F.kl_div(z.log_softmax(-1), t.softmax(-1)))
    assert parts.averaged == 3
    parts, _ = seen(lambda z, t, y: F.kl_div(z.log_softmax(-1), t, reduction="sum"))
    assert parts.misgiven == "target"
    parts, _ = seen(lambda z, t, y: F.kl_div(z.softmax(-1), t.softmax(-1), reduction="sum"))
    assert parts.misgiven == "input"

    def masked(z, t, y):  # rows without a label are zeros on both sides
        keep = (y > 0)[:, None]
        return F.kl_div(z.log_softmax(-1), t.softmax(-1) * keep, reduction="sum")

    assert seen(masked)[0].misgiven == ""


@pytest.mark.parametrize(
    ("temperature", "soft", "hard", "fires"),
    [
        (4.0, 0.5, 0.5, True),
        (2.0, 0.9, 0.1, True),
        (4.0, 8.0, 0.5, False),  # 0.5 * T^2
        (1.0, 0.5, 0.5, False),
        (1.1, 0.5, 0.5, False),
        (4.0, 1.0, 1.0, False),  # no shares of one: as it may be meant
        (None, 0.5, 0.5, False),
    ],
)
def test_weights_that_make_one_lack_the_square(temperature, soft, hard, fires):
    weights = TermWeights(
        1.0, 1.0, None, 8, temperature=temperature, kl_weight=soft, entropy_weight=hard
    )
    faults = list(judge_weights(weights))
    assert [f.subject for f in faults] == (["the teacher"] if fires else [])


def test_what_is_no_distribution_is_said_first():
    (fault,) = judge_weights(TermWeights(1.0, 1.0, None, 8, averaged=3, misgiven="target"))
    assert "kl_div's target" in fault.message
