"""Faulty and fixed runs that the model, the arguments and the data already tell."""

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.gallery.harness import Case, assert_found, assert_silent
from tests.gallery.healthy import images
from tests.models import VOCABULARY, arguments, batchnorm, bert, llama, points, progressions, words


def trainer(folder, model=None, train=None, evaluation=None, base=Trainer, more=None, **args):
    return base(
        model=model if model is not None else bert(),
        args=arguments(folder, **{"max_steps": 4, **args}),
        train_dataset=train if train is not None else words(64),
        eval_dataset=evaluation if evaluation is not None else words(48, seed=2),
        **(more or {}),
    )


def head(folder, faulty):
    model = bert()
    model.bert.requires_grad_(faulty)
    model.classifier.requires_grad_(not faulty)
    return trainer(folder, model)


def layers(folder, faulty):
    model = bert(num_hidden_layers=3)
    model.bert.encoder.layer[1].requires_grad_(not faulty)
    return trainer(folder, model)


def adapters(folder, faulty):
    """A wrapper froze the adapter again; the head trains, so nothing raises."""
    from peft import LoraConfig, TaskType, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name and faulty:
            parameter.requires_grad_(False)
    return trainer(folder, model)


def task_head(folder, faulty):
    """Adapters whose task type was left out: PEFT freezes the classifier with the rest."""
    from peft import LoraConfig, TaskType, get_peft_model

    kind = None if faulty else TaskType.SEQ_CLS
    modules = ["query", "value"]
    return trainer(
        folder, get_peft_model(bert(), LoraConfig(task_type=kind, r=4, target_modules=modules))
    )


def saved_bert(folder):
    BertModel(bert().config).save_pretrained(folder / "base")
    return folder / "base"


def untied(folder, faulty):
    model = llama(tie_word_embeddings=True)
    if faulty:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return trainer(folder, model, progressions(64), progressions(48, seed=2))


def tied_by_hand(folder, faulty):
    model = llama()
    if faulty:
        model.lm_head.weight = model.model.embed_tokens.weight
    return trainer(folder, model, progressions(64), progressions(48, seed=2))


def renamed(folder, faulty):
    """The file's names have a prefix that nobody strips."""
    from safetensors.torch import load_file, save_file

    path = saved_bert(folder)
    if faulty:
        file = path / "model.safetensors"
        kept = {f"net.{name}": value for name, value in load_file(file).items()}
        save_file(kept, file, metadata={"format": "pt"})
    return trainer(folder, BertForSequenceClassification.from_pretrained(path, num_labels=4))


def rewritten(folder, faulty):
    model = BertForSequenceClassification.from_pretrained(saved_bert(folder), num_labels=4)
    for module in model.modules() if faulty else [model.classifier]:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    return trainer(folder, model)


def new_tokens(folder, faulty):
    from peft import LoraConfig, get_peft_model

    model = llama()
    model.resize_token_embeddings(VOCABULARY + 4)
    save = [] if faulty else ["embed_tokens", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=save))
    data = progressions(64).map(
        lambda row: {key: [VOCABULARY + 1, *row[key][1:]] for key in ("input_ids", "labels")}
    )
    return trainer(folder, model, data, progressions(48, seed=2))


def router(folder, faulty):
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64, output_router_logits=not faulty,
    )  # fmt: skip
    return trainer(folder, MixtralForCausalLM(config), progressions(64), progressions(48, seed=2))


def dropout(folder, faulty):
    return trainer(folder, bert(hidden_dropout_prob=0.9 if faulty else 0.3))


def constant(folder, faulty):
    model = batchnorm()
    if faulty:
        nn.init.constant_(model.body[0].weight, 0.01)
        nn.init.zeros_(model.body[0].bias)
    return trainer(folder, model, points(64), points(48, seed=2))


class Evaluates(Trainer):
    """A step of the user's own that evaluates the model it trains."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        model.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)


def evaluates(folder, faulty):
    return trainer(folder, base=Evaluates if faulty else Trainer)


def bigger(folder, faulty):
    """More predictions than any machine holds, from a set that costs nothing to make."""

    class Endless(torch.utils.data.Dataset):
        def __init__(self):
            self.rows = words(64)

        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            return self.rows[index % 64]

    more = {"compute_metrics": lambda p: {"n": 1.0}}
    if not faulty:
        more["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)[:0]
    return trainer(folder, evaluation=Endless(), more=more, eval_strategy="epoch")


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True,
}  # fmt: skip


def direction(folder, faulty):
    more = {"compute_metrics": lambda p: {"perplexity": 1.0}}
    better = None if faulty else False
    chosen = {**BEST, "metric_for_best_model": "perplexity", "greater_is_better": better}
    return trainer(folder, more=more, **chosen)


def same_set(folder, faulty):
    data = words(64)
    return trainer(folder, train=data, evaluation=data if faulty else None, **BEST)


def chosen_by_test(folder, faulty):
    data = words(48, seed=2)
    split = datasets.NamedSplit("test" if faulty else "validation")
    data = datasets.Dataset.from_dict(data.to_dict(), split=split)
    return trainer(folder, evaluation=data, **BEST)


def few_rows(folder, faulty):
    return trainer(folder, evaluation=words(12 if faulty else 128, seed=2), **BEST)


def small_batch(folder, faulty):
    size = 2 if faulty else 8
    data, other = points(64), points(48, seed=2)
    return trainer(folder, batchnorm(), data, other, per_device_train_batch_size=size)


class Flips(torch.utils.data.Dataset):
    def __init__(self, random):
        self.rows, self.random = images(48), random

    def __len__(self):
        return 48

    def __getitem__(self, index):
        noise = torch.randn(1, 8, 8) * 0.1 if self.random else 0.0
        row = self.rows[index]
        return {"pixel_values": row["pixel_values"] + noise, "labels": row["labels"]}


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 4)

    def forward(self, pixel_values=None, labels=None):
        logits = self.net(pixel_values.flatten(1))
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


def augmented(folder, faulty):
    return trainer(folder, Pixels(), Flips(False), Flips(faulty))


class Weighted(nn.Module):
    """Reads a weight out of ``**kwargs``, which the Trainer never puts there."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, features=None, labels=None, **kwargs):
        logits = self.net(features)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        weight = kwargs.get("importance")
        loss = losses.mean() if weight is None else (losses * weight).mean()
        return SequenceClassifierOutput(loss, logits)


def weights(folder, faulty):
    def weighted(rows, seed):
        data = points(rows, seed=seed)
        return data.add_column("importance", np.ones(rows).tolist())

    keep = {"remove_unused_columns": faulty}
    return trainer(folder, Weighted(), weighted(64, 1), weighted(48, 2), **keep)


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def ordered(folder, faulty):
    data = words(128)
    return trainer(folder, train=data.sort("labels") if faulty else data, base=InOrder)


def case(check, build, severity, **more):
    select = {"select": [check]}
    return Case(check, build, severity, train=more.pop("train", False), settings=select, **more)


CASES = [
    case("head-frozen", head, "warning"),
    case("head-frozen", task_head, "warning", name="task head under adapters"),
    case("frozen-by-accident", layers, "warning"),
    case("frozen-by-accident", adapters, "warning", name="adapters frozen"),
    case("untied-embedding", untied, "warning"),
    case("untied-embedding", tied_by_hand, "warning", name="tied by hand"),
    case("weights-not-loaded", renamed, "error"),
    case("weights-not-loaded", rewritten, "error", name="drawn anew after loading"),
    case("new-token-untrained", new_tokens, "warning"),
    case("auxiliary-loss-off", router, "warning"),
    case("dropout-extreme", dropout, "warning"),
    case("symmetric-init", constant, "error"),
    case("trains-in-eval-mode", evaluates, "error", train=True),
    case("eval-memory", bigger, "warning"),
    case("metric-direction", direction, "warning"),
    case("eval-in-training-set", same_set, "error"),
    case("eval-in-training-set", chosen_by_test, "warning", name="the test set chooses"),
    case("eval-too-small", few_rows, "warning"),
    case("batchnorm-small-batch", small_batch, "warning"),
    case("augmentation-on", augmented, "warning"),
    case("column-dropped", weights, "warning"),
    case("ordered-examples", ordered, "warning"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_faulty_run_is_named(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


def test_the_fix_names_the_modules(tmp_path):
    """Lines that can be pasted: the head and the two tensors by their own names."""
    report = assert_found(case("head-frozen", head, "warning"), tmp_path)
    assert report.findings[0].fix == "model.classifier.requires_grad_(True)"
    report = assert_found(case("untied-embedding", tied_by_hand, "warning"), tmp_path)
    assert "lm_head.weight and model.embed_tokens.weight" in report.findings[0].message


def test_notes(tmp_path):
    """Decay on norms, and a head that the seed does not draw; neither is an alarm."""
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = Case("decay-on-norms", lambda f, faulty: trainer(
        f, model, more={"optimizers": (optimizer, None)} if faulty else {}
    ), "note", train=False, settings={"select": ["decay-on-norms"]})  # fmt: skip
    assert_found(found, tmp_path)
    assert not assert_silent(found, tmp_path).findings


def test_the_seed_is_the_models(tmp_path):
    for seed, told in ((3, False), (8, True)):  # the arguments' seed is 3
        seen = Case("seed-after-model", lambda f, _, seed=seed: trainer(f, bert(seed=seed)), "note",
                    train=False, settings={"select": ["seed-after-model"]})  # fmt: skip
        (assert_found if told else assert_silent)(seen, tmp_path)
        if not told:
            assert not assert_silent(seen, tmp_path).findings


def test_a_base_kept_frozen_and_a_loaded_model_are_no_fault(tmp_path):
    saved = LlamaForCausalLM(llama().config)
    saved.save_pretrained(tmp_path / "saved")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    names = ["weights-not-loaded", "head-frozen", "symmetric-init", "new-token-untrained"]
    seen = Case("weights-not-loaded", lambda f, _: trainer(
        f, model, progressions(64), progressions(48, seed=2)
    ), train=False, settings={"select": names})  # fmt: skip
    assert not assert_silent(seen, tmp_path).findings
