"""Whether the uncertainty of predictions can be relied on: measures on probabilities and labels, and repairs."""

from residrop.inference.uncertainty.bootstrap import bootstrap as bootstrap
from residrop.inference.uncertainty.bootstrap import standard_error as standard_error
from residrop.inference.uncertainty.calibration import Reliability as Reliability
from residrop.inference.uncertainty.calibration import brier as brier
from residrop.inference.uncertainty.calibration import calibration_error as calibration_error
from residrop.inference.uncertainty.calibration import fit_temperature as fit_temperature
from residrop.inference.uncertainty.calibration import negative_log_likelihood as negative_log_likelihood
from residrop.inference.uncertainty.calibration import reliability as reliability
from residrop.inference.uncertainty.calibration import with_temperature as with_temperature
from residrop.inference.uncertainty.conformal import Conformal as Conformal
from residrop.inference.uncertainty.conformal import fit_conformal as fit_conformal
from residrop.inference.uncertainty.conformal import nonconformity as nonconformity
from residrop.inference.uncertainty.ood import Detection as Detection
from residrop.inference.uncertainty.ood import detection as detection
from residrop.inference.uncertainty.scores import uncertainty_scores as uncertainty_scores
from residrop.inference.uncertainty.selective import RiskCoverage as RiskCoverage
from residrop.inference.uncertainty.selective import risk_coverage as risk_coverage
