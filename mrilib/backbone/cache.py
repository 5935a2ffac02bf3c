"""What the backbone remembers between forward passes, and which of it each token may attend to.

Shapes: B batch, T new tokens, d hidden size, H heads of D = d / H.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

KERNEL = 4  # taps of the causal convolutions [tokens]


class NirvanaCacheLayer:
    """What one layer remembers: the delta rule's state, the convolutions' last inputs, attention's window.

    Attributes
    ----------
    delta : Tensor, shape (B, H, D, D), or None
        State of the delta rule, float32.
    conv : list of three Tensors, shape (B, KERNEL − 1, d), or None
        Last inputs of the q, k and v convolutions.
    keys, values : Tensor, shape (B, H, room, D), or None
        Attention's keys and values, filled up to `end`. When the room is used up, the last window_size − 1 move to the
        front of a new one, so that a step costs the same however long the sequence.
    """

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size
        self.delta: Tensor | None = None
        self.conv: list[Tensor | None] = [None, None, None]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.end = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, T, D); return those in reach of them, (B, H, past + T, D)."""
        past, length = min(self.end, self.window_size - 1), k.shape[2]
        if self.keys is None or self.values is None:
            # all that came before is new: attend to it as it is, and keep what a later token can reach
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
        """Start new keys and values with the given ones, with room for `needed` more and as many again."""
        batch, heads, self.end, width = k.shape
        room = self.end + needed + max(64, min(self.end, self.window_size))
        self.keys, self.values = k.new_empty(batch, heads, room, width), v.new_empty(batch, heads, room, width)
        self.keys[:, :, : self.end], self.values[:, :, : self.end] = k.detach(), v.detach()

    def tensors(self) -> list[Tensor]:
        """All tensors held, for counting memory."""
        return [x for x in (self.delta, *self.conv, self.keys, self.values) if x is not None]

    def select(self, rows: Tensor) -> None:
        """Keep the given batch rows, in the given order and number."""
        self.delta, self.keys, self.values, *self.conv = (
            None if x is None else x.index_select(0, rows.to(x.device))
            for x in (self.delta, self.keys, self.values, *self.conv)
        )


class NirvanaCache(Cache):
    """What the model remembers of the tokens before, for decoding: of bounded size, however long the sequence.

    It carries no gradient from one forward pass to the next.

    Parameters
    ----------
    config : NirvanaConfig
        Its window_size and num_hidden_layers are what matters.
    """

    is_compileable = False
    is_initialized = True
    layers: list[NirvanaCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=[])
        self.layers = [NirvanaCacheLayer(config.window_size) for _ in range(config.num_hidden_layers)]
        self.window_size = config.window_size
        self.seen = 0
        self.valid: Tensor | None = None  # (B, past), False at padding; None: there was no padding so far

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit, in the library's way of saying so."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of an attention mask over everything read."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [NirvanaCacheLayer(self.window_size) for _ in self.layers]
        self.seen, self.valid = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch rows in the order of beam_idx (N,), as beam search asks for."""
        for layer in self.layers:
            layer.select(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = self.layers[0].tensors()[0].shape[0] if self.seen else 0
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Raise NotImplementedError: a recurrent state cannot be taken back."""
        raise NotImplementedError("NirvanaCache cannot be cropped: the delta rule's state holds no history")


def attention_mask_for(
    length: int, keep: Tensor | None, window_size: int, cache: NirvanaCache | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Who attends to whom, the same for all layers; brings the cache's count of tokens and padding up to date.

    Parameters
    ----------
    length : int
        New tokens T.
    keep : Tensor, shape (B, T), bool, optional
        False at padding; None if there is none.
    window_size : int
        Tokens in reach, the present one included.
    cache : NirvanaCache, optional
    device : torch.device

    Returns
    -------
    mask : Tensor, shape (B or 1, 1, T, past + T), bool, or None
        True where a key is attended to; past is what `NirvanaCacheLayer.append` puts before the new keys.
    causal : bool
        Whether no mask but plain causality is wanted.
    """
    past = 0
    if cache is not None:
        past = min(cache.seen, window_size - 1)
        cache.seen += length
        if keep is not None or cache.valid is not None:
            new, old = keep, cache.valid
            if new is None:
                assert old is not None
                new = torch.ones(old.shape[0], length, dtype=torch.bool, device=device)
            if old is None:
                old = torch.ones(new.shape[0], past, dtype=torch.bool, device=device)
            keep = torch.cat((old, new), 1)
            cache.valid = keep[:, max(0, keep.shape[1] - window_size + 1) :]
    if length == 1:  # everything that is remembered is in reach
        if keep is None:
            return None, False
        mask = keep[:, None, None].clone()
        mask[..., -1] = True
        return mask, False
    if keep is None and past == 0 and length <= window_size:
        return None, True
    distance = torch.arange(past, past + length, device=device)[:, None] - torch.arange(past + length, device=device)
    mask = (distance >= 0) & (distance < window_size)
    if keep is not None:
        # a padded token sees at least itself: a softmax over nothing is 0/0
        mask = (mask & keep[:, None, :]) | (distance == 0)
        return mask[:, None], False
    return mask[None, None], False
