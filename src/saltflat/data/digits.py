"""The bundled data set: 1,797 handwritten digits of 8x8 pixels, to try everything on without a download.

Source: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49). Licence: Creative Commons Attribution 4.0 International (CC BY 4.0). See
digits.LICENSE.md beside this file.
"""

from importlib import resources

import numpy as np
import torch

from saltflat.data.images import Images, Splits, stratified_split

TEST_SIZE = 597  # examples; 1,200 are left for training
SPLIT_SEED = 0  # the published file has no split of its own: this one is fixed, for good


def digits() -> Splits:
    """1,200 training and 597 test images (N, 1, 8, 8) of the digits 0 ... 9, with equal proportions of the classes.

    The file's values 0 ... 16 are scaled to 0 ... 255 (v * 255 / 16, rounded).

    >>> splits = digits()
    >>> len(splits.train), len(splits.test), tuple(splits.train.images.shape[1:])
    (1200, 597, (1, 8, 8))
    """
    with resources.files("saltflat.data").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        values, labels = arrays["images"], arrays["labels"]
    pixels = np.rint(values * (255 / 16)).astype(np.uint8)[:, None]
    whole = Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), num_classes=10, name="digits")
    train, test = stratified_split(whole.labels, TEST_SIZE, SPLIT_SEED)
    return Splits(
        Images(whole.images[train], whole.labels[train], 10, "digits train"),
        Images(whole.images[test], whole.labels[test], 10, "digits test"),
    )
