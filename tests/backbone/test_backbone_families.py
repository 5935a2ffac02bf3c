"""Other language models as backbones: loading from a folder, both stages, generation, frozen weights, recomputation.

A tiny random model of each family is made from the library's own config class. `KINDS` go through all tests. The other
families, the table in docs/backbones.md, go through both stages and generation: a few with every suite, all with
`pytest -m fullsize tests/backbone/test_backbone_families.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from mrilib.backbone.nirvana import load_backbone
from mrilib.comparison import backbone_speed
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.splits import load_annotations, split_volumes
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.pretrain import corpus, tiny_nirvana

VOCABULARY = 500
WIDTH = 32
QUICK = ("gemma3_text", "mamba2", "mixtral")

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SHORT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 512}
HEADS: dict[str, Any] = {**BASE, "head_dim": 8}
EXPERTS: dict[str, Any] = {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}
MANY: dict[str, Any] = {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
SCAN: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
HEADED_SCAN: dict[str, Any] = {**SCAN, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
STATE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "hidden_size": 48, "num_hidden_layers": 3},
    "gpt2": {**SHORT, "n_embd": 40, "n_layer": 3},
    "qwen2": {**BASE, "hidden_size": 56, "num_hidden_layers": 3, "tie_word_embeddings": True},
    "qwen3": {**HEADS, "hidden_size": 64, "num_hidden_layers": 3, "tie_word_embeddings": True},
    "transformer_rnn": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_heads": 2,
                        "concept_dim": 8, "logit_dim": 4},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **KINDS,
    "mistral": HEADS,
    "ministral": HEADS,
    "mixtral": EXPERTS,
    "qwen2_moe": {**MANY, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MANY, "head_dim": 8},
    "qwen3_next": {
        **MANY,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "gemma3n_text": {
        **HEADS,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        **HEADS,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "vaultgemma": HEADS,
    "recurrent_gemma": {
        **BASE,
        "num_hidden_layers": 3,
        "lru_width": WIDTH,
        "attention_window_size": 512,
    },
    "phi": BASE,
    "phi3": BASE,
    "phimoe": EXPERTS,
    "gptj": {**SHORT, "rotary_dim": 8},
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 512,
    },
    "gpt_neox": BASE,
    "gpt_bigcode": SHORT,
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "codegen": {**SHORT, "rotary_dim": 8},
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 512},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "xglm": {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "biogpt": {**BASE, "max_position_embeddings": 512},
    "falcon": BASE,
    "falcon_h1": {**HEADS, **HEADED_SCAN, "mamba_d_ssm": 64},
    "falcon_mamba": STATE,
    "mamba": STATE,
    "mamba2": {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "context_length": 512},
    "bamba": {**BASE, **HEADED_SCAN, "attn_layer_indices": [1]},
    "jamba": {**BASE, **SCAN, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False},
    "zamba2": {**BASE, "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1,
               "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 8},
    "nemotron": BASE,
    "stablelm": BASE,
    "starcoder2": BASE,
    "cohere": BASE,
    "cohere2": {**BASE, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo": BASE,
    "olmo2": BASE,
    "olmo3": BASE,
    "olmoe": {**MANY},
    "granite": BASE,
    "granitemoe": EXPERTS,
    "granitemoehybrid": {**EXPERTS, **HEADED_SCAN, "shared_intermediate_size": 48,
                         "layer_types": ["mamba", "attention"]},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**LATENT, "head_dim": 8},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "smollm3": BASE,
    "ernie4_5": HEADS,
    "hunyuan_v1_dense": HEADS,
    "exaone4": {**BASE, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {**BASE, "layer_types": ["conv", "full_attention"]},
    "helium": HEADS,
    "seed_oss": HEADS,
    "apertus": BASE,
    "arcee": HEADS,
    "minimax": {**EXPERTS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "modernbert-decoder": BASE,
    "persimmon": BASE,
    "jetmoe": {**EXPERTS, "kv_channels": 8},
}  # fmt: skip
REFUSED = "cannot be the backbone"
PADDING = "generated in a batch differs"
FAILURES = {  # families that fail, and the words of the failure
    "gemma4_text": "needs to reverse the embedding",
    "falcon_h1": REFUSED,
    "bamba": REFUSED,
    "zamba2": REFUSED,
    "rwkv": REFUSED,
    "minimax": PADDING,
}
WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)  # products of activations are batched


def make(family: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(vocab_size=VOCABULARY, texts=50)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(folder, phantom_dir, rows, **parameters):
    """The system with the backbone in a folder, and a batch."""
    config = systems.stage1_config(phantom_dir, folder, **parameters)
    dataset = FastMRIDataset(split_volumes(config)["test"], config, load_annotations(config))
    return systems.build(config), systems.batch_of(dataset, rows)


# ------------------------------------------------------------------------------------------ loading from a folder


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["60KB", "5GB"])
def test_folder(kind, max_shard_size, tmp_path):
    original = make(kind)
    original.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = load_backbone("", tmp_path)
    ids = torch.arange(12)[None]
    assert type(loaded) is type(original) and not loaded.training
    assert torch.equal(loaded(ids).logits, original(ids).logits)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == "60KB")
    if len(files) > 1:
        files[1].write_bytes(files[1].read_bytes()[:-10])
        with pytest.raises(ValueError, match=rf"{files[1].name} is not a whole safetensors"):
            load_backbone("", tmp_path)
        files[1].unlink()
        with pytest.raises(FileNotFoundError, match=files[1].name):
            load_backbone("", tmp_path)


@pytest.mark.parametrize("max_shard_size", ["60KB", "5GB"])
def test_folder_with_misfits_is_refused_with_their_names(kind, max_shard_size, tmp_path):
    make(kind).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: torch.zeros(3, 5), "surprise": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="wrong shape") as caught:
        load_backbone("", tmp_path)
    assert name.rpartition(".")[0].removeprefix("transformer.").removeprefix("model.") in str(caught.value)
    if max_shard_size == "5GB":  # in shards the library reads only tensors that the index lists
        assert "surprise" in str(caught.value)


def test_tokenizer_of_another_model_is_never_used(kind, phantom_dir, tmp_path):
    """Mistral's is Nirvana's; for other models a folder without a tokenizer is an error."""
    make(kind, vocab_size=32000).save_pretrained(tmp_path)
    parameters = systems.stage1_config(phantom_dir, tmp_path)
    if kind == "transformer_rnn":
        assert len(two_stage.build_backbone(parameters, "cpu")[1]) == 32000
    else:
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json.*tokenizer_path"):
            two_stage.build_backbone(parameters, "cpu")


# ------------------------------------------------------------------------------------------------- both stages


@pytest.mark.parametrize(
    "family",
    [name if name in (*KINDS, *QUICK) else pytest.param(name, marks=pytest.mark.fullsize) for name in FAMILIES],
)
def test_both_stages_and_generation(family, tokenizer, phantom_dir, tmp_path):
    """Gradients reach the trained part alone; a row generated in a batch equals the row alone. Or the known failure."""
    if family in FAILURES:
        with pytest.raises(Exception, match=FAILURES[family]):
            run_both_stages(family, tokenizer, phantom_dir, tmp_path)
    else:
        run_both_stages(family, tokenizer, phantom_dir, tmp_path)


def run_both_stages(family, tokenizer, phantom_dir, folder):
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    backbone = make(family, **ends)
    width = two_stage.hidden_size(backbone)
    tiny_nirvana.save(backbone, tokenizer, folder)
    system, batch = build(folder, phantom_dir, 2, activation_checkpointing=family in KINDS)
    before = two_stage.fingerprint(system)

    system.freeze("encoder")
    system.train()
    loss = system.analysis_loss(batch).loss
    loss.backward()
    assert loss.isfinite()
    system.check_gradients()
    prefix = system.encoder(batch.kspace, batch.mask)
    assert prefix.shape[-1] == width
    system.zero_grad()

    (folder / "checkpoint.pt").touch()
    config = systems.stage2_config(phantom_dir, folder, folder / "checkpoint.pt")
    system.decoder = build_decoder(config, width)
    system.freeze("decoder")
    system.train()
    with torch.no_grad():
        tokens = system.image_tokens(batch)
    assert tokens.shape == (2, (systems.SIZE // 16) ** 2, width) and tokens.isfinite().all()
    system.reconstruct(batch, tokens).sum().backward()
    system.check_gradients()

    prompts = ["Describe this scan.", "What do you see on this scan? Say it in one or two sentences."]
    together = system.generate(prefix, prompts, 8)
    alone = [system.generate(prefix[i : i + 1], [prompts[i]], 8)[0] for i in range(2)]
    assert together == alone, "a row generated in a batch differs from the row alone"
    assert two_stage.fingerprint(system) == before


def test_sequences_beyond_the_backbones_positions_are_refused(phantom_dir, tmp_path, tokenizer):
    """Beyond learned positions a CPU raises an index error, and a GPU ends the process by a failed assertion."""
    short = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    tiny_nirvana.save(AutoModelForCausalLM.from_config(short), tokenizer, tmp_path)
    system, batch = build(tmp_path, phantom_dir, 1)
    prefix = torch.zeros(1, (systems.SIZE // 16) ** 2 + 2, 32)
    assert system.hidden_states(prefix).shape == (1, 16, 32)  # 18 tokens
    for run in (
        lambda: system.analysis_loss_from_prefix(prefix, batch.slices),
        lambda: system.generate(prefix, ["Describe"], 20),
        lambda: system.hidden_states(torch.zeros(1, 27, 32)),
    ):
        with pytest.raises(ValueError, match="has 24 positions"):
            run()


def test_run_record_has_the_delta_rule_path(kind, phantom_dir):
    config = systems.stage1_config(phantom_dir, Path(__file__).parent, mixed_precision="bf16")
    path = two_stage.delta_rule_path(make(kind), config)["path"]
    assert path == ("plain" if kind == "transformer_rnn" else "none")


# ---------------------------------------------------------------------------------------------- frozen weights


def test_frozen_layers_recompute_in_eval_mode(kind):
    """Same gradients, each layer run twice, less memory; decoding is not recomputed."""
    backbone = make(kind)
    x = torch.randn(2, 90, two_stage.hidden_size(backbone))
    runs = []
    mlp = next(m for m in backbone.modules() if type(m).__name__.endswith("MLP"))
    mlp.register_forward_pre_hook(lambda *_: runs.append(1))  # not a forward hook: recomputation may stop before it

    def measure():
        runs.clear()
        leaf = x.clone().requires_grad_()
        with backbone_speed.SavedTensors(backbone) as saved:
            loss = backbone(inputs_embeds=leaf, use_cache=False).logits.square().mean()
        loss.backward()
        return leaf.grad, saved.bytes, len(runs)

    plain, plain_bytes, plain_runs = measure()
    assert two_stage.checkpoint_layers(backbone) == 3
    assert not any(module.training for module in backbone.modules())
    recomputed, recomputed_bytes, recomputed_runs = measure()
    torch.testing.assert_close(recomputed, plain)
    assert (plain_runs, recomputed_runs) == (1, 2)
    assert recomputed_bytes < 0.5 * plain_bytes
    ids = torch.arange(9)[None]
    with torch.no_grad():
        backbone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    leaf = x.clone().requires_grad_()  # with gradients and a cache, which must be written only once
    cached = backbone(inputs_embeds=leaf, use_cache=True)
    cached.logits.square().mean().backward()
    torch.testing.assert_close(leaf.grad, plain)
    assert cached.past_key_values.get_seq_length() == 90


def test_frozen_weights_cost_no_gradients(kind):
    """Backward to the inputs takes as many products as forward; trained weights double them and save more."""
    backbone = make(kind)
    x = torch.randn(1, 70, two_stage.hidden_size(backbone))

    def measure():
        leaf = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as forward, backbone_speed.SavedTensors(backbone) as saved:
            loss = backbone(inputs_embeds=leaf, use_cache=False).logits.square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts = [counter.get_flop_counts()["Global"] for counter in (forward, backward)]
        products = [sum(count.get(op, 0) for op in WEIGHT_PRODUCTS) for count in counts]
        return products[1] / products[0], saved.bytes

    ratio, saved_bytes = measure()
    assert all(p.grad is None for p in backbone.parameters())
    assert ratio == pytest.approx(1, rel=1e-3)
    backbone.requires_grad_(True)
    trained_ratio, trained_bytes = measure()
    assert trained_ratio == pytest.approx(2, rel=1e-3)
    assert saved_bytes < trained_bytes


def test_model_that_names_no_layers_is_refused():
    backbone = make("transformer_rnn")
    backbone._no_split_modules = None
    with pytest.raises(ValueError, match="activation_checkpointing"):
        two_stage.checkpoint_layers(backbone)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text"])
def test_embeddings_are_measured_as_the_backbone_uses_them(family, tokenizer):
    """Gemma's embedding module multiplies its matrix by the root of the width."""
    backbone = make(family, hidden_size=64, pad_token_id=0)
    used = backbone.get_input_embeddings()(torch.arange(VOCABULARY))
    factor = 1 if family == "llama" else 8
    assert torch.allclose(used, factor * two_stage.word_embeddings(backbone))
    assert two_stage.embedding_rms(backbone) == used.square().mean().sqrt().item()
    ids = tokenizer(" brain", add_special_tokens=False)["input_ids"]
    words = two_stage.word_vectors(["brain"], backbone, tokenizer)
    if "<brain>" not in tokenizer.get_vocab():
        torch.testing.assert_close(words[0], used[torch.tensor(ids)].mean(0))
