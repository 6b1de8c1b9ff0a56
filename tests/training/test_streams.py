"""Streams: every row once per pass, the same for any number of processes, and resumed in the middle of a window."""

import json

import pytest
import torch
from captioned_sets import WORDS, caption, picture

from sublimate.pipelines.model import open_model
from sublimate.training.captioned import Framing
from sublimate.training.forgetting import Forget, anchoring
from sublimate.training.randomness import SampleRandom
from sublimate.training.streams import Lane, StreamSource


class ListedPart:
    """Rows of some files, in order."""

    def __init__(self, rows, opened):
        self.rows, self.next, self.opened = rows, 0, opened

    def __iter__(self):
        while self.next < len(self.rows):
            self.next += 1
            self.opened.append(self.rows[self.next - 1])
            yield {"row": self.rows[self.next - 1]}

    def place(self):
        return {"next": self.next}

    def seek(self, place):
        self.next = place["next"]


class Listed:
    """A stream over lists of row numbers, one list per file; `read` collects what was read."""

    name = "lists"

    def __init__(self, *files):
        self.files, self.read = files, []

    @property
    def parts(self):
        return len(self.files)

    def part(self, index, of):
        return ListedPart([row for file in self.files[index::of] for row in file], self.read)

    def picture(self, row):
        return picture(row["row"])

    def caption(self, row):
        return caption(row["row"])


def files(count, each):
    return [range(each * i, each * (i + 1)) for i in range(count)]


def lane(stream, window=4, seed=0, place=None):
    return Lane(stream, 0, 1, window=window, seed=seed, place=place)


def rows(lane, count):
    return [next(lane)[1]["row"] for _ in range(count)]


def test_a_window_is_shuffled_and_each_differently():
    read = rows(lane(Listed(range(40))), 40)
    windows = [read[i : i + 4] for i in range(0, 40, 4)]
    assert [sorted(window) for window in windows] == [list(range(i, i + 4)) for i in range(0, 40, 4)]
    assert len({tuple(row % 4 for row in window) for window in windows}) > 4
    assert read == rows(lane(Listed(range(40))), 40) != rows(lane(Listed(range(40)), seed=1), 40)


def test_a_lane_reads_on_from_the_start_and_numbers_its_rows():
    stream = Listed(range(6))
    numbered = [next(lane_) for lane_ in [lane(stream)] for _ in range(24)]
    assert sorted(number for number, _ in numbered) == list(range(24))
    assert all([row["row"] for _, row in numbered].count(i) == 4 for i in range(6))


@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("used", [0, 1, 3, 4, 5, 9, 10, 11, 20, 33])
def test_a_lane_resumes_anywhere(window, used):
    straight = rows(lane(Listed(range(10)), window), used + 25)
    stopped = lane(Listed(range(10)), window)
    rows(stopped, used)
    place = json.loads(json.dumps(stopped.place()))
    resumed = lane(Listed(range(10)), window, place=place)
    assert rows(resumed, 25) == straight[used:]
    assert lane(Listed(range(10)), window, place=place).place() == place


def test_a_lane_holds_one_window():
    stream = Listed(range(100))
    rows(lane(stream, window=8), 17)
    assert len(stream.read) == 24


def test_a_part_without_rows_is_named():
    with pytest.raises(ValueError, match="Part 1 of 1 of lists has no rows"):
        lane(Listed([]))


@pytest.fixture(scope="module")
def model(tiny_sd):
    return open_model(tiny_sd)


def source(model, stream, **options):
    options = {"global_batch": 4, "window": 3, "images": False, **options}
    return StreamSource(model, stream, Framing(16, 16), **options)


def draw(source, process, processes, steps, batch=4, start=0):
    """The batches of one of so many processes."""
    local = batch // processes
    indices = range(process * local, (process + 1) * local)
    return [source.batch(SampleRandom(0, step, "x", indices)) for step in range(start, start + steps)]


def test_lanes_share_what_may_be_in_memory(model):
    for parts, rows in ((1, 8), (4, 2)):
        read = source(model, Listed(*files(parts, 12)), window=8)
        draw(read, 0, 1, 1)
        assert [len(lane.rows) for lane in read._open.values()] == [rows] * parts


def together(drawn):
    """What several processes read, as one would."""
    return [torch.cat([told(batch) for batch in parts]) for parts in zip(*drawn, strict=True)]


def told(batch):
    """Everything of a batch, (samples, numbers)."""
    return torch.cat([x.flatten(1) for x in (*batch.condition.values(), *batch.tensors.values())], dim=1)


def assert_equal(first, second):
    assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 24), (2, 12), (3, 8), (8, 3)])
def test_processes_read_together_what_one_reads(model, layout):
    whole = together([draw(source(model, Listed(*files(*layout))), 0, 1, 7)])
    for processes in (2, 4):
        streams = [Listed(*files(*layout)) for _ in range(processes)]
        parts = [draw(source(model, stream), process, processes, 7) for process, stream in enumerate(streams)]
        assert_equal(together(parts), whole)
        read = [set(stream.read) for stream in streams]
        if layout[0] % processes == 0:
            assert all(read[a].isdisjoint(read[b]) for a in range(processes) for b in range(a))
        assert set().union(*read) <= set(range(24))


@pytest.mark.slow
def test_processes_share_images_too(model):
    options = {"images": True, "mirrored": True, "negatives": ["a cat", "red", "dog"]}
    whole = together([draw(source(model, Listed(*files(2, 6)), **options), 0, 1, 2)])
    parts = [draw(source(model, Listed(*files(2, 6)), **options), process, 2, 2) for process in range(2)]
    assert_equal(together(parts), whole)


def test_a_pass_reads_every_row_once(model):
    drawn = together([draw(source(model, Listed(*files(4, 6))), 0, 1, 6)])
    assert len(torch.cat(drawn).unique(dim=0)) == 24


@pytest.mark.slow
def test_captions_belong_to_their_pictures(model):
    (batch,) = draw(source(model, Listed(*files(4, 6)), images=True), 0, 1, 1)
    texts = {caption(i): i for i in range(24)}
    for state, latents in zip(batch.condition["text"], batch["images"], strict=True):
        (i,) = [i for text, i in texts.items() if torch.equal(model.encode_prompts([text])["text"][0], state)]
        image = Framing(16, 16)(picture(i), 0)
        torch.testing.assert_close(model.encode(image[None])[0], latents)
    assert len(WORDS) ** 3 > 24


@pytest.mark.parametrize("layout", [(1, 24), (4, 6)])
@pytest.mark.parametrize("after", [0, 4])
def test_a_stream_goes_on_where_its_processes_were_even_as_another_number(model, layout, after):
    straight = together([draw(source(model, Listed(*files(*layout))), 0, 1, after + 6)])[after:]
    stopped = [source(model, Listed(*files(*layout))) for _ in range(2)]
    for process, part in enumerate(stopped):
        draw(part, process, 2, after)
    place = json.loads(json.dumps({k: v for part in stopped for k, v in part.place().items()}))
    # ... and stopped again and again.
    for processes in (4, 2, 1):
        resumed = [source(model, Listed(*files(*layout))) for _ in range(processes)]
        for part in resumed:
            part.seek(place)
        drawn = [draw(part, process, processes, 2, start=after) for process, part in enumerate(resumed)]
        assert_equal(together(drawn), straight[:2])
        straight = straight[2:]
        place = {k: v for part in resumed for k, v in part.place().items()}


def test_what_is_drawn_before_training_can_be_taken_back(model):
    stream = source(model, Listed(*files(2, 12)))
    place = stream.place()
    draw(stream, 0, 1, 2, batch=8)  # more samples than the global batch has
    stream.seek(place)
    assert_equal(together([draw(stream, 0, 1, 3)]), together([draw(source(model, Listed(*files(2, 12))), 0, 1, 3)]))


def test_a_stream_says_what_it_provides(model, tiny_inpainting):
    stream = Listed(*files(1, 4))
    assert source(model, stream, images=True).provides == {"prompts", "images"}
    assert source(model, stream, negatives=["red"]).provides == {"prompts", "negatives"}
    without = source(model, stream, captions=False)
    assert without.provides == frozenset() and dict(draw(without, 0, 1, 1)[0].condition) == {}
    (batch,) = draw(source(model, stream, negatives=["red"]), 0, 1, 1)
    assert set(batch.condition) == {"text", "negative"} and not batch.tensors
    inpainting = source(open_model(tiny_inpainting), stream)
    assert inpainting.provides == {"prompts", "images", "masks"}
    (batch,) = draw(inpainting, 0, 1, 1)
    assert batch.condition["extra.masked"].shape == batch["images"].shape


def test_captions_may_be_encoded_for_a_teacher_too(tiny_sd):
    model = open_model(tiny_sd)
    forget = [Forget(concept="cat", anchor="van gogh")]
    encode = anchoring(model.encode_prompts, model.encode_prompts, forget)
    (batch,) = draw(source(model, Listed(range(1, 5)), encode=encode), 0, 1, 1)
    (plain,) = draw(source(model, Listed(range(1, 5))), 0, 1, 1)
    torch.testing.assert_close(batch.condition.for_student()["text"], plain.condition["text"])
    changed = (batch.condition.for_teacher()["text"] != plain.condition["text"]).flatten(1).any(1)
    assert changed.sum() == sum("cat" in caption(i) for i in range(1, 5)) > 0
