"""Work done ahead: in order, several at a time, no further ahead than said, and stopped where an item fails."""

import threading

import pytest

from sublimate.training.ahead import ahead


def test_results_come_in_the_order_of_their_items():
    waiting = [threading.Event() for _ in range(3)]

    def last_first(item):
        assert waiting[item].wait(10)
        if item:
            waiting[item - 1].set()
        return 10 * item

    waiting[2].set()
    assert [*ahead(last_first, range(3), threads=3)] == [0, 10, 20]
    assert [*ahead(str, [])] == []


def test_several_are_under_way_at_once():
    together = threading.Barrier(4, timeout=10)
    assert len([*ahead(lambda item: together.wait(), range(8), threads=4)]) == 8


def test_no_more_are_taken_than_are_waited_for():
    taken = []
    results = ahead(lambda item: item, (taken.append(item) or item for item in range(100)), threads=2)
    for used in range(1, 50):
        next(results)
        assert len(taken) == used + 3


def test_an_items_error_comes_in_its_place_and_ends_the_work():
    begun = []

    def fails(item):
        begun.append(item)
        if item == 5:
            raise ValueError("no picture")
        return item

    results = ahead(fails, range(100), threads=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no picture"):
        next(results)
    assert max(begun) <= 8 and [*results] == []
