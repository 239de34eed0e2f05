import random

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer

from hf_recipe.baselines.save_rehearsal import (
    SAVE_FAILS,
    CheckpointRehearsal,
    _nearest_folder,
    obstacles_of,
    rehearse_saving,
)
from hf_recipe.core.check import Skip
from hf_recipe.instruments.quiet import quiet
from hf_recipe.trainer.preflight import subject_of_trainer
from tests.gallery.harness import run
from tests.models import arguments, bert, llama, points, progressions, words


def room(**changes):
    return CheckpointRehearsal(
        **{"checkpoint_bytes": 10**9, "kept": 3, "free_bytes": 10**10, **changes}
    )


@pytest.mark.parametrize(
    ("given", "severity", "subject"),
    [
        (room(failed_in="write", error="RuntimeError"), "error", "write"),
        (
            room(failed_in="write", error="ValueError", obstacles=("a is not contiguous",)),
            "error",
            "write",
        ),
        (room(saves=False, obstacles=("a shares its memory with b",)), "note", "write"),
        (room(failed_in="read", error="SafetensorError"), "error", "read"),
        (room(failed_in="load", error="TypeError"), "warning", "load"),
        (room(lost=("head.weight",)), None, "read"),
        (room(difference=0.5), None, "read"),
        (room(difference=float("nan")), None, "read"),
        (room(free_bytes=2 * 10**9), None, "disk"),
    ],
)
def test_a_saving_that_fails(given, severity, subject):
    (fault,) = SAVE_FAILS.judge(given)
    assert (fault.severity, fault.subject) == (severity, subject)


@pytest.mark.parametrize(
    "given", [room(), room(difference=1e-6), room(difference=0.02, half=True), room(kept=10)]
)
def test_a_saving_that_works_is_silent(given):
    assert list(SAVE_FAILS.judge(given)) == []


def rehearsed(folder, model, data=None, **args):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20, **args}
    trainer = Trainer(model=model, args=arguments(folder, **settings), train_dataset=data)
    trainer.create_optimizer()
    with quiet(trainer.model, trainer=trainer):
        (measured,) = rehearse_saving(subject_of_trainer(trainer, fresh=True))
    return measured


def test_room_is_counted(tmp_path):
    model = llama()
    size = sum(p.numel() for p in model.parameters()) * 4
    measured = rehearsed(tmp_path, model, progressions(64))
    assert measured.kept == 4
    assert measured.checkpoint_bytes == pytest.approx(3 * size, rel=0.01)  # and Adam's two
    assert measured.difference == 0.0
    few = rehearsed(tmp_path, model, progressions(64), save_total_limit=1, save_only_model=True)
    assert few.kept == 2
    assert few.checkpoint_bytes == pytest.approx(size, rel=0.01)
    assert list(tmp_path.iterdir()) == []


def test_where_a_folder_is_missing_the_nearest_above_is_asked(tmp_path):
    assert _nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_bare_module_is_compared_with_its_file(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 64)

        def forward(self, input_ids, labels=None):
            logits = self.embed(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    measured = rehearsed(tmp_path, Bare(), progressions(64))
    assert measured.written
    assert (measured.failed_in, measured.lost) == ("", ())


def test_a_head_that_the_config_does_not_know_cannot_be_loaded(tmp_path):
    model = bert()
    model.classifier = nn.Linear(32, 7)
    measured = rehearsed(tmp_path, model, words(64))
    assert measured.failed_in == "load"


class Forgetful(BertForSequenceClassification):
    """Part of what it computes with is in no state that is saved."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = 1.0 + random.random()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
        outputs.logits = outputs.logits * self.scale
        return outputs


def test_a_model_that_forgets_gives_other_outputs(tmp_path):
    measured = rehearsed(tmp_path, Forgetful(bert().config), words(64))
    assert measured.difference > 1e-3


def test_a_run_that_saves_nothing_is_skipped(tmp_path):
    with pytest.raises(Skip, match="saves nothing"):
        rehearsed(tmp_path, llama(), progressions(64), save_strategy="no")


class Turned(nn.Module):
    """A linear model with a buffer that is a view turned round, or a value that is no tensor."""

    def __init__(self, turned=False, function=False):
        super().__init__()
        self.out = nn.Linear(8, 4)
        places = torch.arange(12.0).reshape(3, 4).t()
        self.register_buffer("places", places if turned else places.contiguous())
        if function:
            self.register_state_dict_post_hook(lambda m, state, p, d: state.update(thing=print))

    def forward(self, features, labels=None):
        logits = self.out(features) + self.places.sum() * 0
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: Turned(), ""),
        (lambda: Turned(turned=True), "places is not contiguous"),
        (lambda: Turned(function=True), "thing is no tensor"),
    ],
)
@pytest.mark.parametrize("saves", [True, False])
def test_a_state_that_no_file_holds_is_named_beforehand(model, word, saves, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2} if saves else {}
    trainer = Trainer(
        model=model(), args=arguments(tmp_path, max_steps=2, **changes), train_dataset=points(32)
    )
    report = run(trainer, train=False, select=["save-fails"])
    told = [(f.severity, f.message) for f in report.findings]
    assert len(told) == bool(word)
    if word:
        assert told[0][0] == ("error" if saves else "note")
        assert word in told[0][1]
        with pytest.raises((ValueError, RuntimeError)):
            trainer.save_model(str(tmp_path / "end"))
    else:
        trainer.save_model(str(tmp_path / "end"))


def test_tensors_that_share_memory_are_named():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert obstacles_of(nn.Sequential(first, second)) == (
        "1.weight shares its memory with 0.weight",
    )
    assert obstacles_of(llama(tie_word_embeddings=True)) == ()
