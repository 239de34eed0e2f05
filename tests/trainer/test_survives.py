"""The recipe survives what Trainers do: retries, compilation, adapters, overrides, streams."""

import pytest
import torch
from transformers import Trainer

import hf_recipe
from tests.gallery import healthy
from tests.models import arguments, bert, classifier, llama, progressions, signature, words


def test_out_of_memory_retries_begin_a_new_attempt(tmp_path):
    """auto_find_batch_size enters on_train_begin again at step 0, with weights already moved."""

    class Small(Trainer):
        attempts = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            if inputs["input_ids"].shape[0] > 6 and self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = Small(
        model=bert(),
        args=arguments(tmp_path, auto_find_batch_size=True, max_steps=6),
        train_dataset=words(),
    )
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert recipe.report.crashed == {}
    assert trainer.state.global_step == 6
    assert recipe.recorder.curves["loss"].x[-6:] == [1, 2, 3, 4, 5, 6]
    initial = [m for m in recipe.report.measurements if m.kind == "InitialLoss"]
    assert len(initial) == 1, "the loss of a moved model is not an initial loss"


def test_a_stream_is_probed_on_its_first_real_batch(tmp_path):
    bare = healthy.streamed(tmp_path / "bare", 5)
    bare.train()
    watched = healthy.streamed(tmp_path / "watched", 5)
    recipe = hf_recipe.attach(watched)
    recipe.preflight()
    assert "initial-loss-unexpected" in recipe.report.skipped
    watched.train()
    assert "initial-loss-unexpected" in recipe.report.ran
    assert "labels-masked" in recipe.report.ran
    assert recipe.report.crashed == {}
    assert signature(watched) == signature(bare)


def test_an_own_compute_loss_is_what_is_probed(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    trainer = Own(
        model=bert(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=10),
        train_dataset=words(),
        eval_dataset=words(40, seed=2),
    )
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert recipe.report.crashed == {}
    assert {f.severity for f in recipe.findings} <= {"note"}
    assert recipe.closing.evaluations["validation"].y


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["N12 LoRA", "activation checkpointing", "N03 T5, tied", "N24 bf16 autocast"]
)
def test_watched_runs_of_every_make_are_bit_identical(name, tmp_path):
    build = next(case.build for case in healthy.HEALTHY if case.name == name)
    bare = build(tmp_path / "bare", 5)
    bare.train()
    watched = build(tmp_path / "watched", 5)
    recipe = hf_recipe.attach(watched)
    recipe.preflight()
    watched.train()
    assert recipe.report.crashed == {}
    assert signature(watched) == signature(bare)


def test_a_compiled_model_is_recorded(tmp_path):
    trainer = classifier(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=4)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert recipe.report.crashed == {}
    assert len(recipe.recorder.curves["loss"].y) == 4


def test_two_calls_of_train_keep_one_report(tmp_path):
    trainer = classifier(tmp_path, max_steps=5)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    trainer.args.max_steps = 10
    trainer.train()
    assert recipe.report.crashed == {}
    assert len([m for m in recipe.report.measurements if m.kind == "InitialLoss"]) == 1


def test_on_error_raises_before_step_1(tmp_path):
    data = progressions()
    masked = data.map(lambda row: {"labels": [-100] * len(row["labels"])})
    for on_error in ("stop", "raise"):
        trainer = Trainer(model=llama(), args=arguments(tmp_path), train_dataset=masked)
        recipe = hf_recipe.attach(trainer, on_error=on_error)
        with pytest.raises(hf_recipe.RecipeError, match="labels-masked"):
            trainer.train()
        assert trainer.state.global_step == 0
        recipe.detach()


def test_on_error_stops_a_run_that_has_begun(tmp_path):
    class Breaks(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            result = super().compute_loss(model, inputs, return_outputs, **kwargs)
            if self.model.training and self.state.global_step >= 5:
                return result * float("nan")
            return result

    trainer = Breaks(model=bert(), args=arguments(tmp_path), train_dataset=words())
    recipe = hf_recipe.attach(trainer, on_error="stop")
    trainer.train()
    assert trainer.state.global_step == 6, "the step at which it happened is the last"
    assert [f.check for f in recipe.findings if f.severity == "error"] == ["loss-not-finite"]
    assert recipe.findings[0].step == 6


def test_expect_is_silent_when_it_fires_and_speaks_when_it_does_not(tmp_path):
    trainer = classifier(tmp_path, warmup_steps=500, max_steps=10)
    recipe = hf_recipe.attach(trainer, expect=["warmup-too-long", "labels-masked"])
    trainer.train()
    found = [(f.check, f.subject) for f in recipe.findings if f.severity != "note"]
    assert found == [("labels-masked", "expect")]


def test_a_baseline_silences_what_is_known(tmp_path):
    trainer = classifier(tmp_path / "first", warmup_steps=500, max_steps=10)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert "warmup-too-long" in {f.check for f in recipe.findings}
    path = tmp_path / "first" / "recipe" / "report.json"
    again = classifier(tmp_path / "again", warmup_steps=500, max_steps=10)
    second = hf_recipe.attach(again, baseline=path)
    again.train()
    assert "warmup-too-long" not in {f.check for f in second.findings}
    assert "warmup-too-long" in second.report.ran


class Slope(torch.nn.Module):
    """Its loss holds its own derivative, so its forward pass cannot do without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def forward(self, x, labels=None):
        x = x.requires_grad_(True)
        y = self.net(x)
        slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        loss = ((slope + y) ** 2).mean() + ((y[:, 0] - labels) ** 2).mean()
        return {"loss": loss, "logits": y[:, 0]}


def test_a_forward_pass_that_takes_gradients_is_skipped_and_crashes_nothing(tmp_path):
    x = torch.linspace(0, 2, 64)
    data = [{"x": a[None], "labels": (-a).exp()} for a in x]
    trainer = Trainer(model=Slope(), args=arguments(tmp_path, max_steps=6), train_dataset=data)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    assert recipe.report.crashed == {}
    assert "takes gradients" in recipe.report.skipped["initial-loss-unexpected"]


def test_generation_configs_are_left_as_they_were(tmp_path):
    case = next(case for case in healthy.HEALTHY if case.name == "N12 LoRA")
    trainer = case.build(tmp_path, 5)
    kept = {n: vars(m).get("generation_config") for n, m in trainer.model.named_modules()}
    hf_recipe.attach(trainer).preflight()
    for name, module in trainer.model.named_modules():
        assert vars(module).get("generation_config") is kept[name], name


def test_a_run_taken_up_again_from_before_its_end_is_counted_once(tmp_path):
    trainer = classifier(tmp_path, max_steps=20, save_strategy="steps", save_steps=10)
    recipe = hf_recipe.attach(trainer)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert recipe.report.crashed == {}
    fall = next(s for s in recipe.watch.states.values() if "spent" in s)
    assert fall["steps"] == 20
