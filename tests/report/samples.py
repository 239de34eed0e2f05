"""A rich report by hand: every kind of exhibit, and findings that explain others."""

import base64
import io
import math
import random

from PIL import Image

from hf_recipe.core.exhibit import Answer, Curve, Ladder, Line, Mark, Matrix, Picture, Rung, Table
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Gate, Report, Stored


def png(shade: int = 120, size: int = 24) -> str:
    image = Image.new("L", (size, size))
    image.putdata([(shade + 5 * (x % size) + 3 * (x // size)) % 256 for x in range(size * size)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def findings() -> list[Finding]:
    return [
        Finding(
            check="loss-not-finite",
            stage="complexify",
            severity="error",
            message="the raw loss is nan at 2 of 8 steps; the Trainer logged 4.297",
            evidence={
                "seen": "nan at steps 4 and 7; 21 of 21 parameters are nan",
                "expected": "a finite loss at every step",
                "losses": [4.2, math.nan, {"deep": [math.inf, -math.inf]}],
                "share": 0.25,
            },
            why="logging_nan_inf_filter=True replaces nan by the running mean in the log.",
            fix="TrainingArguments(..., logging_nan_inf_filter=False, bf16=True)",
            split="train",
            step=4,
            last_step=7,
            count=2,
        ),
        Finding(
            check="gradient-not-finite",
            stage="complexify",
            severity="warning",
            message="the gradient norm is inf at step 4",
            split="train",
            step=4,
        ),
        Finding(
            check="clipping-dominates",
            stage="complexify",
            severity="warning",
            message="92 % of the steps were clipped to a tenth of their length or less",
            step=100,
            split="train",
            evidence={"seen": "92 % of 800 steps", "expected": "under 50 %", "share": 0.92},
            why="A gradient that is always clipped turns the learning rate into a step length.",
            fix="TrainingArguments(..., learning_rate=1e-4, max_grad_norm=1.0)",
            count=8,
        ),
        Finding(
            check="split-leak",
            stage="data",
            severity="warning",
            message="31 of 1,000 validation rows (3.1 %) stand near-identical in training",
            subject="text",
            split="validation",
            evidence={"seen": "31 of 1,000 rows", "expected": "none", "standard_error": 0.0055},
            why="Evaluation on rows that were trained on measures memory, not generalisation.",
            fix='dataset["validation"] = dataset["validation"].select(recipe.clean_rows)',
            examples=(17, 204, 391),
            quotes=("<script>alert(1)</script>", "a row \x1b[31mwith\x00 controls \u202e"),
        ),
        Finding(check="class-imbalance", stage="data", severity="note",
                message="the rarest of 5 classes has 12 rows (1.2 %)", subject="label"),
        Finding(check="duplicate-example", stage="data", severity="note",
                message="4 rows stand twice", split="train"),
    ]  # fmt: skip


def curves() -> list[Curve]:
    draw = random.Random(0)
    steps = tuple(float(i) for i in range(1, 801))
    train = tuple(0.35 + 2.0 * math.exp(-s / 130) + draw.gauss(0, 0.06) for s in steps)
    held = tuple(range(50, 801, 50))
    mean = [0.62 + 1.7 * math.exp(-s / 140) + 0.0004 * max(0, s - 350) for s in held]
    loss = Curve(
        "Loss", "baselines", "step", "nats per row",
        (
            Line("train", steps, train),
            Line("validation", tuple(map(float, held)), tuple(mean),
                 tuple(v - 0.07 for v in mean), tuple(v + 0.07 for v in mean)),
        ),
        (Mark("input-blind baseline", 1.609), Mark("expected at the start", 2.303),
         Mark("one epoch", 125.0, "x")),
        caption="Training loss of every micro-batch, before the NaN filter; the band is 95 %.",
    )  # fmt: skip
    norm = Curve(
        "Gradient norm", "complexify", "step", "norm before clipping",
        (Line("norm", steps, tuple(
            math.nan if s in (400, 401) else 3 * math.exp(draw.gauss(0, 0.7)) for s in steps)),),
        (Mark("max_grad_norm", 1.0),), log_y=True,
    )  # fmt: skip
    law = Curve(
        "More data", "regularize", "rows", "validation loss",
        (Line("measured", (250.0, 500.0, 1000.0, 2000.0), (1.31, 1.06, 0.9, 0.79),
              (1.22, 1.0, 0.86, 0.76), (1.4, 1.12, 0.94, 0.82)),
         Line("fitted", (250.0, 1000.0, 4000.0, 8000.0), (1.3, 0.9, 0.7, 0.64))),
        log_x=True, caption="Twice the rows would save 0.09 nats (80 %: 0.05 to 0.13).",
    )  # fmt: skip
    return [loss, norm, law]


def exhibits() -> list:
    ladder = Ladder(
        "Growth", "complexify",
        (Rung("1 layer, width 64", 0.981, metric=0.61, cost=11.2),
         Rung("2 layers", 0.902, 0.079, 0.051, 0.107, 0.66, 19.8, True),
         Rung("width 128", 0.889, 0.013, -0.011, 0.037, 0.665, 31.0, None, "twice the cost"),
         Rung("rotary positions", 0.957, -0.055, -0.083, -0.027, 0.63, 20.4, False)),
        "accuracy", caption="Each change is compared with the rung before, on the same 1,000 rows.",
    )  # fmt: skip
    names = ("world", "sports", "business", "science", "other")
    matrix = Matrix(
        "Confusions", "baselines", names, names,
        ((91.0, 2.0, 3.0, 1.0, 3.0), (1.0, 96.0, 1.0, 0.0, 2.0), (6.0, 1.0, 84.0, 7.0, 2.0),
         (2.0, 0.0, 11.0, 85.0, 2.0), (14.0, 5.0, 9.0, 8.0, 64.0)),
        caption="Per cent of the rows of each class; rows are the truth.",
    )  # fmt: skip
    table = Table(
        "Highest losses", "data", ("row", "loss", "label", "predicted", "text"),
        ((391, 7.41, "world", "sports", "Cup final <script>alert('row')</script> moved to Sunday"),
         (17, 6.9, "science", "business", "Chip maker & lab share a prize"),
         (204, math.nan, "other", None, "")),
        caption="What the model finds hardest is where labels are wrong.", private=True,
    )  # fmt: skip
    pictures = Picture(
        "As the network sees it", "data", tuple(png(40 * i) for i in range(5)),
        ("cat", "dog", "dog (?)", "truck", "a long label that wraps"),
    )  # fmt: skip
    return [*curves(), ladder, matrix, table, pictures]


def rich_report() -> Report:
    report = Report(title="bert-tiny on ag_news", status="finished")
    report.explains = {"loss-not-finite": ("gradient-not-finite",)}
    for finding in findings():
        report.add(finding)
    report.ran = {f.check: ["run"] for f in findings()}
    report.ran |= {f"check-{i}": ["probe", "eval"] for i in range(12)}
    report.skipped = {
        "overfitting": "no eval_dataset",
        "input-ignored": "no eval_dataset",
        "resume-drift": "the run was not resumed",
    }
    report.crashed = {"ranks-diverge": "ValueError: row 'secret' is odd (probe, ranks.py:41)"}
    for exhibit in exhibits():
        report.exhibit(exhibit)
    report.answer(Answer("Are local features enough?", "data", "undecided: 0.8 ± 1.1 points",
                         {"paired difference": 0.008, "rows": 1000}))  # fmt: skip
    report.answer(Answer("Is more data worth it?", "regularize", "yes: twice the rows, -0.09 nats"))
    report.gate(Gate("data", "pass"))
    report.gate(Gate("baselines", "warn", ("no human baseline was given",)))
    report.gate(Gate("complexify", "fail", ("the loss is not finite", "never overfitted")))
    report.environment = {"python": "3.11", "torch": "2.13", "devices": ["cpu"], "world_size": 1}
    report.settings = {
        "select": None, "ignore": ("token-out-of-range",), "overhead": 0.01,
        "thresholds": {"loss-spike": {"factor": 3.0}}, "origins": {"ignore": "argument"},
    }  # fmt: skip
    report.store(
        Stored("Losses", 1, "run", "train", 7, {"raw": [4.2, {"$float": "nan"}], "rows": ["x"]},
               private=("rows",)), keep=True,
    )  # fmt: skip
    return report
