"""Images as uint8, in memory or on disk, with readers of bundled and downloaded sets, exact splits and augmentation."""

from saltflat.data.arrays import arrays
from saltflat.data.augment import crop_flip, cutout, rotate
from saltflat.data.cifar import cifar10, cifar100
from saltflat.data.digits import digits
from saltflat.data.download import SOURCES, Source, fetch
from saltflat.data.folder import folder, stored_folder, tiny_imagenet
from saltflat.data.image_arrays import image_arrays
from saltflat.data.images import Images, Splits, stratified_split, stratified_subset, to_float
from saltflat.data.labelled import labelled
from saltflat.data.mix import cutmix, mixup, smoothed
from saltflat.data.parquet import parquet, stored_parquet
from saltflat.data.shards import stored_shards
from saltflat.data.stored import Stored, alone, batches, order, shape_of
from saltflat.data.svhn import svhn, svhn_extra

__all__ = [
    "SOURCES",
    "Images",
    "Source",
    "Splits",
    "Stored",
    "alone",
    "arrays",
    "batches",
    "cifar10",
    "cifar100",
    "crop_flip",
    "cutmix",
    "cutout",
    "digits",
    "fetch",
    "folder",
    "image_arrays",
    "labelled",
    "mixup",
    "order",
    "parquet",
    "rotate",
    "shape_of",
    "smoothed",
    "stored_folder",
    "stored_parquet",
    "stored_shards",
    "stratified_split",
    "stratified_subset",
    "svhn",
    "svhn_extra",
    "tiny_imagenet",
    "to_float",
]
