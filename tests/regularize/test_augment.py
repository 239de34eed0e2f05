"""Augmentation: what each change does to a batch, where it acts, and whether labels survive."""

import datasets
import pytest
import torch
from transformers import Trainer

from hf_recipe.instruments.compare import paired_gain
from hf_recipe.regularize.augment import Augmentation, Augmented, augmented, label_kept, preview
from hf_recipe.regularize.augment_images import (
    Brightness,
    Crop,
    CutMix,
    Cutout,
    Flip,
    Move,
    Noise,
)
from hf_recipe.regularize.augment_rows import (
    Interpolate,
    Jitter,
    MixUp,
    SpanMask,
    SpanMix,
    Swap,
    TokenDropout,
    token_settings,
)
from tests.models import arguments, batchnorm, points


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def images(rows=32, channels=1, side=12):
    pixels = torch.randn(rows, channels, side, side, generator=draw(5))
    return {"pixel_values": pixels, "labels": torch.arange(rows) % 4}


def tokens(rows=16, length=20):
    ids = torch.randint(5, 60, (rows, length), generator=draw(6))
    ids[:, 0], mask = 2, torch.ones_like(ids)
    ids[:, -4:], mask[:, -4:] = 0, 0
    ids[:, -5] = 3
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


IMAGE_CHANGES = [Move(), Crop(), Flip(), Cutout(), Noise(), Brightness()]


@pytest.mark.parametrize("change", IMAGE_CHANGES, ids=lambda c: type(c).__name__)
def test_images_change_within_bounds_and_repeat_by_seed(change):
    batch = images()
    kept = batch["pixel_values"].clone()
    once, again, other = (change(batch, draw(s))["pixel_values"] for s in (1, 1, 2))
    assert torch.equal(batch["pixel_values"], kept), "the batch itself must not change"
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == kept.shape
    assert not torch.equal(once, kept)
    assert torch.isfinite(once).all()
    assert float((once - kept).abs().mean()) < 3 * float(kept.std())


def test_a_change_of_strength_nothing_changes_nothing():
    batch = images()
    for change in (Move(0, 0, 0), Crop(1.0), Flip(0), Noise(0), Brightness(0)):
        torch.testing.assert_close(
            change(batch, draw())["pixel_values"], batch["pixel_values"], atol=1e-5, rtol=1e-4
        )


def test_a_shift_moves_by_its_share():
    pixels = torch.zeros(64, 1, 16, 16)
    pixels[:, :, 6:10, 6:10] = 1
    moved = Move(shift=0.25, turn=0, zoom=0)({"x": pixels}, draw())["x"]
    place = torch.arange(16.0)
    centre = (moved.sum((1, 2)) * place).sum(1) / moved.sum((1, 2, 3))
    assert float((centre - 7.5).abs().max()) <= 4.01
    assert float((centre - 7.5).abs().max()) > 3


def test_flip_is_a_mirror():
    batch = images()
    flipped = Flip(1.0)(batch, draw())["pixel_values"]
    assert torch.equal(flipped, batch["pixel_values"].flip(-1))


def test_cutout_covers_its_square():
    pixels = torch.randn(8, 3, 12, 12, generator=draw())
    cut = Cutout(0.5)({"x": pixels}, draw())["x"]
    assert ((cut != pixels).any(1).sum((1, 2)) == 36).all()


def test_places_inside_a_picture_are_not_left_behind():
    batch = {**images(), "labels": torch.zeros(32, 12, 12, dtype=torch.long)}
    for change in (Move(), Crop(), Flip(), CutMix()):
        with pytest.raises(ValueError, match="one label per row"):
            change(batch, draw())
    assert Noise()(batch, draw())["labels"] is batch["labels"]


@pytest.mark.parametrize("change", [MixUp(0.4), CutMix()], ids=["mixup", "cutmix"])
def test_mixed_classes_have_the_expected_loss_of_mixed_labels(change):
    """Rows of class 0 are 0, of class 1 are 1: the drawn label's mean is the row's own value."""
    labels = torch.arange(4000) % 2
    pixels = labels.float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    mixed = change({"x": pixels, "labels": labels}, draw())
    share, drawn = mixed["x"].mean((1, 2, 3)), mixed["labels"].float()
    assert set(mixed["labels"].tolist()) == {0, 1}
    for low, high in ((0.01, 0.3), (0.3, 0.7), (0.7, 0.99)):
        chosen = (share > low) & (share < high)
        error = 3 / float(chosen.sum()) ** 0.5
        assert abs(float(drawn[chosen].mean() - share[chosen].mean())) < error


def test_numbers_as_targets_are_averaged():
    features = torch.randn(50, 3, generator=draw())
    batch = {"features": features, "labels": features.sum(1)}
    for change in (MixUp(1.0), Interpolate(1.0)):
        mixed = change(batch, draw())
        torch.testing.assert_close(mixed["features"].sum(1), mixed["labels"])
        assert not torch.equal(mixed["labels"], batch["labels"])


def test_jitter_scales_with_the_column_and_leaves_codes():
    features = torch.stack(
        [torch.randn(2000) * 100, torch.randn(2000), torch.randint(0, 5, (2000,)).float()], 1
    )
    changed = Jitter(0.1)({"features": features}, draw())["features"] - features
    assert float(changed[:, 0].std()) == pytest.approx(10, rel=0.1)
    assert float(changed[:, 1].std()) == pytest.approx(0.1, rel=0.1)
    assert not changed[:, 2].any()


def test_interpolation_stays_between_rows_of_one_class():
    features = torch.cat([torch.rand(20, 2), torch.rand(20, 2) + 10, torch.full((1, 2), 5.0)])
    labels = torch.tensor([0] * 20 + [1] * 20 + [2])
    changed = Interpolate(1.0)({"features": features, "labels": labels}, draw())["features"]
    assert float(changed[:20].max()) <= 1
    assert float(changed[20:40].min()) >= 10
    assert torch.equal(changed[40], features[40]), "a class of one row has no neighbour"


@pytest.mark.parametrize(
    "change",
    [
        TokenDropout(special=(2, 3), replacement=4, share=0.5),
        SpanMask(special=(2, 3), replacement=4, share=0.6, length=3),
        Swap(special=(2, 3), share=0.8),
        SpanMix(special=(2, 3), share=0.4),
    ],
    ids=lambda c: type(c).__name__,
)
def test_tokens_change_and_padding_and_specials_stay(change):
    batch = tokens()
    changed = change(batch, draw(1))
    ids, new = batch["input_ids"], changed["input_ids"]
    fixed = (batch["attention_mask"] == 0) | (ids == 2) | (ids == 3)
    assert torch.equal(new[fixed], ids[fixed])
    assert not torch.equal(new, ids)
    assert torch.equal(new, change(batch, draw(1))["input_ids"])
    assert changed["labels"] is batch["labels"]
    if isinstance(change, Swap):
        assert torch.equal(new.sort(1).values, ids.sort(1).values)


def test_a_row_never_loses_its_last_token():
    batch = {"input_ids": torch.tensor([[2, 9, 3], [2, 8, 3]])}
    changed = TokenDropout(special=(2, 3), replacement=4, share=0.99)(batch, draw())
    assert torch.equal(changed["input_ids"], batch["input_ids"])


def test_span_mix_takes_from_the_same_class_only():
    ids = torch.cat([torch.full((6, 10), 7), torch.full((6, 10), 9)])
    batch = {"input_ids": ids, "labels": torch.tensor([0] * 6 + [1] * 6)}
    assert torch.equal(SpanMix(share=0.5)(batch, draw())["input_ids"], ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(), "one change"),
        (lambda: Move(shift=2), "shares"),
        (lambda: MixUp(0), "alpha"),
        (lambda: Swap(share=3), "share"),
        (lambda: MixUp()({"input_ids": torch.ones(2, 2).long()}, draw()), "neither"),
        (lambda: TokenDropout()({"x": torch.ones(2, 2)}, draw()), "input_ids"),
        (lambda: SpanMix()({"input_ids": torch.ones(2, 2).long()}, draw()), "class label"),
        (lambda: token_settings(object()), "neither a mask token"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_workers_and_ranks_draw_apart():
    rows = [{"x": torch.zeros(8)}] * 16
    collate = lambda some: {"x": torch.stack([r["x"] for r in some])}  # noqa: E731

    def first(rank):
        torch.manual_seed(0)
        return Augmented(collate, [AddNoise()], rank)(rows)["x"]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    data = torch.utils.data.DataLoader(
        rows, batch_size=4, num_workers=2, collate_fn=Augmented(collate, [AddNoise()])
    )
    torch.manual_seed(0)
    epochs = [torch.cat([b["x"] for b in data]) for _ in range(2)]
    seen = torch.cat(epochs)
    assert len({tuple(row.tolist()) for row in seen}) == len(seen)
    torch.manual_seed(0)
    assert torch.equal(epochs[0], torch.cat([b["x"] for b in data]))


class AddNoise:
    def __call__(self, batch, draw):
        return {"x": batch["x"] + torch.randn(batch["x"].shape, generator=draw)}


class Count:
    """Counts calls; changes nothing."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch, draw):
        self.calls += 1
        return batch


def trainer_of(folder, **changes):
    return Trainer(
        model=batchnorm(),
        args=arguments(folder, **changes),
        train_dataset=points(64),
        eval_dataset=points(32, seed=2),
    )


def test_training_is_varied_and_evaluation_is_not(tmp_path):
    count = Count()
    trainer = trainer_of(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=2)
    with augmented(trainer, count, Jitter(0.3)):
        trainer.train()
        assert count.calls == 8
        trainer.evaluate()
        trainer.predict(trainer.eval_dataset)
        assert count.calls == 8
    plain = trainer_of(tmp_path, max_steps=8)
    plain.train()
    weights = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


def test_a_resumed_run_goes_on_with_augmentation(tmp_path):
    count = Count()
    first = trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    first.add_callback(Augmentation(count))
    first.train()
    before = count.calls
    again = trainer_of(tmp_path, max_steps=12, save_strategy="steps", save_steps=4)
    again.add_callback(Augmentation(count))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert 8 <= count.calls - before <= 9  # Accelerate reads one batch ahead


def test_a_loader_without_a_collator_is_told(tmp_path, caplog):
    callback = Augmentation(Jitter())
    callback.on_train_begin(arguments(tmp_path), None, None, train_dataloader=object())
    assert "augmentation is off" in caplog.text


# ---------------------------------------------------------------- true labels, known truth


@pytest.fixture(scope="module")
def digits_model():
    """A small network on digits, and collated validation rows."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pixels = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(y)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(64, 64),
                torch.nn.ReLU(),
                torch.nn.Linear(64, 10),
            )

        def forward(self, pixel_values, labels=None):
            return {"logits": self.layers(pixel_values)}

    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        logits = net(pixels[:1200])["logits"]
        torch.nn.functional.cross_entropy(logits, labels[:1200]).backward()
        optimizer.step()
    return net, [{"pixel_values": pixels[1200:], "labels": labels[1200:]}]


def test_what_destroys_the_label_is_known_by_the_baseline(digits_model):
    net, batches = digits_model
    kept = label_kept(net, batches, Noise(0.1), Move(0.02, 3, 0.02))
    assert kept.verdict is True, kept
    assert kept.before > 0.9
    for change in (Flip(1.0), Move(0.0, 180), Cutout(0.7)):
        lost = label_kept(net, batches, change)
        assert lost.verdict is False, (change, lost)
    assert net.training


def test_the_preview_shows_before_and_after(digits_model):
    _, batches = digits_model
    (picture,) = preview(batches[0], Flip(1.0), rows=4)
    assert len(picture.pngs) == 8
    assert picture.private
    assert picture.pngs[0] != picture.pngs[1]
    (table,) = preview(tokens(), Swap(share=0.9), rows=3)
    assert len(table.rows) == 3
    assert table.rows[0][1] != table.rows[0][2]
    (numbers,) = preview({"features": torch.randn(4, 3)}, Jitter(), rows=2)
    assert numbers.rows[0][2:] != numbers.rows[1][2:]
    assert preview(batches[0], Count()) == ()


def strokes(rows, seed):
    """Strokes anywhere in 12 x 12 pixels: rising or falling is the class, which a mirror turns."""
    generator = draw(seed)
    labels = torch.arange(rows) % 2
    pixels = torch.randn(rows, 1, 12, 12, generator=generator) * 0.3
    for i in range(rows):
        top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
        for k in range(5):
            pixels[i, 0, top + k, left + (k if labels[i] else 4 - k)] += 2
    return {"x": pixels, "labels": labels}


def test_moving_helps_where_place_says_nothing_and_a_mirror_hurts():
    train, held = strokes(80, 0), strokes(600, 1)

    def losses(change, seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(144, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
        )
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for step in range(120):
            batch = train if change is None else change(train, draw(seed * 1000 + step))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(batch["x"]), batch["labels"]).backward()
            optimizer.step()
        with torch.no_grad():
            logits = net(held["x"])
        return torch.nn.functional.cross_entropy(logits, held["labels"], reduction="none").tolist()

    plain = [losses(None, seed) for seed in range(3)]
    moved = paired_gain(plain, [losses(Move(0.25, 0, 0), seed) for seed in range(3)])
    mirrored = paired_gain(plain, [losses(Flip(0.5), seed) for seed in range(3)])
    print(f"moved {moved}, mirrored {mirrored}")
    assert moved.verdict is True
    assert mirrored.verdict is False


def test_a_dataset_of_lists_and_a_tokenizer_give_settings():
    from hf_recipe.runner.feed import train_tokenizer

    tokenizer = train_tokenizer(["some words here", "and some words there"] * 3)
    settings = token_settings(tokenizer)
    assert settings["replacement"] == tokenizer.mask_token_id
    data = datasets.Dataset.from_dict(tokenizer(["some words here", "words there"]))
    ids = torch.tensor(data[0]["input_ids"])[None]
    changed = TokenDropout(share=0.9, **settings)({"input_ids": ids}, draw())["input_ids"]
    assert changed[0, 0] == ids[0, 0]
    assert int((changed[0, 1:-1] != tokenizer.mask_token_id).sum()) >= 1
