"""Cached teachers: the same step as with the live one, found by content, unbiased when sampled."""

import copy

import datasets
import pytest
import torch
from transformers import default_data_collator as collate

from hf_recipe.tune.distillation import DistillationTrainer
from hf_recipe.tune.divergences import divergence
from hf_recipe.tune.teacher_cache import CachedTeacher, NotCached, cache_teacher, row_keys
from tests.tune.heads_zoo import HEADS, Rows, llama, pair, zoo
from tests.tune.test_distillation import arguments, weights

import transformers as tf  # isort: skip


def step(head, tmp_path, cached, rows=None, **options):
    """The student's weights after one step."""
    student, teacher, data = pair(head)
    if cached:
        teacher = cache_teacher(teacher, data, collate, tmp_path / "cache", temperature=2.0)
    args = arguments(tmp_path, **options)
    trainer = DistillationTrainer(student, args, train_dataset=rows or data, teacher=teacher)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("head", HEADS)
def test_a_cached_teacher_gives_the_step_of_the_live_one(head, tmp_path):
    live, cached = step(head, tmp_path, False), step(head, tmp_path, True)
    assert (live - cached).abs().max() <= 1e-5 * live.abs().max()


def test_rows_are_found_in_any_order_and_under_any_padding(tmp_path):
    _, teacher, data = pair("token")
    cached = cache_teacher(teacher, data, collate, tmp_path / "cache", batch_size=3)
    batch = collate([data[i] for i in (5, 2, 7)])
    longer = {k: torch.nn.functional.pad(v, (2, 3)) for k, v in batch.items()}
    assert row_keys(batch) == row_keys(longer)
    with torch.no_grad():
        mask = batch["attention_mask"].bool()
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        expected = teacher.eval()(**inputs).logits[mask]
    for given in (batch, longer):
        inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
        found = cached(**inputs).logits[given["attention_mask"].bool()]
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_row_that_changed_is_named_and_not_guessed(tmp_path):
    student, teacher, data = pair("image")
    cached = cache_teacher(teacher, data, collate, tmp_path / "cache")
    changed = collate([data[0], data[1]])
    changed["pixel_values"][1] += 0.5
    with pytest.raises(NotCached, match="row 1 of the batch"):
        cached(**changed)
    both = CachedTeacher(tmp_path / "cache", fallback=teacher)
    inputs = {"pixel_values": changed["pixel_values"]}
    assert torch.allclose(both(**inputs).logits, teacher(**inputs).logits, atol=1e-6)
    assert not list(both.state_dict()) or list(both.state_dict()) == ["place"]
    with pytest.raises(ValueError, match="another teacher"):
        CachedTeacher(tmp_path / "cache", fallback=student)


def test_columns_that_only_the_teacher_or_nobody_takes_are_part_of_no_riddle(tmp_path):
    """A BERT teaches a DistilBERT: token types for one alone, and a row's number for neither."""
    make, data = zoo("sequence")
    kinds = [{"token_type_ids": [0] * 4 + [1] * 5, "idx": n} for n in range(len(data))]
    rows = datasets.Dataset.from_list(
        [
            {k: v if k == "labels" else v.tolist() for k, v in row.items()} | kind
            for row, kind in zip(data.rows, kinds, strict=True)
        ]
    )
    torch.manual_seed(0)
    student = tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=60,
            dim=16,
            n_layers=1,
            n_heads=2,
            hidden_dim=16,
            num_labels=3,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )
    teacher, ends = make(), []
    cached = cache_teacher(teacher, rows, collate, tmp_path / "cache")
    assert "token_type_ids" in cached.about["inputs"]
    for each in (teacher, cached):
        args = arguments(tmp_path, distill_temperature=1.0)
        own = copy.deepcopy(student)
        trainer = DistillationTrainer(own, args, train_dataset=rows, teacher=each)
        trainer.train()
        ends.append(weights(trainer))
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_a_cache_that_was_cut_off_is_made_anew(tmp_path):
    _, teacher, data = pair("sequence")

    class CutOff(Rows):
        def __getitem__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, CutOff(data.rows), collate, tmp_path / "cache", batch_size=2)
    assert len(cache_teacher(teacher, data, collate, tmp_path / "cache", batch_size=2)) == 8


def test_the_cache_is_used_again_and_refused_to_others(tmp_path):
    student, teacher, data = pair("sequence")
    first = cache_teacher(teacher, data, collate, tmp_path / "cache")
    assert len(cache_teacher(teacher, Rows([]), collate, tmp_path / "cache")) == len(first) == 8
    with pytest.raises(ValueError, match="made with teacher"):
        cache_teacher(student, data, collate, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"temperature 1\.0, not 3"):
        cache_teacher(teacher, data, collate, tmp_path / "cache", temperature=3.0)


def vocabulary(tmp_path, rows=4, **options):
    """A language model over 200 tokens, its rows, and their cache."""
    torch.manual_seed(1)
    teacher = tf.LlamaForCausalLM(llama(200)).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
    ids = torch.randint(1, 200, (rows, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    data = Rows(
        [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]
    )
    cached = cache_teacher(teacher, data, collate, tmp_path, **options)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        chances = (teacher(**inputs).logits / options["temperature"]).softmax(-1)
    kept = (cached(**inputs).logits / options["temperature"]).softmax(-1)
    return mask.bool(), chances, kept, cached, teacher, data


def test_sampled_tokens_are_unbiased_and_so_is_their_gradient(tmp_path):
    mean = count = 0
    logits = torch.randn(4, 9, 200, generator=torch.Generator().manual_seed(4)).requires_grad_()
    for seed in range(60):
        folder = tmp_path / str(seed)
        mask, chances, kept, *_ = vocabulary(folder, temperature=2.0, samples=12, seed=seed)
        assert (kept[mask].gt(0).sum(-1) <= 12).all()
        mean, count = mean + kept[mask], count + 1
        if seed == 0:
            targets = torch.where(kept > 0, kept, 0).log() * 2.0
            loss = divergence(logits, targets, mask, kind="forward_kl", temperature=2.0)
            (gradient,) = torch.autograd.grad(loss, logits)
            share = (logits / 2.0).softmax(-1) - kept
            expected = share * mask[..., None] / mask.sum() * 2.0
            assert torch.allclose(gradient, expected, atol=1e-6)
    mean = mean / count
    z = (mean - chances[mask]) / (chances[mask] * (1 - chances[mask]) / 12 / count).sqrt()
    assert z.square().mean() == pytest.approx(1, abs=0.1)  # in their own standard errors
    top = chances[mask].topk(12).values.sum(-1)
    assert float((1 - top).mean()) > 0.05  # what renormalised top-k would have lost


def test_top_k_keeps_its_tail(tmp_path):
    mask, chances, kept, *_ = vocabulary(tmp_path, temperature=1.0, top=8)
    values, tokens = chances[mask].topk(8)
    assert torch.allclose(kept[mask].gather(-1, tokens), values, atol=1e-5)
    assert torch.allclose(kept[mask].sum(-1), torch.ones(int(mask.sum())), atol=1e-5)
    assert (kept[mask] > 0).all()


def test_a_vocabulary_is_distilled_from_its_samples(tmp_path):
    *_, cached, teacher, data = vocabulary(tmp_path / "cache", rows=256, temperature=2.0)
    torch.manual_seed(2)
    student = tf.LlamaForCausalLM(llama(200))
    args = arguments(tmp_path, max_steps=96, optim="adamw_torch", learning_rate=0.01, alpha=1.0)

    def apart():
        batch = collate([data[i] for i in range(64)])
        with torch.no_grad():
            z, t = (m.eval()(**batch).logits for m in (student, teacher))
        return float(divergence(z, t, batch["attention_mask"].bool(), temperature=2.0))

    before = apart()
    DistillationTrainer(student, args, train_dataset=data, teacher=cached).train()
    assert apart() < 0.7 * before  # 12 draws per position, six epochs
    for options, words in (
        ({"distill_temperature": 4.0}, "cached at temperature 2.0"),
        ({"divergence": "reverse_kl"}, "not of reverse_kl"),
    ):
        with pytest.raises(ValueError, match=words):
            DistillationTrainer(
                student, arguments(tmp_path, **options), train_dataset=data, teacher=cached
            )
