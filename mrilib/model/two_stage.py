"""Encoder, frozen backbone and decoder put together; the one owner of freezing.

The sequence is: start, k-space tokens, end, prompt, analysis. Image tokens are the backbone's last hidden states at the
k-space positions. The backbone is causal, so they depend on the scan alone, not on the prompt that follows them.
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
from mrilib.data.findings import fact_token
from mrilib.model.encoder import FIRST_TOKENS, KSpaceEncoder, LearnedPrefix


class Texts(NamedTuple):
    """Tokenized prompts and analyses of a batch, padded on the right; T is the longest."""

    ids: Tensor  # int64 (B, T): prompt, analysis, end of sequence, padding
    attention: Tensor  # int64 (B, T): 1 where there is a token
    labels: Tensor  # int64 (B, T): the id where the analysis is to be learned, -100 elsewhere


class TokenLoss(NamedTuple):
    """Sums over the analysis tokens of a batch, for averages over any number of batches."""

    loss: Tensor  # cross-entropy with label smoothing, the one that is trained on [nats]
    cross_entropy: Tensor  # without smoothing, one value a slice (B,) [nats]
    correct: Tensor  # tokens predicted right, one value a slice (B,)
    tokens: Tensor  # analysis tokens, one value a slice (B,)


class TwoStageModel(nn.Module):
    """The whole system.

    Parameters
    ----------
    encoder : KSpaceEncoder or LearnedPrefix, optional
    backbone : PreTrainedModel, optional
        Any Hugging Face causal language model; always frozen.
    tokenizer : PreTrainedTokenizerBase, optional
        A model whose decoder uses no image tokens has none of these three.
    decoder : nn.Module, optional
        `ImageDecoder` or another of `decoders.DECODERS`. Stage 1 has none.
    """

    encoder: Any
    backbone: Any
    decoder: Any

    def __init__(
        self,
        encoder: KSpaceEncoder | LearnedPrefix | None = None,
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
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def uses_tokens(self) -> bool:
        """Whether the decoder, if there is one, reads image tokens."""
        return self.decoder is None or self.decoder.token_dim > 0

    def freeze(self, trainable: str | None) -> list[nn.Parameter]:
        """Freeze everything but one part, and return that part's parameters.

        Parameters
        ----------
        trainable : {"encoder", "decoder", None}
            Frozen parts have requires_grad False and are in eval mode; `train` keeps them there.
        """
        if trainable not in ("encoder", "decoder", None):
            raise ValueError(f"'{trainable}' cannot be trained; encoder, decoder or None")
        self.trainable = trainable
        self.requires_grad_(False)
        self.eval()
        self.trained: set[str] = set()
        if trainable is None:
            return []
        part = getattr(self, trainable)
        if part is None:
            raise ValueError(f"this model has no {trainable} to train")
        part.requires_grad_(True)
        self.trained = {f"{trainable}.{name}" for name, parameter in part.named_parameters() if parameter.requires_grad}
        return [parameter for parameter in part.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> "TwoStageModel":
        """Training mode for the trainable part alone."""
        super().train(False)
        if mode and self.trainable:
            getattr(self, self.trainable).train()
        return self

    def check_gradients(self) -> None:
        """Assert, after a backward pass, that exactly what is to be trained received gradients.

        Raises
        ------
        RuntimeError
            Naming the parameters that have a gradient and should not, or have none and should.
        """
        wrong = [
            name
            for name, parameter in self.named_parameters()
            if (parameter.grad is not None) != (name in self.trained)
        ]
        if wrong:
            raise RuntimeError(f"only the {self.trainable} is to be trained, but gradients are wrong at: {wrong[:8]}")

    # ------------------------------------------------------------------------------------------ text

    def tokenize(self, slices: Sequence[Slice]) -> Texts:
        """Prompts and analyses of slices as ids.

        Labels are masked by length, never by id: padding and end of sequence are one id, and the end is to be learned.
        The analysis of a volume that nobody reviewed says nothing of findings; its end is not learned, as more could
        follow.
        """
        prompts, answers, ends = [], [], []
        for one in slices:
            prompts.append(self._ids(one.report.prompt if one.report else findings.prompt()))
            answers.append(self._ids(one.report.response if one.report else findings.answer(one.facts)))
            ends.append(one.report is not None or one.facts.findings is not None)
        end_id = self.tokenizer.eos_token_id
        length = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(slices), length), end_id)
        attention = torch.zeros(len(slices), length, dtype=torch.long)
        labels = torch.full((len(slices), length), -100)
        for row, (prompt, answer, end) in enumerate(zip(prompts, answers, ends, strict=True)):
            start, stop = len(prompt), len(prompt) + len(answer) + int(end)
            ids[row, : start + len(answer)] = torch.tensor(prompt + answer)
            attention[row, :stop] = 1
            labels[row, start:stop] = ids[row, start:stop]
        return Texts(*(tensor.to(self.device) for tensor in (ids, attention, labels)))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def analysis_loss(self, batch: Batch, label_smoothing: float = 0.0) -> TokenLoss:
        """Cross-entropy on the analysis tokens alone, given k-space tokens and prompt."""
        return self.analysis_loss_from_prefix(self.encoder(batch.kspace, batch.mask), batch.slices, label_smoothing)

    def analysis_loss_from_prefix(
        self, prefix: Tensor, slices: Sequence[Slice], label_smoothing: float = 0.0
    ) -> TokenLoss:
        """The same from k-space tokens (B, N + 2, hidden), whosever they are."""
        texts = self.tokenize(slices)
        embeds = self.backbone.get_input_embeddings()(texts.ids)
        prefix = prefix.to(embeds.dtype)
        attention = torch.cat([texts.attention.new_ones(prefix.shape[:2]), texts.attention], dim=1)
        length = texts.ids.shape[1]
        self._check_length(attention.shape[1])
        output = self.backbone(
            inputs_embeds=torch.cat([prefix, embeds], dim=1),
            attention_mask=attention,
            use_cache=False,
            logits_to_keep=length + 1,  # position i predicts i + 1: from the end vector on
        )
        logits = output.logits[:, :-1].float().transpose(1, 2)
        smoothed = F.cross_entropy(logits, texts.labels, reduction="sum", label_smoothing=label_smoothing)
        with torch.no_grad():
            counted = texts.labels != -100
            plain = F.cross_entropy(logits, texts.labels, reduction="none").sum(1)
            correct = ((logits.argmax(1) == texts.labels) & counted).sum(1)
        return TokenLoss(smoothed, plain, correct, counted.sum(1))

    def _check_length(self, tokens: int) -> None:
        """Raise ValueError where a sequence is longer than the backbone's positions; Nirvana has none."""
        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit and not isinstance(self.backbone, NirvanaForCausalLM):
            raise ValueError(
                f"{type(self.backbone).__name__} knows {limit} positions, k-space tokens and text take {tokens}: "
                "choose a smaller img_size, shorter texts or max_new_tokens, or another backbone"
            )

    @torch.no_grad()
    def generate(self, prefix: Tensor, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Analyses told by the backbone, greedily.

        Parameters
        ----------
        prefix : Tensor, shape (B, N + 2, hidden)
            K-space tokens.
        prompts : sequence of str
            One a slice; they may differ in length (padded on the left, where the k-space tokens start).
        """
        ids = [self._ids(prompt) for prompt in prompts]
        embed = self.backbone.get_input_embeddings()
        rows = [
            torch.cat([one.to(embed.weight.dtype), embed(torch.tensor(tokens, device=self.device))])
            for one, tokens in zip(prefix, ids, strict=True)
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
        """The backbone's last hidden states at the k-space positions, as they are: (B, (img_size/16)², hidden)."""
        return self.image_tokens_from_prefix(self.encoder(batch.kspace, batch.mask))

    def image_tokens_from_prefix(self, prefix: Tensor) -> Tensor:
        """The same from k-space tokens (B, N + 2, hidden)."""
        return self.hidden_states(prefix).float()

    def hidden_states(self, prefix: Tensor) -> Tensor:
        """The same in the type that the backbone works in, which is what the token cache keeps."""
        prefix = prefix.to(word_embeddings(self.backbone).dtype)
        self._check_length(prefix.shape[1])
        return self.backbone.base_model(inputs_embeds=prefix, use_cache=False).last_hidden_state[:, 1:-1]

    def reconstruct(self, batch: Batch, tokens: Tensor | None) -> Tensor:
        """The decoder's image (B, h, w) [file units] from image tokens, or from none."""
        if self.decoder is None:
            raise ValueError("this model has no image decoder; train stage 2 first")
        return self.decoder(tokens, batch.kspace, batch.mask, batch.scale, batch.image_shape, batch.acquired)

    def forward(self, batch: Batch) -> Tensor:
        """From masked k-space to the image (B, h, w) [file units]."""
        return self.reconstruct(batch, self.image_tokens(batch) if self.uses_tokens else None)


def word_embeddings(backbone: PreTrainedModel) -> Tensor:
    """The backbone's embedding matrix, (vocabulary, hidden)."""
    weight = backbone.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def embed(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """Embed ids as the backbone does, which may scale its embedding matrix (Gemma, by √hidden); float32."""
    return backbone.get_input_embeddings()(ids.to(backbone.device)).float()


def embedding_rms(backbone: PreTrainedModel) -> float:
    """Root mean square of the embedded vocabulary."""
    return embed(backbone, torch.arange(len(word_embeddings(backbone)))).square().mean().sqrt().item()


def hidden_size(backbone: PreTrainedModel) -> int:
    """Width of the backbone's word embeddings."""
    return word_embeddings(backbone).shape[1]


def build_backbone(
    config: BackboneParameters, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load backbone and tokenizer, checked against each other, with activation checkpointing if that is asked for.

    Without a tokenizer_path the tokenizer is that of the backbone's folder; Nirvana without one has Mistral's.
    """
    path = resolve(config.backbone_path)
    dtype = getattr(torch, config.backbone_dtype)
    backbone = load_backbone(resolve(config.config_path), path, dtype, device)
    if getattr(config, "activation_checkpointing", False):
        checkpoint_layers(backbone)
    tokenizer_path: str | Path = ""
    if config.tokenizer_path:
        tokenizer_path = resolve(config.tokenizer_path)
    elif (path / "tokenizer.json").exists() or not isinstance(backbone, NirvanaForCausalLM):
        tokenizer_path = path
    tokenizer = load_tokenizer(tokenizer_path, vocab_size=backbone.config.vocab_size)
    return backbone, tokenizer


def checkpoint_layers(backbone: PreTrainedModel) -> int:
    """Make every layer of a language model recompute its activations in the backward pass; how many there are.

    The library's own switch (`activation_checkpointing_enable`) does nothing in eval mode, which a frozen backbone is
    in: a frozen Llama would keep all its activations. Passes that fill a cache, and those without a graph, are as
    before.

    Raises
    ------
    ValueError
        A model whose layers the library does not name.
    """
    names = set(backbone._no_split_modules or ())
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer) or type(m).__name__ in names]
    if not layers:
        raise ValueError(f"activation_checkpointing: {type(backbone).__name__} does not say which its layers are")
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)
    return len(layers)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # recomputing would write into a cache twice
    cached = any(isinstance(x, Cache | NirvanaCacheLayer) for x in (*args, *kwargs.values()))
    if cached or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def delta_rule_path(backbone: PreTrainedModel | None, config: BackboneParameters) -> dict[str, Any]:
    """Which code computes the backbone's delta rule in a run, for its record; see `kernels.path`.

    Raises
    ------
    KernelError
        Fused kernels that fail their check on this device.
    """
    if backbone is None:
        return {"path": "none", "because": "the decoder uses no image tokens"}
    if not isinstance(backbone, NirvanaForCausalLM):
        return {"path": "none", "because": f"{type(backbone).__name__} has no delta rule"}
    mixed = getattr(config, "mixed_precision", "no") == "bf16"
    return kernels.path(backbone.device, torch.bfloat16 if mixed else backbone.dtype, backbone.config.head_dim)


def word_vectors(words: Sequence[str], backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What a language model's vocabulary has for some words: (words, hidden).

    The token that stands for a fact (`corpus.fact_token`) where the vocabulary has one, else the mean over the word's
    own tokens.
    """
    vocabulary = tokenizer.get_vocab()
    rows = []
    for word in words:
        own = vocabulary.get(fact_token(word))
        ids = [own] if own is not None else tokenizer(f" {word.lower()}", add_special_tokens=False)["input_ids"]
        rows.append(embed(backbone, torch.tensor(ids)).mean(0))
    return torch.stack(rows)


def build_encoder(
    config: Stage1Parameters, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> KSpaceEncoder:
    """The k-space encoder of stage 1's parameters, its width following the backbone's.

    With the tokenizer, which an encoder that is to be loaded does without, what maps of findings say starts as the
    language model's own words.
    """
    encoder = KSpaceEncoder(
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
        words = (config.finding_labels, findings.SIDES, findings.REGIONS)
        encoder.finding_words.start_from(*(word_vectors(one, backbone, tokenizer).cpu() for one in words))
    if config.varnet_weights:
        encoder.load_varnet(resolve(config.varnet_weights))
    for convolutions in (encoder.varnet, encoder.finding_maps):
        if convolutions is not None:
            convolutions.to(memory_format=torch.channels_last)  # halves the time of narrow convolutions on CPUs
    return encoder


def build_constant_prefix(config: Stage1Parameters, backbone: PreTrainedModel) -> LearnedPrefix:
    """Stage 1's control that sees no k-space, as long as the encoder's output and as small at the start."""
    return LearnedPrefix((config.img_size // 16) ** 2, hidden_size(backbone), FIRST_TOKENS * embedding_rms(backbone))


def tensor_hash(module: nn.Module) -> str:
    """SHA-256 over a module's tensors: names in order, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_parameters(module: nn.Module | None) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


@torch.no_grad()
def fingerprint(model: TwoStageModel) -> dict[str, str]:
    """SHA-256 of the backbone's tensors, and of the logits that it gives for the prompt alone; bitwise.

    Empty for a model without a backbone.
    """
    backbone, tokenizer = model.backbone, model.tokenizer
    if backbone is None:
        return {}
    ids = torch.tensor([tokenizer(findings.prompt(), add_special_tokens=False)["input_ids"]], device=backbone.device)
    logits = backbone(input_ids=ids, use_cache=False).logits.float().cpu().contiguous()
    return {"tensors": tensor_hash(backbone), "text_logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}
