"""How near a reconstruction comes to the true image."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError
from fedmerge.privacy._seen import Vector


@dataclass(frozen=True, eq=False)
class Quality:
    """Pairs of a reconstruction and a true image, P of them.

    Attributes:
        psnr: Peak signal-to-noise ratio, float64 ``(P,)``, in decibels: 10 log10 (1 / mean squared error) of pixels in
            [0, 1]. Infinite for equal images.
        ssim: Structural similarity, float64 ``(P,)``, 1 for equal images.
        found: Which reconstruction it is, int64 ``(P,)``.
        true: Which true image, int64 ``(P,)``, ascending.

    Example:
        >>> import numpy as np
        >>> one = fm.privacy.Quality(np.array([31.0]), np.array([0.9]), np.array([0]), np.array([0]))
        >>> len(one.psnr)
        1
    """

    psnr: Vector
    ssim: Vector
    found: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]


@checked
def quality(found: Tensor, true: Images) -> Quality:
    """How near the reconstructions ``found`` come to the images ``true``, in the pairs that make the mean PSNR highest.

    An attack does not know in which order a client holds its images, so they are matched: each reconstruction stands
    for one image at most, by the assignment with the highest sum of PSNRs (of equal images 100 dB each).

    SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    IEEE TIP 2004, in a Gaussian window of 11 pixels, or of 5 for images of fewer than 16. Both are computed by
    TorchMetrics, ``pip install "fedmerge[privacy]"``.

    Args:
        found: Float ``(M, C, H, W)``, pixels in [0, 1].
        true: N images.

    Returns:
        min(M, N) pairs.

    Raises:
        DataError: There are no images, or they differ in size from the reconstructions or have fewer than 5 pixels.
        ConfigError: TorchMetrics is not installed.

    Cost: M N comparisons of images, held at once.

    Example:
        >>> images = fm.data.load("digits").train.select([0, 1, 2])
        >>> noisy = (images.images / 255 + 0.1 * torch.randn(3, 1, 8, 8)).clamp(0, 1)
        >>> found = fm.privacy.quality(noisy[[2, 0, 1]], images)
        >>> found.found.tolist(), bool((found.psnr > 15).all())
        ([1, 2, 0], True)
    """
    metrics = _torchmetrics()
    if not len(true) or found.dim() != 4 or not len(found) or found.shape[1:] != true.shape or min(found.shape[2:]) < 5:
        raise DataError(
            f"reconstructions are {tuple(found.shape)} and {true.name} holds {len(true)} images of {true.shape}; "
            "expected at least one of each, of one size and at least 5 pixels a side"
        )
    pixels = (true.images.cpu() / 255).float()
    found = found.detach().cpu().float()
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise DataError("reconstructions hold pixels outside [0, 1]; give them as invert_update returns them")
    shape = (len(found), *pixels.shape)
    every = metrics.peak_signal_noise_ratio(
        found[:, None].expand(shape), pixels.expand(shape), data_range=1.0, reduction="none", dim=(2, 3, 4)
    ).double()
    rows, columns = linear_sum_assignment(every.clamp(max=_EQUAL).numpy(), maximize=True)
    order = columns.argsort()
    rows, columns = rows[order], columns[order]
    similar = metrics.structural_similarity_index_measure(
        found[rows], pixels[columns], data_range=1.0, reduction="none", sigma=1.5 if min(found.shape[2:]) > 15 else 0.5
    )
    return Quality(every.numpy()[rows, columns], np.atleast_1d(similar.double().numpy()), rows, columns)


_EQUAL = 100.0


def _torchmetrics() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchmetrics.functional.image as metrics
    except ImportError as error:
        raise ConfigError(
            'PSNR and SSIM need TorchMetrics, and there is none: pip install "fedmerge[privacy]"'
        ) from error
    return metrics
