import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_recipe.baselines.rehearsal import EVAL_CRASHES, EvaluationRehearsal, rehearse_evaluation
from hf_recipe.instruments.quiet import quiet
from hf_recipe.trainer.preflight import subject_of_trainer
from tests.models import arguments, bert, words


def rehearsal(**changes):
    return EvaluationRehearsal(
        **{"rows": 7, "total_rows": 500, "returned": "dict", "computes_metrics": True, **changes}
    )


def raised(error, **changes):
    return rehearsal(
        failed_in="compute_metrics", error=error, place="train.py:12", returned="", **changes
    )


@pytest.mark.parametrize(
    ("given", "severity"),
    [
        (raised("KeyError"), "error"),
        (raised("TypeError", text="unsupported: <class 'tuple'>"), "error"),
        (raised("ValueError", whole_set=True), "error"),
        (raised("ValueError"), "warning"),  # only a sample could be tried
        (raised("ValueError", rows=500), "error"),
        (raised("ValueError", rows=500, text="Only one class present in y_true"), "warning"),
        (raised("ZeroDivisionError", whole_set=True), "warning"),
        (rehearsal(failed_in="prediction_step", error="ValueError"), "error"),
        (rehearsal(returned="float"), None),
        (rehearsal(returned="NoneType"), None),
        (rehearsal(not_serialisable=("confusion",)), None),
    ],
)
def test_a_failing_evaluation(given, severity):
    (fault,) = EVAL_CRASHES.judge(given)
    assert fault.severity == severity
    assert given.text not in fault.message or not given.text


def test_an_evaluation_that_passes_is_silent():
    assert list(EVAL_CRASHES.judge(rehearsal(metric_names=("accuracy",)))) == []
    assert list(EVAL_CRASHES.judge(rehearsal(returned="", computes_metrics=False))) == []


def rehearsed(folder, metrics, kind=Trainer, preprocess=None, rows=60, **args):
    trainer = kind(
        model=bert(),
        args=arguments(folder, **args),
        train_dataset=words(32),
        eval_dataset=words(rows, seed=2),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
    )
    with quiet(trainer.model, trainer=trainer):
        (located,) = rehearse_evaluation(subject_of_trainer(trainer, fresh=True))
    return located.measurement


def test_the_names_of_the_metrics_are_measured(tmp_path):
    measured = rehearsed(tmp_path, lambda p: {"f1": 0.5, "accuracy": np.float32(0.25)})
    assert measured.metric_names == ("f1", "accuracy")
    assert measured.not_serialisable == ()
    assert measured.rows == 7


def test_several_classes_stand_in_the_sample(tmp_path):
    classes = []

    class Keep:
        def __call__(self, prediction):
            classes.extend(prediction.label_ids.tolist())
            return {"a": 1.0}

    rehearsed(tmp_path, Keep())
    assert set(classes) == {0, 1, 2, 3}


def test_arrays_among_the_metrics_are_told(tmp_path):
    measured = rehearsed(tmp_path, lambda p: {"confusion": np.eye(3), "accuracy": 0.5})
    assert measured.not_serialisable == ("confusion",)


def test_a_metric_over_all_batches_is_rehearsed_batch_by_batch(tmp_path):
    class Accumulating:
        def __init__(self):
            self.right = []

        def __call__(self, prediction, compute_result=False):
            assert isinstance(prediction.predictions, torch.Tensor)
            self.right += (prediction.predictions.argmax(-1) == prediction.label_ids).tolist()
            return {"accuracy": float(np.mean(self.right))} if compute_result else {}

    metric = Accumulating()
    measured = rehearsed(tmp_path, metric, batch_eval_metrics=True)
    assert measured.metric_names == ("accuracy",)
    assert metric.right == []


def test_inputs_and_losses_are_given_where_asked_for(tmp_path):
    def metric(prediction):
        assert prediction.inputs.shape == (7, 12)
        assert len(prediction.losses) == 2 * 16
        return {"a": 1.0}

    measured = rehearsed(tmp_path, metric, include_for_metrics=["inputs", "loss"])
    assert measured.failed_in == ""


def test_each_stage_is_named(tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no")

    class Predicting(Trainer):
        prediction_step = broken

    assert rehearsed(tmp_path, broken).failed_in == "compute_metrics"
    assert rehearsed(tmp_path, lambda p: {}, preprocess=broken).failed_in == (
        "preprocess_logits_for_metrics"
    )
    assert rehearsed(tmp_path, lambda p: {}, kind=Predicting).failed_in == "prediction_step"


def test_a_prediction_step_without_labels_is_seen(tmp_path):
    class Bare(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                return None, model(**inputs).logits, None

    measured = rehearsed(tmp_path, lambda p: {"a": 1.0}, kind=Bare)
    assert (measured.loss, measured.labels, measured.stock_step) == (False, False, False)
    assert measured.returned == ""
