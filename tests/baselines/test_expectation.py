"""The expected initial loss, on numbers that can be checked by hand and on fresh heads."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torch.nn import functional

from hf_recipe.baselines.initial_loss import expected_initial_loss


def test_uniform_logits_cost_log_k_with_no_error():
    assert expected_initial_loss(np.zeros((6, 4)), np.array([0, 1, 2, 3, 0, 1])) == (
        pytest.approx(math.log(4)),
        0.0,
    )


def test_it_is_the_mean_over_every_pairing_of_rows_and_labels():
    z, y = torch.randn(7, 5, dtype=torch.double), torch.tensor([0, 0, 3, 1, 4, 4, 4])
    pairs = [functional.cross_entropy(z, y.roll(k)) for k in range(7)]
    expected, _ = expected_initial_loss(z, y)
    assert expected == pytest.approx(float(sum(pairs)) / 7, abs=1e-12)


def test_row_variance_is_that_of_permuted_rows():
    torch.manual_seed(0)
    z, y = torch.randn(40, 3, dtype=torch.double), torch.randint(0, 3, (40,))
    draws = torch.stack([functional.cross_entropy(z, y[torch.randperm(40)]) for _ in range(4000)])
    _, error = expected_initial_loss(z, y)
    # Permuted class names add about as much again where the logits have no structure.
    assert float(draws.std()) <= error <= 1.8 * float(draws.std())


def test_masked_rows_do_not_count_and_shapes_agree():
    z, y = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    y[0, 3:] = -100
    flat = expected_initial_loss(
        z.reshape(-1, 7), y.reshape(-1), groups=torch.arange(2).repeat_interleave(5)
    )
    assert expected_initial_loss(z, y) == pytest.approx(flat)
    kept = y.reshape(-1) != -100
    alone = expected_initial_loss(z.reshape(-1, 7)[kept], y.reshape(-1)[kept])
    assert expected_initial_loss(z, y)[0] == pytest.approx(alone[0])
    assert all(map(math.isnan, expected_initial_loss(z, torch.full((2, 5), -100))))


def test_segmentation_takes_classes_in_the_second_axis():
    z, y = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    assert expected_initial_loss(z, y) == pytest.approx(
        expected_initial_loss(z.movedim(1, -1).reshape(2, 20, 3), y.reshape(2, 20))
    )


def test_binary_outputs_and_regression():
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert expected_initial_loss(torch.zeros(2, 2), y)[0] == pytest.approx(math.log(2))
    target = torch.tensor([0.0, 2.0, 4.0])
    expected, error = expected_initial_loss(torch.zeros(3, 1), target)
    assert (expected, error) == (pytest.approx(20 / 3), 0.0)  # variance 8/3 + mean 2 squared
    expected, _ = expected_initial_loss(torch.ones(3), target, problem_type="regression")
    assert expected == pytest.approx(8 / 3 + 1)


def test_label_smoothing_moves_the_target_to_uniform():
    z, y = torch.randn(50, 6), torch.randint(0, 6, (50,))
    shuffled = [
        float(functional.cross_entropy(z, y.roll(k), label_smoothing=0.2)) for k in range(50)
    ]
    expected, _ = expected_initial_loss(z, y, label_smoothing=0.2)
    assert expected == pytest.approx(sum(shuffled) / 50, rel=1e-6)


def test_clusters_widen_the_error():
    torch.manual_seed(1)
    z = torch.randn(30, 1, 4).expand(30, 8, 4).reshape(-1, 4)
    y = torch.randint(0, 4, (30, 1)).expand(30, 8).reshape(-1)
    groups = torch.arange(30).repeat_interleave(8)
    assert expected_initial_loss(z, y, groups=groups)[1] > expected_initial_loss(z, y)[1] * 1.3


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.array([0, 1, 2]), "outside"),
        (np.zeros((3, 2)), np.array([0, 1]), "do not fit"),
    ],
)
def test_what_does_not_fit_is_an_error(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        expected_initial_loss(logits, labels)


def fresh_alarms(x, y, classes, seeds, rows):
    alarms, scores = 0, []
    for seed in range(seeds):
        torch.manual_seed(seed)
        chosen = torch.randperm(len(y))[:rows]
        net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, classes))
        with torch.no_grad():
            z = net(x[chosen])
        loss = float(functional.cross_entropy(z, y[chosen]))
        expected, error = expected_initial_loss(z, y[chosen])
        alarms += not abs(loss - expected) <= 4 * error + 0.005 * expected
        scores.append((loss - expected) / error)
    return alarms, np.std(scores)


@pytest.mark.parametrize("rows", [256, 1797])
def test_fresh_networks_on_digits_raise_no_alarm(rows):
    data = load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    alarms, spread = fresh_alarms(x, y, 10, 40, rows)
    assert alarms == 0
    assert 0.7 < spread < 1.3  # the error is neither too small nor padded


def test_two_classes_raise_no_alarm_though_rows_alone_would():
    data = load_breast_cancer()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0)).float()
    alarms, _ = fresh_alarms(x, torch.tensor(data.target), 2, 40, 569)
    assert alarms == 0


@pytest.mark.parametrize("fault", ["sum", "negated", "wrong scale", "labels known"])
def test_faults_lie_beyond_four_errors(fault):
    data = load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        z = net(x)
        if fault == "labels known":
            z = z + 3 * functional.one_hot(y, 10)
    loss = float(functional.cross_entropy(z, y))
    seen = {"sum": loss * len(y), "negated": -loss, "wrong scale": loss / 4}.get(fault, loss)
    expected, error = expected_initial_loss(z, y)
    assert abs(seen - expected) > 4 * error + 0.005 * expected


def test_classes_that_are_ruled_out_do_not_count():
    """A vocabulary padded with minus infinity gives what the vocabulary gives."""
    torch.manual_seed(0)
    z, y = torch.randn(200, 7), torch.randint(0, 7, (200,))
    walls = torch.full((200, 3), -math.inf)
    assert expected_initial_loss(torch.cat([walls, z, walls], 1), y + 3) == pytest.approx(
        expected_initial_loss(z, y)
    )


def test_groups_may_be_names_and_one_for_each_sequence():
    torch.manual_seed(0)
    z, y = torch.randn(8, 6, 5), torch.randint(0, 5, (8, 6))
    by_default = expected_initial_loss(z, y)
    assert expected_initial_loss(z, y, groups=[f"sequence {i}" for i in range(8)]) == by_default
    assert expected_initial_loss(z, y, groups=torch.arange(8)[:, None].expand(8, 6)) == by_default


def test_labels_of_the_logits_shape_are_multi_label_in_any_dtype():
    torch.manual_seed(0)
    z = torch.randn(50, 4)
    y = z + torch.randn(50, 4) > 0
    answers = [expected_initial_loss(z, labels) for labels in (y, y.long(), y.float())]
    assert answers[0] == answers[1] == answers[2]
    assert expected_initial_loss(z, y.long().argmax(1)[:, None]) == expected_initial_loss(
        z, y.long().argmax(1)
    )
