"""Other language models in the backbone's place: Llama, GPT-2 and Qwen, made on the spot, beside Nirvana.

Loaded from a folder, whole or in shards; in both stages and in generation; frozen, with and without recomputing.
"""

from pathlib import Path

import pytest
import systems
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mrilib.backbone.nirvana import NirvanaConfig, load_backbone
from mrilib.comparison import backbone_speed
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.splits import load_annotations, split_volumes
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.pretrain import corpus, tiny_nirvana

WIDTHS = {"llama": 48, "gpt2": 40, "qwen2": 56, "qwen3": 64, "nirvana": 32}
VOCABULARY = 500


def config_of(kind: str) -> PreTrainedConfig:
    width = WIDTHS[kind]
    rope = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    if kind == "llama":
        return LlamaConfig(**rope, tie_word_embeddings=False)
    if kind == "qwen2":
        return Qwen2Config(**rope, tie_word_embeddings=True)
    if kind == "qwen3":
        return Qwen3Config(**rope, head_dim=8, tie_word_embeddings=True)
    if kind == "gpt2":
        return GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=3, n_head=4, n_positions=512)
    return NirvanaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=3, num_heads=2, concept_dim=8, logit_dim=4
    )


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(kind)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(vocab_size=VOCABULARY, texts=50)


@pytest.fixture(params=WIDTHS)
def kind(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("shards", [False, True])
def test_folder(kind, shards, tmp_path):
    original = make(kind)
    original.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "5GB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == shards
    found = load_backbone("", tmp_path)
    ids = torch.arange(12)[None]
    assert type(found) is type(original) and not found.training
    assert torch.equal(found(ids).logits, original(ids).logits)
    if not shards:
        return
    files[1].write_bytes(files[1].read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{files[1].name} is not a whole safetensors"):
        load_backbone("", tmp_path)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        load_backbone("", tmp_path)


@pytest.mark.parametrize("shards", [False, True])
def test_folder_that_does_not_fit_lists_names(kind, shards, tmp_path):
    make(kind).save_pretrained(tmp_path, max_shard_size="60KB" if shards else "5GB")
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    names = sorted(tensors)
    tensors[names[0]] = torch.zeros(3, 5)
    tensors["surprise"] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        load_backbone("", tmp_path)
    base = names[0].rpartition(".")[0].removeprefix("transformer.").removeprefix("model.")
    assert "wrong shape" in str(caught.value) and base in str(caught.value)
    if not shards:  # the library reads of a sharded file what the index lists
        assert "surprise" in str(caught.value)


def test_both_stages_and_generation(kind, tokenizer, phantom_dir, tmp_path):
    """The encoder's width follows the backbone's; gradients reach the trained part alone; text comes out."""
    tiny_nirvana.save(make(kind), tokenizer, tmp_path)
    config = systems.stage1_config(phantom_dir, tmp_path, activation_checkpointing=True)
    system = systems.build(config)
    dataset = FastMRIDataset(split_volumes(config)["test"], config, load_annotations(config))
    batch = systems.batch_of(dataset, 2)
    before = two_stage.fingerprint(system)

    system.freeze("encoder")
    system.train()
    system.analysis_loss(batch).loss.backward()
    system.check_gradients()
    prefix = system.encoder(batch.kspace, batch.mask)
    assert prefix.shape[-1] == WIDTHS[kind]
    system.zero_grad()

    (tmp_path / "checkpoint.pt").touch()
    config2 = systems.stage2_config(phantom_dir, tmp_path, tmp_path / "checkpoint.pt")
    system.decoder = build_decoder(config2, two_stage.hidden_size(system.backbone))
    system.freeze("decoder")
    system.train()
    with torch.no_grad():
        tokens = system.image_tokens(batch)
    assert tokens.shape == (2, (systems.SIZE // 16) ** 2, WIDTHS[kind])
    system.reconstruct(batch, tokens).sum().backward()
    system.check_gradients()

    prompts = ["Describe this scan.", "What do you see on this scan? Say it in one or two sentences."]
    together = system.generate(prefix, prompts, 8)
    alone = [system.generate(prefix[i : i + 1], [prompts[i]], 8)[0] for i in range(2)]
    assert together == alone and len(together) == 2
    assert two_stage.fingerprint(system) == before


def test_frozen_layers_recompute_in_eval_mode(kind):
    """Same gradients, each layer run once more, and far less kept; passes that decode are as before."""
    language_model = make(kind)
    x = torch.randn(2, 90, WIDTHS[kind])
    runs = []
    inner = next(m for m in language_model.modules() if type(m).__name__.endswith("MLP"))
    inner.register_forward_pre_hook(lambda *_: runs.append(1))  # the end of a layer is not run again

    def gradient():
        runs.clear()
        leaf = x.clone().requires_grad_()
        with backbone_speed.SavedTensors(language_model) as saved:
            loss = language_model(inputs_embeds=leaf, use_cache=False).logits.square().mean()
        loss.backward()
        return leaf.grad, saved.bytes, len(runs)

    plain, plain_bytes, plain_runs = gradient()
    assert two_stage.checkpoint_layers(language_model) == 3
    assert not any(module.training for module in language_model.modules())
    recomputed, recomputed_bytes, recomputed_runs = gradient()
    torch.testing.assert_close(recomputed, plain)
    assert (plain_runs, recomputed_runs) == (1, 2)
    assert recomputed_bytes < 0.5 * plain_bytes
    ids = torch.arange(9)[None]
    with torch.no_grad():
        language_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    leaf = x.clone().requires_grad_()  # with a graph and a cache: written once
    cached = language_model(inputs_embeds=leaf, use_cache=True)
    cached.logits.square().mean().backward()
    torch.testing.assert_close(leaf.grad, plain)
    assert cached.past_key_values.get_seq_length() == 90


def test_frozen_weights_cost_no_gradients(kind):
    """Backward to the inputs: as many products as forward, the weights' would double them; and less is kept."""
    language_model = make(kind)
    x = torch.randn(1, 70, WIDTHS[kind])

    def run():
        leaf = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as forward, backbone_speed.SavedTensors(language_model) as saved:
            loss = language_model(inputs_embeds=leaf, use_cache=False).logits.square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        products = [sum(f.get_flop_counts()["Global"].get(op, 0) for op in LINEAR) for f in (forward, backward)]
        return products[1] / products[0], saved.bytes

    ratio, kept = run()
    assert all(p.grad is None for p in language_model.parameters())
    assert ratio == pytest.approx(1, rel=1e-3)
    language_model.requires_grad_(True)
    ratio_trained, kept_trained = run()
    assert ratio_trained == pytest.approx(2, rel=1e-3)
    assert kept < kept_trained


LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)  # products with weights; those between activations are batched


def test_another_models_tokenizer_is_never_put_in_its_place(kind, phantom_dir, tmp_path):
    """Mistral's belongs to Nirvana alone; a folder without its tokenizer is an error for the others."""
    config = config_of(kind)
    config.vocab_size = 32000
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    parameters = systems.stage1_config(phantom_dir, tmp_path)
    if kind == "nirvana":
        assert len(two_stage.build_backbone(parameters, "cpu")[1]) == 32000
    else:
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json.*tokenizer_path"):
            two_stage.build_backbone(parameters, "cpu")


def test_sequences_beyond_the_backbones_positions_are_refused(phantom_dir, tmp_path, tokenizer):
    """Learned positions end: on a CPU an index error, on a GPU a failed assertion that ends the process."""
    short = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    tiny_nirvana.save(AutoModelForCausalLM.from_config(short), tokenizer, tmp_path)
    config = systems.stage1_config(phantom_dir, tmp_path)
    system = systems.build(config)
    dataset = FastMRIDataset(split_volumes(config)["test"], config, load_annotations(config))
    batch = systems.batch_of(dataset, 1)
    prefix = torch.zeros(1, (systems.SIZE // 16) ** 2 + 2, 32)
    assert system.hidden_states(prefix).shape == (1, 16, 32)  # 18 tokens
    for run in (
        lambda: system.analysis_loss_from_prefix(prefix, batch.slices),
        lambda: system.generate(prefix, ["Describe"], 20),
        lambda: system.hidden_states(torch.zeros(1, 27, 32)),
    ):
        with pytest.raises(ValueError, match="has 24 positions"):
            run()


def test_a_model_that_names_no_layers_is_refused():
    language_model = make("nirvana")
    language_model._no_split_modules = None
    with pytest.raises(ValueError, match="activation_checkpointing"):
        two_stage.checkpoint_layers(language_model)


def test_delta_rule_is_told_for_the_record(kind, phantom_dir):
    config = systems.stage1_config(phantom_dir, Path(__file__).parent, mixed_precision="bf16")
    told = two_stage.delta_rule_path(make(kind), config)
    assert told["path"] == ("plain" if kind == "nirvana" else "none")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text"])
def test_embeddings_are_measured_as_the_backbone_uses_them(family, tokenizer):
    """Gemma's embedding module multiplies its matrix by the root of the width."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = AutoConfig.for_model(family, **sizes, **heads, pad_token_id=0)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    used = backbone.get_input_embeddings()(torch.arange(VOCABULARY))
    factor = 1 if family == "llama" else 8
    assert torch.allclose(used, factor * two_stage.word_embeddings(backbone))
    assert two_stage.embedding_rms(backbone) == used.square().mean().sqrt().item()
    ids = tokenizer(" brain", add_special_tokens=False)["input_ids"]
    words = two_stage.word_vectors(["brain"], backbone, tokenizer)
    if "<brain>" not in tokenizer.get_vocab():
        torch.testing.assert_close(words[0], used[torch.tensor(ids)].mean(0))
