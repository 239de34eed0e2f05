"""What `attach`'s preflight costs, in forward + backward passes of the user's own batch.

    python scripts/benchmark.py preflight

A BERT, a GPT-2, a ResNet and a ViT, small enough for a CPU. The pass of the bare model is timed
right before and after each preflight (CPU time, one thread), and the median ratio of some fresh
Trainers is held against the limit. Probes of the data alone have a budget of their own, in seconds
for 100,000 rows, at the first launch and at the second. Nothing may have been skipped for its cost,
and the probes' tensors take less memory than the run's own first step. Beside it: how long
``import hf_recipe`` and ``hf-recipe explain`` take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.figures import OUT, Figures  # noqa: E402

LEAST = 0.005  # passes; what rounds to 0.00 is left out of the table
ROWS, BATCH = 256, 16
MANY, DATA_SECONDS, AGAIN_SECONDS = 100_000, 5.0, 0.2


def text(model: Any, length: int, vocabulary: int, classes: int) -> tuple[Any, Any]:
    """A model over tokens and random rows for it; no classes: next tokens."""
    import datasets
    import torch

    ids = torch.randint(5, vocabulary, (ROWS, length))
    labels = (ids[:, 0] % classes).tolist() if classes else ids.tolist()
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    return model, datasets.Dataset.from_dict({**columns, "labels": labels})


def pictures(model: Any, side: int) -> tuple[Any, Any]:
    """A model over pictures and random rows for it."""
    import torch

    draw = zip(torch.randn(ROWS, 3, side, side), torch.randint(0, 10, (ROWS,)), strict=True)
    return model, [{"pixel_values": picture, "labels": label} for picture, label in draw]


def bert() -> tuple[Any, Any]:
    """A small BERT and 128 tokens a row."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=4000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, num_labels=4,
    )  # fmt: skip
    return text(BertForSequenceClassification(config), 128, 4000, 4)


def gpt2() -> tuple[Any, Any]:
    """A small GPT-2 and 128 tokens a row."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2000, n_embd=128, n_layer=4, n_head=4, n_positions=128)
    return text(GPT2LMHeadModel(config), 128, 2000, 0)


def resnet() -> tuple[Any, Any]:
    """A small ResNet and pictures of 96 x 96."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    return pictures(ResNetForImageClassification(config), 96)


def vit() -> tuple[Any, Any]:
    """A small ViT and pictures of 32 x 32."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=192, num_hidden_layers=4, num_attention_heads=3,
        intermediate_size=768, num_labels=10,
    )  # fmt: skip
    return pictures(ViTForImageClassification(config), 32)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "BERT": bert,
    "GPT-2": gpt2,
    "ResNet": resnet,
    "ViT": vit,
}


def trainer_of(build: Callable[[], tuple[Any, Any]], folder: Path, seed: int) -> Any:
    """A fresh Trainer with an evaluation set and checkpoints, as a user's."""
    import torch
    from transformers import Trainer

    from tests.models import arguments

    torch.manual_seed(seed)
    model, data = build()
    model.accepts_loss_kwargs = False
    part = data.select(range(64)) if hasattr(data, "select") else data[:64]
    args = arguments(
        folder, per_device_train_batch_size=BATCH, eval_strategy="steps", eval_steps=10,
        save_strategy="steps", save_steps=10,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=part)


def pass_seconds(trainer: Any, times: int = 3) -> list[float]:
    """CPU seconds of forward + backward of the user's batch, bare."""
    import torch

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    state = torch.get_rng_state()
    trainer.model.train()
    took = []
    for _ in range(times):
        began = time.process_time()
        trainer.model(**batch).loss.backward()
        took.append(time.process_time() - began)
        trainer.model.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    return took


def one_preflight(trainer: Any) -> tuple[dict[str, float], float, dict[str, str]]:
    """CPU seconds of each probe, of the whole, and what was skipped for its cost."""
    import hf_recipe
    from hf_recipe.examiner import Examiner

    spent: dict[str, float] = defaultdict(float)
    inner = Examiner.examine

    def examine(self: Examiner, probe: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return inner(self, probe, *args, **kwargs)
        finally:
            spent[f"{probe.moment}: {probe.name}"] += time.process_time() - began

    recipe = hf_recipe.attach(trainer)
    recipe.closing.console.enabled = False
    Examiner.examine = examine  # type: ignore[method-assign]
    try:
        began = time.process_time()
        recipe.preflight()
        whole = time.process_time() - began
    finally:
        Examiner.examine = inner  # type: ignore[method-assign]
    words = ("budget", "memory", "too long", "too large")
    costly = {k: v for k, v in recipe.report.skipped.items() if any(w in v for w in words)}
    assert not recipe.report.crashed, recipe.report.crashed
    recipe.detach()
    return dict(spent), whole, costly


def measure(build: Callable[[], tuple[Any, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The cost of some fresh preflights, in passes of the same minute."""
    ratios, data_seconds, tables, skipped, units = [], [], [], {}, []
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(build, Path(folder), options.seed + repeat)
            pass_seconds(trainer, 1)  # warms up
            around = pass_seconds(trainer)
            spent, whole, costly = one_preflight(trainer)
            unit = statistics.median(around + pass_seconds(trainer))
        data = sum(v for k, v in spent.items() if k.startswith(("dataset:", "batch:")))
        ratios.append((whole - data) / unit)
        data_seconds.append(data)
        tables.append({name: seconds / unit for name, seconds in spent.items()})
        skipped |= costly
        units.append(unit)
    names = {name for table in tables for name in table}
    each = {n: statistics.median([table.get(n, 0.0) for table in tables]) for n in names}
    cost = statistics.median(ratios)
    return {
        "passes": cost,
        "pass_ms": 1000 * statistics.median(units),
        "data_seconds": statistics.median(data_seconds),
        "probes": dict(sorted(each.items(), key=lambda item: -item[1])),
        "skipped_for_cost": skipped,
    }


def record(figures: Figures, name: str, found: dict[str, Any], limit: float) -> None:
    """The whole against its limit, and what each probe costs, as a table."""
    figures.record(
        f"{name}: passes",
        found["passes"],
        most=limit,
        note=f"of {found['pass_ms']:.0f} ms; {found['data_seconds']:.2f} s more for the data "
        f"checks of {ROWS} rows",
    )
    left = found["skipped_for_cost"]
    figures.record(f"{name}: skipped for cost", len(left), most=0, note=", ".join(left))
    for probe, cost in found["probes"].items():
        if cost >= LEAST:
            figures.record(f"{name}, {probe}", cost, cell=(probe, name))


def memory(build: Callable[[], tuple[Any, Any]], seed: int) -> float:
    """The most bytes that tensors of the preflight took, over those of the run's first step."""
    import hf_recipe
    from hf_recipe.instruments.memory import TensorBytes

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(build, Path(folder), seed)
        recipe = hf_recipe.attach(trainer)
        recipe.closing.console.enabled = False
        with TensorBytes() as probes:
            recipe.preflight()
        recipe.detach()
        trainer.args.max_steps = 1
        with TensorBytes() as step:
            trainer.train()
    return probes.peak / step.peak


def launches(seed: int) -> tuple[float, float]:
    """CPU seconds of the data checks of `MANY` tokenised rows, at the first launch and the next."""
    import datasets
    import numpy as np
    import pyarrow as pa
    from transformers import Trainer

    from tests.models import arguments

    ids = np.random.default_rng(seed).integers(5, 4000, (MANY, 64))
    places = pa.array(np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32))
    column = pa.ListArray.from_arrays(places, pa.array(ids.reshape(-1)))
    table = pa.table({"input_ids": column, "labels": pa.array(ids[:, 0] % 4)})
    data, took = datasets.Dataset(table, fingerprint=f"launches {seed}"), []
    cache = tempfile.TemporaryDirectory()
    os.environ["HF_RECIPE_CACHE"] = cache.name
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            held_out = data.select(range(MANY // 10))
            trainer = Trainer(
                bert()[0], arguments(Path(folder)), train_dataset=data, eval_dataset=held_out
            )
            spent, _, _ = one_preflight(trainer)
        took.append(sum(v for k, v in spent.items() if k.startswith(("dataset:", "batch:"))))
    cache.cleanup()
    return took[0], took[1]


def seconds_of(code: str, times: int = 5) -> float:
    """Seconds that a fresh interpreter spends on `code`, beyond its own start; the least of some.

    Raises:
        subprocess.CalledProcessError: the code failed.
    """
    timed = f"import time; t = time.perf_counter(); {code}; print('took', time.perf_counter() - t)"
    found = []
    for _ in range(times):
        command = [sys.executable, "-c", timed]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        found.append(float(said.rsplit("took", 1)[1]))
    return min(found)


def beside(figures: Figures, seed: int) -> None:
    """Data checks of many rows, and what does not load torch."""
    first, second = launches(seed)
    figures.record(f"data checks of {MANY:,} rows, CPU s", first, most=DATA_SECONDS)
    figures.record("data checks at the second launch, CPU s", second, most=AGAIN_SECONDS)
    no_torch = "import sys; assert 'torch' not in sys.modules"
    figures.record("import hf_recipe, s", seconds_of(f"import hf_recipe; {no_torch}"), most=0.1)
    explain = f"from hf_recipe.cli import main; main(['explain', 'loss-not-finite']); {no_torch}"
    figures.record("hf-recipe explain, s", seconds_of(explain), most=0.3)


def main() -> int:
    """Print and write the figures; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=10.0, help="forward + backward passes")
    parser.add_argument("--repeats", type=int, default=3, help="fresh Trainers of each model")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # imports are no part of a preflight
        one_preflight(trainer_of(MODELS[options.models[0]], Path(folder), options.seed))
    title = "Cost of the preflight, in forward + backward passes of the user's batch"
    figures = Figures("scripts/benchmark.py preflight", title, options.seed)
    for name in options.models:
        record(figures, name, measure(MODELS[name], options), options.limit)
        peak = memory(MODELS[name], options.seed)
        figures.record(f"{name}: probes' memory / the first step's", peak, most=1.0)
    beside(figures, options.seed)
    return figures.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
