"""Models: specs that build them, one way to call any of them, taps, and weights on disk."""

from stillhouse.models.adapted import Adapted
from stillhouse.models.batch_norm import BatchStatistics, batch_norms
from stillhouse.models.calling import arguments, as_embedding, as_logits, embedding, forward, logits
from stillhouse.models.coding import Autoencoder, AutoencoderSpec, Code
from stillhouse.models.convnet import CNN, CNNSpec, ConvNet, ConvNetSpec
from stillhouse.models.denoiser import DiffusersSpec, PointDenoiser, PointDenoiserSpec, UNetSpec, bottleneck
from stillhouse.models.graph import GNNSpec, GraphNetwork
from stillhouse.models.hub import HubSpec
from stillhouse.models.misfit import MisfitError
from stillhouse.models.mlp import MLP, MLPSpec
from stillhouse.models.positions import IGNORED, targets
from stillhouse.models.predictor import Predictor, PredictorSpec
from stillhouse.models.resnet import ImageNetResNetSpec, ResNet, ResNetSpec, WideResNet, WideResNetSpec
from stillhouse.models.sources import FileSpec, ImportSpec, ObjectSpec
from stillhouse.models.spec import ModelSpec, origin
from stillhouse.models.standardized import Standardized, StandardizedSpec
from stillhouse.models.storage import load, load_weights, save
from stillhouse.models.taps import Taps, resolve_paths
from stillhouse.models.two_towers import HubTowers, TwoTowers, TwoTowersSpec, load_clip
from stillhouse.models.vit import ViT, ViTSpec
from stillhouse.models.weights import count_parameters, fingerprint, freeze, initialise

__all__ = [
    "CNN",
    "IGNORED",
    "MLP",
    "Adapted",
    "Autoencoder",
    "AutoencoderSpec",
    "BatchStatistics",
    "CNNSpec",
    "Code",
    "ConvNet",
    "ConvNetSpec",
    "DiffusersSpec",
    "FileSpec",
    "GNNSpec",
    "GraphNetwork",
    "HubSpec",
    "HubTowers",
    "ImageNetResNetSpec",
    "ImportSpec",
    "MLPSpec",
    "MisfitError",
    "ModelSpec",
    "ObjectSpec",
    "PointDenoiser",
    "PointDenoiserSpec",
    "Predictor",
    "PredictorSpec",
    "ResNet",
    "ResNetSpec",
    "Standardized",
    "StandardizedSpec",
    "Taps",
    "TwoTowers",
    "TwoTowersSpec",
    "UNetSpec",
    "ViT",
    "ViTSpec",
    "WideResNet",
    "WideResNetSpec",
    "arguments",
    "as_embedding",
    "as_logits",
    "batch_norms",
    "bottleneck",
    "count_parameters",
    "embedding",
    "fingerprint",
    "forward",
    "freeze",
    "initialise",
    "load",
    "load_clip",
    "load_weights",
    "logits",
    "origin",
    "resolve_paths",
    "save",
    "targets",
]
