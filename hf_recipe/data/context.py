"""Are local features enough, or is global order or place needed?

The recipe asks it before any architecture is chosen. A ladder of cheap probes answers: each rung
sees more of the context than the one before, and the answer is the first rung that no later one
beats. Text: words, neighbours, place, words in their order. Images: patches wherever they stand,
then in 2 x 2 and 4 x 4 fields, then all pixels. A rung counts as better only if it also beats
itself on inputs whose words or fields are shuffled: more features alone are no context.
Where no rung beats chance the answer is "undecided": such probes are blind to much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from hf_recipe.core.check import Measurement, Skip
from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.finding import Fault
from hf_recipe.data.asked import answered, asking, chance_cell
from hf_recipe.data.cheap import ALPHA, Trial, kernel, linear, paired
from hf_recipe.data.pictures import Pictures, area
from hf_recipe.data.sample import Sample, sample_of
from hf_recipe.data.words import Keys, TokenRows, bag, neighbours, ordered_pairs, placed, tokenise
from hf_recipe.instruments.subject import Subject

WORDS = 48  # kinds of patches
PATCH = 3
LARGEST = 32  # side in pixels at which patches are cut

Probed = tuple[Trial, Callable[[], Trial] | None]

QUESTION = "Are local features enough, or is global context needed?"


@dataclass(frozen=True)
class Rung:
    """One probe: what it saw, its accuracy with standard error, its chance under shuffled labels.

    `p_next` is the smallest chance, over the later rungs, that such a rung's lead on this one is
    an accident, or its lead on its own twin: the same probe of inputs whose words or fields were
    shuffled, which tells context from a mere wealth of features. `shuffled` is the accuracy of
    this rung's twin, where it was needed. `most` is the largest lead of a later rung that the rows
    leave open, at 95 %.
    """

    sees: str
    accuracy: float
    error: float
    p_chance: float
    p_next: float
    most: float
    local: bool
    shuffled: float | None = None


@dataclass(frozen=True)
class ContextLadder(Measurement):
    """How much of the context a cheap probe needs to tell the label.

    Attributes:
        rungs: from the most local one up.
        modality: "text" or "image".
        majority: share of the commonest class among the held-out rows.
        rows: held-out rows.
        note: how the rows were drawn.
    """

    rungs: tuple[Rung, ...]
    modality: str
    majority: float
    rows: int
    note: str = ""


def tokens_of(subject: Subject, sample: Sample) -> TokenRows | None:
    """The sample's text as rows of tokens, made once per subject; None where there is no text."""
    if sample.inputs.tokens is not None:
        return sample.inputs.tokens
    if sample.inputs.texts is None:
        return None
    if "sample tokens" not in subject.cache:
        subject.cache["sample tokens"] = tokenise(sample.inputs.texts)
    found: TokenRows = subject.cache["sample tokens"]
    return found


def no_context(sample: Sample) -> Skip:
    """Why neither text nor images are there to ask about."""
    unread = sample.inputs.unread
    named = f"; not read: {', '.join(unread)}" if unread else ""
    if sample.inputs.sounds is not None:
        return Skip(f"the question is asked of texts and images; these are recordings{named}")
    return Skip(f"the inputs are columns of numbers or categories, without an order{named}")


def words_trial(subject: Subject, sample: Sample, tokens: TokenRows) -> Trial:
    """The simplest text probe, which several questions start from; fitted once per subject."""
    if "words trial" not in subject.cache:
        subject.cache["words trial"] = linear("words", bag(tokens), sample.labels, sample.held)
    found: Trial = subject.cache["words trial"]
    return found


def pixels_trial(subject: Subject, sample: Sample, pictures: Pictures) -> Trial:
    """The simplest image probe, fitted once per subject."""
    if "pixels trial" not in subject.cache:
        small = at_most(pictures, LARGEST)
        subject.cache["pixels trial"] = kernel("all pixels", small, sample.labels, sample.held)
    found: Trial = subject.cache["pixels trial"]
    return found


def at_most(pictures: Pictures, side: int) -> npt.NDArray[np.float32]:
    """The images with no side longer than `side`, by area means."""
    height, width = pictures.pixels.shape[1:3]
    scale = min(1.0, side / max(height, width))
    return area(pictures.pixels, max(1, round(height * scale)), max(1, round(width * scale)))


def take_ladder(subject: Subject) -> Iterator[ContextLadder | Answer | Table]:
    """Climb the ladder on the training set's sample."""
    sample = sample_of(subject)
    tokens, pictures = tokens_of(subject, sample), sample.inputs.pictures
    if pictures is not None:
        probed = image_rungs(subject, sample, pictures)
    elif tokens is not None:
        probed = text_rungs(subject, sample, tokens)
    else:
        raise no_context(sample)
    ladder = climb(probed, "text" if pictures is None else "image", sample.note)
    yield ladder
    yield ladder_table(ladder)
    yield Answer(QUESTION, "data", verdict(ladder)[1], {
        "rows": ladder.rows,
        "chance": f"{ladder.majority:.3f}",
        **{rung.sees: f"{rung.accuracy:.3f} +- {2 * rung.error:.3f}" for rung in ladder.rungs},
    })  # fmt: skip


def text_rungs(subject: Subject, sample: Sample, tokens: TokenRows) -> list[Probed]:
    """Words; neighbours; place; order; each later one with a twin whose words are shuffled."""
    labels, held = sample.labels, sample.held

    def seeing(name: str, feature: Callable[[TokenRows], Keys]) -> Probed:
        def fitted(rows: TokenRows) -> Trial:
            return linear(name, bag(rows) + feature(rows), labels, held)

        return fitted(tokens), lambda: fitted(tokens.shuffled(np.random.default_rng(0)))

    return [
        (words_trial(subject, sample, tokens), None),
        seeing("words and their neighbours", neighbours),
        seeing("words and their place", placed),
        seeing("words in their order", ordered_pairs),
    ]


def image_rungs(subject: Subject, sample: Sample, pictures: Pictures) -> list[Probed]:
    """Patches anywhere, in 2 x 2 and 4 x 4 fields, all pixels; twins with the fields shuffled."""
    labels, held = sample.labels, sample.held
    images = at_most(pictures, LARGEST)
    words = patch_words(images.mean(axis=3), held)

    def seeing(name: str, grid: int) -> Probed:
        fields = pooled(words, grid)
        twin = shuffled_fields(fields.reshape(len(words), grid**2, WORDS))
        return kernel(name, fields, labels, held), lambda: kernel(name, twin, labels, held)

    def tiles() -> Trial:
        return kernel("", shuffled_fields(cut_in_tiles(images)), labels, held)

    return [
        (seeing("patches anywhere", 1)[0], None),
        seeing("patches in 2 x 2 fields", 2),
        seeing("patches in 4 x 4 fields", 4),
        (pixels_trial(subject, sample, pictures), tiles),
    ]


def shuffled_fields(fields: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(rows, fields, values) with each row's fields in an order of its own."""
    rows, count = fields.shape[:2]
    order = np.random.default_rng(0).permuted(np.tile(np.arange(count), (rows, 1)), axis=1)
    return np.take_along_axis(fields, order[:, :, None], axis=1)


def cut_in_tiles(images: npt.NDArray[np.float32], grid: int = 4) -> npt.NDArray[np.float32]:
    """(rows, 16, values): images as 4 x 4 tiles."""
    rows, height, width, channels = images.shape
    tall, wide = (max(1, side // grid) for side in (height, width))
    even = area(images, tall * grid, wide * grid)
    tiles = even.reshape(rows, grid, tall, grid, wide, channels).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(rows, grid**2, -1)


def patch_words(gray: npt.NDArray[Any], held: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(rows, y, x): the kind of the 3 x 3 patch at each place, learned on the teaching half."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    windows = np.lib.stride_tricks.sliding_window_view(gray, (PATCH, PATCH), axis=(1, 2))
    places = windows.shape[1:3]
    patches = windows.reshape(-1, PATCH * PATCH)
    scale = float(gray.std()) or 1.0
    rng = np.random.default_rng(0)
    taught = np.flatnonzero(np.repeat(~held, places[0] * places[1]))
    some = rng.choice(taught, min(len(taught), 10_000), replace=False)
    noise = rng.normal(0, 1e-4, (len(some), PATCH * PATCH))  # flat patches are all the same
    model = MiniBatchKMeans(WORDS, batch_size=2_048, n_init=1, max_iter=20, random_state=0)
    with threadpool_limits(1):
        model.fit(patches[some] / scale + noise)
        centres = model.cluster_centers_.astype(np.float32)
        found = [
            ((centres**2).sum(axis=1) - 2 * (part / scale) @ centres.T).argmin(axis=1)
            for part in np.array_split(patches.astype(np.float32), max(1, len(patches) // 100_000))
        ]
    return np.concatenate(found).reshape(len(gray), *places).astype(np.int64)


def pooled(words: npt.NDArray[np.int64], grid: int) -> npt.NDArray[np.float64]:
    """(rows, fields x kinds): root of the share of each kind of patch in each field."""
    rows, height, width = words.shape
    fields = (np.arange(height) * grid // height)[:, None] * grid + np.arange(width) * grid // width
    codes = (np.arange(rows)[:, None, None] * grid**2 + fields) * WORDS + words
    counts = np.bincount(codes.reshape(-1), minlength=rows * grid**2 * WORDS)
    return np.asarray(np.sqrt(counts.reshape(rows, -1) / (height * width)))


# ---------------------------------------------------------------- verdicts


def climb(probed: list[Probed], modality: str, note: str) -> ContextLadder:
    """Compare every rung with the later ones on the same rows, and these with their twins."""
    trials = [trial for trial, _ in probed]
    pairs = {(i, j): paired(trials[i], trials[j]) for j in range(len(trials)) for i in range(j)}
    twins: dict[int, Trial] = {}
    for j, (_, twin) in enumerate(probed):
        if twin is not None and any(pairs[i, j].p_gain < ALPHA for i in range(j)):
            twins[j] = twin()
    p_twin = {j: paired(trials[j], twin).p_loss for j, twin in twins.items()}
    rungs = []
    for i, trial in enumerate(trials):
        later = [max(pairs[i, j].p_gain, p_twin.get(j, 1.0)) for j in range(i + 1, len(trials))]
        rungs.append(
            Rung(
                sees=trial.name,
                accuracy=trial.accuracy,
                error=trial.error,
                p_chance=trial.p_chance,
                p_next=min([1.0, *later]),
                most=max([0.0, *(pairs[i, j].most_gain for j in range(i + 1, len(trials)))]),
                local=i < (2 if modality == "text" else 1),
                shuffled=twins[i].accuracy if i in twins else None,
            )
        )
    truth = trials[0].truth
    return ContextLadder(
        rungs=tuple(rungs),
        modality=modality,
        majority=float(np.bincount(truth).max() / len(truth)),
        rows=len(truth),
        note=note,
    )


def verdict(
    ladder: ContextLadder, alpha: float = ALPHA, resolution: float = 0.05
) -> tuple[str, str]:
    """("local" | "global" | "undecided", the sentence that says so)."""
    rungs = ladder.rungs
    best = max(rungs, key=lambda rung: rung.accuracy)
    if not min(rung.p_chance for rung in rungs) < alpha:
        return "undecided", (
            f"undecided: no probe beats chance ({best.accuracy:.1%} at best of {ladder.rows:,} "
            f"held-out rows, commonest class {ladder.majority:.1%}); it needs a model that is "
            "aware of order, or the inputs do not tell the label"
        )
    first = next(rung for rung in rungs if not rung.p_next < alpha)
    seen = f"{first.accuracy:.1%} of {ladder.rows:,} held-out rows"
    later = (
        f"probes that see more reach {best.accuracy:.1%}" if best is not first else "none better"
    )
    if not first.local:
        less = rungs[rungs.index(first) - 1]
        text = (
            f"global context is needed: {first.sees} tell {seen}, {less.sees} {less.accuracy:.1%}"
        )
        if first.shuffled is not None:
            text += f"; shuffled {first.shuffled:.1%}"
        return "global", text
    if first.most > resolution:
        return "undecided", (
            f"undecided: {first.sees} tell {seen} and {later}, but a lead of "
            f"{first.most:.1%} cannot be excluded"
        )
    return "local", (
        f"local features are enough for a cheap probe: {first.sees} tell {seen}; {later}; "
        f"a lead of more than {first.most:.1%} is excluded (95 %)"
    )


def ladder_table(ladder: ContextLadder) -> Table:
    """The rungs as a table."""
    rows: list[tuple[str | float | None, ...]] = [
        (r.sees, round(r.accuracy, 4), round(2 * r.error, 4), chance_cell(r.p_chance),
         None if r.shuffled is None else round(r.shuffled, 4), chance_cell(r.p_next))
        for r in ladder.rungs
    ]  # fmt: skip
    head = ("the probe sees", "accuracy", "+- (2 standard errors)", "p of chance", "shuffled",
            "p that no later one is better")  # fmt: skip
    caption = f"{ladder.rows:,} held-out rows, commonest class {ladder.majority:.1%}; {ladder.note}"
    return Table("How much context does the label need?", "data", head, tuple(rows), caption)


def local_context_enough(
    ladder: ContextLadder,
    *,
    alpha: Annotated[
        float, "of one paired test; with five tests an answer is wrong at most once in twenty"
    ] = ALPHA,
    resolution: Annotated[
        float, "accuracy; a lead beyond it that cannot be excluded leaves it open; judged"
    ] = 0.05,
) -> Iterator[Fault]:
    """A note where local features carry the label."""
    word, sentence = verdict(ladder, alpha, resolution)
    if word != "local":
        return
    first = next(rung for rung in ladder.rungs if not rung.p_next < alpha)
    yield Fault(
        message=sentence,
        subject=ladder.modality,
        evidence={
            "seen": f"{first.sees}: {first.accuracy:.1%}",
            "expected": "a lead of a later rung, were context needed",
            "accuracy": first.accuracy,
            "rows": ladder.rows,
            "largest_lead_left_open": first.most,
        },
    )


LADDER = asking("climb the context ladder", ContextLadder, take_ladder)

LOCAL_CONTEXT_ENOUGH = answered(
    "local-context-enough",
    local_context_enough,
    why="If local features carry the label, a small local model is the baseline to beat.",
    fix="start from a bag of words, or a few convolutions with global pooling",
    source="Karpathy 2019; Brendel and Bethge 2019 (arXiv:1904.00760); McNemar 1947",
    unsure="The probes are weak: a strong model may use context that they cannot. The answer is "
    "about this label and this much data, and about the first and last words of long texts.",
)
