"""The backbone's cache for decoding, and the attention mask over cached and new tokens.

Shapes: B batch, T new tokens, d hidden size, H heads of D = d / H.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

KERNEL = 4  # taps of the causal convolutions [tokens]


class NirvanaCacheLayer:
    """Cache of one layer: state of the delta rule, last inputs of the convolutions, keys and values of attention.

    Attributes
    ----------
    delta : Tensor, shape (B, H, D, D), or None
        State of the delta rule, in float32.
    conv : list of three Tensors, shape (B, KERNEL − 1, d), or None
        Last inputs of the convolutions of q, k and v.
    keys, values : Tensor, shape (B, H, room, D), or None
        Keys and values of attention, filled up to `end`. When the room is full, the last window_size − 1 are copied to
        the start of a new tensor. A step thus costs the same for sequences of any length.
    """

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size
        self.delta: Tensor | None = None
        self.conv: list[Tensor | None] = [None, None, None]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.end = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, T, D); return all that they may attend to, (B, H, past + T, D)."""
        past, length = min(self.end, self.window_size - 1), k.shape[2]
        if self.keys is None or self.values is None:
            # the new ones are all there are; store those within reach of later tokens
            tail = min(length, max(self.window_size - 1, 1))
            self._make_room(k[:, :, length - tail :], v[:, :, length - tail :], 1)
            return k, v
        if self.end + length > self.keys.shape[2]:
            self._make_room(self._recent(self.keys, past), self._recent(self.values, past), length)
        self.keys[:, :, self.end : self.end + length] = k.detach()
        self.values[:, :, self.end : self.end + length] = v.detach()
        self.end += length
        keys, values = self._recent(self.keys, past + length), self._recent(self.values, past + length)
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            keys, values = torch.cat((keys[:, :, :past], k), 2), torch.cat((values[:, :, :past], v), 2)
        return keys, values

    def _recent(self, x: Tensor, count: int) -> Tensor:
        return x[:, :, self.end - count : self.end]

    def _make_room(self, k: Tensor, v: Tensor, needed: int) -> None:
        """Allocate new keys and values that start with k and v, with room for at least `needed` more."""
        batch, heads, self.end, width = k.shape
        room = self.end + needed + max(64, min(self.end, self.window_size))
        self.keys, self.values = k.new_empty(batch, heads, room, width), v.new_empty(batch, heads, room, width)
        self.keys[:, :, : self.end], self.values[:, :, : self.end] = k.detach(), v.detach()

    def tensors(self) -> list[Tensor]:
        """List all tensors, for counting memory."""
        return [x for x in (self.delta, *self.conv, self.keys, self.values) if x is not None]

    def select(self, rows: Tensor) -> None:
        """Replace the batch rows by the given ones, which may repeat."""
        self.delta, self.keys, self.values, *self.conv = (
            None if x is None else x.index_select(0, rows.to(x.device))
            for x in (self.delta, self.keys, self.values, *self.conv)
        )


class NirvanaCache(Cache):
    """Cache of the model for decoding. Its size is bounded, and no gradient passes from one forward pass to the next.

    Parameters
    ----------
    config : NirvanaConfig
        Gives window_size and num_hidden_layers.
    """

    is_compileable = False
    is_initialized = True
    layers: list[NirvanaCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=[])
        self.layers = [NirvanaCacheLayer(config.window_size) for _ in range(config.num_hidden_layers)]
        self.window_size = config.window_size
        self.token_count = 0  # tokens read so far, padding included
        self.valid: Tensor | None = None  # (B, past), False at padding; None without padding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far, padding included."""
        return self.token_count

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return −1, the library's value for no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of an attention mask over all tokens."""
        return self.token_count + query_length, 0

    def reset(self) -> None:
        """Empty the cache."""
        self.layers = [NirvanaCacheLayer(self.window_size) for _ in self.layers]
        self.token_count, self.valid = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows by beam_idx (N,), for beam search."""
        for layer in self.layers:
            layer.select(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = self.layers[0].tensors()[0].shape[0] if self.token_count else 0
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Raise NotImplementedError: a recurrent state cannot be rolled back."""
        raise NotImplementedError("NirvanaCache cannot be cropped: the delta rule's state holds no history")

    def add_tokens(self, length: int, keep: Tensor | None, device: torch.device) -> Tensor | None:
        """Count new tokens and store their padding.

        Parameters
        ----------
        length : int
            New tokens T.
        keep : Tensor, shape (B, T), bool, optional
            False at padding.
        device : torch.device

        Returns
        -------
        Tensor, shape (B, past + T), bool, or None
            Padding of past and new tokens; None without padding.
        """
        past = min(self.token_count, self.window_size - 1)
        self.token_count += length
        if keep is None:
            if self.valid is None:
                return None
            keep = torch.ones(self.valid.shape[0], length, dtype=torch.bool, device=device)
        if self.valid is None:
            self.valid = torch.ones(keep.shape[0], past, dtype=torch.bool, device=device)
        keep = torch.cat((self.valid, keep), 1)
        self.valid = keep[:, max(0, keep.shape[1] - self.window_size + 1) :]
        return keep


def attention_mask_for(
    length: int, keep: Tensor | None, window_size: int, cache: NirvanaCache | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Make the attention mask, the same for all layers, and add the new tokens to the cache's count and padding.

    Parameters
    ----------
    length : int
        New tokens T.
    keep : Tensor, shape (B, T), bool, optional
        False at padding; None without padding.
    window_size : int
        Tokens within reach, the present one included.
    cache : NirvanaCache, optional
    device : torch.device

    Returns
    -------
    mask : Tensor, shape (B or 1, 1, T, past + T), bool, or None
        True where a query attends to a key. The past keys are those that `NirvanaCacheLayer.append` puts first.
    causal : bool
        Whether attention is causal and needs no other mask.
    """
    past = 0
    if cache is not None:
        past = min(cache.token_count, window_size - 1)
        keep = cache.add_tokens(length, keep, device)
    if length == 1:  # all cached keys are within reach
        if keep is None:
            return None, False
        mask = keep[:, None, None].clone()
        mask[..., -1] = True
        return mask, False
    if keep is None and past == 0 and length <= window_size:
        return None, True
    distance = torch.arange(past, past + length, device=device)[:, None] - torch.arange(past + length, device=device)
    mask = (distance >= 0) & (distance < window_size)
    if keep is None:
        return mask[None, None], False
    # a padded token attends at least to itself: a softmax over nothing is 0/0
    return ((mask & keep[:, None, :]) | (distance == 0))[:, None], False
