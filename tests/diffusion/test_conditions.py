"""Conditions: batches of named tensors, and what the null replaces."""

import copy

import pytest
import torch

from sublimate.diffusion.conditions import Condition


def make(n=3, length=4):
    text = torch.arange(n * length * 2, dtype=torch.float32).reshape(n, length, 2)
    mask = torch.ones(n, length, dtype=torch.long)
    return Condition({"text": text, "text.mask": mask, "extra.sizes": torch.arange(n)[:, None]})


def test_batch_size():
    assert make(3).batch_size == 3
    assert Condition().batch_size is None and Condition().expand(7) == {}


def test_moving_converts_only_floating_point():
    moved = make().to(dtype=torch.float64)
    assert moved["text"].dtype == torch.float64 and moved["text.mask"].dtype == torch.int64
    assert make().to("meta")["text"].device.type == "meta"


@pytest.mark.parametrize("rows", [slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True])])
def test_rows_are_chosen_alike_in_every_tensor(rows):
    chosen = make().index(rows)
    assert isinstance(chosen, Condition) and chosen.batch_size == 2
    for key, value in make().items():
        assert torch.equal(chosen[key], value[1:])


def test_a_single_row_keeps_its_batch():
    assert torch.equal(make().index(-1)["text"], make()["text"][2:])


def test_one_sample_serves_many():
    many = make(1).expand(5)
    assert many["text"].shape == (5, 4, 2) and torch.equal(many["text"][4], make(1)["text"][0])
    assert make(3).expand(3).batch_size == 3
    with pytest.raises(ValueError, match="batch size 3 cannot serve 5"):
        make(3).expand(5)


def test_null_replaces_text_and_nothing_else():
    null = Condition({"text": -torch.ones(1, 4, 2), "text.mask": torch.zeros(1, 4, dtype=torch.long)})
    result = make().with_null(null)
    assert (result["text"] == -1).all() and result["text"].shape == (3, 4, 2)
    assert (result["text.mask"] == 0).all()
    assert torch.equal(result["extra.sizes"], make()["extra.sizes"])
    assert make().with_null(null.expand(3))["text"].shape == (3, 4, 2)
    assert make().to("meta").with_null(null)["text"].is_meta  # where the condition is, wherever the null is


@pytest.mark.parametrize("null", [Condition(), Condition(text=torch.zeros(1, 4, 2))])
def test_null_needs_the_same_text(null):
    with pytest.raises(ValueError, match="null condition"):
        make().with_null(null)


def test_nothing_to_replace_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        Condition(extra=torch.zeros(2)).with_null(Condition())


def test_replace_leaves_the_original():
    original = make()
    changed = original.replace(text=torch.zeros(3, 1), **{"text.pooled": torch.ones(3, 2)})
    assert changed["text.pooled"].shape == (3, 2) and (changed["text"] == 0).all()
    assert "text.pooled" not in original and original["text"].shape == (3, 4, 2)


def test_cat_undoes_index():
    joined = Condition.cat([make().index(slice(0, 1)), make().index(slice(1, 3))])
    assert all(torch.equal(joined[key], value) for key, value in make().items())
    assert Condition.cat([]) == {} and Condition.cat([Condition(), Condition()]) == {}


def test_cat_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="different keys"):
        Condition.cat([make(), Condition(text=torch.zeros(1, 4, 2))])
    with pytest.raises(ValueError, match="'text' has samples of different shapes"):
        Condition.cat([make(length=4), make(length=5)])


def test_bad_values_are_refused():
    with pytest.raises(TypeError, match="'text' is a list"):
        Condition(text=[1.0])
    with pytest.raises(ValueError, match="batch first"):
        Condition(text=torch.tensor(1.0))
    with pytest.raises(ValueError, match="one batch size"):
        Condition(text=torch.zeros(2), extra=torch.zeros(3))


def test_copies_are_conditions():
    twin = copy.deepcopy(make())
    assert isinstance(twin, Condition) and torch.equal(twin["text"], make()["text"])


def test_dropping_replaces_the_text_of_some_samples():
    condition = Condition({"text": torch.ones(3, 2, 4), "text.pooled": torch.ones(3, 5), "extra": torch.arange(3.0)})
    null = Condition({"text": torch.zeros(1, 2, 4), "text.pooled": torch.zeros(1, 5)})
    found = condition.dropping(torch.tensor([False, True, False]), null)
    for key in ("text", "text.pooled"):
        assert found[key].flatten(1).mean(1).tolist() == [1, 0, 1]
    assert torch.equal(found["extra"], condition["extra"])
