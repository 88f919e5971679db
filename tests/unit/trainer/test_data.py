"""The digits and their split."""

from __future__ import annotations

import torch

from tamiyo_svc.trainer.data import Digits, load


def digits(random_seed: int = 0) -> Digits:
    return load(torch.Generator().manual_seed(random_seed))


def test_the_parts_make_up_the_whole_without_overlap() -> None:
    data = digits()
    parts = (data.training, data.validation, data.test)
    assert sum(len(part) for part in parts) == 1797
    images = torch.cat([part.images for part in parts]).flatten(1)
    other = torch.cat(
        [p.images for p in (digits(1).training, digits(1).validation, digits(1).test)]
    )
    assert torch.equal(images.sum(), other.sum())
    assert len(data.validation) == 250
    assert images.min() == 0.0
    assert images.max() == 1.0


def test_the_split_follows_from_the_generator() -> None:
    assert torch.equal(digits(1).test.labels, digits(1).test.labels)
    assert not torch.equal(digits(1).test.labels, digits(2).test.labels)


def test_an_epoch_is_full_batches_of_different_samples() -> None:
    training = digits().training
    batches = list(training.batches(64, torch.Generator().manual_seed(3)))
    assert {len(batch) for batch in batches} == {64}
    assert len(batches) == len(training) // 64
    again = list(training.batches(64, torch.Generator().manual_seed(3)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0].labels, batches[1].labels)
