"""Maps of findings: a U-Net in the k-space encoder that marks, on VarNet's image, where each label's boxes are.

A text says "mass, left, central" in a few of its tokens, and of some slices only: its cross-entropy takes far longer to
teach an encoder what a lesion looks like than to name the contrast. fastMRI+ knows the pixels. What is found is added
to the token of the patch that it lies in, so it still reaches text and image through nothing but tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrilib import kspace as physics
from mrilib.analysis import BOX_LABELS, MIDLINE_HALF_WIDTH, SIDES, Box
from mrilib.data import Slice
from mrilib.unet import Depth, UNet

RARE = -4.0  # logit of a map before training: findings are rare
# Of a marked pixel's loss: a logit of 0 then means that one in four such pixels is marked.
POSITIVE_WEIGHT = 3.0
# Logit above which a finding is said, about one in three: F1 is highest if all is said that is likelier than half of it
# (Lipton et al., ECML PKDD 2014).
SURE = 0.5
DEPTH = Depth(1, (1, 1, 1))
PATCH = 16  # the ViT's [pixels]; also the decoder's total down-sampling, so that tokens lie on its bottleneck
CELL = 4  # pixels of a map, each way, of which the greatest value counts
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
        nn.init.zeros_(self.unet.head.weight)
        nn.init.constant_(self.unet.head.bias, RARE)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 2, img_size, img_size), real and imaginary part → logits, float32 (B, labels, img_size, img_size)."""
        return self.unet(pixels).float()


class FindingWords(nn.Module):
    """What maps of findings say of each patch, in vectors for the language model, trained on by the text alone.

    A patch in which a label is found, by a logit above `SURE`, says the label's vector and those of the row and the
    column that the finding's centre lies in. A sentence names label, side and region, and these are sums of such
    vectors: a few of them, each learned from every finding that has it, where a ViT must learn every label at every
    place. They can start as what the language model's own vocabulary has for these words (`start_from`).

    Something is found or it is not: told as loud as the maps are sure, a dozen half-heard findings mix with one another
    and the language model learns to invent. So no gradient of the text reaches the maps.

    Parameters
    ----------
    labels : int
    output_dim : int
        Hidden size of the backbone.
    img_size : int
        Side of the maps [pixels].
    """

    def __init__(self, labels: int, output_dim: int, img_size: int) -> None:
        super().__init__()
        # Tables, kept flat so that Muon leaves them to AdamW: it would turn what few findings say of one knot as far as
        # what all of them say of left and right.
        self.label = nn.Parameter(torch.randn(labels * output_dim))
        self.row = nn.Parameter(torch.randn(KNOTS * output_dim))
        self.column = nn.Parameter(torch.randn(KNOTS * output_dim))
        self.output_dim = output_dim
        # where a cell's centre lies, from 0 to 1
        self.place: Tensor
        self.register_buffer("place", (torch.arange(img_size // CELL) + 0.5) * CELL / img_size, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits, float32 (B, labels, img_size, img_size) → (B, (img_size/16)², output_dim)."""
        with torch.no_grad():
            cells = F.max_pool2d(maps, CELL)  # (B, labels, img_size/4, img_size/4)
            each = PATCH // CELL
            found = (F.max_pool2d(cells, each) > SURE).to(cells.dtype)
            # a finding's centre: of what is found in a patch and its neighbours
            weight = cells.sigmoid().square()
            place = self.place
            parts = torch.stack([weight, weight * place[:, None], weight * place], dim=2).flatten(1, 2)
            sums = F.avg_pool2d(parts, 3 * each, stride=each, padding=each)
            total, down, across = sums.unflatten(1, (-1, 3)).unbind(2)
            rows, columns = (self._knots(one / total.clamp_min(1e-9)) for one in (down, across))
        label, row, column = (table.unflatten(0, (-1, self.output_dim)) for table in self.tables)
        said = label[:, None, None] + rows @ row + columns @ column
        return (found[..., None] * said).sum(1).flatten(1, 2)

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


def ellipses(boxes: Sequence[Box], labels: Sequence[str], recon: tuple[int, int]) -> Tensor:
    """What the maps of a slice should be: for each label the ellipses that its boxes enclose.

    Parameters
    ----------
    boxes : sequence of Box
        In array coordinates of the evaluated image; those with other labels are left out.
    labels : sequence of str
    recon : (h, w) [pixels]

    Returns
    -------
    Tensor, float32, shape (labels, h, w)
        1 where a pixel's centre lies inside, 0 elsewhere.
    """
    rows, columns = torch.arange(recon[0]) + 0.5, torch.arange(recon[1]) + 0.5
    marked = torch.zeros(len(labels), *recon)
    for box in (one for one in boxes if one.label in labels):
        down = (rows - box.y - box.height / 2) / (box.height / 2)
        across = (columns - box.x - box.width / 2) / (box.width / 2)
        inside = (down[:, None].square() + across.square() < 1).float()
        place = labels.index(box.label)
        marked[place] = torch.maximum(marked[place], inside)
    return marked


def finding_map_losses(
    logits: Tensor, slices: Sequence[Slice], labels: Sequence[str], matrix: tuple[int, int]
) -> Tensor:
    """Binary cross-entropy of each slice's maps, summed over labels and averaged over pixels [nats].

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
    targets = []
    for one in slices:
        marked = physics.center_crop_or_pad(ellipses(one.boxes or (), labels, one.recon), matrix)
        marked = physics.center_crop_or_pad(marked, size)
        targets.append(marked.flip(-1) if one.mirrored else marked)
    known = torch.tensor([float(one.boxes is not None) for one in slices], device=logits.device)
    weight = torch.tensor(POSITIVE_WEIGHT, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(
        logits, torch.stack(targets).to(logits.device), reduction="none", pos_weight=weight
    )
    return losses.sum(1).mean((-2, -1)) * known
