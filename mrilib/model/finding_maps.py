"""Maps of findings: a U-Net in the k-space encoder that marks, on VarNet's image, where each label's boxes are.

A text says "mass, left, central" in a few of its tokens, and of some slices only: its cross-entropy takes far longer to
teach an encoder what a lesion looks like than to name the contrast. fastMRI+ knows the pixels. What is found is added
to the token of the patch that it lies in, so it still reaches text and image through nothing but tokens. What the U-Net
makes of each patch on the way is of use to the ViT too, whose own patches are seen through one linear map.
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
from mrilib.model.unet import Depth, UNet
from mrilib.physics import fourier

RARE = -4.0  # logit of a map before training: findings are rare
# Of a marked pixel's loss, for a finding of `USUAL` size; it falls with the root of the size. A text names a lacune in
# as many words as a tumour, whose pixels are a hundred times as many. With weight w a logit of 0 means that one in
# 1 + w such pixels is marked: of small findings less than of large ones.
POSITIVE_WEIGHT = 3.0
USUAL = 1 / 160  # of the image
SURE = 1.0  # logit above which a finding is said; chosen on validation patients, for maps that look both ways
DEPTH = Depth(1, (1, 1, 1))
PATCH = 16  # the ViT's [pixels]; also the decoder's total down-sampling, so that tokens lie on its bottleneck
FEWEST = 3  # pixels of a finding
KNOTS = 60  # places along an axis with a vector of their own, halfway between which the thirds and the midline end


class FindingMaps(nn.Module):
    """A U-Net from an image to one map for each label.

    Parameters
    ----------
    labels : sequence of str
        Of `analysis.BOX_LABELS`.
    chans : int
        Width of its finest level, at half size.

    Raises
    ------
    ValueError
        A label that fastMRI+ has no boxes of, or one that is named twice.
    """

    def __init__(self, labels: Sequence[str], chans: int) -> None:
        super().__init__()
        for number, label in enumerate(labels):
            if label not in BOX_LABELS:
                raise ValueError(f"finding_labels: '{label}' is none of the labels with boxes: {', '.join(BOX_LABELS)}")
            if label in labels[:number]:
                raise ValueError(f"finding_labels: '{label}' is named twice")
        self.unet = UNet(2, len(labels), chans, DEPTH)
        self.features = self.unet.features
        nn.init.zeros_(self.unet.head.weight)
        nn.init.constant_(self.unet.head.bias, RARE)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2, img_size, img_size), real and imaginary part → maps and the bottleneck's features of each patch.

        Logits, float32 (B, labels, img_size, img_size), and float32 (B, (img_size/16)², `features`).
        """
        maps, features = self.unet.with_bottleneck(pixels)
        return maps.float(), features.flatten(2).mT.float()


class FindingWords(nn.Module):
    """What maps of findings say of each patch, in vectors for the language model, trained on by the text alone.

    The patch in which a finding's centre lies (`findings_from_maps`) says the label's vector and those of the
    centre's row and column. A sentence names label, side and region, and these are sums of such
    vectors: a few of them, each learned from every finding that has it, where a ViT must learn every label at every
    place. They can start as what the language model's own vocabulary has for these words (`start_from`).

    Something is found or it is not: told as loud as the maps are sure, a dozen half-heard findings mix with one another
    and the language model learns to invent. So no gradient of the text reaches the maps.

    Parameters
    ----------
    labels : int
    output_dim : int
        Hidden size of the backbone.
    """

    def __init__(self, labels: int, output_dim: int) -> None:
        super().__init__()
        # Tables, kept flat so that Muon leaves them to AdamW: it would turn what few findings say of one knot as far as
        # what all of them say of left and right.
        self.label = nn.Parameter(torch.randn(labels * output_dim))
        self.row = nn.Parameter(torch.randn(KNOTS * output_dim))
        self.column = nn.Parameter(torch.randn(KNOTS * output_dim))
        self.output_dim = output_dim

    def forward(self, maps: Tensor) -> Tensor:
        """Logits, float32 (B, labels, img_size, img_size) → (B, (img_size/16)², output_dim)."""
        found = findings_from_maps(maps)
        label, row, column = (table.unflatten(0, (-1, self.output_dim)) for table in self.tables)
        length = maps.shape[-1]
        side = length // PATCH
        number, which = found[:, :2].long().unbind(1)
        down, across = found[:, 2:].unbind(1)
        patch = (number * side + (down // PATCH).long()) * side + (across // PATCH).long()
        words = label[which] + self._knots(down / length) @ row + self._knots(across / length) @ column
        silent = label.new_zeros(maps.shape[0] * side * side, self.output_dim)
        return silent.index_add(0, patch, words.to(silent.dtype)).unflatten(0, (-1, side * side))

    @property
    def tables(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Vectors of labels, rows and columns, each flat."""
        return self.label, self.row, self.column

    @torch.no_grad()
    def start_from(self, labels: Tensor, sides: Tensor, regions: Tensor) -> None:
        """Start as the language model's words: (labels, d), and `analysis.SIDES` and `REGIONS`, (3, d), where they lie.

        Sides and regions are those of the displayed image, which is the array flipped up/down.
        """
        place = (torch.arange(KNOTS, dtype=torch.float64) + 0.5) / KNOTS
        middle = (place - 0.5).abs() <= MIDLINE_HALF_WIDTH
        side = torch.where(middle, SIDES.index("midline"), torch.where(place < 0.5, 0, 2))
        third = (3 * (1 - place)).long()
        for table, words in ((self.label, labels), (self.column, sides[side]), (self.row, regions[third])):
            table.copy_(words.flatten())

    @staticmethod
    def _knots(place: Tensor) -> Tensor:
        """Weights of the two nearest of the evenly spaced knots: (...) in [0, 1] → (..., KNOTS)."""
        knots = torch.arange(KNOTS, device=place.device)
        return (1 - ((place[..., None] * KNOTS - 0.5).clamp(0, KNOTS - 1) - knots).abs()).clamp_min(0)


@torch.no_grad()
def findings_from_maps(maps: Tensor) -> Tensor:
    """What maps of findings show: every connected region above `SURE` of `FEWEST` pixels or more.

    Parameters
    ----------
    maps : Tensor, float32, shape (B, labels, img_size, img_size)
        Logits.

    Returns
    -------
    Tensor, float32, shape (findings, 4)
        Slice, label, and the row and column of the centre of its bounding box [pixels], as `analysis` reads a box.
    """
    found = []
    marked = (maps > SURE).cpu().numpy()
    for number, which in np.argwhere(marked.any((-2, -1))):
        regions, _ = ndimage.label(marked[number, which], np.ones((3, 3)))
        for region, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
            if (regions[rows, columns] == region).sum() >= FEWEST:
                found.append((number, which, (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2))
    return torch.tensor(found, dtype=torch.float32, device=maps.device).view(-1, 4)


def ellipses(boxes: Sequence[Box], labels: Sequence[str], image_shape: tuple[int, int]) -> Tensor:
    """What the maps of a slice should show: for each label the ellipses that its boxes enclose.

    Parameters
    ----------
    boxes : sequence of Box
        In array coordinates of the evaluated image; those with other labels are left out.
    labels : sequence of str
    image_shape : (h, w) [pixels]

    Returns
    -------
    Tensor, float32, shape (labels, h, w)
        Area of the smallest ellipse that a pixel's centre lies in [pixels], 0 where there is none.
    """
    rows, columns = torch.arange(image_shape[0]) + 0.5, torch.arange(image_shape[1]) + 0.5
    areas = torch.full((len(labels), *image_shape), math.inf)
    for box in (one for one in boxes if one.label in labels):
        down = (rows - box.y - box.height / 2) / (box.height / 2)
        across = (columns - box.x - box.width / 2) / (box.width / 2)
        inside = down[:, None].square() + across.square() < 1
        place = labels.index(box.label)
        area = math.pi / 4 * box.width * box.height
        areas[place] = torch.where(inside, areas[place].clamp_max(area), areas[place])
    return torch.where(areas.isinf(), 0, areas)


def encoder_ellipses(
    slices: Sequence[Slice], labels: Sequence[str], matrix: tuple[int, int], size: Sequence[int]
) -> Tensor:
    """`ellipses` of each slice where the encoder sees them: (B, labels, *size).

    Parameters
    ----------
    slices : sequence of Slice
    labels : sequence of str
    matrix : (readout, phase) [pixels]
        Of the image that the encoder's input was cropped or padded from.
    size : (h, w) [pixels]
    """
    seen = []
    for one in slices:
        marked = fourier.center_crop_or_pad(ellipses(one.boxes or (), labels, one.image_shape), matrix)
        marked = fourier.center_crop_or_pad(marked, size)
        seen.append(marked.flip(-1) if one.mirrored else marked)
    return torch.stack(seen)


def finding_map_losses(
    logits: Tensor, slices: Sequence[Slice], labels: Sequence[str], matrix: tuple[int, int]
) -> Tensor:
    """Weighted binary cross-entropy of each slice's maps, summed over labels and averaged over pixels [nats].

    Parameters
    ----------
    logits : Tensor, float32, shape (B, labels, img_size, img_size)
    slices : sequence of Slice
    labels : sequence of str
        What the maps are of.
    matrix : (readout, phase) [pixels]
        Of the image that the maps' input was cropped or padded from.

    Returns
    -------
    Tensor, float32, shape (B,)
        Zero for a slice whose findings are unknown, which is never turned into "nothing there".
    """
    size = logits.shape[-2:]
    known = torch.tensor([float(one.boxes is not None) for one in slices], device=logits.device)
    areas = encoder_ellipses(slices, labels, matrix, size).to(logits.device)
    weights = POSITIVE_WEIGHT * (USUAL * size[0] * size[1] / areas.clamp_min(1)).sqrt()
    losses = F.binary_cross_entropy_with_logits(logits, (areas > 0).float(), reduction="none", pos_weight=weights)
    return losses.sum(1).mean((-2, -1)) * known
