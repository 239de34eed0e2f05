"""Distillation as people write it by themselves: with its faults, and with its healthy twins."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_recipe import DistillationTrainer, RecipeCallback, attach
from tests.tune.heads_zoo import Rows, bert
from tests.tune.test_teachers import examined


def rows_of(seed, rows=64):
    """The label is the first token; the rest says nothing."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 4, (rows,), generator=draw)
    rest = torch.randint(4, 60, (rows, 4), generator=draw)
    ids = torch.cat([first[:, None], rest], 1)
    return Rows([{"input_ids": i, "labels": int(i[0]) - 1} for i in ids])


def arguments(folder, **options):
    told = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(**told | {"save_strategy": "no"} | options)


def classifier(seed=3, **options):
    torch.manual_seed(seed)
    return tf.BertForSequenceClassification(bert(num_labels=3, **options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher worth its name, in the training mode in which a Trainer leaves it."""
    model = classifier(seed=0, attention_probs_dropout_prob=0.1)
    wanted = {"max_steps": 80, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
    args = arguments(tmp_path_factory.mktemp("teacher"), **wanted)
    Trainer(model, args, train_dataset=rows_of(0)).train()
    assert model.training
    return model


class FromTheGuide(Trainer):
    """The trainer of Hugging Face's guide to distillation in computer vision."""

    def __init__(self, teacher_model, student_model, temperature, lambda_param, **options):
        self.squared = options.pop("squared", True)
        super().__init__(model=student_model, **options)
        self.teacher, self.student = teacher_model, student_model
        self.loss_function = nn.KLDivLoss(reduction="batchmean")
        self.temperature, self.lambda_param = temperature, lambda_param

    def compute_loss(self, student, inputs, return_outputs=False, num_items_in_batch=None):
        output = self.student(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs)
        soft_teacher = F.softmax(target.logits / self.temperature, dim=-1)
        soft_student = F.log_softmax(output.logits / self.temperature, dim=-1)
        soft = self.loss_function(soft_student, soft_teacher)
        soft = soft * self.temperature**2 if self.squared else soft
        loss = (1.0 - self.lambda_param) * output.loss + self.lambda_param * soft
        return (loss, output) if return_outputs else loss


def guide(folder, teacher, temperature=4.0, share=0.5, **options):
    return FromTheGuide(
        teacher,
        classifier(),
        temperature,
        share,
        args=arguments(folder),
        train_dataset=rows_of(0),
        eval_dataset=rows_of(1),
        **options,
    )


def frozen(model):
    return copy.deepcopy(model).requires_grad_(False).eval()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_guides_trainer_is_silent(temperature, trained, tmp_path):
    assert examined(guide(tmp_path, frozen(trained), temperature))[0] == {}
    plain = guide(tmp_path, frozen(trained), 1.0, squared=False)
    assert examined(plain)[0] == {}  # at T = 1 there is nothing to forget


def test_a_forgotten_square_of_the_temperature_is_named(trained, tmp_path):
    found, report = examined(guide(tmp_path, frozen(trained), squared=False))
    assert found == {"distillation-idle": "warning"}
    (finding,) = report.flat
    assert "softened at T = 4 and weighs 0.5" in finding.message
    assert finding.evidence["expected"] == "0.5 * T^2 = 8"


def test_a_head_in_another_order_is_found_by_the_answers(trained, tmp_path):
    teacher = frozen(trained)
    for part in (teacher.classifier.weight, teacher.classifier.bias):
        part.data = part.data[[1, 2, 0]]
    found, report = examined(guide(tmp_path, teacher))
    assert found["teacher-mismatch"] == "error"
    message = next(f.message for f in report.flat if f.check == "teacher-mismatch")
    assert "its class 0 is what the labels call 1" in message


def test_an_untrained_teacher_is_no_better_and_not_in_another_order(tmp_path):
    found, _ = examined(guide(tmp_path, frozen(classifier(seed=9))))
    assert found.get("teacher-no-better") == "warning"
    assert "teacher-mismatch" not in found


def test_noise_is_found_wherever_it_comes_from(trained, tmp_path):
    """As a Trainer leaves it; by a module of no known kind; by a function in the forward pass."""

    class Jitter(nn.Module):
        def forward(self, hidden):
            return hidden + 0.1 * torch.randn_like(hidden) if self.training else hidden

    left = copy.deepcopy(trained).requires_grad_(False)
    assert examined(guide(tmp_path, left))[0]["teacher-trains"] == "error"
    odd = frozen(trained)
    odd.classifier = nn.Sequential(Jitter(), odd.classifier)
    assert "teacher-trains" not in examined(guide(tmp_path, odd))[0]
    odd.training = odd.classifier[0].training = True
    assert examined(guide(tmp_path, odd))[0]["teacher-trains"] == "error"


class Both(nn.Module):
    """Teacher and student in one model, which a Trainer puts into training mode as a whole."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher, self.config = student, teacher, student.config

    def forward(self, input_ids, labels=None):
        output = self.student(input_ids=input_ids, labels=labels)
        with torch.no_grad():
            target = self.teacher(input_ids=input_ids).logits
        soft = F.kl_div(output.logits.log_softmax(-1), target.softmax(-1), reduction="batchmean")
        loss = soft if output.loss is None else 0.5 * soft + 0.5 * output.loss
        return {"loss": loss, "logits": output.logits}


def test_a_teacher_inside_the_model_is_seen(trained, tmp_path):
    still = frozen(trained)
    for module in still.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for teacher, severity in ((still, None), (frozen(trained), "error")):
        model = Both(classifier(), teacher)
        given = {"train_dataset": rows_of(0), "eval_dataset": rows_of(1)}
        found, _ = examined(Trainer(model, arguments(tmp_path), **given))
        assert found.get("teacher-trains") == severity
        assert found.keys() <= {"teacher-trains"}


def test_a_callback_alone_sees_the_teacher_inside_the_model(trained, tmp_path):
    """There is no Trainer to ask: what the callback is given is enough, and nothing crashes."""
    callback = RecipeCallback(select=["teacher-mismatch", "teacher-no-better"])
    model, args = Both(classifier(), frozen(trained)), arguments(tmp_path, max_steps=2)
    given = {"train_dataset": rows_of(0), "eval_dataset": rows_of(1), "callbacks": [callback]}
    Trainer(model, args, **given).train()
    assert callback.report.crashed == {}
    assert "teacher-mismatch" in callback.report.ran
    assert callback.report.findings == []


def test_a_teacher_beside_the_trainer_is_seen(trained, tmp_path):
    """As in a notebook: the loss takes it from around itself."""
    my_teacher = frozen(trained)

    class Distils(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(**inputs)
            with torch.no_grad():
                target = my_teacher(**inputs).logits.softmax(-1)
            loss = 0.5 * output.loss + 0.5 * F.cross_entropy(output.logits, target)
            return (loss, output) if return_outputs else loss

    def distils():
        given = {"train_dataset": rows_of(0), "eval_dataset": rows_of(1)}
        return Distils(classifier(), arguments(tmp_path), **given)

    found, report = examined(distils())
    assert found == {}
    assert "teacher-trains" in report.ran
    my_teacher.train()
    assert examined(distils())[0]["teacher-trains"] == "error"
    assert my_teacher.training  # left as it was


@pytest.mark.parametrize(
    ("kind", "fires"),
    [("probabilities", True), ("logits", True), ("logarithms", False), ("reversed", False)],
)
def test_what_kl_div_is_given_must_be_distributions(kind, fires, trained, tmp_path):
    class Distils(FromTheGuide):
        def compute_loss(self, student, inputs, return_outputs=False, num_items_in_batch=None):
            output = student(**inputs)
            with torch.no_grad():
                t = self.teacher(**inputs).logits
            z = output.logits
            soft = {
                "probabilities": lambda: F.kl_div(z.softmax(-1), t.softmax(-1), reduction="sum"),
                "logits": lambda: F.kl_div(z.log_softmax(-1), t, reduction="sum"),
                "logarithms": lambda: F.kl_div(
                    z.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True
                ),
                "reversed": lambda: F.kl_div(t.log_softmax(-1), z.softmax(-1), reduction="sum"),
            }[kind]()
            loss = output.loss + soft / len(z)
            return (loss, output) if return_outputs else loss

    given = {"train_dataset": rows_of(0), "eval_dataset": rows_of(1)}
    trainer = Distils(frozen(trained), classifier(), 1.0, 0.5, args=arguments(tmp_path), **given)
    found, report = examined(trainer)
    assert found == ({"distillation-idle": "warning"} if fires else {})
    if fires:
        assert "holds no distributions" in report.flat[0].message


def test_rows_without_a_label_are_the_teachers(trained, tmp_path):
    """What a teacher speaks for is not masked by mistake; without one it is."""
    rows = [row if n % 10 == 0 else row | {"labels": -100} for n, row in enumerate(rows_of(0).rows)]
    given = {"args": arguments(tmp_path), "train_dataset": Rows(rows)}
    distils = DistillationTrainer(classifier(), teacher=frozen(trained), **given)
    alone = Trainer(classifier(), **given)
    found = [
        {f.check for f in attach(trainer, select=["labels-masked"]).preflight()}
        for trainer in (distils, alone)
    ]
    assert found == [set(), {"labels-masked"}]
