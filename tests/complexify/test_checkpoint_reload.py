"""A checkpoint loaded again: the judge on numbers, real folders whole and broken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

import hf_recipe
from hf_recipe.complexify.checkpoint_reload import CHECKPOINT_DIFFERS as CHECK
from hf_recipe.complexify.checkpoint_reload import FILE, LIVE, TWICE, CheckpointReload
from tests.models import arguments, bert, llama, points, progressions, signature, words


@pytest.mark.parametrize(
    ("reload", "subject", "severity"),
    [
        (CheckpointReload(LIVE, "read", "SafetensorError"), "read", None),
        (CheckpointReload(FILE, "load", "TypeError"), "load", "warning"),
        (CheckpointReload(LIVE, missing=("classifier.weight",), difference=0.7), "missing", None),
        (CheckpointReload(LIVE, difference=0.2), "outputs", None),
        (CheckpointReload(LIVE, difference=math.nan), "outputs", None),
        (CheckpointReload(LIVE, difference=0.5, half=True), "outputs", None),
        (CheckpointReload(FILE, differing=("a",)), "outputs", None),
    ],
)
def test_a_checkpoint_that_is_another_model(reload, subject, severity):
    (fault,) = CHECK.judge(reload)
    assert (fault.subject, fault.severity) == (subject, severity)


@pytest.mark.parametrize(
    "reload",
    [
        CheckpointReload(LIVE, difference=1e-6),
        CheckpointReload(LIVE, difference=0.02, half=True, differing=("norm",)),
        CheckpointReload(TWICE, difference=0.0),
        CheckpointReload(FILE),
    ],
)
def test_the_same_model_is_silent(reload):
    assert list(CHECK.judge(reload)) == []


# ---------------------------------------------------------------- real folders


def trained(folder: Path, model: nn.Module, data: Any, **changes: Any) -> tuple[Trainer, Any]:
    chosen = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    trainer = Trainer(model=model, args=arguments(folder, **chosen), train_dataset=data)
    recipe = hf_recipe.attach(trainer, select=["checkpoint-differs"])
    trainer.train()
    return trainer, recipe


def found(recipe: Any) -> list[str]:
    assert recipe.report.crashed == {}
    return [f.subject for f in recipe.findings if f.check == "checkpoint-differs"]


def test_a_whole_checkpoint_is_silent_and_nothing_is_left(tmp_path: Path) -> None:
    trainer, recipe = trained(tmp_path, bert(), words())
    before = signature(trainer)
    saved = recipe.check_checkpoint()
    assert (saved.against, saved.difference, saved.missing) == (LIVE, 0.0, ())
    last = recipe.check_checkpoint(tmp_path / "checkpoint-4")
    assert (last.against, last.difference) == (LIVE, 0.0)
    earlier = recipe.check_checkpoint(tmp_path / "checkpoint-2")
    assert (earlier.against, earlier.difference, earlier.differing) == (TWICE, 0.0, ())
    assert found(recipe) == []
    assert recipe.report.ran["checkpoint-differs"] == ["end"]
    assert signature(trainer) == before
    recipe.detach()


def test_a_head_that_was_not_saved(tmp_path: Path) -> None:
    trainer, recipe = trained(tmp_path, bert(), words())
    trainer.model.bert.save_pretrained(tmp_path / "body")
    reload = recipe.check_checkpoint(tmp_path / "body")
    assert reload.missing == ("classifier.bias", "classifier.weight")
    assert reload.difference > 0.1
    assert found(recipe) == ["missing"]
    recipe.detach()


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    _, recipe = trained(tmp_path, bert(), words())
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert recipe.check_checkpoint(tmp_path / "checkpoint-4").failed_in == "read"
    assert found(recipe) == ["read"]
    recipe.detach()


def untied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    return model


@pytest.mark.parametrize("omitted", [True, False])
def test_ties_that_loading_makes_again(omitted, tmp_path: Path) -> None:
    _, recipe = trained(tmp_path, untied(), progressions(64))
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    if omitted:  # as savers do that take the config's word for the tie
        del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    reload = recipe.check_checkpoint(tmp_path / "checkpoint-4")
    assert found(recipe) == (["outputs"] if omitted else [])
    assert reload.tied
    assert reload.differing == (("lm_head.weight",) if omitted else ())
    recipe.detach()


@pytest.mark.parametrize(("kept", "expected"), [(["classifier"], []), ([], ["missing"])])
def test_adapters_and_the_head_beside_them(kept, expected, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["query"], modules_to_save=kept)
    model = get_peft_model(bert(), settings)
    for parameter in model.base_model.model.classifier.parameters():
        parameter.requires_grad_(True)
    _, recipe = trained(tmp_path, model, words())
    recipe.check_checkpoint(tmp_path / "checkpoint-4")
    assert found(recipe) == expected
    recipe.detach()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, features: Any = None, labels: Any = None) -> dict[str, Any]:
        logits = self.net(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_module_without_a_config_is_compared_by_its_tensors(tmp_path: Path) -> None:
    _, recipe = trained(tmp_path, Plain(), points())
    reload = recipe.check_checkpoint()
    assert (reload.against, reload.missing, reload.tensors) == (FILE, (), 2)
    assert found(recipe) == []
    recipe.detach()


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    _, recipe = trained(tmp_path, Plain(), points(), max_steps=1, save_strategy="no")
    with pytest.raises(FileNotFoundError, match="no folder"):
        recipe.check_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert recipe.check_checkpoint(tmp_path / "empty") is None
    assert "no safetensors" in recipe.report.skipped["checkpoint-differs"]
    recipe.detach()
