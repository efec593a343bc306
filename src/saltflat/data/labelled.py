"""More training data for a set at hand: generated images, or collected ones that a network labelled.

Two kinds of files are read, as they are published. An npz file has the images in `image` (or `x`) and their classes in
`label` (or `y`): S.-A. Rebuffi et al., "Fixing Data Augmentation to Improve Adversarial Robustness" (arXiv:2103.01946)
and, with other generators, much after it. A pickle has them in `data` and `extrapolated_targets`: Y. Carmon et al.,
"Unlabeled Data Improves Adversarial Robustness" (arXiv:1905.13736), 500,000 of the Tiny Images.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltflat.data import pickles
from saltflat.data.image_arrays import channels_first, class_labels, whole_arrays
from saltflat.data.images import Images

PICKLE = b"\x80"  # how every pickle begins, since protocol 2


def labelled(path: str | os.PathLike[str], *, like: Images) -> Images:
    """Images (N, C, H, W) of the shape and with the classes of `like`, in the order of the file.

    path: an npz file or a pickle, told apart by what is inside: uint8 (N, H, W, C) or (N, C, H, W), where C = 1 or 3,
    or (N, H, W), which is grey; and one class an image, (N,). Soft labels are not read. Not every class has to occur.
    No code in the file is ever run. A pickle may be of any protocol, but its arrays have to be in it. An npz file is in
    memory once, a pickle for a moment three times.

    Raises FileNotFoundError for a missing file, and ValueError, in one line, for one that is cut or altered, that holds
    anything else than the above, or whose images or classes are not those of `like`.

    >>> import tempfile
    >>> from saltflat.data import digits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/generated.npz", image=np.zeros((5, 8, 8, 1), np.uint8), label=np.arange(5))
    ...     labelled(f"{folder}/generated.npz", like=digits().train)
    Images(num_classes=10, name='generated')
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; expected an npz file or a pickle of images and labels")
    with file.open("rb") as opened:
        pickled = opened.read(len(PICKLE)) == PICKLE
    x, y = _pickled(file) if pickled else whole_arrays(file, (("image", "x"), ("label", "y")))
    images = channels_first(x, f"{file}: images")
    labels = class_labels(y, len(images), f"{file}: labels")
    shape, expected = tuple(images.shape[1:]), tuple(like.images.shape[1:])
    if shape != expected:
        raise ValueError(f"{file}: images: expected shape {expected}, (C, H, W) of {like.name}, got {shape}")
    if (largest := int(labels.max())) >= like.num_classes:
        raise ValueError(f"{file}: labels: expected 0 ... {like.num_classes - 1}, as {like.name} has, got {largest}")
    return Images(images, labels, like.num_classes, file.stem)


def _pickled(file: Path) -> list[NDArray[Any]]:
    content = pickles.load(file.read_bytes(), str(file))
    entries = content if isinstance(content, dict) else {}
    names = ("data", "extrapolated_targets")
    found = [entries.get(name, entries.get(name.encode())) for name in names]
    arrays = [array for array in found if isinstance(array, np.ndarray)]
    if len(arrays) != len(names):
        raise ValueError(f"{file}: expected a dictionary with the arrays {' and '.join(names)}")
    return arrays
