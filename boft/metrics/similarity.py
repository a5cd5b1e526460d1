"""How alike two sets of pictures are: by the features of any network, and by colour."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from boft.errors import BOFTError


def pairwise_cosine(
    features: torch.Tensor, references: torch.Tensor, origin: torch.Tensor | None = None
) -> torch.Tensor:
    """Cosine similarity of every picture with every reference.

    This is DreamBooth's subject fidelity (Ruiz et al., CVPR 2023, section 4.1: CLIP-I, DINO) for whatever network the
    features come from.

    Args:
        features: [N, F]; references: [M, F].
        origin: [F], the features of an average picture, from which both are measured. Without it, networks whose
            features are all positive call any two pictures alike.

    Returns:
        [N, M] in -1 … 1.
    """
    if origin is not None:
        features, references = features - origin, references - origin
    return torch.nn.functional.cosine_similarity(features[:, None].float(), references[None].float(), dim=-1)


def color_overlap(
    pictures: Sequence[Image.Image], references: Sequence[Image.Image], *, bins: int = 6, middle: float = 0.6
) -> float:
    """Mean share of colours that a picture and a reference have in common: 1 is the same histogram, 0 no common colour.

    The intersection of RGB histograms (Swain and Ballard, 1991) of `bins`³ colours, over the middle of each picture
    (`middle` of its width and height), where the subject is.
    """
    ours, theirs = (np.stack([_histogram(p, bins, middle) for p in group]) for group in (pictures, references))
    return float(np.minimum(ours[:, None], theirs[None]).sum(axis=-1).mean())


def _histogram(picture: Image.Image, bins: int, middle: float) -> np.ndarray:
    """Share of each of `bins`³ colours in the middle of a picture: [bins³], summing to 1."""
    if not 0 < middle <= 1:
        raise BOFTError(f"middle must be a share above 0 and up to 1, not {middle}")
    width, height = picture.size
    left, top = round(width * (1 - middle) / 2), round(height * (1 - middle) / 2)
    pixels = np.asarray(picture.convert("RGB").crop((left, top, width - left, height - top)), dtype=np.int64)
    red, green, blue = np.moveaxis(pixels * bins // 256, -1, 0)
    counts = np.bincount(((red * bins + green) * bins + blue).ravel(), minlength=bins**3)
    return counts / counts.sum()
