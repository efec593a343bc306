"""Images in memory as uint8, with readers for bundled and downloaded data sets, exact splits, and crop-and-flip."""

from saltflat.data.arrays import arrays
from saltflat.data.augment import crop_flip
from saltflat.data.cifar import cifar10, cifar100
from saltflat.data.digits import digits
from saltflat.data.images import Images, Splits, stratified_split, stratified_subset, to_float
from saltflat.data.parquet import parquet

__all__ = [
    "Images",
    "Splits",
    "arrays",
    "cifar10",
    "cifar100",
    "crop_flip",
    "digits",
    "parquet",
    "stratified_split",
    "stratified_subset",
    "to_float",
]
