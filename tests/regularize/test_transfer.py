"""Parts of many models, freezing, thawing by the step, rates by depth, and what transfer buys."""

import pytest
import torch
import transformers
from transformers import Trainer

from hf_recipe.instruments.compare import paired_gain
from hf_recipe.regularize.transfer import (
    GradualUnfreezing,
    add_adapters,
    freeze,
    head_warmup,
    layerwise_rates,
    parts_of,
)
from hf_recipe.regularize.weight_decay import decay_groups
from tests.models import arguments, batchnorm, bert, llama, words

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


def zoo():
    """Name -> (model, number of blocks)."""
    torch.manual_seed(0)
    t = transformers
    gpt2 = t.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)
    vit = t.ViTConfig(image_size=8, patch_size=4, num_hidden_layers=2, **SMALL)
    t5 = t.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    resnet = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return {
        "bert": (bert(num_hidden_layers=3), 3),
        "llama": (llama(num_hidden_layers=2), 2),
        "gpt2": (t.GPT2LMHeadModel(gpt2), 2),
        "vit": (t.ViTForImageClassification(vit), 2),
        "t5": (t.T5ForConditionalGeneration(t5), 4),
        "resnet": (t.ResNetForImageClassification(resnet), 2),
    }


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "t5", "resnet"])
def test_every_parameter_has_one_part_and_the_head_is_last(name):
    model, blocks = zoo()[name]
    parts = parts_of(model)
    names = [n for part in parts for n in part.parameters]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert parts[0].name == "embeddings"
    tied = name == "gpt2"  # its head is the embeddings
    assert (parts[-1].name == "head") is not tied
    assert len(parts) == blocks + (1 if tied else 2)


def test_freezing_keeps_what_is_frozen(tmp_path):
    model = bert(num_hidden_layers=2)
    assert freeze(model, 2) == ("embeddings", "bert.encoder.layer.0")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Trainer(model=model, args=arguments(tmp_path, max_steps=3), train_dataset=words(32)).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any("embeddings" in n or "layer.0." in n for n in moved)
    assert any("layer.1." in n for n in moved)
    assert any(n.startswith("classifier") for n in moved)


class Trained(transformers.TrainerCallback):
    def __init__(self, callback):
        self.callback, self.counts, self.moved = callback, [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.counts.append(self.callback.trained)
        self.moved.append(
            {n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])}
        )


def thawed(folder, callback, steps=10, resume=None, **changes):
    trainer = Trainer(
        model=bert(num_hidden_layers=2),
        args=arguments(folder, max_steps=steps, weight_decay=0.1, **changes),
        train_dataset=words(64),
    )
    watch = Trained(callback)
    trainer.add_callback(callback)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def test_parts_thaw_from_the_top_and_stay_where_they_were_on_a_resume(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 5}
    trainer, watch = thawed(tmp_path, GradualUnfreezing(0.8), **saved)
    assert watch.counts == sorted(watch.counts)
    assert watch.counts[0] == 1
    assert watch.counts[-1] == 4
    assert all(n.startswith("classifier") for n in watch.moved[0])
    assert any("layer.0." in n for n in watch.moved[-1])
    assert all(p.requires_grad for p in trainer.model.parameters())
    resumed, later = thawed(
        tmp_path, GradualUnfreezing(0.8), resume=str(tmp_path / "checkpoint-5"), **saved
    )
    assert later.counts == watch.counts[5:]
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_new_head_warms_up_alone(tmp_path):
    _, watch = thawed(tmp_path, head_warmup(0.3))
    assert watch.counts == [1] * 3 + [4] * 7


def test_rates_fall_with_depth_and_vectors_do_not_decay():
    model = bert(num_hidden_layers=2)
    groups = layerwise_rates(model, 1e-3, decay=0.5, weight_decay=0.1)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {
        "head": 1e-3,
        "bert.encoder.layer.1": 5e-4,
        "bert.encoder.layer.0": 2.5e-4,
        "embeddings": 1.25e-4,
    }
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for group in (*groups, *decay_groups(model, 0.1)):
        vectors = [p for p in group["params"] if p.ndim < 2]
        assert not (group["weight_decay"] and vectors)
    torch.optim.AdamW(groups)
    two = decay_groups(model, 0.1)
    assert sum(len(g["params"]) for g in two) == len(list(model.parameters()))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no list of blocks"):
        parts_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no list of blocks"):
        freeze(batchnorm())
    with pytest.raises(ValueError, match="at least one part"):
        freeze(bert(), 0)
    with pytest.raises(ValueError, match="decay is in"):
        layerwise_rates(bert(), 1e-3, decay=2)
    with pytest.raises(ValueError, match="shares"):
        GradualUnfreezing(0)
    with pytest.raises(ValueError, match="weight_decay"):
        decay_groups(bert(), float("nan"))
    with pytest.raises(ValueError, match="rank"):
        add_adapters(bert(), 0)


def test_adapters_train_little_and_learn(tmp_path):
    pytest.importorskip("peft")
    model = add_adapters(bert(num_hidden_layers=2), 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.25 * sum(p.numel() for p in model.parameters())
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=40, learning_rate=1e-2, label_names=["labels"]),
        train_dataset=words(128),
        eval_dataset=words(64, seed=2),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_weights_of_a_kindred_task_help_and_of_noise_do_not(tmp_path):
    """The body learned on 512 rows of one task, then 32 rows of the same rule, renamed."""

    def losses(body, seed):
        model = bert(num_hidden_layers=1, seed=seed)
        if body is not None:
            model.bert.load_state_dict(body)
        few = words(32, seed=7)
        few = few.remove_columns("labels").add_column(
            "labels", [(y + 1) % 4 for y in few["labels"]]
        )
        args = arguments(tmp_path, max_steps=25, learning_rate=2e-3, seed=seed)
        Trainer(model=model, args=args, train_dataset=few).train()
        held = words(120, seed=8)
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(held["input_ids"])).logits
        labels = (torch.tensor(held["labels"]) + 1) % 4
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()

    source = bert(num_hidden_layers=1, seed=5)
    args = arguments(tmp_path, max_steps=100, learning_rate=3e-3)
    Trainer(model=source, args=args, train_dataset=words(512, seed=9)).train()
    noise = {k: torch.randn_like(v) for k, v in source.bert.state_dict().items()}
    scratch = [losses(None, seed) for seed in range(3)]
    kindred = paired_gain(scratch, [losses(source.bert.state_dict(), s) for s in range(3)])
    foreign = paired_gain(scratch, [losses(noise, s) for s in range(3)])
    print(f"kindred {kindred}, noise {foreign}")
    assert kindred.verdict is True
    assert foreign.verdict is not True


def test_frozen_batchnorm_keeps_its_statistics(tmp_path):
    t = transformers
    config = t.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic",
        num_labels=2,
    )  # fmt: skip
    model = t.ResNetForImageClassification(config)
    rows = [{"pixel_values": torch.randn(1, 16, 16), "labels": i % 2} for i in range(32)]
    name = "resnet.embedder.embedder.normalization"
    norm = model.get_submodule(name)
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=8), train_dataset=rows)
    trainer.add_callback(head_warmup(1.0))
    trainer.train()
    assert not norm.running_mean.any()
    assert norm.momentum == 0.1
