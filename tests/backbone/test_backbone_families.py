"""Families of Hugging Face causal language models in the backbone's place: the table in docs/backbones.md.

A tiny random model of each family, from the library's own config class, goes through loading, both stages and
generation. A few kinds run with every suite, all of them with
`pytest -m fullsize tests/backbone/test_backbone_families.py`.
"""

from typing import Any

import pytest
import systems
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mrilib.data.dataset import FastMRIDataset
from mrilib.data.splits import load_annotations, split_volumes
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.pretrain import corpus, tiny_nirvana

VOCABULARY = 500
WIDTH = 32
QUICK = (
    "gemma3_text",
    "mamba2",
    "mixtral",
)  # test_loading.py has Llama, GPT-2, Qwen2, Qwen3, Nirvana

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

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": HEADS,
    "ministral": HEADS,
    "mixtral": EXPERTS,
    "qwen2": BASE,
    "qwen2_moe": {**MANY, "shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
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
    "gpt2": SHORT,
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
LACKS = {  # families that fail, and the words of the failure
    "gemma4_text": "needs to reverse the embedding",
    "falcon_h1": REFUSED,
    "bamba": REFUSED,
    "zamba2": REFUSED,
    "rwkv": REFUSED,
    "minimax": PADDING,
}


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(vocab_size=VOCABULARY, texts=50)


@pytest.mark.parametrize(
    "family", [one if one in QUICK else pytest.param(one, marks=pytest.mark.fullsize) for one in FAMILIES]
)
def test_family(family, tokenizer, phantom_dir, tmp_path):
    """Both stages, and generation in a batch as alone; or the failure that the table gives."""
    if family in LACKS:
        with pytest.raises(Exception, match=LACKS[family]):
            run(family, tokenizer, phantom_dir, tmp_path)
    else:
        run(family, tokenizer, phantom_dir, tmp_path)


def run(family, tokenizer, phantom_dir, folder):
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **ends))
    tiny_nirvana.save(made, tokenizer, folder)
    config = systems.stage1_config(phantom_dir, folder)
    system = systems.build(config)
    dataset = FastMRIDataset(split_volumes(config)["test"], config, load_annotations(config))
    batch = systems.batch_of(dataset, 2)
    before = two_stage.fingerprint(system)

    system.freeze("encoder")
    system.train()
    loss = system.analysis_loss(batch).loss
    loss.backward()
    assert loss.isfinite()
    system.check_gradients()
    prefix = system.encoder(batch.kspace, batch.mask)
    system.zero_grad()

    (folder / "checkpoint.pt").touch()
    config2 = systems.stage2_config(phantom_dir, folder, folder / "checkpoint.pt")
    system.decoder = build_decoder(config2, two_stage.hidden_size(system.backbone))
    system.freeze("decoder")
    system.train()
    with torch.no_grad():
        tokens = system.image_tokens(batch)
    assert tokens.shape == (2, (systems.SIZE // 16) ** 2, WIDTH) and tokens.isfinite().all()
    system.reconstruct(batch, tokens).sum().backward()
    system.check_gradients()

    prompts = ["Describe this scan.", "What do you see on this scan? Say it in one or two sentences."]
    together = system.generate(prefix, prompts, 8)
    alone = [system.generate(prefix[i : i + 1], [prompts[i]], 8)[0] for i in range(2)]
    assert together == alone, "a row generated in a batch differs from the row alone"
    assert two_stage.fingerprint(system) == before
