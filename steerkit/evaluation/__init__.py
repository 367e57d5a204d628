"""What steering does to what a model writes, at what cost, and how much of it to use."""

from steerkit.evaluation.calibration import Calibration as Calibration
from steerkit.evaluation.calibration import calibrate as calibrate
from steerkit.evaluation.comparison import Comparison as Comparison
from steerkit.evaluation.comparison import compare as compare
from steerkit.evaluation.report import Report as Report
from steerkit.evaluation.run import evaluate as evaluate
