"""Images in memory as uint8, with readers of bundled and downloaded data sets, exact splits, augmentation, mixing."""

from saltflat.data.arrays import arrays
from saltflat.data.augment import crop_flip, rotate
from saltflat.data.cifar import cifar10, cifar100
from saltflat.data.digits import digits
from saltflat.data.download import SOURCES, Source, fetch
from saltflat.data.folder import folder, tiny_imagenet
from saltflat.data.image_arrays import image_arrays
from saltflat.data.images import Images, Splits, stratified_split, stratified_subset, to_float
from saltflat.data.labelled import labelled
from saltflat.data.mix import cutmix, mixup, smoothed
from saltflat.data.parquet import parquet
from saltflat.data.svhn import svhn, svhn_extra

__all__ = [
    "SOURCES",
    "Images",
    "Source",
    "Splits",
    "arrays",
    "cifar10",
    "cifar100",
    "crop_flip",
    "cutmix",
    "digits",
    "fetch",
    "folder",
    "image_arrays",
    "labelled",
    "mixup",
    "parquet",
    "rotate",
    "smoothed",
    "stratified_split",
    "stratified_subset",
    "svhn",
    "svhn_extra",
    "tiny_imagenet",
    "to_float",
]
