"""Scores of uncertainty: one number an image, high where a prediction may be wrong."""

from typing import Literal

from torch import Tensor

from residrop.inference.sampled.predictions import Prediction

__all__ = ["SCORES", "ScoreName", "uncertainty_scores"]

ScoreName = Literal["max_probability", "entropy", "mutual_information", "disagreement"]
SCORES: dict[ScoreName, str] = {
    "max_probability": "1 - largest probability",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "disagreement": "disagreement of the passes",
}


def uncertainty_scores(found: Prediction) -> dict[ScoreName, Tensor]:
    """All scores of a prediction, each Tensor[n] (with the places of dense outputs behind).

    Deterministic inference has the first two alone.

    - max_probability: 1 - largest probability, in [0, 1 - 1/classes] (Hendrycks and Gimpel 2017).
    - entropy: of the (mean) probabilities in nats, in [0, log(classes)].
    - mutual_information: the part of the entropy that the draws explain, in nats (Houlsby et al. 2011, eq. 2).
    - disagreement: share of the single passes that do not decide for the class that most of them decide for, in
      [0, 1) (the variation ratio of Gal 2016, section 3.3.1).
    """
    scores: dict[ScoreName, Tensor] = {
        "max_probability": 1 - found.probabilities.amax(found.class_dim),
        "entropy": found.entropy.clamp_min(0),
    }
    if found.samples:
        scores["mutual_information"] = found.mutual_information
        scores["disagreement"] = found.disagreement
    return scores
