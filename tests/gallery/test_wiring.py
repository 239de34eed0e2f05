"""Faulty and fixed runs: how loss, optimizer, evaluation and checkpoints are wired."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import hf_recipe
from tests.gallery.harness import Case, alarms, assert_found, assert_silent, everything, run
from tests.models import arguments, batchnorm, bert, llama, points, progressions, words

OURS = (
    "loss-scaled-by-accumulation",
    "parameter-unoptimized",
    "metrics-never-computed",
    "eval-never-runs",
    "eval-crashes",
    "save-fails",
    "loss-not-finite",
)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def classifier(folder, *, model=None, kind=Trainer, metrics=None, optimizers=(None, None), **args):
    return kind(
        model=model if model is not None else bert(),
        args=arguments(folder, **{"max_steps": 4, **args}),
        train_dataset=words(64),
        eval_dataset=words(48, seed=2),
        compute_metrics=metrics,
        optimizers=optimizers,
    )


# ---------------------------------------------------------------- accumulation


def stock_bert(folder, faulty):
    model = bert()
    if faulty:
        del model.accepts_loss_kwargs  # transformers' own default
    return classifier(folder, model=model, gradient_accumulation_steps=4)


class OwnLoss(Trainer):
    """A mean over the batch that ignores num_items_in_batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class OwnLossDivided(OwnLoss):
    loss_is_scaled_for_ga = False


def own_loss(folder, faulty):
    kind = OwnLoss if faulty else OwnLossDivided
    return kind(
        model=llama(),
        args=arguments(folder, max_steps=2, gradient_accumulation_steps=4),
        train_dataset=progressions(64),
    )


# ---------------------------------------------------------------- optimizer


def head_only(folder, faulty):
    model = bert()
    if not faulty:
        for parameter in model.bert.parameters():
            parameter.requires_grad_(False)
    head = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
    return classifier(folder, model=model, optimizers=(head, None))


def stale_optimizer(folder, faulty):
    model = bert()
    other = bert(seed=5) if faulty else model
    return classifier(
        folder, model=model, optimizers=(torch.optim.AdamW(other.parameters(), lr=1e-3), None)
    )


# ---------------------------------------------------------------- evaluation


class Targets(BertForSequenceClassification):
    """Its label argument is called `targets`."""

    def forward(self, input_ids=None, attention_mask=None, targets=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=targets)


def targets(folder, faulty):
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=4,
    )
    return Trainer(
        model=Targets(config),
        args=arguments(
            folder,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            label_names=None if faulty else ["targets"],
        ),
        train_dataset=words(64).rename_column("labels", "targets"),
        eval_dataset=words(48, seed=2).rename_column("labels", "targets"),
        compute_metrics=accuracy,
    )


def out_of_reach(folder, faulty):
    steps = 500 if faulty else 2
    return classifier(folder, metrics=accuracy, eval_strategy="steps", eval_steps=steps)


def crashing_metric(prediction):
    return {"accuracy": (prediction.predictions["logits"] == prediction.label_ids).mean()}


def crashing(folder, faulty):
    metrics = crashing_metric if faulty else accuracy
    return classifier(folder, metrics=metrics, eval_strategy="epoch", num_train_epochs=1)


def no_dict(folder, faulty):
    metrics = (lambda p: accuracy(p)["accuracy"]) if faulty else accuracy
    return classifier(folder, metrics=metrics, eval_strategy="epoch")


# ---------------------------------------------------------------- saving


class Shared(nn.Module):
    """Two names for one weight: safetensors refuses to write it."""

    def __init__(self, shared):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.out = nn.Linear(16, 64, bias=False)
        if shared:
            self.out.weight = self.embed.weight

    def forward(self, input_ids, labels=None):
        logits = self.out(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def shared_weights(folder, faulty):
    return Trainer(
        model=Shared(faulty),
        args=arguments(folder, max_steps=2, save_strategy="steps", save_steps=2),
        train_dataset=progressions(32),
    )


# ---------------------------------------------------------------- not finite


class NaNAt(Trainer):
    """The loss is NaN from one step on."""

    at = 3

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training and self.state.global_step >= self.at:
            loss = loss * float("nan")
        return (loss, outputs) if return_outputs else loss


class NaNInEvaluation(Trainer):
    """Every second evaluation batch is NaN; the logged eval_loss is a number all the same."""

    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        self.seen = getattr(self, "seen", 0) + 1
        return (loss * float("nan") if self.seen % 2 else loss), logits, labels


def nan_step(folder, faulty):
    return classifier(folder, kind=NaNAt if faulty else Trainer, max_steps=8, logging_steps=1)


def nan_evaluation(folder, faulty):
    kind = NaNInEvaluation if faulty else Trainer
    return classifier(folder, kind=kind, eval_strategy="steps", eval_steps=2)


CASES = [
    Case("loss-scaled-by-accumulation", stock_bert, "error", train=False, name="stock-head"),
    Case("loss-scaled-by-accumulation", own_loss, "error", train=False, name="own-loss"),
    Case("parameter-unoptimized", head_only, "error", train=True, name="head-only"),
    Case("parameter-unoptimized", stale_optimizer, "error", train=True, name="stale"),
    Case("metrics-never-computed", targets, "error", train=True),
    Case("eval-never-runs", out_of_reach, "warning", train=True),
    Case("eval-crashes", crashing, "error", train=False, name="metric-raises"),
    Case("eval-crashes", no_dict, "error", train=False, name="no-dict"),
    Case("save-fails", shared_weights, "error", train=False),
    Case("loss-not-finite", nan_step, "error", name="nan-step"),
    Case("loss-not-finite", nan_evaluation, "error", name="nan-evaluation"),
]


def restricted(case):
    """Our own checks alone: the gallery's rule on other checks is held by their own cases."""
    case.settings.setdefault("select", OURS)
    return case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(restricted(case), tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    assert_silent(restricted(case), tmp_path)


# ---------------------------------------------------------------- what is said


def test_a_nan_is_named_with_its_step_and_the_log_does_not_hide_it(tmp_path):
    trainer = nan_step(tmp_path, True)
    report = run(trainer, select=OURS)
    finding = next(f for f in report.findings if f.check == "loss-not-finite")
    assert finding.evidence["first_step"] == 4  # global_step 3 is done, step 4 is taken
    assert all(x["loss"] == x["loss"] for x in trainer.state.log_history if "loss" in x)


def test_the_label_name_that_is_there_is_proposed(tmp_path):
    report = run(targets(tmp_path, True), train=False, select=OURS)
    finding = next(f for f in report.findings if f.check == "metrics-never-computed")
    assert finding.fix == 'TrainingArguments(..., label_names=["targets"])'


def test_the_line_that_raised_is_named(tmp_path):
    report = run(crashing(tmp_path, True), train=False, select=OURS)
    finding = next(f for f in report.findings if f.check == "eval-crashes")
    line = crashing_metric.__code__.co_firstlineno + 1
    assert f"test_wiring.py:{line}" in finding.message


# ---------------------------------------------------------------- healthy, though odd


def mixtral():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=1,
        output_router_logits=True,
    )
    return MixtralForCausalLM(config)


def tied():
    return llama(tie_word_embeddings=True)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


@pytest.mark.parametrize("build", [llama, tied, mixtral, adapted], ids=lambda f: f.__name__)
def test_language_models_stay_silent(build, tmp_path):
    trainer = Trainer(
        model=build(),
        args=arguments(
            tmp_path,
            max_steps=4,
            gradient_accumulation_steps=4,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
        ),
        train_dataset=progressions(64),
        eval_dataset=progressions(16, seed=2),
    )
    report = run(trainer, select=OURS)
    assert alarms(report) == set(), [f.message for f in everything(report)]
    assert set(report.ran) == set(OURS), report.skipped
    saved = {p.name for p in tmp_path.iterdir()}
    assert not {name for name in saved if name.startswith(".")}, "the rehearsal is removed"


def test_batchnorm_and_several_evaluation_sets_stay_silent(tmp_path):
    trainer = Trainer(
        model=batchnorm(),
        args=arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
        ),
        train_dataset=points(64),
        eval_dataset={"one": points(20, seed=2), "two": points(30, seed=3)},
        compute_metrics=accuracy,
    )
    report = run(trainer, select=OURS)
    assert alarms(report) == set(), [f.message for f in everything(report)]


def test_t5_is_scaled_by_accumulation_as_it_ships(tmp_path):
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        d_kv=16,
        decoder_start_token_id=0,
    )
    trainer = Trainer(
        model=T5ForConditionalGeneration(config),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=progressions(32),
    )
    finding = run(trainer, train=False, select=OURS).findings[0]
    assert finding.check == "loss-scaled-by-accumulation"
    assert finding.evidence["loss_factor"] == pytest.approx(2.0, rel=1e-4)
    assert finding.evidence["gradient_factor"] == pytest.approx(2.0, rel=1e-3)


def test_an_evaluation_by_hand_is_no_alarm(tmp_path):
    report = run(classifier(tmp_path, metrics=accuracy), select=OURS)
    assert alarms(report) == set()
    notes = [f for f in everything(report) if f.severity == "note"]
    assert [f.check for f in notes] == ["eval-never-runs"]


def test_a_metric_of_the_whole_set_is_no_alarm(tmp_path):
    references = words(48, seed=2)["labels"]

    def against_all(prediction):
        if len(prediction.predictions) != len(references):
            raise ValueError("not as many predictions as references")
        return accuracy(prediction)

    report = run(classifier(tmp_path, metrics=against_all, eval_strategy="epoch"), select=OURS)
    assert alarms(report) == set()


def test_a_rehearsal_leaves_a_metric_as_it_was(tmp_path):
    history = []

    def remembering(prediction):
        history.append(len(prediction.predictions))
        return accuracy(prediction)

    run(classifier(tmp_path, metrics=remembering), train=False, select=OURS)
    assert history == []


def test_the_watched_checks_are_in_the_catalogue():
    assert set(OURS) <= set(hf_recipe.CHECKS)
