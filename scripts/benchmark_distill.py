"""Measure the chunked distillation loss against the naive one: memory, time, exactness, quality.

    python scripts/benchmark_distill.py            # every target; exits 1 when one is missed
    python scripts/benchmark_distill.py --quick    # width 64 alone, without the quality runs
    python scripts/benchmark_distill.py --trl ENV  # against TRL, too, of that environment

TRL's chunked path is measured in an environment of its own: `python -m venv ENV`, then
`ENV/bin/pip install trl` beside this project's dependencies.

Peak memory is the high-water mark of a process of its own (VmHWM, reset after the inputs are
there), so that what initialising left behind is not counted. Time is the processor's, in pairs:
naive and chunked in turn, the ratio of each pair, its median.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_recipe.tune.distillation_loss import KINDS, chunked_divergence
from scripts.figures import OUT, Figures

VOCABULARY, ROWS = 128_256, 512
MEBIBYTE = 2**20
# {width: {kind: least ratio of peaks}}; "beyond": without the head's own gradient.
TOTAL_TARGETS = {64: {"forward_kl": 8.0, "reverse_kl": 8.0, "skewed_kl": 8.0, "jsd": 12.0}}
BEYOND_TARGETS = {512: 8.0, 2048: 6.0}
SLOWEST, TOLERANCE = 1.0, 1e-5
TRL_BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # it knows no skewed one
TRL_SHARE = 1 / 3  # of its peak
OURS = ("naive", "chunked")


def naive_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    kind: str,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The same loss as one would write it: both logits, autograd, the mask at the end."""
    log_q = F.log_softmax(student_hidden @ student_weight.T / temperature, dim=-1)
    log_p = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, dim=-1)
    if kind == "forward_kl":
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif kind == "reverse_kl":
        rows = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        share = torch.tensor(0.5 if kind == "jsd" else 0.1, dtype=log_q.dtype)
        log_m = torch.logsumexp(
            torch.stack([log_p + share.log(), log_q + torch.log1p(-share)]), dim=0
        )
        rows = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        if kind == "jsd":
            back = F.kl_div(log_m, log_q, reduction="none", log_target=True)
            rows = share * rows + (1 - share) * back
    kept = rows[labels != -100]
    return kept.sum() / kept.shape[0] * temperature**2


def inputs(width: int, rows: int, vocabulary: int = VOCABULARY, dtype=torch.float32) -> list:
    """Hidden states and heads of student and teacher; labels with every second row masked."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::2] = -100
    student = draw(rows, width).requires_grad_(), draw(vocabulary, width).mul_(0.1).requires_grad_()
    return [*student, draw(rows, width), draw(vocabulary, width).mul_(0.1), labels]


def trl_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """TRL's chunked path, as its DistillationTrainer calls it on a processor."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows, _ = ChunkedDivergenceFunction.apply(
        student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, TRL_BETAS[kind]
    )
    kept = labels != -100
    return rows.masked_fill(~kept, 0).sum() / kept.sum()


def losses() -> dict[str, Callable[..., torch.Tensor]]:
    """The implementations by name."""
    return {
        "naive": naive_divergence,
        "chunked": lambda *tensors, kind: chunked_divergence(*tensors, kind=kind),
        "trl": trl_divergence,
    }


def status(field: str) -> float:
    """A field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def child(implementation: str, kind: str, width: int, rows: int) -> None:
    """Print the peak over what was resident before, in MiB, of one forward and backward."""
    torch.set_num_threads(1)
    tensors = inputs(width, rows)
    warm = inputs(width, 8, 64)
    losses()[implementation](*warm, kind=kind).backward()
    gc.collect()
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss = losses()[implementation](*tensors, kind=kind)
    loss.backward()
    print(json.dumps({"peak": status("VmHWM") - resident, "loss": loss.item()}))


def measured(
    implementation: str, kind: str, width: int, rows: int, python: str = sys.executable
) -> dict[str, float]:
    """``peak``, in MiB, and ``loss`` of a process that does nothing else."""
    command = [python, __file__, "--child", implementation, kind, str(width), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{implementation}, {kind}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peak(implementation: str, kind: str, width: int, rows: int) -> float:
    """The peak of `measured`."""
    return measured(implementation, kind, width, rows)["peak"]


def against_trl(figures: Figures, python: str, width: int = 64) -> None:
    """Our peak as a share of TRL's, and that both compute the same."""
    for kind in TRL_BETAS:
        ours, theirs = (
            measured("chunked", kind, width, ROWS),
            measured("trl", kind, width, ROWS, python),
        )
        note = f"{ours['peak']:.0f} MiB against {theirs['peak']:.0f}"
        name = f"peak as a share of TRL's, width {width}, {kind}"
        figures.record(name, ours["peak"] / theirs["peak"], most=TRL_SHARE, note=note)
        apart = abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])
        figures.record(f"loss against TRL's, {kind}", apart, most=TOLERANCE)


def trl_python(environment: Path | None) -> str | None:
    """The interpreter that has TRL: of the environment given, or this one; None: neither."""
    if environment is not None:
        found = environment / "bin" / "python"
        if not found.is_file():
            raise SystemExit(f"--trl {environment}: no environment, there is no {found}")
        return str(found)
    return sys.executable if importlib.util.find_spec("trl") else None


def time_ratio(kind: str, width: int, pairs: int) -> dict[str, float]:
    """Processor seconds of chunked over those of naive: the median of alternating pairs."""
    tensors = inputs(width, ROWS)
    functions = losses()
    ratios, seconds = [], {"naive": [], "chunked": []}
    for turn in range(pairs + 1):
        order = ["naive", "chunked"] if turn % 2 else ["chunked", "naive"]
        spent = {}
        for name in order:
            tensors[0].grad = tensors[1].grad = None
            started = time.process_time()
            functions[name](*tensors, kind=kind).backward()
            spent[name] = time.process_time() - started
        if turn:  # the first pair warms up
            ratios.append(spent["chunked"] / spent["naive"])
            for name, value in spent.items():
                seconds[name].append(value)
    return {
        "ratio": statistics.median(ratios),
        "naive_s": statistics.median(seconds["naive"]),
        "chunked_s": statistics.median(seconds["chunked"]),
    }


def exactness(kind: str, rows: int = 64, vocabulary: int = 20_000, width: int = 64) -> float:
    """Largest error of value and gradients against float64, relative to the largest entry."""
    narrow = inputs(width, rows, vocabulary)
    wide = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in narrow
    ]
    chunked = chunked_divergence(*narrow, kind=kind, temperature=2.0, chunk_rows=7)
    exact = naive_divergence(*wide, kind=kind, temperature=2.0)
    chunked.backward()
    exact.backward()
    errors = [abs(chunked.item() - exact.item()) / abs(exact.item())]
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        errors.append(float((a.grad - b.grad).abs().max() / b.grad.abs().max()))
    return max(errors)


class Perceptron(torch.nn.Module):
    """Two layers over the 64 pixels of a digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
        )

    def forward(
        self, pixels: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Logits (rows, 10), and the loss where there are labels."""
        logits = self.layers(pixels)
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits, labels), **found}


def digits(seed: int, teacher_width: int = 256, share: float = 0.1) -> dict[str, float]:
    """Test accuracies on digits: teacher, student of 1/8 the width, the same student by labels.

    The student has `share` of the labels; its unlabelled rows are taught by the teacher alone.
    """
    import numpy as np
    import transformers as tf
    from sklearn.datasets import load_digits

    from hf_recipe.tune.distillation import DistillationTrainer, DistillationTrainingArguments

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = (data.data[order] / 16).astype("float32")
    labels = data.target[order]
    rows = [{"pixels": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    train, test = rows[:1437], rows[1437:]
    few = [
        {**row, "labels": row["labels"] if i < share * len(train) else -100}
        for i, row in enumerate(train)
    ]

    def fit(model: torch.nn.Module, data: list, epochs: int, **options) -> float:
        arguments = dict(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=epochs,
            learning_rate=5e-3,
            per_device_train_batch_size=32,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        if options:
            made = DistillationTrainingArguments(**arguments, alpha=0.9, distill_temperature=4.0)
            trainer = DistillationTrainer(model, made, train_dataset=data, **options)
        else:
            trainer = tf.Trainer(model, tf.TrainingArguments(**arguments), train_dataset=data)
        trainer.train()
        predicted = trainer.predict(test).predictions.argmax(-1)
        return float((predicted == labels[1437:]).mean())

    tf.set_seed(seed)
    teacher, student = Perceptron(teacher_width), Perceptron(teacher_width // 8)
    alone = copy.deepcopy(student)
    # Label-only training takes as many steps as distilling: 10 x the epochs over 1/10 of the rows.
    return {
        "teacher": fit(teacher, train, 20),
        "student": fit(student, few, 40, teacher=teacher),
        "labels_only": fit(alone, few[: math.ceil(share * len(train))], round(40 / share)),
    }


def main() -> int:
    """Measure, print, write the figures; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="width 64 alone, no quality runs")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the quality runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON")
    parser.add_argument("--trl", type=Path, help="environment that has TRL; default: this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    python = trl_python(options.trl)
    command = "scripts/benchmark.py distill" + (" --quick" if options.quick else "")
    command += " --trl ENV" if python else ""
    figures = Figures(command, f"Distillation loss at {VOCABULARY:,} classes, {ROWS} rows")

    for kind in KINDS:
        figures.record(f"largest error, {kind}", exactness(kind), most=TOLERANCE)
    for kind, target in TOTAL_TARGETS[64].items():
        ratio = peak("naive", kind, 64, ROWS) / peak("chunked", kind, 64, ROWS)
        figures.record(f"peak ratio, width 64, {kind}", ratio, least=target)
        spent = time_ratio(kind, 64, 3)["ratio"]
        figures.record(f"time ratio, width 64, {kind}", spent, most=SLOWEST)
    if python:
        against_trl(figures, python)
    else:
        print("TRL is not here: its chunked path is not measured; see --trl")
    for width, target in {} if options.quick else BEYOND_TARGETS.items():
        head = VOCABULARY * width * 4 / MEBIBYTE
        for kind in ("forward_kl", "jsd"):
            naive, chunked = (peak(name, kind, width, ROWS) - head for name in OURS)
            name = f"peak ratio beyond the head, width {width}, {kind}"
            figures.record(name, naive / chunked, least=target)
            pairs = 3 if width < 1024 else 1
            spent = time_ratio(kind, width, pairs)["ratio"]
            figures.record(f"time ratio, width {width}, {kind}", spent, most=SLOWEST)
    if not options.quick:
        runs = [digits(seed) for seed in range(options.seeds)]
        kept = statistics.mean(run["student"] / run["teacher"] for run in runs)
        gain = statistics.mean(run["student"] - run["labels_only"] for run in runs)
        figures.record("digits: share of the teacher's accuracy kept", kept, least=0.97)
        figures.record("digits: points over label-only training", 100 * gain, least=2.0)
    return figures.finish(options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        sys.exit(main())
