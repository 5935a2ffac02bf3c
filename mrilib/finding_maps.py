"""Maps of findings: a U-Net in the k-space encoder that marks, on VarNet's image, where each label's boxes are.

A text says "mass, left, central" in a few of its tokens, and of some slices only: its cross-entropy takes far longer to
teach an encoder what a lesion looks like than to name the contrast. fastMRI+ knows the pixels. The maps are further
channels of the ViT's input, so that what is found still reaches text and image through nothing but tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrilib import kspace as physics
from mrilib.analysis import BOX_LABELS, Box
from mrilib.data import Slice
from mrilib.unet import Depth, UNet

RARE = -4.0  # logit of a map before training: findings are rare
POSITIVE_WEIGHT = 3.0  # of a marked pixel's loss; the maps see a little too much rather than too little
DEPTH = Depth(1, (1, 1, 1))


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
