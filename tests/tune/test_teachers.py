import copy
import math

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers as tf
from transformers import Trainer, TrainingArguments

from hf_recipe.core.config import Settings
from hf_recipe.examiner import Examiner
from hf_recipe.instruments.batches import rows_of_trainer
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.subject import Subject, trainer_loss
from hf_recipe.runner.models import SimpleConfig, SimpleModel
from hf_recipe.tune import teacher_gain, teacher_spaces, teacher_weight, teachers
from hf_recipe.tune.distillation import DistillationTrainer
from hf_recipe.tune.ensemble import Ensemble
from hf_recipe.tune.teacher_gain import (
    Fidelity,
    TeacherGain,
    calibration_error,
    class_table,
    fidelity,
    judge_fidelity,
    judge_gain,
)
from hf_recipe.tune.teacher_spaces import TeacherSpace, judge_space
from hf_recipe.tune.teacher_weight import TermWeights, judge_weights
from hf_recipe.tune.teachers import TeacherState, judge_state
from tests.tune.heads_zoo import HEADS, Rows, bert, pair, zoo
from tests.tune.test_distillation import arguments

PROBES = (
    teacher_spaces.SPACES,
    teacher_spaces.ORDER,
    teachers.STATES,
    teacher_weight.WEIGHTS,
    teacher_gain.GAIN,
)
OURS = ("teacher-mismatch", "teacher-trains", "distillation-idle", "teacher-no-better")


def examined(trainer, *, optimizer=None, processing_class=None):
    """{check: severities} of the four checks, and the report."""
    sets = {"validation": rows_of_trainer(trainer, trainer.eval_dataset, "validation")}
    subject = Subject(
        model=trainer.model,
        args=trainer.args,
        train=rows_of_trainer(trainer, trainer.train_dataset, "train"),
        evaluation={k: v for k, v in sets.items() if v is not None},
        trainer=trainer,
        processing_class=processing_class,
        optimizer=optimizer,
        loss_function=trainer_loss(trainer),
    )
    examiner = Examiner(Settings())
    found = []
    for probe in PROBES:
        found += examiner.examine(
            probe, subject, guard=lambda: quiet(trainer.model, trainer=trainer)
        )
    assert not examiner.report.crashed, examiner.report.crashed
    return {f.check: f.severity for f in found if f.check in OURS}, examiner.report


class OwnLoop(Trainer):
    """What people write by themselves."""

    def __init__(
        self,
        *arguments,
        teacher,
        alpha=0.5,
        temperature=2.0,
        guarded=True,
        reduction="batchmean",
        squared=True,
        **options,
    ):
        super().__init__(*arguments, **options)
        self.teacher, self.guarded = teacher, guarded
        self.share, self.temperature = alpha, temperature
        self.reduction, self.squared = reduction, squared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.set_grad_enabled(not self.guarded):
            target = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        classes = target.shape[-1]
        soft = F.kl_div(
            (outputs.logits / self.temperature).log_softmax(-1).view(-1, classes),
            (target / self.temperature).softmax(-1).view(-1, classes),
            reduction=self.reduction,
        )
        if self.squared:
            soft = soft * self.temperature**2
        loss = self.share * soft + (1 - self.share) * outputs.loss
        return (loss, outputs) if return_outputs else loss


def own_loop(tmp_path, teacher=None, **options):
    student, known, rows = pair("sequence")
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False
    )
    teacher = (teacher or known).requires_grad_(False).eval()
    return OwnLoop(student, args, train_dataset=rows, teacher=teacher, **options)


# ---------------------------------------------------------------- judging


def test_spaces_are_judged_by_size_order_and_tokens():
    assert not list(judge_space(TeacherSpace(0, 3, 3)))
    assert not list(judge_space(TeacherSpace(0, None, 3)))
    assert not list(judge_space(TeacherSpace(0, 3, 5, cut=True)))
    (size,) = judge_space(TeacherSpace(0, 151_936, 152_064))
    assert "151936" in size.message
    assert "152064" in size.message
    (order,) = judge_space(TeacherSpace(0, 3, 3, first=1, names=("cat", "dog")))
    assert order.message.startswith("class 1")
    assert "cat" not in order.message
    assert order.quotes == ("cat", "dog")
    (token,) = judge_space(TeacherSpace(0, 3, 3, first_token=2))
    assert token.message.startswith("token 2")


def test_states_are_judged_by_noise_gradients_and_optimizer():
    assert not list(judge_state(TeacherState(0, 1, 0, False, 0, 0)))
    assert not list(judge_state(TeacherState(0, 1, 0, True, 0, 0)))
    for state in (
        TeacherState(0, 1, 3, False, 0, 0),
        TeacherState(0, 1, 0, True, 4, 0),
        TeacherState(0, 1, 0, False, 0, 5),
    ):
        assert len(list(judge_state(state))) == 1


@pytest.mark.parametrize(
    ("soft", "hard", "severity"),
    [
        (1.0, 1.0, None),
        (0.1, 1.0, None),
        (1.0, 0.05, None),
        (0.0, 1.0, "warning"),
        (0.01, 1.0, "warning"),
        (1.0, 0.001, "note"),
        (1.0, None, None),
        (0.0, None, "warning"),
        (float("nan"), 1.0, "warning"),
    ],
)
def test_weights_are_judged_against_each_other(soft, hard, severity):
    faults = list(judge_weights(TermWeights(soft, hard, 0.5, 8)))
    assert [f.severity for f in faults] == ([severity] if severity else [])


def test_gain_is_judged_in_standard_errors():
    assert not list(judge_gain(TeacherGain(0.1, 0.9, 0.8, 0.05, 128, "validation")))
    assert not list(judge_gain(TeacherGain(0.9, 0.9, 0.0, 0.05, 8, "validation")))
    assert list(judge_gain(TeacherGain(0.9, 0.9, 0.0, 0.05, 128, "validation")))
    assert list(judge_gain(TeacherGain(0.9, 0.1, -0.8, 0.05, 128, "validation")))
    lucky = TeacherGain(0.88, 0.95, 0.07, 0.03, 128, "validation", 0.89)
    assert "commonest label errs by 0.890" in next(iter(judge_gain(lucky))).message
    rare = TeacherGain(0.04, 0.5, 0.46, 0.03, 128, "validation", 0.05)
    assert not list(judge_gain(rare))  # labels 19 to 1: accuracy is no mark of a good teacher


def test_a_student_that_passed_its_teacher_is_a_note():
    def found(gain, error):
        return Fidelity(0.9, 0.1, 0.2, 0.2 + gain, gain, error, None, None, 8.0, 2.0, 100, 100)

    assert not list(judge_fidelity(found(0.05, 0.02)))
    assert not list(judge_fidelity(found(-0.05, 0.02)))
    (fault,) = judge_fidelity(found(-0.1, 0.02))
    assert fault.severity == "note"


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    hits = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    assert calibration_error(confidence, hits) == pytest.approx(4 / 6 * 0.15, abs=1e-6)
    assert math.isnan(calibration_error(torch.tensor([0.5, math.nan]), torch.tensor([1.0, 0.0])))


# ---------------------------------------------------------------- real Trainers


@pytest.mark.parametrize("head", HEADS)
def test_a_healthy_distillation_is_silent(head, tmp_path):
    student, teacher, rows = pair(head)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, alpha=0.5), train_dataset=rows, teacher=teacher
    )
    before = copy.deepcopy(student.state_dict())
    found, report = examined(trainer)
    assert {n for n in found if n != "teacher-no-better"} == set()  # nobody is trained here
    assert all(name in report.ran or name in report.skipped for name in OURS)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


def test_a_healthy_loop_of_ones_own_is_silent(tmp_path):
    assert examined(own_loop(tmp_path))[0].keys() <= {"teacher-no-better"}


@pytest.mark.parametrize(
    ("options", "severity"),
    [
        ({"alpha": 0.0}, "warning"),
        ({"alpha": 1.0}, "note"),
        ({"temperature": 20.0, "squared": False}, "warning"),
    ],
)
def test_an_idle_term_is_found_in_any_trainer(options, severity, tmp_path):
    found, _ = examined(own_loop(tmp_path, **options))
    assert found.get("distillation-idle") == severity


def test_a_mean_over_many_classes_idles_the_teacher(tmp_path):
    student, teacher, rows = pair("masked_lm")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    teacher.requires_grad_(False).eval()
    for reduction, severity in (("batchmean", None), ("mean", "warning")):
        trainer = OwnLoop(
            student,
            args,
            train_dataset=rows,
            teacher=teacher,
            temperature=1.0,
            reduction=reduction,
        )
        assert examined(trainer)[0].get("distillation-idle") == severity


def test_a_teacher_left_in_training_mode_is_found(tmp_path):
    teacher = tf.BertForSequenceClassification(bert(num_labels=3, hidden_dropout_prob=0.1))
    trainer = own_loop(tmp_path, teacher=teacher)
    assert "teacher-trains" not in examined(trainer)[0]
    teacher.train()
    assert examined(trainer)[0]["teacher-trains"] == "error"


def test_a_teacher_that_learns_is_found(tmp_path):
    trainer = own_loop(tmp_path, guarded=False)
    assert "teacher-trains" not in examined(trainer)[0]
    trainer.teacher.requires_grad_(True)
    assert examined(trainer)[0]["teacher-trains"] == "error"
    trainer.guarded = True
    assert "teacher-trains" not in examined(trainer)[0]
    both = [*trainer.model.parameters(), *trainer.teacher.parameters()]
    optimizer = torch.optim.SGD(both, lr=0.1)
    assert examined(trainer, optimizer=optimizer)[0]["teacher-trains"] == "error"


def test_other_labels_are_found(tmp_path):
    student, _, rows = pair("sequence")
    student.config.id2label = {0: "a", 1: "b", 2: "c"}
    for names, fires in (({0: "A", 1: "b", 2: "c"}, False), ({0: "b", 1: "a", 2: "c"}, True)):
        teacher = tf.BertForSequenceClassification(bert(id2label=names))
        trainer = DistillationTrainer(
            student, arguments(tmp_path), train_dataset=rows, teacher=teacher
        )
        assert ("teacher-mismatch" in examined(trainer)[0]) is fires


def test_a_vocabulary_of_the_same_size_in_another_order_is_found(tmp_path):
    words = ["[UNK]", "a", "b", "c"]

    def tokenizer(order):
        model = tokenizers.models.WordLevel({w: i for i, w in enumerate(order)}, unk_token="[UNK]")
        return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))

    student, teacher, rows = pair("sequence")
    for order, at in ((words, None), (["[UNK]", "a", "c", "b"], 2)):
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path),
            train_dataset=rows,
            teacher=copy.deepcopy(teacher),
            processing_class=tokenizer(words),
            teacher_processing_class=tokenizer(order),
            data_collator=tf.default_data_collator,
        )
        found, report = examined(trainer, processing_class=trainer.processing_class)
        assert ("teacher-mismatch" in found) is (at is not None)
        if at is not None:
            (finding,) = (f for f in report.flat if f.check == "teacher-mismatch")
            assert finding.evidence["first"] == at


def test_a_run_without_a_teacher_is_skipped(tmp_path):
    student, _, rows = pair("sequence")
    found, report = examined(Trainer(student, arguments(tmp_path), train_dataset=rows))
    assert found == {}
    assert report.skipped["teacher-trains"] == "there is no teacher: nothing is distilled"


def test_a_teacher_worth_its_name_is_told_from_one_that_is_not(tmp_path):
    make, _ = zoo("sequence")
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(1, 4, (64,), generator=draw)
    rest = torch.randint(1, 60, (64, 4), generator=draw)
    rows = Rows(
        [
            {"input_ids": torch.cat([f[None], r]), "labels": int(f - 1)}
            for f, r in zip(first, rest, strict=True)
        ]
    )
    torch.manual_seed(0)
    teacher, student = make(), make()
    untrained = copy.deepcopy(teacher)
    options = {
        "max_steps": 60,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "per_device_train_batch_size": 32,
    }
    Trainer(teacher, arguments(tmp_path, **options), train_dataset=rows).train()

    def distilling(model):
        return DistillationTrainer(
            student,
            arguments(tmp_path, **options),
            train_dataset=rows,
            eval_dataset=rows,
            teacher=model,
        )

    assert examined(distilling(untrained))[0]["teacher-no-better"] == "warning"
    trainer = distilling(teacher)
    assert examined(trainer)[0] == {}
    trainer.train()
    found, table = fidelity(trainer)
    assert found.teacher_error < 0.1
    assert found.agreement > 0.9
    assert found.divergence < 0.2
    assert found.parameters_ratio == 1.0
    assert 0 <= found.student_calibration < 0.5
    assert Fidelity.from_values(found.values()) == found
    assert len(table.rows) == 7
    assert set(found.class_losses) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert sum(count for *_, count in found.class_losses.values()) == found.labelled
    shown = class_table(found).rows
    assert [row[4] for row in shown] == sorted((row[4] for row in shown), reverse=True)
    for name, count, theirs, ours, lost in shown:
        assert (theirs, ours, count) == found.class_losses[name]
        assert lost == pytest.approx(ours - theirs)


# ---------------------------------------------------------------- ensembles


def test_an_ensemble_averages_probabilities_and_teaches(tmp_path):
    student, _, rows = pair("sequence")
    torch.manual_seed(3)
    members = [tf.BertForSequenceClassification(bert(num_labels=3)).eval() for _ in range(3)]
    ensemble = Ensemble(members)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), train_dataset=rows, teacher=ensemble
    )
    batch = trainer.data_collator(list(rows))
    with torch.no_grad():
        mean = sum(m(**batch).logits.softmax(-1) for m in members) / 3
        outputs = ensemble(**batch)
    torch.testing.assert_close(outputs["logits"].softmax(-1), mean)
    assert outputs["loss"].ndim == 0
    trainer.train()
    evaluated = Trainer(ensemble, arguments(tmp_path), eval_dataset=rows).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(outputs["loss"].item(), rel=1e-4)
    with pytest.raises(ValueError, match="needs members"):
        Ensemble([])
    with pytest.raises(ValueError, match="2 members need as many weights"):
        Ensemble(members[:2], [1.0])


def test_a_trainer_keeps_the_columns_that_members_take(tmp_path):
    torch.manual_seed(0)
    members = [SimpleModel(SimpleConfig("image", 16, num_labels=3)) for _ in range(2)]
    ensemble = copy.deepcopy(Ensemble(members))
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(1, 4, 4, generator=draw), "labels": i % 3, "row": i}
        for i in range(6)
    ]
    seen = Trainer(ensemble, arguments(tmp_path, remove_unused_columns=True)).predict(Rows(rows))
    assert seen.label_ids.tolist() == [0, 1, 2, 0, 1, 2]
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        mean = sum(m(pixel_values=pixels).logits.softmax(-1) for m in ensemble.members) / 2
    torch.testing.assert_close(torch.tensor(seen.predictions).softmax(-1), mean)
    ensemble.members[0].classifier.weight.data.mul_(3)  # a copy answers by its own members
    again = Trainer(ensemble, arguments(tmp_path)).predict(Rows(rows))
    assert abs(again.predictions - seen.predictions).max() > 1e-3
