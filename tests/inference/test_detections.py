"""Objects that several passes found, and detectors under predict."""

import itertools

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

from residrop.blocks.attach import attach, sampling
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.inference import Sampled, merge_detections, predict
from residrop.rules.catalogue import make_rule


def one(*objects):
    """Detections from (box, score, label) each."""
    return {
        "boxes": torch.tensor([box for box, _, _ in objects], dtype=torch.float32).view(-1, 4),
        "scores": torch.tensor([score for _, score, _ in objects]),
        "labels": torch.tensor([label for _, _, label in objects], dtype=torch.long),
    }


def test_objects_are_averaged_over_the_passes_that_found_them():
    a, b = (0, 0, 10, 10), (100, 100, 120, 120)
    passes = [
        one((a, 0.8, 1), (b, 0.9, 2)),
        one(((1, 0, 11, 10), 0.6, 1)),
        one(((2, 0, 12, 10), 0.7, 1), (b, 0.3, 2), ((0, 50, 10, 60), 0.1, 1)),
        one(),
    ]
    found = merge_detections(passes)
    assert found.labels.tolist() == [1, 2, 1]  # by score
    torch.testing.assert_close(found.scores, torch.tensor([2.1 / 4, 1.2 / 4, 0.1 / 4]))
    torch.testing.assert_close(found.presence, torch.tensor([0.75, 0.5, 0.25]))
    torch.testing.assert_close(found.boxes[0], torch.tensor([1.0, 0.0, 11.0, 10.0]))
    torch.testing.assert_close(found.deviation[0], torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert not found.deviation[1].any()
    assert found.deviation[2].isnan().all()


def test_labels_and_small_overlaps_keep_objects_apart():
    a = (0, 0, 10, 10)
    assert len(merge_detections([one((a, 0.5, 1)), one((a, 0.5, 2))]).labels) == 2
    apart = [one((a, 0.5, 1)), one(((6, 0, 16, 10), 0.5, 1))]  # iou 0.25
    assert len(merge_detections(apart).labels) == 2
    assert len(merge_detections(apart, iou=0.2).labels) == 1
    with pytest.raises(ConfigError, match="iou is 2"):
        merge_detections(apart, iou=2)
    with pytest.raises(ConfigError, match="no passes to merge"):
        merge_detections([])


def test_two_boxes_of_a_pass_are_two_objects_and_the_assignment_is_the_best():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = torch.rand(2, 4, 2, generator=generator) * 4
        first, second = (torch.cat((c, c + 6), 1) for c in corners)
        scores = torch.linspace(0.9, 0.6, 4)
        labels = torch.ones(4, dtype=torch.long)
        found = merge_detections(
            [{"boxes": boxes, "scores": scores, "labels": labels} for boxes in (first, second)], iou=0.0
        )
        # all orders of the second pass: the one with the largest sum of overlaps
        overlaps = box_iou(first, second)
        best = max(itertools.permutations(range(4)), key=lambda order: sum(overlaps[i, j] for i, j in enumerate(order)))
        wanted = torch.stack([(first[i] + second[j]) / 2 for i, j in enumerate(best)])
        order = torch.argsort(
            torch.stack([scores[i] + scores[j] for i, j in enumerate(best)]), descending=True, stable=True
        )
        torch.testing.assert_close(found.boxes, wanted[order])


class Backbone(nn.Sequential):
    out_channels = 8

    def __init__(self):
        blocks = [Residual(nn.Conv2d(8, 8, 3, padding=1), rule=make_rule("stochastic-depth", 0.5)) for _ in range(3)]
        super().__init__(nn.Conv2d(3, 8, 3, stride=4, padding=1), *blocks)


def detector(kind):
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
    size = {"min_size": 64, "max_size": 64}
    if kind == "retinanet":
        return RetinaNet(
            Backbone(), 3, anchor_generator=anchors, score_thresh=0.0, detections_per_img=5, topk_candidates=20, **size
        )
    pool = MultiScaleRoIAlign(featmap_names=["0"], output_size=3, sampling_ratio=1)
    return FasterRCNN(
        Backbone(),
        3,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_score_thresh=0.0,
        box_detections_per_img=5,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=10,
        **size,
    )


@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_detectors_give_the_objects_of_the_loop(kind):
    model = detector(kind)
    attach(model, seed=3)
    images = [torch.rand(3, 48, 64), torch.rand(3, 64, 64)]
    found = predict(model, images, 6, first=1, keep=True)
    with torch.no_grad(), sampling(model, first=1):
        passes = [model(images) for _ in range(6)]
    for number, merged in enumerate(found.images):
        for a, b in zip(found.sample_images, passes, strict=True):
            assert all(torch.equal(a[number][key], b[number][key]) for key in ("boxes", "scores", "labels"))
        wanted = merge_detections([one[number] for one in passes])
        assert all(torch.equal(a, b) for a, b in zip(merged, wanted, strict=True) if not a.isnan().any())
        assert (merged.presence <= 1).all()
        assert len(merged.boxes) > 0
    once = predict(model, images)
    with torch.no_grad():
        plain = model.eval()(images)
    assert once.samples == 0
    for merged, wanted in zip(once.images, plain, strict=True):
        order = wanted["scores"].argsort(descending=True, stable=True)
        assert torch.equal(merged.boxes, wanted["boxes"][order])
        torch.testing.assert_close(merged.scores, wanted["scores"][order])
        assert not merged.deviation.any()
        assert (merged.presence == 1).all()
    assert len(Sampled(model, 2)(images)) == 2
    with pytest.raises(ConfigError, match="not a list of dicts"):
        predict(model, images, 2, outputs=lambda o: o[0]["boxes"], kind="detections")
