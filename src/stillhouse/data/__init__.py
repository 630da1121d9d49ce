"""Data: specs to write in a recipe, loaded sets with fixed splits, and exactly resumable batches.

>>> data = load_data("digits")
>>> stream = data.split("train").batches(32).open(seed=0)
>>> next(stream)["pixel_values"].shape
torch.Size([32, 1, 8, 8])
"""

from stillhouse.data.augment import Augment, CropFlip, Kornia, NoAugment, ResizedCrop, Shift
from stillhouse.data.batch import Batch
from stillhouse.data.batches import Batches, Stream
from stillhouse.data.characters import Characters
from stillhouse.data.classic import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST
from stillhouse.data.dataset import Data, DataSpec, LongTail, Split, load_data, read_spec
from stillhouse.data.graphs import Graph, GraphMotifs, TUDataset, padded
from stillhouse.data.hub import HubData
from stillhouse.data.images import FolderData
from stillhouse.data.intents import CLINC150
from stillhouse.data.objects import ImportedData, ObjectData
from stillhouse.data.pixels import PixelScale
from stillhouse.data.points import Ring
from stillhouse.data.procedural import DSprites, Scenes, Sprites
from stillhouse.data.randaugment import RandAugment
from stillhouse.data.tables import CSVData, JSONLData, ParquetData
from stillhouse.data.unions import fitted, union
from stillhouse.facts import Facts

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CLINC150",
    "MNIST",
    "Augment",
    "Batch",
    "Batches",
    "CSVData",
    "Characters",
    "CropFlip",
    "DSprites",
    "Data",
    "DataSpec",
    "Digits",
    "Facts",
    "FashionMNIST",
    "FolderData",
    "Graph",
    "GraphMotifs",
    "HubData",
    "ImportedData",
    "JSONLData",
    "Kornia",
    "LongTail",
    "NoAugment",
    "ObjectData",
    "ParquetData",
    "PixelScale",
    "RandAugment",
    "ResizedCrop",
    "Ring",
    "Scenes",
    "Shift",
    "Split",
    "Sprites",
    "Stream",
    "TUDataset",
    "fitted",
    "load_data",
    "padded",
    "read_spec",
    "union",
]
