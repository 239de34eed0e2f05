"""Judging functions of the static checks, on literal numbers."""

import pytest
import torch
from torch import nn

from hf_recipe.baselines.augmentation import Redrawn, augmentation_on
from hf_recipe.baselines.evaluation_memory import GatheredBytes, eval_memory
from hf_recipe.baselines.frozen import (
    Stack,
    TrainableParts,
    frozen_by_accident,
    head_frozen,
    output_parts,
)
from hf_recipe.baselines.initialisation import (
    SeededDraw,
    UnitSymmetry,
    seed_after_model,
    symmetric_init,
)
from hf_recipe.baselines.loaded import LoadedWeights, weights_not_loaded
from hf_recipe.baselines.modes import TrainingModes, measure_modes, trains_in_eval_mode
from hf_recipe.baselines.new_tokens import NewTokens, mean_rows, untrained_tokens
from hf_recipe.baselines.terms import AuxiliaryTerms, DropoutRates, auxiliary_off, dropout_extreme
from hf_recipe.baselines.tied import EmbeddingTie, untied_embedding
from hf_recipe.complexify.batchnorm import BatchNormRows, small_batch
from hf_recipe.data.columns_dropped import DroppedColumns, column_dropped
from hf_recipe.data.order import DrawnOrder, ordered_examples
from hf_recipe.regularize.metric_names import lower_is_better
from hf_recipe.regularize.selection import (
    EvaluationRows,
    Selection,
    eval_in_training_set,
    eval_too_small,
    metric_direction,
)
from hf_recipe.regularize.weight_decay import DecayGroups, decay_on_norms

WHOLE = {
    "elements": 1000, "trainable": 1000, "loaded": True, "adapted": False, "adapter_tensors": 0,
    "adapter_trainable": 0, "head": "classifier", "head_elements": 40, "head_trainable": 40,
    "head_drawn": True, "frozen_parts": (),
}  # fmt: skip
HEADLESS = {**WHOLE, "trainable": 960, "head_trainable": 0}
ROWS = {
    "name": "validation", "rows": 500, "labels_per_row": 1, "is_training_set": False,
    "declared": False, "split": "validation", "chooses": ("load_best_model_at_end",),
    "scheduled": True,
}  # fmt: skip
GIB = 2**30


def told(judge, measurement):
    """Severities of the faults ("default" where the check's own holds)."""
    again = type(measurement).from_values(measurement.values())
    assert again == measurement
    return [fault.severity or "default" for fault in judge(measurement)]


def stack(frozen, before, drawn, blocks=12):
    return Stack("encoder.layer", blocks, tuple(frozen), before, drawn)


@pytest.mark.parametrize(
    ("judge", "measurement", "expected"),
    [
        (head_frozen, TrainableParts(**WHOLE), []),
        (head_frozen, TrainableParts(**HEADLESS), ["default"]),
        (head_frozen, TrainableParts(**{**HEADLESS, "head_drawn": False}), []),
        (
            head_frozen,
            TrainableParts(**{**HEADLESS, "adapted": True, "loaded": False, "head_writes": True}),
            [],
        ),
        (
            head_frozen,
            TrainableParts(**{**HEADLESS, "adapted": True, "loaded": False}),
            ["default"],
        ),
        (head_frozen, TrainableParts(**{**HEADLESS, "trainable": 0}), []),
        (frozen_by_accident, TrainableParts(**WHOLE), []),
        (
            frozen_by_accident,
            TrainableParts(**{**WHOLE, "trainable": 40, "frozen_parts": ("bert",)}),
            ["default"],
        ),
        (
            frozen_by_accident,
            TrainableParts(**WHOLE, stacks=(stack([0, 1], True, False),)),
            ["warning"],
        ),
        (frozen_by_accident, TrainableParts(**WHOLE, stacks=(stack([0, 1], False, False),)), []),
        (
            frozen_by_accident,
            TrainableParts(**WHOLE, stacks=(stack([0, 1], False, True),)),
            [],
        ),
        (frozen_by_accident, TrainableParts(**WHOLE, stacks=(stack(range(12), True, True),)), []),
        (
            frozen_by_accident,
            TrainableParts(**{**WHOLE, "adapted": True, "adapter_tensors": 8}),
            ["warning"],
        ),
        (untied_embedding, EmbeddingTie(True, True, True, "e", "h", 9, False, False), []),
        (untied_embedding, EmbeddingTie(False, False, False, "e", "h", 9, False, False), []),
        (untied_embedding, EmbeddingTie(True, False, True, "e", "h", 9, False, False), ["default"]),
        (untied_embedding, EmbeddingTie(True, False, True, "e", "h", 9, True, False), ["note"]),
        (weights_not_loaded, LoadedWeights(200, 198, 196, 2, 0, 24, 0), []),
        (weights_not_loaded, LoadedWeights(200, 198, 0, 198, 0, 0, 0), ["default"]),
        (weights_not_loaded, LoadedWeights(200, 198, 196, 2, 0, 24, 0, moved=1), []),
        (weights_not_loaded, LoadedWeights(200, 198, 196, 2, 0, 24, 0, moved=2), ["default"]),
        (weights_not_loaded, LoadedWeights(200, 198, 0, 0, 196, 0, 0), ["note"]),
        (weights_not_loaded, LoadedWeights(200, 200, 198, 0, 0, 24, 23, ("a",)), ["default"]),
        (weights_not_loaded, LoadedWeights(200, 200, 198, 0, 0, 24, 2, ("a",)), ["note"]),
        (untrained_tokens, NewTokens(104, 100, False, 64, 64, 1), ["default"]),
        (untrained_tokens, NewTokens(104, 100, True, 64, 64, 1), []),
        (untrained_tokens, NewTokens(104, 100, False, 64, 0, 0), []),
        (untrained_tokens, NewTokens(104, 104, False), []),
        (symmetric_init, UnitSymmetry(12, (), ("last",), ()), []),
        (symmetric_init, UnitSymmetry(12, ("fc",), (), ()), ["default"]),
        (symmetric_init, UnitSymmetry(12, ("head",), (), ("head",)), ["warning"]),
        (symmetric_init, UnitSymmetry(4, (), ("a", "b", "c"), ()), ["default"]),
        (seed_after_model, SeededDraw(42, False, 100, False), ["default"]),
        (seed_after_model, SeededDraw(42, False, 100, True), []),
        (seed_after_model, SeededDraw(42, True, 100, False), []),
        (seed_after_model, SeededDraw(42, False, 0, False), []),
        (
            auxiliary_off,
            AuxiliaryTerms({"router_aux_loss_coef": "output_router_logits"},
                           {"router_aux_loss_coef": 0.001}, True, False),
            ["default"],
        ),
        (
            auxiliary_off,
            AuxiliaryTerms({"router_aux_loss_coef": "output_router_logits"},
                           {"router_aux_loss_coef": 0.001}, False, False),
            [],
        ),
        (dropout_extreme, DropoutRates({"layer.dropout": 0.3}), []),
        (dropout_extreme, DropoutRates({"layer.dropout": 0.5}), ["default"]),
        (dropout_extreme, DropoutRates({"layer.dropout": 0.9}), ["warning"]),
        (dropout_extreme, DropoutRates({"layer.dropout": 1.0}), ["warning"]),
        (trains_in_eval_mode, TrainingModes(1, 40, (), 3, ()), []),
        (trains_in_eval_mode, TrainingModes(1, 40, ("bert",), 0, ()), ["default"]),
        (trains_in_eval_mode, TrainingModes(1, 40, (), 0, ("norm",)), ["note"]),
        (eval_memory, GatheredBytes(100, 4, 400, 400, None, GIB, False, True), []),
        (eval_memory, GatheredBytes(9, 4, GIB, GIB, None, GIB, False, True), ["default"]),
        (eval_memory, GatheredBytes(9, 4, GIB, GIB, None, GIB, False, False), ["note"]),
        (eval_memory, GatheredBytes(9, 4, GIB, GIB, GIB, 9 * GIB, True, True), ["default"]),
        (eval_memory, GatheredBytes(9, 4, 9 * GIB, 9 * GIB, None, None, True, True), []),
        (augmentation_on, Redrawn("train", 4, (), False, True), []),
        (augmentation_on, Redrawn("train", 4, ("pixel_values",), False, True), ["default"]),
        (augmentation_on, Redrawn("validation", 4, ("pixel_values",), False, False), ["warning"]),
        (augmentation_on, Redrawn("validation", 4, ("labels",), True, False), ["default"]),
        (small_batch, BatchNormRows(3, 8, False, 1), []),
        (small_batch, BatchNormRows(3, 4, False, 8), ["default"]),
        (small_batch, BatchNormRows(0, 1, False, 1), []),
        (metric_direction, Selection("wer", True, ("load_best_model_at_end",)), ["default"]),
        (metric_direction, Selection("eval_f1", False, ("EarlyStopping",)), ["default"]),
        (metric_direction, Selection("wer", True, ()), []),
        (metric_direction, Selection("eval_loss", False, ("save_strategy=best",)), []),
        (metric_direction, Selection("score", False, ("save_strategy=best",)), []),
        (eval_in_training_set, EvaluationRows(**ROWS), []),
        (eval_in_training_set, EvaluationRows(**{**ROWS, "is_training_set": True}), ["default"]),
        (
            eval_in_training_set,
            EvaluationRows(**{**ROWS, "is_training_set": True, "declared": True}),
            ["note"],
        ),
        (eval_in_training_set, EvaluationRows(**{**ROWS, "split": "test"}), ["warning"]),
        (eval_in_training_set, EvaluationRows(**{**ROWS, "split": "test", "chooses": ()}), []),
        (eval_too_small, EvaluationRows(**ROWS), []),
        (eval_too_small, EvaluationRows(**{**ROWS, "rows": 60}), ["note"]),
        (eval_too_small, EvaluationRows(**{**ROWS, "rows": 10}), ["warning"]),
        (eval_too_small, EvaluationRows(**{**ROWS, "rows": 10, "chooses": ()}), []),
        (eval_too_small, EvaluationRows(**{**ROWS, "rows": 10, "labels_per_row": 128}), []),
        (decay_on_norms, DecayGroups(0.0, 0, 20, ""), []),
        (decay_on_norms, DecayGroups(0.01, 20, 20, "norm.weight"), ["default"]),
        (column_dropped, DroppedColumns(("text", "idx"), {}, (), ()), []),
        (column_dropped, DroppedColumns(("age",), {}, (), ("age",)), ["note"]),
        (column_dropped, DroppedColumns(("w",), {"w": "compute_loss"}, (), ("w",)), ["default"]),
        (
            column_dropped,
            DroppedColumns(("sample_weight",), {}, ("sample_weight",), ("sample_weight",)),
            ["default"],
        ),
        (ordered_examples, DrawnOrder("RandomSampler", True), []),
        (ordered_examples, DrawnOrder("SequentialSampler", False, 64, 8, 4, 0.0, 1.1), ["default"]),
        (ordered_examples, DrawnOrder("SequentialSampler", False, 64, 8, 4, 1.0, 1.1), []),
        (ordered_examples, DrawnOrder("SequentialSampler", False, 64, 8, 1, 0.0, 0.0), []),
        (ordered_examples, DrawnOrder("PairSampler", False, 64, 8, 4, 0.5, 1.1, True), ["note"]),
    ],
)  # fmt: skip
def test_verdict(judge, measurement, expected):
    assert told(judge, measurement) == expected


def test_directions():
    for name in ("eval_loss", "perplexity", "wer", "val-rmse", "mae"):
        assert lower_is_better(name) is True, name
    for name in ("accuracy", "eval_f1", "rougeL", "mAP", "recall@10"):
        assert lower_is_better(name) is False, name
    for name in ("neg_mse", "score", "loss_accuracy", "one_minus_wer"):
        assert lower_is_better(name) is None, name


def test_a_part_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert measure_modes(model, 1).affected == ()
    model[1].eval()
    assert measure_modes(model, 1).affected == ("1",)
    model[1].requires_grad_(False)  # a frozen part may well be evaluated
    assert measure_modes(model, 1).affected == ()
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    norm[1].eval()
    modes = measure_modes(norm, 1)
    assert (modes.affected, modes.norms) == ((), ("1",))


def test_rows_at_the_mean_are_new():
    table = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    assert mean_rows(table) == 60
    added = table.mean(0) + 1e-4 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert mean_rows(torch.cat([table, added])) == 60


def test_a_frozen_copy_is_no_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 8))
    model[2].requires_grad_(False)
    assert output_parts(model)[0] == "2"
    model[2].load_state_dict(model[0].state_dict())
    assert output_parts(model)[0] == "1"
