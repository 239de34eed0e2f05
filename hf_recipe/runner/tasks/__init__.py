"""The tasks: one object each, in one table; where ``--task`` is not given, the first that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_recipe.runner.tasks.answers import QuestionAnswering
from hf_recipe.runner.tasks.base import Task
from hf_recipe.runner.tasks.choice import MultipleChoice
from hf_recipe.runner.tasks.language import CausalLM, MaskedLM
from hf_recipe.runner.tasks.multi_label import MultiLabelClassification
from hf_recipe.runner.tasks.pictures import SemanticSegmentation
from hf_recipe.runner.tasks.rows import ImageClassification, Regression, SequenceClassification
from hf_recipe.runner.tasks.tagging import TokenClassification
from hf_recipe.runner.tasks.translation import Seq2Seq

if TYPE_CHECKING:
    import datasets

    from hf_recipe.runner.options import DataOptions

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        CausalLM(),
        MaskedLM(),
        QuestionAnswering(),
        MultipleChoice(),
        Seq2Seq(),
        TokenClassification(),
        SemanticSegmentation(),
        MultiLabelClassification(),
        Regression(),
        ImageClassification(),
        SequenceClassification(),
    )
}


def task_for(rows: datasets.Dataset, chosen: DataOptions) -> Task:
    """The task that was asked for, or the first whose columns these are."""
    if chosen.task is not None:
        return TASKS[chosen.task]
    return next(task for task in TASKS.values() if task.fits(rows, chosen))
