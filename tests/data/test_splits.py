from pathlib import Path

import pytest
import torch

from residrop.common.errors import ConfigError, DataError
from residrop.data.splits import (
    Files,
    Images,
    balanced_limit,
    hold_out,
    renumber,
    select,
    stratified,
    svhn_validation,
    take_apart,
)


def test_hold_out_depends_on_the_seed_only():
    index = hold_out(100, 30, seed=7)
    assert index.dtype == torch.int64
    assert index.unique().numel() == 30
    assert torch.equal(index, hold_out(100, 30, seed=7))
    assert not torch.equal(index, hold_out(100, 30, seed=8))


@pytest.mark.parametrize("count", [-1, 100, 101])
def test_hold_out_refuses_counts(count):
    with pytest.raises(ConfigError, match=f"validation={count}.*100 training images"):
        hold_out(100, count, seed=0)


def test_take_apart_is_disjoint_and_complete():
    images = Images(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), torch.arange(10))
    rest, held = take_apart(images, torch.tensor([2, 5]))
    assert held.labels.tolist() == [2, 5]
    assert rest.labels.tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    assert rest.pixels.flatten().tolist() == rest.labels.tolist()


def test_select_files_keeps_paths_with_labels():
    files = Files(tuple(Path(str(i)) for i in range(5)), torch.arange(5), 8, 9)
    chosen = select(files, torch.tensor([4, 1]))
    assert [path.name for path in chosen.paths] == ["4", "1"]
    assert chosen.labels.tolist() == [4, 1]
    assert (chosen.size, chosen.shorter) == (8, 9)


def test_stratified_takes_a_share_of_every_class_by_the_hash_of_its_keys():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    keys = [f"{label}/{i}" for i, label in enumerate(labels.tolist())]
    index = stratified(labels, "abcd", 0.3, keys)
    assert labels[index].bincount(minlength=4).tolist() == [15, 3, 1, 0]
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    shuffled = stratified((3 - labels)[order], "dcba", 0.3, [keys[i] for i in order.tolist()])
    assert {keys[i] for i in order[shuffled].tolist()} == {keys[i] for i in index.tolist()}
    for gone in range(50):  # whichever goes, at most one comes in its place
        left = torch.tensor([i for i in range(63) if i != gone])
        again = left[stratified(labels[left], "abcd", 0.3, [keys[i] for i in left.tolist()])]
        assert len(set(again.tolist()) - set(index.tolist())) <= 1
    with pytest.raises(ConfigError, match=r"split=0.0: must lie between"):
        stratified(labels, "abcd", 0.0, keys)


def test_renumber_matches_names():
    labels = torch.tensor([2, 0, 2])
    assert renumber(labels, "abc", "cba", "here").tolist() == [0, 2, 0]
    assert renumber(labels, "abc", "ca", "here").tolist() == [0, 1, 0]  # nothing is called b
    with pytest.raises(DataError, match=r"^here: class 'c' is not among the classes \(a, b\); correct the name"):
        renumber(labels, "abc", "ab", "here")


def test_svhn_validation_takes_400_and_200_style_counts_of_every_class():
    generator = torch.Generator().manual_seed(0)
    train, extra = (torch.arange(n)[torch.randperm(n, generator=generator)] % 10 for n in (300, 700))
    index = svhn_validation(train, extra, seed=1, per_train=4, per_extra=2)
    labels = torch.cat([train, extra])
    assert index.unique().numel() == 60
    assert labels[index[index < 300]].bincount().tolist() == [4] * 10
    assert labels[index[index >= 300]].bincount().tolist() == [2] * 10
    assert torch.equal(index, svhn_validation(train, extra, seed=1, per_train=4, per_extra=2))
    assert not torch.equal(index, svhn_validation(train, extra, seed=2, per_train=4, per_extra=2))


def test_svhn_validation_refuses_small_classes():
    labels = torch.arange(30) % 10
    with pytest.raises(DataError, match="SVHN train: 3 images of class 0, 4 are"):
        svhn_validation(labels, labels, seed=1, per_train=4, per_extra=2)


@pytest.mark.parametrize(("limit", "counts"), [(6, [2, 2, 2]), (10, [2, 4, 4]), (99, [2, 4, 93])])
def test_balanced_limit_is_as_equal_as_the_set_allows(limit, counts):
    labels = torch.tensor([0] * 2 + [1] * 4 + [2] * 94)
    index = balanced_limit(labels, limit, seed=3)
    assert index.unique().numel() == limit
    assert labels[index].bincount(minlength=3).tolist() == counts


def test_balanced_limit_nests_and_depends_on_the_seed():
    labels = torch.arange(60) % 6
    small, large = (set(balanced_limit(labels, n, seed=1).tolist()) for n in (12, 30))
    assert small < large
    assert small != set(balanced_limit(labels, 12, seed=2).tolist())
    assert len(balanced_limit(labels, 1000, seed=1)) == 60


def test_balanced_limit_refuses_zero():
    with pytest.raises(ConfigError, match="limit=0"):
        balanced_limit(torch.arange(3), 0, seed=1)
