import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_recipe.data.label_head import (
    ON_HEAD,
    LabelsOnHead,
    absent_class,
    label_name_mismatch,
    label_out_of_range,
    problem_type_mismatch,
)
from hf_recipe.data.labels import COUNTS, LabelCounts, class_imbalance, prior_entropy
from tests.data import worlds


def counted(**values):
    base = {"column": "label", "form": "class", "rows": 100, "total": 100, "whole": True}
    return LabelCounts(**{**base, **values})


def on_head(labels=None, **values):
    return LabelsOnHead(**{"labels": labels or counted(), "outputs": 2, **values})


def examine(data, tmp_path, *, evaluation=None, kind=Trainer, tok=True, **config):
    model = worlds.bert(**config)
    tokens = worlds.tokenized(data)
    if evaluation is not None:
        evaluation = worlds.tokenized(evaluation)
    trainer = worlds.trainer(model, tokens, evaluation, tmp_path, tok=worlds.tokenizer(), kind=kind)
    return worlds.examined(trainer, COUNTS, ON_HEAD)


# ---------------------------------------------------------------- literal numbers


def test_imbalance():
    assert not list(class_imbalance(counted(counts={"0": 50, "1": 50})))
    (fault,) = class_imbalance(counted(counts={"0": 97, "1": 3}))
    assert "97.0%" in fault.message
    assert "rarest 3" in fault.message
    assert fault.evidence["entropy"] == pytest.approx(0.1347, abs=1e-4)
    (fault,) = class_imbalance(counted(counts={"0": 100}))
    assert fault.severity == "warning"
    assert not list(class_imbalance(counted(form="sequence", counts={"0": 97, "1": 3})))
    assert prior_entropy({"a": 1, "b": 1, "c": 2}) == pytest.approx(1.5 * math.log(2))


def test_absent_class():
    labels = counted(counts={"1": 50, "2": 50}, lowest=1, highest=2)
    (fault,) = absent_class(on_head(labels, outputs=3, unused=(0,), unused_count=1))
    assert "1 of 3 outputs" in fault.message
    assert "off by one?" in fault.message
    assert not list(absent_class(on_head(labels, outputs=3)))
    # four labels cannot show nine classes
    few = counted(counts={"0": 2, "1": 2})
    assert not list(absent_class(on_head(few, outputs=9, unused=(2,), unused_count=7)))


def test_an_entity_of_single_words_leaves_its_inner_tag_unused():
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    tags = counted(form="tags", counts={"0": 90, "1": 30, "3": 30})
    scheme = on_head(tags, outputs=5, unused=(2, 4), unused_count=2, head_names=names)
    assert [f.severity for f in absent_class(scheme)] == ["note"]
    for change in ({"elsewhere": 1}, {"head_names": ()}, {"unused": (3, 4)}, {"unused": (0, 2)}):
        assert [f.severity for f in absent_class(replace(scheme, **change))] == [None]


def test_out_of_range():
    labels = counted(lowest=0, highest=5)
    (fault,) = label_out_of_range(on_head(labels, outside=3, outside_rows=(17,)))
    for part in ("3 labels", "0..1", "to 5", "num_labels=2", "row 17"):
        assert part in fault.message
    assert not list(label_out_of_range(on_head(labels)))


def test_names():
    labels = counted(names=("contradiction", "neutral", "entailment"))
    (fault,) = label_name_mismatch(
        on_head(labels, head_names=("ENTAILMENT", "neutral", "contradiction"))
    )
    assert fault.evidence["data_ids"] == [0, 2]
    assert "entailment" not in fault.message
    assert not list(label_name_mismatch(on_head(labels, head_names=labels.names)))
    assert not list(label_name_mismatch(on_head(labels, head_names=("bad", "so so", "good"))))
    assert not list(label_name_mismatch(on_head(labels)))


def test_problem_type():
    binary = counted(lowest=0, highest=1, distinct=2)
    (fault,) = problem_type_mismatch(on_head(binary, outputs=1))
    assert fault.severity == "error"
    assert fault.fix == "num_labels=2"
    assert not list(problem_type_mismatch(on_head(binary, outputs=1, own_loss=True)))
    assert not list(problem_type_mismatch(on_head(binary, outputs=2)))
    ratings = counted(lowest=1, highest=5, distinct=5)
    assert not list(problem_type_mismatch(on_head(ratings, outputs=1)))
    quantity = counted(form="number", lowest=0, highest=90, distinct=80)
    assert not list(problem_type_mismatch(on_head(quantity, outputs=1)))
    halves = counted(lowest=0, highest=5, distinct=6, floating=True)
    assert not list(problem_type_mismatch(on_head(halves, outputs=1)))
    one_hot = counted(form="flags", width=4, single=1.0)
    (fault,) = problem_type_mismatch(on_head(one_hot, outputs=4))
    assert fault.severity == "error"
    several = counted(form="flags", width=4, single=0.4)
    assert not list(problem_type_mismatch(on_head(several, outputs=4)))
    (fault,) = problem_type_mismatch(on_head(binary, problem_type="regression"))
    assert "single_label" in fault.fix


# ---------------------------------------------------------------- runs and their twins


@pytest.mark.parametrize("seed", range(10))
def test_healthy_classification_is_silent(seed, tmp_path):
    classes = 2 + seed % 5
    report = examine(
        worlds.classified(200, seed, classes),
        tmp_path,
        evaluation=worlds.classified(40, seed + 100, classes),
        num_labels=classes,
    )
    assert not worlds.loud(report)
    assert "absent-class" in report.ran


def test_off_by_one(tmp_path):
    data = worlds.classified(200, classes=3).map(lambda row: {"label": row["label"] + 1})
    assert worlds.loud(examine(data, tmp_path, num_labels=4)) == ["absent-class"]
    report = examine(data, tmp_path, num_labels=3)
    (finding,) = [f for f in report.flat if f.check == "label-out-of-range"]
    assert finding.severity == "error"
    assert data[finding.examples[0]]["label"] == 3


def test_a_class_that_only_evaluation_has(tmp_path):
    data = worlds.classified(300, classes=3)
    train = data.filter(lambda row: row["label"] != 2)
    report = examine(train, tmp_path, evaluation=data, num_labels=3)
    (finding,) = [f for f in report.flat if f.severity == "warning"]
    assert finding.check == "absent-class"
    assert "an evaluation set uses 1" in finding.message
    assert finding.split == "train"


def test_imbalance_of_97_percent(tmp_path):
    data = worlds.classified(800)
    keep = [i for i, y in enumerate(data["label"]) if y == 0][:194] + [
        i for i, y in enumerate(data["label"]) if y == 1
    ][:6]
    report = examine(data.select(keep), tmp_path)
    assert worlds.names(report) == ["class-imbalance"]
    assert "97.0%" in report.flat[0].message


def test_names_in_another_order(tmp_path):
    data = worlds.classified(200).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    wrong = examine(data, tmp_path, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    right = examine(data, tmp_path, id2label={0: "No", 1: "Yes"}, label2id={"No": 0, "Yes": 1})
    assert worlds.loud(wrong) == ["label-name-mismatch"]
    assert not worlds.loud(right)
    assert not worlds.loud(examine(data, tmp_path))


def test_silent_regression(tmp_path):
    data = worlds.classified(200)
    report = examine(data, tmp_path, num_labels=1)
    assert worlds.loud(report) == ["problem-type-mismatch"]
    assert report.flat[0].severity == "error"
    assert not worlds.loud(examine(data, tmp_path, num_labels=2))


@pytest.mark.parametrize("kind", ["float", "score", "years"])
def test_real_regression(kind, tmp_path):
    rng = np.random.default_rng(0)
    target = {
        "float": rng.normal(size=200),
        "score": rng.integers(1, 6, 200).astype(float),  # ratings 1 to 5
        "years": rng.integers(0, 90, 200),
    }[kind]
    data = worlds.classified(200).remove_columns("label").add_column("label", target.tolist())
    assert not worlds.loud(examine(data, tmp_path, num_labels=1))


class OneLogit(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.logits.squeeze(-1), labels.float()
        )
        return (loss, outputs) if return_outputs else loss


def test_one_logit_with_its_own_loss_is_silent(tmp_path):
    data = worlds.classified(200)
    assert not worlds.loud(examine(data, tmp_path, num_labels=1, kind=OneLogit))


def test_one_hot_into_bce(tmp_path):
    data = worlds.classified(200, classes=3)
    flags = np.eye(3)[data["label"]]
    one_hot = data.remove_columns("label").add_column("labels", flags.tolist())
    assert worlds.loud(examine(one_hot, tmp_path, num_labels=3)) == ["problem-type-mismatch"]
    several = np.maximum(flags, np.random.default_rng(0).integers(0, 2, flags.shape))
    multi = data.remove_columns("label").add_column("labels", several.tolist())
    assert not worlds.loud(examine(multi, tmp_path, num_labels=3))


def test_labels_are_judged_as_the_collator_makes_them(tmp_path):
    data = worlds.tokenized(worlds.classified(100)).map(lambda row: {"label": row["label"] + 1})
    tok = worlds.tokenizer()

    def collate(rows):
        labels = torch.tensor([row["label"] - 1 for row in rows])
        batch = tok.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
        return {**batch, "labels": labels}

    trainer = worlds.trainer(worlds.bert(), data, None, tmp_path, collator=collate, tok=tok)
    report = worlds.examined(trainer, ON_HEAD)
    assert not report.flat
    assert "label-out-of-range" in report.ran

    def one_hot(rows):
        batch = collate(rows)
        return {**batch, "labels": torch.nn.functional.one_hot(batch["labels"], 2).float()}

    trainer = worlds.trainer(worlds.bert(), data, None, tmp_path, collator=one_hot, tok=tok)
    assert worlds.loud(worlds.examined(trainer, ON_HEAD)) == ["problem-type-mismatch"]


def test_language_models_have_no_classes(tmp_path):
    data = worlds.tokenized(worlds.classified(60)).remove_columns("label")
    data = data.map(lambda row: {"labels": row["input_ids"]})
    trainer = worlds.trainer(worlds.gpt2(), data, None, tmp_path, tok=worlds.tokenizer())
    report = worlds.examined(trainer, COUNTS, ON_HEAD)
    assert not report.flat
    assert "absent-class" in report.skipped


def test_tags(tmp_path):
    from transformers import DataCollatorForTokenClassification

    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(100)).remove_columns("label")
    data = data.map(lambda row: {"labels": [-100] + [i % 3 for i in row["input_ids"][1:]]})
    collator = DataCollatorForTokenClassification(tok)
    for classes, wanted in ((3, []), (4, ["absent-class"]), (2, ["label-out-of-range"])):
        model = worlds.tagger(num_labels=classes)
        trainer = worlds.trainer(model, data, None, tmp_path, collator=collator, tok=tok)
        assert worlds.loud(worlds.examined(trainer, COUNTS, ON_HEAD)) == wanted


def test_a_hundred_thousand_labels_are_cheap(tmp_path):
    import time

    rng = np.random.default_rng(0)
    data = datasets.Dataset.from_dict(
        {"x": rng.normal(size=10**5), "label": rng.integers(0, 2, 10**5)}
    )
    trainer = worlds.trainer(
        worlds.bert(), data, None, tmp_path, remove_unused_columns=False,
        collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in ("x", "label")},
    )  # fmt: skip
    start = time.process_time()
    report = worlds.examined(trainer, COUNTS, ON_HEAD)
    assert time.process_time() - start < 5
    assert not worlds.loud(report)
