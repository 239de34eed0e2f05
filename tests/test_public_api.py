"""The names that others build on."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_recipe

NAMES = [
    "Augmentation",
    "WeightAveraging",
    "average_weights",
    "set_dropout",
    "Simulated",
    "GradualUnfreezing",
    "layerwise_rates",
    "decay_groups",
    "CHECKS",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "BestCheckpoints",
    "EarlyStopping",
    "GrowInput",
    "HockeyStickCallback",
    "InitialLossCallback",
    "LRDecayCallback",
    "RecipeCallback",
    "RecipeError",
    "Report",
    "__version__",
    "assert_equivalent",
    "attach",
    "compare_with_human",
    "expected_initial_loss",
    "explain",
    "group_split",
    "inspect_dataset",
    "seed_everything",
    "set_output_bias",
]

FUNCTIONS = {
    "hf_recipe.baselines.initial_loss.expected_initial_loss": [
        "logits",
        "labels",
        "problem_type",
        "groups",
        "ignore_index",
    ],
    "hf_recipe.complexify.schedule.judge_schedule": [
        "learning_rates",
        "steps_per_epoch",
        "continuation",
    ],
    "hf_recipe.complexify.loss_law.fit": ["runs"],
    "hf_recipe.complexify.loss_law.LossLaw.predict": ["self", "learning_rates"],
    "hf_recipe.complexify.loss_law.LossLaw.interval": ["self", "learning_rates", "level"],
    "hf_recipe.regularize.learning_curve.fit": ["sizes", "losses"],
    "hf_recipe.regularize.learning_curve.LearningCurve.predict": ["self", "size"],
    "hf_recipe.tune.analysis.analyse": ["trials", "space", "metric", "greater_is_better"],
    "hf_recipe.tune.space.quasi_random": ["space", "n", "seed"],
    "hf_recipe.tune.distillation_loss.chunked_divergence": [
        "student_hidden",
        "student_weight",
        "teacher_hidden",
        "teacher_weight",
        "labels",
        "kind",
        "temperature",
        "chunk_rows",
        "student_bias",
        "teacher_bias",
        "logit_scale",
        "softcap",
        "num_items",
        "ignore_index",
    ],
    "hf_recipe.regularize.early_stopping.StoppingRule.update": [
        "self",
        "value",
        "standard_error",
        "schedule_fraction",
    ],
}


def test_the_public_names_are_these():
    assert sorted(hf_recipe.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(hf_recipe, name) is not None


@pytest.mark.parametrize("path", sorted(FUNCTIONS))
def test_fixed_functions_take_these_arguments(path):
    import importlib

    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        break
    assert list(inspect.signature(found).parameters)[: len(FUNCTIONS[path])] == FUNCTIONS[path]


def test_attach_takes_what_the_contract_names():
    names = list(inspect.signature(hf_recipe.attach).parameters)
    assert names == [
        "trainer",
        "select",
        "ignore",
        "expect",
        "severity",
        "thresholds",
        "on_error",
        "baseline",
        "report_dir",
        "overhead",
        "log_samples",
    ]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = hf_recipe.atach


def test_the_first_use_of_a_name_draws_no_random_number():
    """Libraries draw when they are imported; the run's own draws must not move."""
    code = (
        "import random; random.seed(0); before = random.getstate(); import hf_recipe; "
        "hf_recipe.attach; hf_recipe.RecipeCallback; assert random.getstate() == before"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-2000:]
