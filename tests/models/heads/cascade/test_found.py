import pytest
import torch

from synchromesh.models.boxes import iou
from synchromesh.models.heads.cascade.found import found_boxes
from synchromesh.models.heads.cascade.region_proposals import Regions

CLASSES = 3


def slow(
    regions: Regions,
    boxes: torch.Tensor,
    scores: list[torch.Tensor],
    image: int,
    least: float,
    overlap: float,
    most: int,
) -> list:
    candidates = []
    for region in range(len(regions)):
        for label in range(CLASSES):
            left, top, right, bottom = boxes[region, label].tolist()
            if regions.image[region] != image or right <= left or bottom <= top:
                continue
            score = sum(one[region, label].item() for one in scores) / len(scores)
            if score >= least:
                candidates.append((score, label, region))
    kept: list[tuple[float, int, int]] = []
    for score, label, region in sorted(candidates, key=lambda each: -each[0]):
        rivals = [other for _, known, other in kept if known == label]
        if all(iou(boxes[region, label][None], boxes[other, label][None]) <= overlap for other in rivals):
            kept.append((score, label, region))
    return [(score, label, boxes[region, label].tolist()) for score, label, region in kept[:most]]


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize(("least", "overlap", "most"), [(0.0, 0.5, 100), (0.3, 0.5, 100), (0.1, 0.3, 4)])
def test_what_is_found_is_what_the_loops_find(least: float, overlap: float, most: int, class_agnostic: bool) -> None:
    corners = torch.rand(30, 2) * 20
    boxes = torch.cat([corners, corners + torch.rand(30, 2) * 20], dim=1)
    boxes[::7, 2] = boxes[::7, 0]  # no area
    regions = Regions(boxes, torch.tensor([0, 0, 2]).repeat_interleave(10))
    scores = [(2 * torch.randn(30, CLASSES + 1)).softmax(1) for _ in range(3)]
    each = boxes[:, None].repeat(1, CLASSES, 1)
    if not class_agnostic:
        each[:, :, 2:] += torch.randint(-5, 9, (30, CLASSES, 2))  # of some classes they have no area
    of_class = None if class_agnostic else each
    found = found_boxes(regions, scores, 3, least=least, overlap=overlap, most=most, of_class=of_class)
    for image, got in enumerate(found):
        expected = slow(regions, each, scores, image, least, overlap, most)
        assert got.labels.tolist() == [label for _, label, _ in expected]
        assert got.boxes.tolist() == [box for *_, box in expected]
        assert got.scores.tolist() == pytest.approx([score for score, *_ in expected])
    assert len(found[1].boxes) == 0


def test_without_images_or_regions_nothing_is_found() -> None:
    none = Regions(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    scores = [torch.zeros(0, CLASSES + 1)]
    assert found_boxes(none, scores, 0, least=0.0, overlap=0.5, most=10) == []
    (found,) = found_boxes(none, scores, 1, least=0.0, overlap=0.5, most=10)
    assert (found.boxes.shape, found.scores.shape, found.labels.dtype) == ((0, 4), (0,), torch.int64)
