"""The two-stage model: k-space encoder, frozen backbone and image decoder; then the functions that build its parts.

The sequence is: start, k-space tokens, end, prompt, analysis. Image tokens are the backbone's last hidden states at the
k-space positions. The backbone is causal, so they depend on the scan alone, not on the prompt that follows. A
*prefix* is start, N = (img_size/16)² k-space tokens and end: (B, N + 2, hidden).
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from mrilib.backbone import kernels
from mrilib.backbone.cache import NirvanaCacheLayer
from mrilib.backbone.nirvana import NirvanaForCausalLM, load_backbone
from mrilib.backbone.tokenizer import load_tokenizer
from mrilib.config import BackboneParameters, Stage1Parameters, resolve
from mrilib.data import findings
from mrilib.data.dataset import Batch, Slice
from mrilib.model.encoder import INITIAL_TOKEN_SCALE, ConstantPrefix, KSpaceEncoder
from mrilib.model.unet import PATCH
from mrilib.transfer import to_device


class Texts(NamedTuple):
    """Tokenized prompts and analyses of a batch, padded on the right to T tokens."""

    ids: Tensor  # int64 (B, T): prompt, analysis, end of sequence, padding
    labels: Tensor  # int64 (B, T): the id at positions that enter the loss, -100 elsewhere

    def to(self, device: torch.device | str) -> "Texts":
        """Copy with the tensors on `device`."""
        return Texts(*(to_device(tensor, device) for tensor in self))


class TokenLoss(NamedTuple):
    """Sums over the analysis tokens of a batch, for averages over several batches."""

    loss: Tensor  # cross-entropy with label smoothing, the training loss [nats]
    cross_entropy: Tensor  # without label smoothing, (B,) [nats]
    correct: Tensor  # number of correctly predicted tokens, (B,)
    tokens: Tensor  # number of analysis tokens, (B,)


class TwoStageModel(nn.Module):
    """K-space encoder, frozen backbone and image decoder.

    Parameters
    ----------
    encoder : KSpaceEncoder or ConstantPrefix, optional
    backbone : PreTrainedModel, optional
        Any Hugging Face causal language model; always frozen.
    tokenizer : PreTrainedTokenizerBase, optional
        Encoder, backbone and tokenizer are left out with a decoder that uses no image tokens.
    decoder : nn.Module, optional
        One of `decoders.DECODERS`; left out in stage 1.
    """

    encoder: Any
    backbone: Any
    decoder: Any

    def __init__(
        self,
        encoder: KSpaceEncoder | ConstantPrefix | None = None,
        backbone: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.backbone, self.decoder = encoder, backbone, decoder
        self.tokenizer: Any = tokenizer
        self.freeze(None)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def uses_tokens(self) -> bool:
        """Whether image tokens are needed; true without a decoder."""
        return self.decoder is None or self.decoder.token_dim > 0

    def forward(self, batch: Batch) -> Tensor:
        """Reconstruct the images (B, h, w) [file units] from masked k-space."""
        return self.reconstruct(batch, self.image_tokens(batch) if self.uses_tokens else None)

    def freeze(self, trainable: str | None) -> list[nn.Parameter]:
        """Freeze everything except one part, and return the parameters of that part.

        Parameters
        ----------
        trainable : {"encoder", "decoder", None}
            Frozen parts have requires_grad False and stay in eval mode.
        """
        if trainable not in ("encoder", "decoder", None):
            raise ValueError(f"'{trainable}' cannot be trained; choose encoder, decoder or None")
        self.trainable = trainable
        self.requires_grad_(False)
        self.eval()
        self.trainable_names: set[str] = set()
        if trainable is None:
            return []
        part = getattr(self, trainable)
        if part is None:
            raise ValueError(f"this model has no {trainable} to train")
        part.requires_grad_(True)
        self.trainable_names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return [parameter for parameter in part.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> "TwoStageModel":
        """Set training mode for the trainable part alone."""
        super().train(False)
        if mode and self.trainable:
            getattr(self, self.trainable).train()
        return self

    def check_gradients(self) -> None:
        """Check, after a backward pass, that exactly the trainable parameters have gradients.

        Raises
        ------
        RuntimeError
            Names the parameters with an unexpected or a missing gradient.
        """
        wrong = [
            name
            for name, parameter in self.named_parameters()
            if (parameter.grad is not None) != (name in self.trainable_names)
        ]
        if wrong:
            raise RuntimeError(f"{self.trainable} is trainable, but gradients are unexpected or missing: {wrong[:8]}")

    # ------------------------------------------------------------------------------------------ text

    def tokenize(self, slices: Sequence[Slice]) -> Texts:
        """Tokenize prompts and analyses; the tensors are on the CPU.

        Labels are masked by position, because padding and end of sequence share an id. The end of sequence enters the
        loss only for reviewed volumes and reports; otherwise findings could follow.
        """
        prompts = [self._ids(prompt_of(one)) for one in slices]
        answers = [self._ids(answer_of(one)) for one in slices]
        end_id = self.tokenizer.eos_token_id
        length = max(len(prompt) + len(answer) + 1 for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(slices), length), end_id)
        labels = torch.full((len(slices), length), -100)
        for row, (one, prompt, answer) in enumerate(zip(slices, prompts, answers, strict=True)):
            is_complete = one.report is not None or one.facts.findings is not None
            start, stop = len(prompt), len(prompt) + len(answer) + int(is_complete)
            ids[row, : start + len(answer)] = torch.tensor(prompt + answer)
            labels[row, start:stop] = ids[row, start:stop]
        return Texts(ids, labels)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def analysis_loss(self, batch: Batch, label_smoothing: float = 0.0) -> TokenLoss:
        """Compute the cross-entropy of the analysis tokens after k-space tokens and prompt."""
        return self.analysis_loss_from_prefix(self.encoder(batch.kspace, batch.mask), batch.slices, label_smoothing)

    def analysis_loss_from_prefix(
        self, prefix: Tensor, slices: Sequence[Slice], label_smoothing: float = 0.0
    ) -> TokenLoss:
        """Compute `analysis_loss` from k-space tokens (B, N + 2, hidden), possibly of other slices."""
        texts = self.tokenize(slices).to(self.device)
        embeds = self.backbone.get_input_embeddings()(texts.ids)
        prefix = prefix.to(embeds.dtype)
        inputs = torch.cat([prefix, embeds], dim=1)
        self._check_length(inputs.shape[1])
        # No attention mask: no token reads the padding after it, and models read a mask's values from the device.
        output = self.backbone(
            inputs_embeds=inputs,
            use_cache=False,
            logits_to_keep=texts.ids.shape[1] + 1,  # from the end vector on: position i predicts token i + 1
        )
        logits = output.logits[:, :-1].float().transpose(1, 2)
        loss = F.cross_entropy(logits, texts.labels, reduction="sum", label_smoothing=label_smoothing)
        with torch.no_grad():
            is_analysis = texts.labels != -100
            cross_entropy = F.cross_entropy(logits, texts.labels, reduction="none").sum(1)
            correct = ((logits.argmax(1) == texts.labels) & is_analysis).sum(1)
        return TokenLoss(loss, cross_entropy, correct, is_analysis.sum(1))

    def _check_length(self, tokens: int) -> None:
        """Raise ValueError if a sequence has more tokens than the backbone has positions. Nirvana has no limit."""
        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit and not isinstance(self.backbone, NirvanaForCausalLM):
            raise ValueError(
                f"{type(self.backbone).__name__} has {limit} positions, but k-space tokens and text need {tokens}: "
                "choose a smaller img_size, shorter texts or max_new_tokens, or another backbone"
            )

    @torch.no_grad()
    def generate(self, prefix: Tensor, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Generate analyses by greedy decoding.

        Parameters
        ----------
        prefix : Tensor, shape (B, N + 2, hidden)
            K-space tokens.
        prompts : sequence of str
            One for each slice. Shorter sequences are padded on the left.
        max_new_tokens : int
        """
        embed = self.backbone.get_input_embeddings()
        rows = [
            torch.cat([tokens.to(embed.weight.dtype), embed(torch.tensor(self._ids(prompt), device=self.device))])
            for tokens, prompt in zip(prefix, prompts, strict=True)
        ]
        length = max(len(row) for row in rows)
        self._check_length(length + max_new_tokens)
        inputs = torch.stack([F.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        attention = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        output = self.backbone.generate(
            inputs_embeds=inputs,
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    # ------------------------------------------------------------------------------------------ image

    def image_tokens(self, batch: Batch) -> Tensor:
        """Compute image tokens, float32 (B, (img_size/16)², hidden)."""
        return self.image_tokens_from_prefix(self.encoder(batch.kspace, batch.mask))

    def image_tokens_from_prefix(self, prefix: Tensor) -> Tensor:
        """Compute `image_tokens` from k-space tokens (B, N + 2, hidden)."""
        return self.hidden_states(prefix).float()

    def hidden_states(self, prefix: Tensor) -> Tensor:
        """Compute image tokens in the backbone's own type, the type that the token cache stores."""
        prefix = prefix.to(word_embeddings(self.backbone).dtype)
        self._check_length(prefix.shape[1])
        return self.backbone.base_model(inputs_embeds=prefix, use_cache=False).last_hidden_state[:, 1:-1]

    def reconstruct(self, batch: Batch, tokens: Tensor | None) -> Tensor:
        """Decode images (B, h, w) [file units] from image tokens, or without them."""
        if self.decoder is None:
            raise ValueError("this model has no image decoder; train stage 2 first")
        return self.decoder(tokens, batch.kspace, batch.mask, batch.scale, batch.image_shape, batch.acquired)


def prompt_of(one: Slice) -> str:
    """Return the prompt of a slice: its report's, or the general one."""
    return one.report.prompt if one.report else findings.prompt()


def answer_of(one: Slice) -> str:
    """Return the true analysis of a slice: its report's, or the one of its facts."""
    return one.report.response if one.report else findings.answer(one.facts)


# ---------------------------------------------------------------------------------------------- builders

ENCODER: type[KSpaceEncoder] = KSpaceEncoder  # for an encoder of your own, put a subclass here


def build_backbone(
    config: BackboneParameters, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load backbone and tokenizer, and check that they fit each other.

    Without a tokenizer_path the tokenizer is the one in the backbone's folder. A Nirvana folder without a tokenizer
    gets Mistral's.
    """
    path = resolve(config.backbone_path)
    backbone = load_backbone(resolve(config.config_path), path, getattr(torch, config.backbone_dtype), device)
    if getattr(config, "activation_checkpointing", False):
        checkpoint_layers(backbone)
    tokenizer_path: str | Path = ""
    if config.tokenizer_path:
        tokenizer_path = resolve(config.tokenizer_path)
    elif (path / "tokenizer.json").exists() or not isinstance(backbone, NirvanaForCausalLM):
        tokenizer_path = path
    return backbone, load_tokenizer(tokenizer_path, vocab_size=backbone.config.vocab_size)


def build_encoder(
    config: Stage1Parameters, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> KSpaceEncoder:
    """Build the k-space encoder of stage 1's parameters for a backbone.

    With a tokenizer, the vectors of findings are initialized with the backbone's word embeddings. An encoder with
    weights to be loaded needs none.
    """
    encoder = ENCODER(
        output_dim=hidden_size(backbone),
        img_size=config.img_size,
        vit_embed_dim=config.vit_embed_dim,
        vit_num_layers=config.vit_num_layers,
        vit_num_heads=config.vit_num_heads,
        num_cascades=config.varnet_num_cascades,
        chans=config.varnet_chans,
        pools=config.varnet_pools,
        map_network=config.varnet_map_network,
        finding_labels=config.finding_labels,
        activation_checkpointing=config.activation_checkpointing,
    )
    encoder.match_embeddings(embedding_rms(backbone))
    if encoder.finding_words is not None and tokenizer is not None:
        vocabularies = (config.finding_labels, findings.SIDES, findings.REGIONS)
        vectors = [word_vectors(words, backbone, tokenizer).cpu() for words in vocabularies]
        encoder.finding_words.initialize_from_words(*vectors)
    if config.varnet_weights:
        encoder.load_varnet(resolve(config.varnet_weights))
    for network in (encoder.varnet, encoder.finding_maps):
        if network is not None:
            network.to(memory_format=torch.channels_last)  # halves the time of narrow convolutions on CPUs
    return encoder


def build_constant_prefix(config: Stage1Parameters, backbone: PreTrainedModel) -> ConstantPrefix:
    """Build stage 1's baseline without k-space, with the length and the initial scale of the encoder's tokens."""
    rms = INITIAL_TOKEN_SCALE * embedding_rms(backbone)
    return ConstantPrefix((config.img_size // PATCH) ** 2, hidden_size(backbone), rms)


def word_embeddings(backbone: PreTrainedModel) -> Tensor:
    """Return the backbone's embedding matrix, (vocabulary, hidden)."""
    weight = backbone.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def hidden_size(backbone: PreTrainedModel) -> int:
    """Return the width of the backbone's word embeddings."""
    return word_embeddings(backbone).shape[1]


@torch.no_grad()
def embed(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """Embed ids in float32 with the backbone's own scaling: Gemma multiplies by √hidden."""
    return backbone.get_input_embeddings()(ids.to(backbone.device)).float()


def embedding_rms(backbone: PreTrainedModel) -> float:
    """Compute the root mean square of all word embeddings."""
    return embed(backbone, torch.arange(len(word_embeddings(backbone)))).square().mean().sqrt().item()


def word_vectors(words: Sequence[str], backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Embed words: (words, hidden).

    A word with a special token (`findings.fact_token`) has that token's embedding. Other words have the mean over
    their tokens.
    """
    vocabulary = tokenizer.get_vocab()
    rows = []
    for word in words:
        fact_id = vocabulary.get(findings.fact_token(word))
        ids = [fact_id] if fact_id is not None else tokenizer(f" {word.lower()}", add_special_tokens=False)["input_ids"]
        rows.append(embed(backbone, torch.tensor(ids)).mean(0))
    return torch.stack(rows)


def checkpoint_layers(backbone: PreTrainedModel) -> int:
    """Make every layer recompute its activations in the backward pass; return the number of layers.

    transformers' own switch does nothing in eval mode, the mode of a frozen backbone. Passes that fill a cache and
    passes without a graph are unchanged.

    Raises
    ------
    ValueError
        If the model declares no layer classes.
    """
    names = set(backbone._no_split_modules or ())
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer) or type(m).__name__ in names]
    if not layers:
        raise ValueError(
            f"activation_checkpointing: {type(backbone).__name__} declares no layer classes (_no_split_modules); "
            "set activation_checkpointing: false"
        )
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)
    return len(layers)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # A recomputed forward pass would write into a cache twice.
    cached = any(isinstance(x, Cache | NirvanaCacheLayer) for x in (*args, *kwargs.values()))
    if cached or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


# ---------------------------------------------------------------------------------------------- facts for records


def delta_rule_path(backbone: PreTrainedModel | None, config: BackboneParameters) -> dict[str, Any]:
    """Describe the code that computes the backbone's delta rule, for the run's record; see `kernels.path`.

    Raises
    ------
    KernelError
        If fused kernels fail their check on this device.
    """
    if backbone is None:
        return {"path": "none", "because": "the decoder uses no image tokens"}
    if not isinstance(backbone, NirvanaForCausalLM):
        return {"path": "none", "because": f"{type(backbone).__name__} has no delta rule"}
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = autocast.get(getattr(config, "mixed_precision", "no"), backbone.dtype)
    return kernels.path(backbone.device, dtype, backbone.config.head_dim)


def count_parameters(module: nn.Module | None) -> int:
    """Count a module's parameters; 0 for None."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def tensor_hash(module: nn.Module) -> str:
    """Compute SHA-256 over a module's tensors: names in order, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def fingerprint(model: TwoStageModel) -> dict[str, str]:
    """Compute SHA-256 of the backbone's tensors and of its logits for the prompt alone; empty without a backbone."""
    backbone, tokenizer = model.backbone, model.tokenizer
    if backbone is None:
        return {}
    ids = torch.tensor([tokenizer(findings.prompt(), add_special_tokens=False)["input_ids"]], device=backbone.device)
    logits = backbone(input_ids=ids, use_cache=False).logits.float().cpu().contiguous()
    return {"tensors": tensor_hash(backbone), "text_logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}
