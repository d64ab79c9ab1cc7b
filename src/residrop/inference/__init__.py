"""Prediction with a randomly present network."""

from residrop.inference.evaluate import Evaluation as Evaluation
from residrop.inference.evaluate import Scores as Scores
from residrop.inference.evaluate import evaluate as evaluate
from residrop.inference.evaluate import score as score
from residrop.inference.predict import Prediction as Prediction
from residrop.inference.predict import predict as predict
