"""One batch memorised by healthy models of nine kinds, and by none of nine broken ones.

    python scripts/benchmark.py one-batch

Each healthy model, tiny and freshly drawn, must come down to its floor within 150 steps and be put
back bit for bit; each broken one must not, and its cause is printed. Equal inputs under different
labels have a floor above zero, which is compared with the entropy that was planted.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.figures import OUT, Figures  # noqa: E402

STEPS, ROWS = 150, 16


def healthy() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name -> () -> (model, rows)."""
    import torch
    from transformers import (
        BertForMaskedLM,
        BertForTokenClassification,
        GPT2Config,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    from tests.gallery.healthy import images
    from tests.models import VOCABULARY, bert, llama, progressions, words

    def regression() -> tuple[Any, Any]:
        data = words(64)
        targets = [50.0 + label for label in data["labels"]]
        data = data.remove_columns("labels").add_column("labels", targets)
        return bert(classes=1, problem_type="regression"), data

    def masked() -> tuple[Any, Any]:
        def hide(row: dict[str, Any]) -> dict[str, Any]:
            ids = row["input_ids"]
            return {
                "input_ids": [1 if i % 7 == 3 else t for i, t in enumerate(ids)],
                "labels": [t if i % 7 == 3 else -100 for i, t in enumerate(ids)],
            }

        return BertForMaskedLM(bert().config), progressions(64).map(hide)

    def tags() -> tuple[Any, Any]:
        data = words(64).map(lambda row: {"labels": [t % 4 for t in row["input_ids"]]})
        return BertForTokenClassification(bert().config), data

    def gpt2() -> tuple[Any, Any]:
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32)
        return GPT2LMHeadModel(config), progressions(64)

    def t5() -> tuple[Any, Any]:
        config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2,
                          num_heads=2, decoder_start_token_id=0)  # fmt: skip
        return T5ForConditionalGeneration(config), progressions(64)

    def vit() -> tuple[Any, Any]:
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=32,
                           num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                           num_labels=4)  # fmt: skip
        return ViTForImageClassification(config), images(64)

    def resnet() -> tuple[Any, Any]:
        config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16],
                              depths=[1, 1], layer_type="basic", num_labels=4)  # fmt: skip
        return ResNetForImageClassification(config), images(64)

    built = {
        "BERT classifier": lambda: (bert(), words(64)),
        "BERT tagger": tags,
        "BERT masked": masked,
        "GPT-2": gpt2,
        "Llama": lambda: (llama(), progressions(64)),
        "T5": t5,
        "ViT": vit,
        "ResNet": resnet,
        "regression around 50": regression,
    }
    return {name: _seeded(torch, build) for name, build in built.items()}


def _seeded(torch: Any, build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        return build()

    return made


def broken() -> dict[str, Callable[[Any, dict[str, Any]], Any]]:
    """Name -> (model, inputs) -> the loss that a faulty compute_loss returns."""
    import torch
    from torch.nn import functional

    def logits(model: Any, inputs: dict[str, Any]) -> Any:
        return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits

    def loss(z: Any, inputs: dict[str, Any]) -> Any:
        return functional.cross_entropy(z, inputs["labels"])

    def shuffled(model: Any, inputs: dict[str, Any]) -> Any:
        order = torch.randperm(len(inputs["labels"]))
        return functional.cross_entropy(logits(model, inputs), inputs["labels"][order])

    def frozen(model: Any, inputs: dict[str, Any]) -> Any:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return loss(logits(model, inputs), inputs)

    def without_input(model: Any, inputs: dict[str, Any]) -> Any:
        same = {**inputs, "input_ids": torch.zeros_like(inputs["input_ids"])}
        return loss(logits(model, same), inputs)

    return {
        "detached": lambda m, x: loss(logits(m, x).detach(), x) + 0 * logits(m, x).sum(),
        "frozen": frozen,
        "labels shuffled at each step": shuffled,
        "softmax twice": lambda m, x: loss(logits(m, x).softmax(-1), x),
        "sign": lambda m, x: -loss(logits(m, x), x),
        "inputs lost": without_input,
        "rows averaged": lambda m, x: loss(logits(m, x).mean(0, keepdim=True) + 0 * logits(m, x),
                                           x),
        "answers rounded": lambda m, x: loss(logits(m, x).round(), x),
        "labels broadcast": lambda m, x: functional.mse_loss(
            logits(m, x)[:, :1].expand(len(x["labels"]), len(x["labels"])),
            x["labels"].float().expand(len(x["labels"]), -1),
        ),
    }  # fmt: skip


def attempt(model: Any, data: Any, faulty: Callable[[Any, dict[str, Any]], Any] | None) -> Any:
    """`recipe.overfit_one_batch()` on a fresh Trainer: (result, put back bit for bit)."""
    import torch
    from transformers import Trainer

    import hf_recipe
    from tests.models import arguments

    class Faulty(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            loss = faulty(model, inputs)
            return (loss, model(**inputs)) if return_outputs else loss

    kind = Trainer if faulty is None else Faulty
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), per_device_train_batch_size=ROWS)
        trainer = kind(model=model, args=args, train_dataset=data)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        recipe = hf_recipe.attach(trainer, on_error="warn")
        recipe.closing.console.enabled = False
        found = recipe.overfit_one_batch(max_steps=STEPS)
        recipe.detach()
        same = all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    return found, same


def conflicting() -> tuple[Any, Any, float]:
    """A model, rows of which a half stand twice under two labels, and the floor in nats."""
    import datasets

    from tests.models import bert, words

    rows = words(8).to_dict()
    doubled = {name: values + values for name, values in rows.items()}
    doubled["labels"] = rows["labels"] + [
        (label + 1) % 4 if i < 4 else label for i, label in enumerate(rows["labels"])
    ]
    return bert(), datasets.Dataset.from_dict(doubled), math.log(2) / 2


def main() -> int:
    """Print the figures; 1 when a target is missed."""
    from hf_recipe.baselines.one_batch import likeliest_cause

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    figures = Figures("scripts/benchmark.py one-batch", "One batch memorised")
    reached, put_back, steps = 0, 0, []
    models = healthy()
    for name, build in models.items():
        found, same = attempt(*build(), None)
        reached, put_back = reached + found.reached, put_back + same
        steps.append(found.steps)
        note = f"loss {found.start:.3g} -> {found.end:.3g}, floor {found.floor:.3g}"
        figures.record(f"{name}: steps", found.steps, most=STEPS, note=note)
    figures.record("healthy models at their floor", reached, least=len(models),
                   note=f"of {len(models)}")  # fmt: skip
    passed = 0
    for name, faulty in broken().items():
        found, same = attempt(*models["BERT classifier"](), faulty)
        passed, put_back = passed + found.reached, put_back + same
        cause = likeliest_cause(found)[0]
        print(f"  broken, {name}: loss {found.start:.3g} -> {found.end:.3g}; {cause}", flush=True)
    figures.record("broken models at their floor", passed, most=0, note=f"of {len(broken())}")
    model, data, floor = conflicting()
    found, same = attempt(model, data, None)
    figures.record("conflicting labels: floor's error", abs(found.floor / floor - 1), most=0.02,
                   note=f"{found.floor:.4f} nats, reached: {found.reached}")  # fmt: skip
    whole = len(models) + len(broken()) + 1
    figures.record("put back bit for bit", put_back + same, least=whole, note=f"of {whole}")
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
