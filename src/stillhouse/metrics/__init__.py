"""What is measured: pure functions of tensors and of callables, no models and no data sets of their own."""

from stillhouse.metrics.classification import (
    accuracy,
    agreement,
    classification,
    expected_calibration_error,
    mean_total_variation,
    negative_log_likelihood,
    roc_auc,
    topk_accuracy,
)
from stillhouse.metrics.condensation import augmentation_robust_score, label_robust_score
from stillhouse.metrics.cost import latency, model_bytes, parameters
from stillhouse.metrics.differences import Difference, paired_difference
from stillhouse.metrics.language import token_agreement, token_prediction
from stillhouse.metrics.neighbours import distance_correlation, neighbour_overlap, retrieval_rank1
from stillhouse.metrics.regression import regression
from stillhouse.metrics.representation import effective_dimensions, linear_probe, linear_readout
from stillhouse.metrics.robustness import fgsm_accuracy, noise_accuracy
from stillhouse.metrics.shots import shot_accuracy
from stillhouse.metrics.smoothness import smoothness, spread

__all__ = [
    "Difference",
    "accuracy",
    "agreement",
    "augmentation_robust_score",
    "classification",
    "distance_correlation",
    "effective_dimensions",
    "expected_calibration_error",
    "fgsm_accuracy",
    "label_robust_score",
    "latency",
    "linear_probe",
    "linear_readout",
    "mean_total_variation",
    "model_bytes",
    "negative_log_likelihood",
    "neighbour_overlap",
    "noise_accuracy",
    "paired_difference",
    "parameters",
    "regression",
    "retrieval_rank1",
    "roc_auc",
    "shot_accuracy",
    "smoothness",
    "spread",
    "token_agreement",
    "token_prediction",
    "topk_accuracy",
]
