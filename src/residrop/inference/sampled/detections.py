"""Objects that several passes found in one image, matched with one another."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError
from residrop.common.extras import extra
from residrop.inference.sampled.predictions import Detections

__all__ = ["merge_detections"]


class _Object:
    """What is known of one object: a box in every pass that found it."""

    def __init__(self, label: int) -> None:
        self.label = label
        self.boxes: list[Tensor] = []
        self.score = 0.0

    def add(self, box: Tensor, score: float) -> None:
        self.boxes.append(box)
        self.score += score

    @property
    def box(self) -> Tensor:
        return torch.stack(self.boxes).mean(dim=0)


def merge_detections(passes: Sequence[Mapping[str, Tensor]], iou: float = 0.5) -> Detections:
    """The objects of one image, from the detections of several passes.

    Pass after pass, boxes are assigned to the objects that passes before found, one to one, so that the sum of the
    overlaps with their mean boxes is largest (Hungarian algorithm); only boxes of the object's label that overlap by at
    least `iou` are, the others are new objects. This is the sequential merging of Miller et al. 2019 ("Evaluating
    merging strategies for sampling-based uncertainty techniques in object detection") with an assignment that is the
    best of each pass.

    Args:
        passes: dicts with boxes Tensor[k, 4] (corners x1, y1, x2, y2), scores Tensor[k] and labels Tensor[k], as
            torchvision's detectors give them for one image; at least one.
        iou: intersection over union, in [0, 1].

    Raises:
        ConfigError: no passes, or an `iou` outside [0, 1].
    """
    check_rate("iou", iou)
    if not passes:
        raise ConfigError("there are no passes to merge; give the detections of at least one")
    with extra("theory"):
        from scipy.optimize import linear_sum_assignment
    objects: list[_Object] = []
    for found in passes:
        boxes, scores = found["boxes"].detach().float().cpu(), found["scores"].detach().tolist()
        labels = found["labels"].tolist()
        left = set(range(len(boxes)))
        if objects and len(boxes):
            overlaps = _overlaps(torch.stack([known.box for known in objects]), boxes)
            alike = torch.tensor([[known.label == label for label in labels] for known in objects])
            overlaps = overlaps.where(alike & (overlaps >= iou), -1.0)  # below any that may be
            places = linear_sum_assignment(overlaps.clamp_min(0.0).numpy(), maximize=True)
            for known, box in zip(*(place.tolist() for place in places), strict=True):
                if overlaps[known, box] >= 0.0:
                    objects[known].add(boxes[box], scores[box])
                    left.remove(box)
        for box in sorted(left):
            objects.append(_Object(labels[box]))
            objects[-1].add(boxes[box], scores[box])
    objects.sort(key=lambda known: -known.score)
    count, device = len(passes), passes[0]["boxes"].device
    return Detections(
        boxes=_stacked([known.box for known in objects]).to(device),
        deviation=_stacked([_deviation(known.boxes) for known in objects]).to(device),
        scores=torch.tensor([known.score / count for known in objects]).to(device),
        labels=torch.tensor([known.label for known in objects], dtype=torch.long).to(device),
        presence=torch.tensor([len(known.boxes) / count for known in objects]).to(device),
    )


def _stacked(boxes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(boxes)) if boxes else torch.empty(0, 4)


def _deviation(boxes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(boxes)).std(dim=0) if len(boxes) > 1 else torch.full((4,), torch.nan)


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Tensor[k, m]: intersection over union of boxes Tensor[k, 4] and Tensor[m, 4]."""
    with extra("train"):
        from torchvision.ops import box_iou

    return box_iou(a, b)
