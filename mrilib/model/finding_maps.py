"""Detection maps: a U-Net in the k-space encoder that marks each label's findings on VarNet's image.

The findings of a slice are a few tokens of its text, and many slices have none. Cross-entropy on text therefore teaches
an encoder slowly what a lesion looks like, whereas fastMRI+ gives the pixels. A detected finding adds a vector to the
token of its patch, so it reaches text and image through tokens alone. The features of the U-Net's bottleneck are also
an input of the ViT.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from mrilib.data.annotations import BOX_LABELS, Box
from mrilib.data.dataset import Slice
from mrilib.data.findings import MIDLINE_HALF_WIDTH, SIDES
from mrilib.model.unet import PATCH, Depth, UNet
from mrilib.physics import fourier
from mrilib.transfer import to_device

INITIAL_LOGIT = -4.0  # of an untrained map: findings are rare
# Loss weight of a marked pixel in a finding of `REFERENCE_AREA`, falling with the square root of the area: a small
# finding has as many words in the text as a large one, but a hundredth of its pixels.
POSITIVE_WEIGHT = 3.0
REFERENCE_AREA = 1 / 160  # fraction of the image
DETECTION_LOGIT = 1.0  # threshold of a detected pixel; chosen on validation patients, for maps averaged over mirroring
MIN_PIXELS = 3  # of a detected finding
DEPTH = Depth(1, (1, 1, 1))
KNOTS = 60  # positions with a vector along each axis; the borders of thirds and midline lie halfway between two knots


class FindingMaps(nn.Module):
    """A U-Net from an image to one detection map for each label.

    Parameters
    ----------
    labels : sequence of str
        Of `data.annotations.BOX_LABELS`.
    chans : int
        Width of the finest level, at half the image size.

    Raises
    ------
    ValueError
        If fastMRI+ has no boxes of a label, or if a label is repeated.
    """

    def __init__(self, labels: Sequence[str], chans: int) -> None:
        super().__init__()
        for number, label in enumerate(labels):
            if label not in BOX_LABELS:
                raise ValueError(f"finding_labels: '{label}' is none of the labels with boxes: {', '.join(BOX_LABELS)}")
            if label in labels[:number]:
                raise ValueError(f"finding_labels: '{label}' is repeated; list it once")
        self.unet = UNet(2, len(labels), chans, DEPTH)
        self.features = self.unet.bottleneck_channels
        nn.init.zeros_(self.unet.head.weight)
        nn.init.constant_(self.unet.head.bias, INITIAL_LOGIT)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute detection maps and bottleneck features from real and imaginary part, (B, 2, img_size, img_size).

        Returns
        -------
        maps : Tensor, float32, shape (B, labels, img_size, img_size)
            Logits.
        features : Tensor, float32, shape (B, (img_size/16)², features)
        """
        maps, features = self.unet.with_bottleneck(pixels)
        return maps.float(), features.flatten(2).mT.float()


class FindingEmbedding(nn.Module):
    """Vectors of the detected findings, added to the tokens of their patches.

    A finding (`detect_findings`) is the sum of three vectors: one for its label, one each for row and column of its
    centre. The text names label, side and region, so few vectors are needed, and each one is trained by every finding
    that shares it. They can be initialized with the language model's own word embeddings (`initialize_from_words`).

    Detection is a hard threshold, so the text's gradient does not reach the maps. Vectors scaled by a map's probability
    would mix many weak detections, from which the language model learns to invent findings.

    Parameters
    ----------
    labels : int
        Number of labels.
    output_dim : int
        Hidden size of the backbone.
    """

    def __init__(self, labels: int, output_dim: int) -> None:
        super().__init__()
        # The tables are flat, so that Muon leaves them to AdamW. Muon's orthogonalised steps would move a knot that few
        # findings use as far as the frequent directions.
        self.label = nn.Parameter(torch.randn(labels * output_dim))
        self.row = nn.Parameter(torch.randn(KNOTS * output_dim))
        self.column = nn.Parameter(torch.randn(KNOTS * output_dim))
        self.output_dim = output_dim

    def forward(self, maps: Tensor) -> Tensor:
        """Logits, float32 (B, labels, img_size, img_size) → (B, (img_size/16)², output_dim)."""
        detected = detect_findings(maps)
        label, row, column = (table.unflatten(0, (-1, self.output_dim)) for table in self.tables)
        size = maps.shape[-1]
        side = size // PATCH
        slice_index, label_index = detected[:, :2].long().unbind(1)
        y, x = detected[:, 2:].unbind(1)
        patch = (slice_index * side + (y // PATCH).long()) * side + (x // PATCH).long()
        vectors = label[label_index] + _knot_weights(y / size) @ row + _knot_weights(x / size) @ column
        tokens = label.new_zeros(maps.shape[0] * side * side, self.output_dim)
        return tokens.index_add(0, patch, vectors.to(tokens.dtype)).unflatten(0, (-1, side * side))

    @property
    def tables(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Vectors of labels, rows and columns, each flat."""
        return self.label, self.row, self.column

    @torch.no_grad()
    def initialize_from_words(self, labels: Tensor, sides: Tensor, regions: Tensor) -> None:
        """Initialize with word embeddings.

        Parameters
        ----------
        labels : Tensor, shape (labels, output_dim)
        sides, regions : Tensor, shape (3, output_dim)
            In the order of `data.findings.SIDES` and `REGIONS`. They hold for the displayed image, which is the array
            flipped up/down.
        """
        positions = (torch.arange(KNOTS, dtype=torch.float64) + 0.5) / KNOTS
        is_midline = (positions - 0.5).abs() <= MIDLINE_HALF_WIDTH
        side = torch.where(is_midline, SIDES.index("midline"), torch.where(positions < 0.5, 0, 2))
        third = (3 * (1 - positions)).long()
        for table, vectors in ((self.label, labels), (self.column, sides[side]), (self.row, regions[third])):
            table.copy_(vectors.flatten())


def _knot_weights(position: Tensor) -> Tensor:
    """Linear interpolation weights of evenly spaced knots: (...) in [0, 1] → (..., KNOTS)."""
    knots = torch.arange(KNOTS, device=position.device)
    return (1 - ((position[..., None] * KNOTS - 0.5).clamp(0, KNOTS - 1) - knots).abs()).clamp_min(0)


@torch.no_grad()
def detect_findings(maps: Tensor) -> Tensor:
    """List the connected regions of at least `MIN_PIXELS` pixels above `DETECTION_LOGIT`.

    Parameters
    ----------
    maps : Tensor, float32, shape (B, labels, img_size, img_size)
        Logits.

    Returns
    -------
    Tensor, float32, shape (findings, 4)
        Index of the slice, index of the label, and the row and column of the bounding box's centre [pixels].
    """
    findings = []
    marked = (maps > DETECTION_LOGIT).cpu().numpy()  # the only read in a forward pass
    for index, label in np.argwhere(marked.any((-2, -1))):
        regions, _ = ndimage.label(marked[index, label], np.ones((3, 3)))
        for region, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
            if (regions[rows, columns] == region).sum() >= MIN_PIXELS:
                center = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
                findings.append((index, label, *center))
    return to_device(torch.tensor(findings, dtype=torch.float32).view(-1, 4), maps.device)


def ellipse_areas(boxes: Sequence[Box], labels: Sequence[str], image_shape: tuple[int, int]) -> Tensor:
    """Mark the ellipse in each box, the target of the detection maps.

    Parameters
    ----------
    boxes : sequence of Box
        In array coordinates of the evaluated image. Boxes of other labels are ignored.
    labels : sequence of str
    image_shape : (h, w) [pixels]

    Returns
    -------
    Tensor, float32, shape (labels, h, w)
        Area of the smallest ellipse that contains the pixel's centre [pixels]; 0 outside of every ellipse.
    """
    rows, columns = torch.arange(image_shape[0]) + 0.5, torch.arange(image_shape[1]) + 0.5
    areas = torch.full((len(labels), *image_shape), math.inf)
    for box in boxes:
        if box.label not in labels:
            continue
        y = (rows - box.y - box.height / 2) / (box.height / 2)
        x = (columns - box.x - box.width / 2) / (box.width / 2)
        inside = y[:, None].square() + x.square() < 1
        index = labels.index(box.label)
        area = math.pi / 4 * box.width * box.height
        areas[index] = torch.where(inside, areas[index].clamp_max(area), areas[index])
    return torch.where(areas.isinf(), 0, areas)


def finding_map_losses(
    logits: Tensor, slices: Sequence[Slice], labels: Sequence[str], matrix: tuple[int, int]
) -> Tensor:
    """Compute the weighted binary cross-entropy of each slice's maps, summed over labels, averaged over pixels [nats].

    Parameters
    ----------
    logits : Tensor, float32, shape (B, labels, img_size, img_size)
    slices : sequence of Slice
    labels : sequence of str
        Labels of the maps.
    matrix : (readout, phase) [pixels]
        Size of the image before it was cropped or padded to img_size.

    Returns
    -------
    Tensor, float32, shape (B,)
        Zero for a slice with unknown findings. Unknown never counts as "no finding".
    """
    size = logits.shape[-2:]
    known = to_device(torch.tensor([float(one.boxes is not None) for one in slices]), logits.device)
    areas = to_device(torch.stack([_encoder_areas(one, labels, matrix, size) for one in slices]), logits.device)
    weights = POSITIVE_WEIGHT * (REFERENCE_AREA * size[0] * size[1] / areas.clamp_min(1)).sqrt()
    losses = F.binary_cross_entropy_with_logits(logits, (areas > 0).float(), reduction="none", pos_weight=weights)
    return losses.sum(1).mean((-2, -1)) * known


def _encoder_areas(one: Slice, labels: Sequence[str], matrix: tuple[int, int], size: Sequence[int]) -> Tensor:
    """`ellipse_areas` on the grid of the encoder's image, (labels, *size), mirrored where the slice is."""
    areas = fourier.center_crop_or_pad(ellipse_areas(one.boxes or (), labels, one.image_shape), matrix)
    areas = fourier.center_crop_or_pad(areas, size)
    return areas.flip(-1) if one.mirrored else areas
