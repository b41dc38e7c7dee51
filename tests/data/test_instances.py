import torch

from synchromesh.data.instances import Instances


def test_objects_of_a_stretched_picture_have_stretched_boxes_and_no_masks() -> None:
    one = Instances(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([7]), masks=torch.ones(1, 5, 5, dtype=torch.bool))
    twice = one.scaled(2.0, 3.0)
    assert twice.boxes.tolist() == [[2, 6, 6, 12]]
    assert twice.masks is None
    assert len(twice) == 1
    assert len(Instances.none()) == 0
