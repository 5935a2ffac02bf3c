"""The Nirvana backbone: a language model with the gated delta rule, windowed attention and a Trigger.

Layers 0 and 1 are a gated delta net (Yang et al., 2024, arXiv:2412.06464). From layer 2 on, the Trigger learns while it
reads and weights, for each token, the outputs of the delta rule, of causal attention, and of a map of both. Module and
parameter names are those of the published weights, so a published `model.safetensors` loads unchanged.

Shapes: B batch, T tokens, d hidden size, H heads of D = d / H, C concept_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.logging import get_logger

from mrilib.backbone.cache import KERNEL, NirvanaCache, NirvanaCacheLayer, attention_mask_for
from mrilib.backbone.kernels import gated_delta_rule
from mrilib.backbone.loading import MODEL_TYPE, load_backbone
from mrilib.backbone.trigger import TriggerState, TriggerWeights

__all__ = [
    "NirvanaCache",
    "NirvanaConfig",
    "NirvanaForCausalLM",
    "NirvanaModel",
    "load_backbone",
]

logger = get_logger("mrilib")

FIRST_TRIGGER_LAYER = 2
LARGEST = {"num_hidden_layers": 1000, "vocab_size": 1 << 24, "window_size": 1 << 31}  # other sizes: 1 << 16
# transformers 5.24 renamed past_key_values to cache, in forward's arguments and in outputs
OUTPUT_CACHE = (
    "cache" if "cache" in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"
)


class NirvanaConfig(PreTrainedConfig):
    """Settings of the backbone, under the names of the published `nirvana_1_3B.json`.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_heads : int
    concept_dim : int
        Width C of the Trigger's input and output.
    logit_dim : int
        Number L of the Trigger's adaptable factors per weight.
    window_size : int
        Tokens within reach of attention, the present one included.
    norm_eps : float
        Added to the mean square in every RMSNorm.
    initializer_range : float
        Standard deviation of new linear weights.
    max_position_embeddings, rope_theta, fuse_norm, fuse_cross_entropy
        Unused keys of the published file: there are no position embeddings, and no flag fuses operations.

    Raises
    ------
    ValueError
        If a size is not a whole number of at least 1, num_heads does not divide hidden_size, or the activation is not
        silu; and for biases, which the architecture does not have.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (Trainer adds a list to it)
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012  (the base class declares it so)

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 22
    num_heads: int = 16
    concept_dim: int = 64
    logit_dim: int = 32
    window_size: int = 2048
    norm_eps: float = 1e-6
    hidden_act: str = "swish"
    attention_bias: bool = False
    initializer_range: float = 6e-3
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    fuse_norm: bool = True
    fuse_cross_entropy: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        # the published file refers to code that is not shipped with it
        kwargs.pop("auto_map", None)
        # derived sizes may be given, if they are correct
        derived = {name: kwargs.pop(name, None) for name in ("head_dim", "intermediate_size")}
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "concept_dim", "logit_dim",
                     "window_size"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
            if value > (largest := LARGEST.get(name, 1 << 16)):
                raise ValueError(f"{name} must be at most {largest}, got {value}")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}")
        if self.hidden_size < 16:
            raise ValueError(f"hidden_size must be at least 16, got {self.hidden_size}")
        for name, value in derived.items():
            if value is not None and value != getattr(self, name):
                raise ValueError(f"{name} must be {getattr(self, name)} in this architecture, got {value}")
        if self.hidden_act not in ("swish", "silu"):
            raise ValueError(f"hidden_act must be 'swish' or 'silu', got {self.hidden_act!r}")
        if self.attention_bias:
            raise ValueError("attention_bias must be false: the architecture has no biases")

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        """Inner width of the MLP: 8/3 of hidden_size, rounded up to a multiple of 256."""
        return 256 * math.ceil(int(self.hidden_size * 4 * 2 / 3) / 256)


class Linear(nn.Linear):
    """A linear map without bias that rounds equally for one token and for many, and is fast for one.

    Matrix libraries sum in another order if the rows do not fill a tile of four. In a narrow model the norm after the
    delta rule amplifies this rounding to 2e-4 in some tokens. There, rows of zeros fill the tile, at little cost, and
    step-by-step decoding repeats a full pass to 5e-5. In wide models padding costs more and changes little; there a
    single token waits for the weights from memory. The library reads them with one core for a product with one row,
    but with all cores for a batch of products.
    """

    NARROW = 128  # largest hidden size at which tiles are filled
    fills_tiles = False  # set by the model
    _PARTS = 16  # products in a batch; more cores would wait for the same memory
    _LARGE = 1 << 16  # number of weights from which the batch is faster

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        rows = x.numel() // x.shape[-1]
        if self.fills_tiles and rows % 4 and rows < 64:
            full = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % 4))
            return F.linear(full, self.weight)[:rows].view(*x.shape[:-1], -1)
        single = rows == 1 and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if single and self.weight.numel() >= self._LARGE and self.out_features >= self._PARTS:
            return self._map_one_row(x)
        return F.linear(x, self.weight)

    def _map_one_row(self, x: Tensor) -> Tensor:
        """Map a single token by `_PARTS` products and a rest."""
        split = self.out_features - self.out_features % self._PARTS
        # the transpose of a row: for a contiguous column the library is four times slower
        column = x.reshape(1, 1, -1).expand(self._PARTS, -1, -1).mT
        y = torch.bmm(self.weight[:split].view(self._PARTS, -1, self.in_features), column).flatten()
        if split < self.out_features:
            y = torch.cat((y, F.linear(x.flatten(), self.weight[split:])))
        return y.view(*x.shape[:-1], -1)


def _correlate(x: Tensor, taps: Tensor) -> Tensor:
    """y_t = Σ_j taps_j x_{t+j}, for x (B, T + KERNEL − 1, d) and taps (KERNEL, d)."""
    length = x.shape[1] - KERNEL + 1
    y = x[:, :length] * taps[0]
    for j in range(1, KERNEL):
        y.addcmul_(x[:, j : j + length], taps[j])
    return y


class CausalConv(torch.autograd.Function):
    """Causal depthwise convolution as a sum of shifted products; PyTorch's convolution is ten times slower on CPUs.

    `CausalConv.apply(x, weight)` returns y_t = Σ_j w_j x_{t+j}, (B, T, d). x (B, T + KERNEL − 1, d) starts with the
    KERNEL − 1 previous tokens; weight is (d, 1, KERNEL).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _correlate(x, weight.squeeze(1).t().contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients: for x the same sum in reversed time, for weights only if they are trained."""
        x, weight = ctx.saved_tensors
        grad = grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            padded = F.pad(grad, (0, 0, KERNEL - 1, KERNEL - 1))
            grad_x = _correlate(padded, weight.squeeze(1).t().flip(0).contiguous())
        if ctx.needs_input_grad[1]:
            length = grad.shape[1]
            taps = [(grad * x[:, j : j + length]).sum((0, 1)) for j in range(KERNEL)]
            grad_weight = torch.stack(taps, -1).unsqueeze(1)
        return grad_x, grad_weight


class ShortConv(nn.Conv1d):
    """A causal depthwise convolution with silu; a module, so that accelerate's hooks can offload its weight."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, KERNEL, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T + KERNEL − 1, d) to (B, T, d)."""
        return F.silu(CausalConv.apply(x, self.weight.to(x.dtype)))  # under autocast x is narrower


class Interpolation(nn.Module):
    """Low-rank map of the delta output, the attention output and twice the Trigger's h."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        inner = hidden_size // 8
        self.lora = nn.Sequential(Linear(in_features, inner), nn.SiLU(), Linear(inner, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, 2d + 2C) to (B, T, d)."""
        return self.lora(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Compute softmax(q kᵀ / √D) v, for attn_implementation="eager"; mask and causal as in PyTorch's attention."""
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _low_rank(hidden_size: int, rank: int) -> nn.Sequential:
    return nn.Sequential(Linear(hidden_size, rank), Linear(rank, hidden_size))


class TaskAwareDeltaNet(nn.Module):
    """A layer's mixer: the delta branch and, from layer 2 on, attention and the Trigger, which weights both.

    Parameters
    ----------
    config : NirvanaConfig
    layer_idx : int
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int) -> None:
        super().__init__()
        d, heads = config.hidden_size, config.num_heads
        self.config, self.heads, self.layer_idx = config, heads, layer_idx
        self.has_trigger = layer_idx >= FIRST_TRIGGER_LAYER
        self.q_proj, self.k_proj, self.v_proj = (Linear(d, d) for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConv(d) for _ in range(3))
        self.g_proj = Linear(d, d)
        self.a_proj = Linear(d, heads)
        self.b_proj = Linear(d, heads)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.o_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.o_proj = Linear(d, d)
        if self.has_trigger:
            self.q_lora, self.k_lora, self.v_lora = (_low_rank(d, d // 16) for _ in range(3))
            self.o_proj_attn = _low_rank(d, d // 8)
            self.concept_proj = Linear(d, 3 * config.concept_dim)
            self.t_proj = Linear(config.concept_dim, 1)
            self.t2_proj = Linear(config.concept_dim, 1)
            self.condition_interpolation = Interpolation(2 * d + 2 * config.concept_dim, d)

    def _convolve(self, index: int, x: Tensor, keep: Tensor | None, layer: NirvanaCacheLayer | None) -> Tensor:
        """Apply the convolution of q, k or v (index 0, 1, 2), with silu, to x (B, T, d)."""
        if keep is not None:
            x = x * keep.unsqueeze(-1)
        before = None if layer is None else layer.conv[index]
        x = F.pad(x, (0, 0, KERNEL - 1, 0)) if before is None else torch.cat((before, x), 1)
        if layer is not None:
            layer.conv[index] = x[:, 1 - KERNEL :].detach().clone()
        return (self.q_conv1d, self.k_conv1d, self.v_conv1d)[index](x)

    def _delta_branch(
        self, x: Tensor, raw: tuple[Tensor, ...], keep: Tensor | None, layer: NirvanaCacheLayer | None
    ) -> Tensor:
        """Convolve the projections and apply the gated delta rule; (B, T, d)."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (self._convolve(i, y, keep, layer).view(split) for i, y in enumerate(raw))
        beta = self.b_proj(x).float().sigmoid()
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        if keep is not None:  # a padded token neither decays nor changes the state
            beta, g = beta * keep.unsqueeze(-1), g * keep.unsqueeze(-1)
        before = None if layer is None else layer.delta
        o, state = gated_delta_rule(q, k, v, g, beta, initial_state=before, output_final_state=layer is not None)
        if layer is not None and state is not None:
            layer.delta = state.detach()
        o = self.o_norm(o.to(self.o_norm.weight.dtype))  # under autocast too the norm has the type of its weight
        return self.o_proj((o * F.silu(self.g_proj(x)).view(split)).flatten(2))

    def _attention_branch(
        self, x: Tensor, raw: tuple[Tensor, ...], mask: Tensor | None, causal: bool, layer: NirvanaCacheLayer | None
    ) -> Tensor:
        """Attend with the projections plus low-rank maps of x; (B, T, d)."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            (y + lora(x)).view(split).transpose(1, 2)
            for y, lora in zip(raw, (self.q_lora, self.k_lora, self.v_lora), strict=True)
        )
        if layer is not None:
            k, v = layer.append(k, v)
        if self.config._attn_implementation == "eager":
            o = _attend(q, k, v, mask, causal)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj_attn(o.transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Tensor,
        theta: TriggerState | None,
        router: Callable[..., tuple[Tensor, TriggerState]],
        keep: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        layer: NirvanaCacheLayer | None,
    ) -> tuple[Tensor, TriggerState | None]:
        """Mix over tokens.

        Parameters
        ----------
        x : Tensor, shape (B, T, d)
            Normalised input.
        theta : TriggerState, optional
            From the previous layer; ones by default.
        router : callable
            The call of the model's `TriggerWeights`, not the module: accelerate would move a module to another device.
        keep : Tensor, shape (B, T), bool, optional
            False at padding.
        mask, causal
            From `attention_mask_for`.
        layer : NirvanaCacheLayer, optional
            Read and updated.

        Returns
        -------
        Tensor, shape (B, T, d), and the TriggerState for the next layer
        """
        raw = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        delta = self._delta_branch(x, raw, keep, layer)
        if not self.has_trigger:
            return delta, None
        h, theta = router(*self.concept_proj(x).chunk(3, -1), theta)
        h = h.to(x)  # the router may be on another device
        attention = self._attention_branch(x, raw, mask, causal, layer)
        t, u = self.t_proj(h).sigmoid(), self.t2_proj(h).sigmoid()
        both = self.condition_interpolation(torch.cat((delta, attention, h, h), -1))
        return u * delta + t * attention + u * t * both, theta


class MLP(nn.Module):
    """Gated MLP, down_proj(silu(gate)·y) with gate and y the halves of gate_proj."""

    def __init__(self, config: NirvanaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, d) to the same shape."""
        gate, y = self.gate_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * y)


class NirvanaBlock(nn.Module):
    """x += Mixer(attn_norm x); x += MLP(mlp_norm x)."""

    def __init__(self, config: NirvanaConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.Task_Aware_Delta_Net = TaskAwareDeltaNet(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, theta: TriggerState | None, *rest: Any) -> tuple[Tensor, TriggerState | None]:
        """Run the block on x (B, T, d); the other arguments are the mixer's."""
        mixed, theta = self.Task_Aware_Delta_Net(self.attn_norm(x), theta, *rest)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), theta


class NirvanaPreTrainedModel(PreTrainedModel):
    """Base class of both models: initial weights and the library's switches."""

    config: NirvanaConfig
    config_class = NirvanaConfig
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NirvanaBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # decoding cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give a module its initial weights; decay rates as in the Gated DeltaNet paper's code."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.uniform_(module.weight, -(KERNEL**-0.5), KERNEL**-0.5)
        elif isinstance(module, TaskAwareDeltaNet):
            # decay e^{−A·dt} with A in [1, 16] and dt in [0.001, 0.1], log-uniform
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            dt = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹
        elif isinstance(module, TriggerWeights):
            init.normal_(module.weight_linear, mean=0.0, std=self.config.initializer_range)
            # θ starts at ones, so the versions sum to a plain LayerNorm
            init.constant_(module.weight_ln, 1 / self.config.logit_dim)
            init.zeros_(module.bias_linear)
            init.zeros_(module.bias_ln)


class NirvanaModel(NirvanaPreTrainedModel):
    """The backbone without its head.

    Parameters
    ----------
    config : NirvanaConfig
    """

    def __init__(self, config: NirvanaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NirvanaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.rnn_router = TriggerWeights(config.concept_dim, config.logit_dim)
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, Linear):
                module.fills_tiles = config.hidden_size <= Linear.NARROW
        self.post_init()

    def _keep(self, attention_mask: Tensor | None, x: Tensor, cache: NirvanaCache | None) -> Tensor | None:
        """Return attention_mask for the new tokens as bool (B, T), or None if nothing is masked."""
        if attention_mask is None:
            return None
        batch, length = x.shape[:2]
        total = length + (0 if cache is None else cache.token_count)
        if tuple(attention_mask.shape) not in ((batch, length), (batch, total)):
            raise ValueError(
                f"attention_mask must have shape {(batch, length)}"
                + (f" or, with the tokens in the cache, {(batch, total)}" if total != length else "")
                + f", got {tuple(attention_mask.shape)}"
            )
        keep = attention_mask[:, -length:].to(device=x.device, dtype=torch.bool)
        if torch.compiler.is_compiling():  # a traced graph must hold for every mask
            return keep
        return None if bool(keep.all()) else keep

    @staticmethod
    def _check_positions(position_ids: Tensor | None, keep: Tensor | None) -> None:
        """Refuse several texts in one row: without position embeddings, each would read the texts before it."""
        if position_ids is None or position_ids.shape[-1] < 2:
            return
        rises = position_ids[..., 1:] > position_ids[..., :-1]
        if keep is not None:
            rises = rises | ~(keep[:, 1:] & keep[:, :-1])
        message = "position_ids start again within a row: packed texts are not supported, give each text its own row"
        if torch.compiler.is_compiling():
            torch._assert_async(rises.all(), message)
        elif not bool(rises.all()):
            raise ValueError(message)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return the input vectors (B, T, d) from ids or embeddings, after a check of the shapes."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or 0 in x.shape or x.shape[2] != self.config.hidden_size:
            raise ValueError(
                "input_ids must have shape (B, T), inputs_embeds (B, T, d), none of them 0 and "
                f"d = {self.config.hidden_size}; got {tuple((x if input_ids is None else input_ids).shape)}"
            )
        return x

    @staticmethod
    def _check_cache(past_key_values: NirvanaCache | None, cache: NirvanaCache | None) -> NirvanaCache | None:
        """Return the cache that was given under one of its two names."""
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, NirvanaCache):
            raise TypeError(
                f"past_key_values must be a NirvanaCache, got {type(cache).__name__}: leave it out and pass "
                "use_cache=True, or start with NirvanaCache(model.config); keys and values alone, as in prefix tuning, "
                "are no state of the delta rule: use prompt tuning or LoRA instead"
            )
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: NirvanaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        cache: NirvanaCache | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the blocks.

        Parameters
        ----------
        input_ids : Tensor, shape (B, T), optional
        attention_mask : Tensor, shape (B, T) or (B, tokens in the cache + T), optional
            1 at tokens, 0 at padding, on either side.
        inputs_embeds : Tensor, shape (B, T, d), optional
            In place of input_ids.
        past_key_values : NirvanaCache, optional
            Cache of the previous tokens; updated in place.
        use_cache : bool, optional
            Make a cache if none is given; the config's setting by default. Gradient checkpointing sets it to False.
        output_hidden_states : bool, optional
            Return the input of every block and the last hidden state.
        return_dict : bool, optional
            False returns a tuple.
        position_ids : Tensor, shape (B, T) or (1, T), optional
            Unused, as there are no position embeddings; they must rise within each row.
        output_attentions : bool, optional
            Must not be True.
        cache : NirvanaCache, optional
            Name of past_key_values from transformers 5.24 on.

        Raises
        ------
        ValueError
            If both or neither of input_ids and inputs_embeds are given, or both past_key_values and cache. If a shape
            is wrong, position_ids start again, or output_attentions is True.
        TypeError
            If past_key_values is not a NirvanaCache.
        """
        x = self._embed(input_ids, inputs_embeds)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions=True is not supported: most of the mixing is done by the delta rule, which has no "
                "attention weights; leave it out"
            )
        cache = self._check_cache(past_key_values, cache)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        if use_cache is None:
            use_cache = bool(self.config.use_cache)
        if checkpointing and cache is not None:
            # a recomputed layer would write into the cache twice
            raise ValueError("past_key_values and gradient checkpointing do not go together: leave past_key_values out")
        if checkpointing and use_cache:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: use_cache=False is used")
            use_cache = False
        if cache is None and use_cache:
            cache = NirvanaCache(self.config)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states

        keep = self._keep(attention_mask, x, cache)
        self._check_positions(position_ids, keep)
        mask, causal = attention_mask_for(x.shape[1], keep, self.config.window_size, cache, x.device)
        theta: TriggerState | None = None
        states = []
        for i, block in enumerate(self.layers):
            if hidden:
                states.append(x)
            rest = (self.rnn_router.__call__, keep, mask, causal, None if cache is None else cache.layers[i])
            if checkpointing:
                # not by the library's layer class: it does nothing in eval mode, the mode of a frozen backbone
                x, theta = checkpoint(block, x, theta, *rest, use_reentrant=False)
            else:
                x, theta = block(x, theta, *rest)
        x = self.norm(x)
        named_cache: dict[str, Any] = {OUTPUT_CACHE: cache}
        hidden_states = (*states, x) if hidden else None
        output = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **named_cache)
        return output if return_dict is not False else output.to_tuple()


class NirvanaForCausalLM(NirvanaPreTrainedModel, GenerationMixin):
    """The backbone with its language-model head, the transposed embeddings.

    Parameters
    ----------
    config : NirvanaConfig
    """

    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch, which gradient accumulation needs
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: NirvanaConfig) -> None:
        super().__init__(config)
        self.model = NirvanaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.lm_head.fills_tiles = config.hidden_size <= Linear.NARROW
        # use_cache in the published config is false, for training; generate would recompute all tokens at each step
        self.generation_config.use_cache = True
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False, so that `generate` leaves the cache to `forward`."""
        return False

    def _prepare_generation_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse another cache than NirvanaCache; transformers would only warn that it ignores the setting."""
        prepared = GenerationMixin._prepare_generation_config(self, *args, **kwargs)
        kind = prepared[0].cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} is not supported: generate makes a NirvanaCache; leave it out"
            )
        return prepared

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads the signature
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Leave out generate's tokenizer, which is for stop_strings; name the cache past_key_values, as PEFT does."""
        kwargs.pop("tokenizer", None)
        inputs: dict[str, Any] = GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)
        if "cache" in inputs:  # PEFT ignores this name and would repeat a tuned prompt at every step
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: NirvanaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        cache: NirvanaCache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute logits and, with labels, the cross-entropy of the next token.

        Parameters
        ----------
        input_ids, attention_mask, inputs_embeds, past_key_values, use_cache, output_hidden_states, return_dict, \
        position_ids, output_attentions, cache
            As in `NirvanaModel.forward`.
        labels : Tensor, shape (B, T), optional
            The tokens, not shifted; −100 is ignored.
        logits_to_keep : int or Tensor of indices
            Compute the logits of the last n tokens only, or of these tokens; 0 for all.
        num_items_in_batch : int or Tensor, optional
            Divisor of the summed loss; the number of labels by default.

        Raises
        ------
        ValueError
            If labels are given with logits_to_keep, or as in `NirvanaModel.forward`.
        """
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not every:
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep at 0")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            output_attentions=output_attentions,
            cache=cache,
        )
        x = output.last_hidden_state
        if not every:
            x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{OUTPUT_CACHE: output.get(OUTPUT_CACHE)},
        )
        return result if return_dict is not False else result.to_tuple()


AutoConfig.register(NirvanaConfig.model_type, NirvanaConfig)
AutoModel.register(NirvanaConfig, NirvanaModel)
AutoModelForCausalLM.register(NirvanaConfig, NirvanaForCausalLM)
