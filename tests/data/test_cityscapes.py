import pytest

from synchromesh.data.cityscapes import IDS, Cityscapes, CityscapesPanoptic
from synchromesh.errors import InputError

NAME = "train/bonn/bonn_000001_000019"


@pytest.fixture
def city(tmp_path, picture, label_file):
    def write(values, what: str = "labelIds", mode: str = "L"):
        picture(f"leftImg8bit/{NAME}_leftImg8bit.png", len(values), len(values[0]))
        label_file(f"gtFine/{NAME}_gtFine_{what}.png", values, mode=mode)
        return tmp_path

    return write


def test_34_ids_become_19_classes(city) -> None:
    # id -> train id, as the table of the data set's scripts has it
    table = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    table |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    annotated = Cityscapes(city([list(range(34))])).load()
    assert annotated.pictures[0].opened(3)[1].values.tolist() == [[table.get(value, 255) for value in range(34)]]
    assert len(annotated.classes) == 19
    assert (annotated.classes[0], annotated.classes[18]) == ("road", "bicycle")
    assert annotated.notes() == ()


def test_an_id_that_is_none_is_named(city) -> None:
    assert "has 77 in 1 of 2 pixels" in Cityscapes(city([[7, 77]])).load().notes()[0]


def test_objects_are_class_times_1000_and_crowds_have_no_number(city) -> None:
    ids = [[7, 26000, 26001, 26], [23, 33002, 29000, 0]]
    annotated = CityscapesPanoptic(city(ids, "instanceIds", "I;16")).load()
    (picture,) = annotated.pictures
    found = picture.opened(3)[1]
    car, sky, road, bicycle = (list(IDS).index(name) for name in ("car", "sky", "road", "bicycle"))
    assert {(one.id, one.label, one.crowd) for one in found.segments} == {
        (7, road, False), (26, car, True), (26000, car, False), (26001, car, False),
        (23, sky, False), (33002, bicycle, False),
    }  # fmt: skip
    assert found.labels().tolist() == [[road, car, car, 255], [sky, bicycle, 255, 255]]
    things = found.instances(annotated.things)
    assert sorted(zip(things.labels.tolist(), things.boxes.tolist(), strict=True)) == [
        (car, [1, 0, 2, 1]), (car, [2, 0, 3, 1]), (bicycle, [1, 1, 2, 2]),
    ]  # fmt: skip


def test_a_missing_split_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="leftImg8bit/val does not exist"):
        Cityscapes(tmp_path, "val").load()
