"""Data sets through Hugging Face `datasets`: the rows of every layout, by number and as streams."""

import json
import sys

import pytest
from captioned_sets import LAYOUTS, caption, png

from sublimate.training.data_config import DataConfig
from sublimate.training.hub_rows import DatasetRows, DatasetStream
from sublimate.training.streams import Lane

LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if name != "folder"}


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"Reading owner/name needs Hugging Face datasets: .* 'sublimate\[data\]'"):
        DatasetRows(DataConfig(dataset_name="owner/name"))
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match="needs Hugging Face datasets"):
        DatasetStream(DataConfig(train_data_dir=tmp_path, streaming=True))


@pytest.fixture(scope="module", params=LAYOUTS)
def data(request, tmp_path_factory):
    pytest.importorskip("datasets")
    write, columns = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return {"train_data_dir": write(folder / "data", 20), "cache_dir": folder / "cache", **columns}


@pytest.fixture
def streamed(data):
    return DatasetStream(DataConfig(**{**data, "cache_dir": None}, streaming=True))


def test_rows_come_by_number(data):
    rows = DatasetRows(DataConfig(**data))
    assert list(rows.captions) == [caption(i) for i in range(20)] and len(rows) == 20
    assert [rows.picture(i).getpixel((3, 3)) for i in (13, 0)] == [(39, 39, 39), (0, 0, 0)]
    assert rows.identity() == DatasetRows(DataConfig(**data)).identity()
    assert list(DatasetRows(DataConfig(**{**data, "caption_column": None})).captions) == []


def test_parts_of_a_stream_hold_every_row_once(streamed):
    assert streamed.parts == 4
    for of in (1, 2, 4):
        rows = [row for index in range(of) for row in streamed.part(index, of)]
        assert [streamed.caption(row) for row in rows] == [caption(i) for i in range(20)]
        assert [streamed.picture(row).getpixel((0, 0))[0] for row in rows] == [3 * i for i in range(20)]


def test_a_part_goes_on_anywhere(streamed):
    whole = [streamed.caption(row) for row in streamed.part(1, 2)]
    for read in range(len(whole) + 1):
        part = streamed.part(1, 2)
        rows = iter(part)
        for _ in range(read):
            next(rows)
        resumed = streamed.part(1, 2)
        resumed.seek(json.loads(json.dumps(part.place())))
        assert [streamed.caption(row) for row in resumed] == whole[read:]


def test_a_lane_goes_on_where_it_did_after_stops_within_one_window(streamed):
    def lane(place=None):
        return Lane(streamed, 1, 2, window=4, seed=0, place=place)

    def captions(lane, count):
        return [streamed.caption(next(lane)[1]) for _ in range(count)]

    straight, stopped = captions(lane(), 24), lane()
    read = captions(stopped, 6)
    for count in (0, 1, 0, 17):  # the last passes the data's end
        stopped = lane(json.loads(json.dumps(stopped.place())))
        read += captions(stopped, count)
    assert read == straight


def test_captions_for_a_teacher_that_draws_need_no_pictures(data):
    rows = DatasetRows(DataConfig(**{**data, "image_column": "image"}, images="teacher"))
    assert list(rows.captions) == [caption(i) for i in range(20)]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_there_are_named(data, streaming):
    options = {**data, "cache_dir": None} if streaming else data
    read = DatasetStream if streaming else DatasetRows
    for option in ("image_column", "caption_column"):
        with pytest.raises(ValueError, match=rf"has no column 'nothing', only .*: set data\.{option}"):
            read(DataConfig(**{**options, option: "nothing"}, streaming=streaming))


def write_rows(folder, rows, empty=0):
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows)[: len(rows) - empty], folder / "0.parquet")
    return {"train_data_dir": folder, "cache_dir": folder / "cache"}


def test_damaged_rows_are_named(tmp_path):
    pytest.importorskip("datasets")
    good = {"image": {"bytes": png(1), "path": None}, "text": "a cat"}
    bad = {"image": {"bytes": png(1)[:40], "path": None}, "text": "a dog"}
    none = {"image": None, "text": "a dog"}
    data = write_rows(tmp_path / "damaged", [good, bad, none])
    rows = DatasetRows(DataConfig(**data))
    with pytest.raises(ValueError, match=r"The picture in row 1 of .*damaged cannot be read"):
        rows.picture(1)
    with pytest.raises(ValueError, match=r"There is no picture in row 2 of .*damaged: its column 'image' is None"):
        rows.picture(2)
    stream = DatasetStream(DataConfig(**{**data, "cache_dir": None}, streaming=True))
    with pytest.raises(ValueError, match=r"The picture of .*damaged with the caption 'a dog' cannot be read"):
        stream.picture(list(stream.part(0, 1))[1])
    data = write_rows(tmp_path / "silent", [good, {**good, "text": None}])
    with pytest.raises(ValueError, match=r"Row 1 of .*silent has the caption None, which is no text"):
        DatasetRows(DataConfig(**data))


def test_pictures_may_be_bytes_or_paths(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "7.png").write_bytes(png(7))
    rows = [{"image": png(5), "text": "a cat"}]
    assert DatasetRows(DataConfig(**write_rows(tmp_path / "bytes", rows))).picture(0).getpixel((0, 0)) == (15, 15, 15)
    rows = [{"image": str(tmp_path / "7.png"), "text": "a cat"}]
    assert DatasetRows(DataConfig(**write_rows(tmp_path / "paths", rows))).picture(0).getpixel((0, 0)) == (21, 21, 21)


def test_empty_data_sets_are_named(tmp_path):
    pytest.importorskip("datasets")
    data = write_rows(tmp_path / "empty", [{"image": png(1), "text": "a cat"}], empty=1)
    with pytest.raises(ValueError, match=r"empty has no rows: give another"):
        DatasetRows(DataConfig(**data))
    stream = DatasetStream(DataConfig(**{**data, "cache_dir": None}, streaming=True))
    with pytest.raises(ValueError, match=r"Part 1 of 1 of .*empty has no rows"):
        Lane(stream, 0, 1, window=4, seed=0)


def test_folders_without_data_are_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"holds no captioned pictures: give a folder with metadata\.jsonl, parquet"):
        DatasetRows(DataConfig(train_data_dir=tmp_path))
    (tmp_path / "0.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        DatasetRows(DataConfig(train_data_dir=tmp_path, cache_dir=tmp_path / "cache"))


@pytest.mark.slow
def test_a_data_set_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it is asked for again and again
    with pytest.raises(ValueError, match="nobody/nothing-at-all cannot be read"):
        DatasetRows(DataConfig(dataset_name="nobody/nothing-at-all", cache_dir=tmp_path))
