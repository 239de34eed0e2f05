"""Measure the chunked distillation loss against the naive one: memory, time, exactness, quality.

    python scripts/benchmark_distill.py            # every target; exits 1 when one is missed
    python scripts/benchmark_distill.py --quick    # width 64 alone, without the quality runs

Peak memory is the high-water mark of a process of its own (VmHWM, reset after the inputs are
there), so that what initialising left behind is not counted. Time is paired: naive and chunked in
turn, the ratio of each pair, its median.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_recipe.tune.distillation_loss import KINDS, chunked_divergence

VOCABULARY, ROWS = 128_256, 512
MEBIBYTE = 2**20
# {width: {kind: least ratio of peaks}}; "beyond": without the head's own gradient.
TOTAL_TARGETS = {64: {"forward_kl": 8.0, "reverse_kl": 8.0, "skewed_kl": 8.0, "jsd": 12.0}}
BEYOND_TARGETS = {512: 8.0, 2048: 6.0}
SLOWEST, TOLERANCE = 1.0, 1e-5


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


def losses() -> dict[str, Callable[..., torch.Tensor]]:
    return {
        "naive": naive_divergence,
        "chunked": lambda *tensors, kind: chunked_divergence(*tensors, kind=kind),
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
    losses()[implementation](*tensors, kind=kind).backward()
    print(json.dumps({"peak": status("VmHWM") - resident}))


def peak(implementation: str, kind: str, width: int, rows: int) -> float:
    command = [sys.executable, __file__, "--child", implementation, kind, str(width), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def time_ratio(kind: str, width: int, pairs: int) -> dict[str, float]:
    """Seconds of chunked over seconds of naive, as the median of pairs in alternating order."""
    tensors = inputs(width, ROWS)
    functions = losses()
    ratios, seconds = [], {"naive": [], "chunked": []}
    for turn in range(pairs + 1):
        order = ["naive", "chunked"] if turn % 2 else ["chunked", "naive"]
        spent = {}
        for name in order:
            tensors[0].grad = tensors[1].grad = None
            started = time.perf_counter()
            functions[name](*tensors, kind=kind).backward()
            spent[name] = time.perf_counter() - started
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
    errors = [abs(float(chunked) - float(exact)) / abs(float(exact))]
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        errors.append(float((a.grad - b.grad).abs().max() / b.grad.abs().max()))
    return max(errors)


if __name__ == "__main__" and sys.argv[1:2] == ["--child"]:
    child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
elif __name__ == "__main__":
    for k in KINDS:
        print(k, exactness(k))
    for w in (64, 512, 2048):
        for k in ("forward_kl", "jsd"):
            n, c = peak("naive", k, w, 512), peak("chunked", k, w, 512)
            g = VOCABULARY * w * 4 / MEBIBYTE
            print(w, k, n, c, n / c, (n - g) / (c - g), flush=True)
            if w < 2048:
                print(time_ratio(k, w, 3), flush=True)
