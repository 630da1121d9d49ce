"""What is measured: pure functions of tensors and of callables, no models and no data sets of their own."""

from stillhouse.metrics.classification import (
    accuracy,
    agreement,
    classification,
    expected_calibration_error,
    mean_total_variation,
    negative_log_likelihood,
    topk_accuracy,
)
from stillhouse.metrics.cost import latency, model_bytes, parameters
from stillhouse.metrics.language import token_agreement, token_prediction
from stillhouse.metrics.regression import regression

__all__ = [
    "accuracy",
    "agreement",
    "classification",
    "expected_calibration_error",
    "latency",
    "mean_total_variation",
    "model_bytes",
    "negative_log_likelihood",
    "parameters",
    "regression",
    "token_agreement",
    "token_prediction",
    "topk_accuracy",
]
