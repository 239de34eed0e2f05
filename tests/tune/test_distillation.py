import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from transformers import TrainingArguments

from hf_recipe.tune.distillation import DistillationTrainer, DistillationTrainingArguments
from tests.tune.heads_zoo import HEADS, Rows, bert, llama, pair, t5, zoo

heads = pytest.mark.parametrize("head", HEADS)


def arguments(tmp_path, **options):
    return DistillationTrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        }
    )


def trainer_of(head, tmp_path, *, rows=None, **options):
    student, teacher, data = pair(head)
    return DistillationTrainer(
        student, arguments(tmp_path, **options), train_dataset=rows or data, teacher=teacher
    )


def batch_of(trainer, count=8):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@heads
def test_the_loss_is_alpha_soft_and_the_rest_hard(head, tmp_path):
    trainer = trainer_of(head, tmp_path, alpha=0.3)
    batch = batch_of(trainer)
    trainer.model.train()
    terms = trainer.terms(trainer.model, batch)
    assert terms.soft > 0
    assert terms.total.item() == pytest.approx(0.3 * terms.soft.item() + 0.7 * terms.hard.item())
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(terms.total.item())
    if head != "unlabelled":
        with torch.no_grad():
            own = trainer.model(**batch).loss
        assert terms.hard.item() == pytest.approx(own.item(), rel=1e-5)


@heads
def test_a_student_like_its_teacher_has_nothing_soft_to_learn(head, tmp_path):
    student, _, rows = pair(head)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), train_dataset=rows, teacher=copy.deepcopy(student)
    )
    assert abs(trainer.terms(student.train(), batch_of(trainer)).soft.item()) < 1e-6


@heads
def test_micro_batches_do_not_change_the_step(head, tmp_path):
    ends, losses = [], []
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        trainer = trainer_of(
            head,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        losses.append(trainer.train().training_loss)
        ends.append(weights(trainer))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() < 1e-5


@heads
def test_training_moves_the_student_alone_and_saves_it_alone(head, tmp_path):
    trainer = trainer_of(head, tmp_path)
    (teacher,) = trainer.teachers
    before = copy.deepcopy(teacher.state_dict())
    start = weights(trainer)
    trainer.train()
    assert (weights(trainer) - start).abs().max() > 0
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    trainer.save_model(tmp_path / "saved")
    if head == "segmentation":
        return  # the zoo's segmenter has no BatchNorm, a loaded one has
    again = type(trainer.model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.state_dict(), trainer.model.state_dict())


def test_chunked_and_dense_take_the_same_step(tmp_path):
    for head in ("llama", "gpt2", "masked_lm", "seq2seq"):
        ends = []
        for chunked in (True, False):
            trainer = trainer_of(head, tmp_path, distill_chunked=chunked, alpha=0.4)
            trainer.train()
            assert trainer._chunked is chunked
            ends.append(weights(trainer))
        assert (ends[0] - ends[1]).abs().max() < 1e-6, head


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothing_touches_the_hard_term_alone(smoothing, tmp_path):
    trainer = trainer_of("sequence", tmp_path, label_smoothing_factor=smoothing)
    batch = batch_of(trainer)
    terms = trainer.terms(trainer.model.train(), batch)
    logits = trainer.model(**batch).logits
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
    assert terms.hard.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = trainer_of("sequence", tmp_path)
    assert terms.soft.item() == pytest.approx(
        plain.terms(plain.model.train(), batch).soft.item(), rel=1e-6
    )


def test_causal_positions_are_shifted_and_masked(tmp_path):
    trainer = trainer_of("llama", tmp_path, distill_temperature=1.0)
    batch = batch_of(trainer)
    soft = trainer.terms(trainer.model.train(), batch).soft
    z, t = trainer.model(**batch).logits[:, :-1], trainer.teachers[0](**batch).logits[:, :-1]
    kept = batch["labels"][:, 1:] != -100
    expected = F.kl_div(z.log_softmax(-1)[kept], t.softmax(-1)[kept], reduction="batchmean")
    assert soft.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("head", ["sequence", "token", "llama"])
def test_nothing_supervised_is_zero_with_a_live_graph(head, tmp_path):
    trainer = trainer_of(head, tmp_path)
    batch = batch_of(trainer)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    if head == "sequence":  # unlabelled rows are still taught
        terms = trainer.terms(trainer.model, batch)
        assert loss.item() == pytest.approx(0.5 * terms.soft.item())
        assert loss > 0
    else:
        assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("head", ["sequence", "token", "llama", "image", "regression"])
def test_rows_without_any_labels_are_taught(head, tmp_path):
    _, data = zoo(head)
    rows = Rows([{k: v for k, v in row.items() if k != "labels"} for row in data.rows])
    trainer = trainer_of(head, tmp_path, rows=rows)
    start = weights(trainer)
    result = trainer.train()
    assert result.training_loss > 0
    assert (weights(trainer) - start).abs().max() > 0


def test_missing_numbers_are_taught_only(tmp_path):
    _, data = zoo("regression")
    rows = [dict(row) for row in data.rows]
    rows[0]["labels"] = rows[0]["labels"] * float("nan")
    trainer = trainer_of("regression", tmp_path, rows=Rows(rows))
    batch = batch_of(trainer)
    terms = trainer.terms(trainer.model.train(), batch)
    z = trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.squeeze(-1)
    expected = (z[1:] - batch["labels"][1:]).square().sum() / 8
    assert terms.hard.item() == pytest.approx(expected.item(), rel=1e-5)


@heads
def test_evaluation_reports_the_plain_trainers_loss(head, tmp_path):
    student, teacher, rows = pair(head)
    options = {"per_device_eval_batch_size": 4, "remove_unused_columns": False}
    ours = DistillationTrainer(
        student, arguments(tmp_path, **options), eval_dataset=rows, teacher=teacher
    ).evaluate()
    plain_args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    plain = tf.Trainer(student, plain_args, eval_dataset=rows).evaluate()
    if head == "gpt2":  # the Trainer counts one position too many for this class
        assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0.5)
    elif head == "unlabelled":
        assert ours["eval_loss"] > 0
    else:
        assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


def test_several_teachers_are_averaged_in_probability(tmp_path):
    student, teacher, rows = pair("sequence")
    torch.manual_seed(5)
    other = tf.BertForSequenceClassification(bert(num_labels=3))
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        train_dataset=rows,
        teachers=[teacher, other],
        teacher_weights=[3, 1],
    )
    batch = batch_of(trainer)
    with torch.no_grad():
        expected = 0.75 * teacher(**batch).logits.softmax(-1)
        expected += 0.25 * other(**batch).logits.softmax(-1)
    torch.testing.assert_close(trainer.teacher_logits(batch)["logits"].softmax(-1), expected)
    trainer.train()


def test_a_teacher_of_other_inputs_gets_its_columns(tmp_path):
    import datasets

    make, data = zoo("sequence")
    teacher = tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=3
        )
    )
    rows = datasets.Dataset.from_list(
        [
            {k: v if k == "labels" else v.tolist() for k, v in row.items()}
            | {"token_type_ids": [0] * 9, "note": "x"}
            for row in data.rows
        ]
    )
    trainer = DistillationTrainer(make(), arguments(tmp_path), train_dataset=rows, teacher=teacher)
    assert trainer.train().training_loss > 0


def test_relations_and_attentions_are_matched_across_widths(tmp_path):
    _, data = zoo("token")
    student = tf.BertForTokenClassification._from_config(
        bert(num_labels=4), attn_implementation="eager"
    )
    teacher = tf.BertForTokenClassification._from_config(
        bert(num_labels=4, hidden_size=24, num_attention_heads=3, num_hidden_layers=2),
        attn_implementation="eager",
    )
    ends = []
    for size, accumulate in ((8, 1), (2, 4)):
        options = arguments(
            tmp_path,
            relation_weight=1.0,
            attention_weight=1.0,
            transfer_layers=[[1, 2]],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        trainer = DistillationTrainer(
            copy.deepcopy(student), options, train_dataset=data, teacher=teacher
        )
        without = trainer.terms(trainer.model.train(), batch_of(trainer))
        assert without.total > 0.5 * without.soft + 0.5 * without.hard
        trainer.train()
        ends.append(weights(trainer))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


def test_a_bf16_teacher_under_autocast_keeps_its_own_type(tmp_path):
    student, teacher, rows = pair("image")
    trainer = DistillationTrainer(
        student, arguments(tmp_path, bf16=True), train_dataset=rows, teacher=teacher.bfloat16()
    )
    trainer.train()
    assert next(teacher.parameters()).dtype == torch.bfloat16
    assert weights(trainer).isfinite().all()


def test_the_log_shows_both_terms(tmp_path):
    trainer = trainer_of(
        "sequence",
        tmp_path,
        logging_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        alpha=0.25,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0.25 * logged["soft_loss"] + 0.75 * logged["hard_loss"] == pytest.approx(
        logged["loss"], rel=1e-3
    )


def test_resuming_gives_the_same_student(tmp_path):
    _, data = zoo("llama", rows=16)
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "distill_chunked": True,
    }
    whole = trainer_of("llama", tmp_path / "a", rows=data, **options)
    whole.train()
    again = trainer_of("llama", tmp_path / "a", rows=data, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))


def test_spaces_that_differ_are_named_before_the_first_step(tmp_path):
    _, data = zoo("llama")
    student = tf.LlamaForCausalLM(llama())
    teacher = tf.LlamaForCausalLM(llama(vocabulary=64, width=24))
    trainer = DistillationTrainer(student, arguments(tmp_path), train_dataset=data, teacher=teacher)
    with pytest.raises(ValueError, match="the student has 60 classes, its teacher 64"):
        trainer.train()
    cut = arguments(tmp_path, distill_vocabulary="cut")
    for chunked in (True, False):
        cut.distill_chunked = chunked
        assert (
            DistillationTrainer(student, cut, train_dataset=data, teacher=teacher)
            .train()
            .training_loss
            > 0
        )

    names = {"id2label": {0: "a", 1: "b", 2: "c"}}
    swapped = {"id2label": {0: "a", 1: "c", 2: "b"}}
    _, rows = zoo("sequence")
    trainer = DistillationTrainer(
        tf.BertForSequenceClassification(bert(**names)),
        arguments(tmp_path),
        train_dataset=rows,
        teacher=tf.BertForSequenceClassification(bert(**swapped)),
    )
    with pytest.raises(ValueError, match="class 1 is 'b' for the student and 'c'"):
        trainer.train()


def test_what_cannot_work_is_said_at_once(tmp_path):
    student, _, rows = pair("sequence")
    with pytest.raises(ValueError, match="needs teacher="):
        DistillationTrainer(student, arguments(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="shares parameters with the student"):
        DistillationTrainer(student, arguments(tmp_path), train_dataset=rows, teacher=student)
    with pytest.raises(ValueError, match="alpha must lie in"):
        arguments(tmp_path, alpha=1.5)
    with pytest.raises(ValueError, match="divergence must be one of"):
        arguments(tmp_path, divergence="kl")


def test_a_head_that_cannot_be_rebuilt_is_distilled_densely(tmp_path):
    class Doubling(tf.LlamaForCausalLM):
        def forward(self, *inputs, **options):
            outputs = super().forward(*inputs, **options)
            outputs.logits = 2 * outputs.logits
            return outputs

    _, data = zoo("llama")
    teacher = tf.LlamaForCausalLM(llama())
    trainer = DistillationTrainer(
        Doubling(llama()),
        arguments(tmp_path, distill_chunked=True),
        train_dataset=data,
        teacher=teacher,
    )
    trainer.train()
    assert trainer._chunked is False


def test_t5_without_decoder_inputs_makes_them_of_its_labels(tmp_path):
    trainer = trainer_of("seq2seq", tmp_path, label_smoothing_factor=0.1)
    assert "decoder_input_ids" not in batch_of(trainer)
    assert trainer.train().training_loss > 0
    assert isinstance(trainer.model.config, type(t5()))
