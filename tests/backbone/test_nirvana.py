"""The backbone: outputs of the published architecture, cache, gradients, generation, arguments, offloading.

Largest absolute errors, for hidden states up to 7: 8e-5 for golden outputs, which themselves differ by 1.2e-4 from a
run in double precision; 7e-5 between cached steps and one full pass.
"""

import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mrilib.backbone import nirvana
from mrilib.backbone.nirvana import (
    Linear,
    NirvanaCache,
    NirvanaConfig,
    NirvanaForCausalLM,
    load_backbone,
)
from mrilib.backbone.trigger import EPS, RATE, TriggerWeights

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "nirvana_small"
PUBLISHED = ROOT / "models" / "nirvana_1_3B.json"


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture
def model():
    return load_backbone(GOLDEN / "config.json", GOLDEN / "model.safetensors").requires_grad_(False)


def small(**changes):
    """A small model with large random weights, so that every term matters."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    return NirvanaForCausalLM(NirvanaConfig(**{**sizes, "concept_dim": 6, "logit_dim": 3, **changes})).eval()


def error(a, b, keep=None):
    difference = (a - b).abs()
    return (difference if keep is None else difference[keep.bool()]).max().item()


# --- exactness


@torch.no_grad()
def test_golden(model, io):
    out = model(io["input_ids"], attention_mask=io["attention_mask"], output_hidden_states=True)
    assert len(out.hidden_states) == 5
    for i, hidden in enumerate(out.hidden_states):
        assert error(hidden, io[f"hidden_states.{i}"], io["attention_mask"]) < 1e-4, f"hidden_states.{i}"
    assert error(out.logits, io["logits"], io["attention_mask"]) < 1e-4
    last = model.model(inputs_embeds=io["inputs_embeds"], attention_mask=io["attention_mask"]).last_hidden_state
    assert error(last, io["last_hidden_from_embeds"], io["attention_mask"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, io, side):
    """Rows of different length in one batch equal the golden prefixes; the last row is all padding."""
    lengths = (130, 37, 1, 0)
    ids, mask = torch.full((4, 130), 2), torch.zeros(4, 130, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(130 - n, 130) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = io["input_ids"][0, :n], 1
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for row, n in enumerate(lengths):
        if n:
            assert error(logits[row][mask[row].bool()], io["logits"][0, :n]) < 1e-4, n


@torch.no_grad()
@pytest.mark.parametrize("window_size", [2048, 16, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_steps_equal_one_pass(model, io, window_size, padded):
    """In double precision; in single precision linear maps alone cause errors of 2.5e-4 on some processors."""
    model.double()
    model.config.window_size = window_size
    ids = io["input_ids"][:, :100]
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :17] = 0
    full = model(ids, attention_mask=mask if padded else None).logits
    for first in (1, 40):
        cache, parts, done = None, [], 0
        for n in (first, 1, 3, *([1] * (96 - first))):
            out = model(
                ids[:, done : done + n],
                attention_mask=mask[:, : done + n] if padded else None,
                past_key_values=cache,
                use_cache=True,
            )
            cache, done = out.past_key_values, done + n
            parts.append(out.logits)
        assert done == 100 and cache.get_seq_length() == 100
        assert error(torch.cat(parts, 1), full, mask) < 1e-4, first


@torch.no_grad()
def test_window_hides_older_tokens():
    """With one attention layer and no delta output, a token acts only within the window."""
    model = small(window_size=5, num_hidden_layers=3)
    for layer in model.model.layers:
        layer.Task_Aware_Delta_Net.o_proj.weight.zero_()
    ids = torch.arange(20)[None]
    changed = ids.clone()
    changed[0, 7] = 49
    differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


@torch.no_grad()
def test_cache_size_is_bounded():
    model = small(window_size=16)
    cache = model(torch.zeros(1, 40, dtype=torch.long), use_cache=True).past_key_values
    sizes = []
    for _ in range(200):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        sizes.append(sum(x.numel() for layer in cache.layers for x in layer.tensors()))
    assert max(sizes[100:]) <= max(sizes[:100]) and cache.token_count == 240


def test_trigger_equals_autograds_gradient_step():
    """The expected step forms W_t for every token."""
    torch.manual_seed(1)
    width, versions = 5, 3
    router = TriggerWeights(width, versions).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    c_q, c_k, c_v = torch.randn(3, 2, 7, width)
    theta = tuple(torch.randn(4, 2, 7, versions).requires_grad_())
    h, new = router(c_q, c_k, c_v, theta)
    weights = (router.weight_linear, router.weight_ln, router.bias_linear, router.bias_ln)

    def apply(c, thetas, stop):
        pairs = zip(weights, thetas, strict=True)
        big_w, w, b, bias = (torch.einsum("...l,btl->bt...", x.float(), t) for x, t in pairs)
        z = torch.einsum("bti,btio->bto", c, big_w) + b
        mean, var = z.mean(-1, keepdim=True), z.var(-1, correction=0, keepdim=True)
        if stop:  # mean and deviation are constants in the formula's gradient
            mean, var = mean.detach(), var.detach()
        return w * (z - mean) / (var + EPS).sqrt() + bias + c

    loss = 0.5 * (apply(c_k, theta, True) - c_v).square().sum()
    expected = [t - RATE * g for t, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)]
    for a, b in zip(new, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(h, apply(c_q, expected, False), atol=1e-4, rtol=1e-4)


def test_trigger_computes_in_float32_under_autocast():
    torch.manual_seed(1)
    router = TriggerWeights(5, 3)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    concepts = torch.randn(3, 2, 7, 5)
    h, theta = router(*concepts, None)
    with torch.autocast("cpu", torch.bfloat16):
        h_auto, theta_auto = router(*concepts, None)
    for a, b in zip((h_auto, *theta_auto), (h, *theta), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# --- gradients


def test_input_gradients_equal_finite_differences():
    """Along a random direction; frozen weights get no gradient."""
    model = small().requires_grad_(False)
    x = torch.randn(2, 9, 32).requires_grad_()
    labels = torch.randint(50, (2, 9))
    loss = model(inputs_embeds=x, labels=labels).loss
    (grad,) = torch.autograd.grad(loss, x)
    direction = torch.randn_like(x)
    direction /= direction.norm()
    step = 1e-2
    with torch.no_grad():
        up, down = (model(inputs_embeds=x + s * step * direction, labels=labels).loss for s in (1, -1))
    assert (up - down).item() / (2 * step) == pytest.approx((grad * direction).sum().item(), rel=2e-2, abs=1e-3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_gives_the_same_gradients():
    """In eval mode, the mode of a frozen backbone."""
    model = small()
    x = torch.randn(2, 70, 32)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.square().mean().backward()
        grads.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert all(g is not None for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    cache = NirvanaCache(model.config)
    with pytest.raises(ValueError, match=r"past_key_values.*gradient checkpointing"):
        model(inputs_embeds=x, past_key_values=cache)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_turns_the_cache_off_with_one_warning(monkeypatch):
    """As transformers' own models do: a training loop may pass use_cache=True, or leave it to the config."""
    warnings = []
    monkeypatch.setattr(nirvana.logger, "warning", warnings.append)
    type(nirvana.logger).warning_once.cache_clear()
    ids = torch.randint(50, (2, 9))
    losses = []
    for arguments in ({"use_cache": False}, {"use_cache": True}, {}):
        model = small(use_cache=True).train()
        model.gradient_checkpointing_enable()
        output = model(ids, labels=ids, **arguments)
        output.loss.backward()
        assert output.past_key_values is None
        losses.append(output.loss.item())
    assert losses[0] == losses[1] == losses[2]
    assert len(warnings) == 1 and "use_cache=False" in warnings[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padded_rows_are_finite(side):
    """One row is all padding: no NaN, and no gradient at padding."""
    model = small().requires_grad_(False)
    x = torch.randn(3, 70, 32).requires_grad_()
    mask = torch.ones(3, 70, dtype=torch.long)
    mask[1, slice(0, 20) if side == "left" else slice(50, 70)] = 0
    mask[2] = 0
    hidden = model.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
    hidden[mask.bool()].square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~mask.bool()] == 0).all() and (x.grad[mask.bool()] != 0).any(-1).all()


def test_loss_equals_cross_entropy():
    model = small()
    ids = torch.randint(50, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    half = model(ids, labels=labels, num_items_in_batch=26).loss  # of 13 labels
    assert half.item() == pytest.approx(expected.item() / 2, rel=1e-5)
    assert error(model(ids, logits_to_keep=2).logits, out.logits[:, -2:]) < 1e-5
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=labels, logits_to_keep=1)


def test_bfloat16_is_close_to_float32():
    model = small().to(torch.bfloat16)
    exact = small()
    ids = torch.randint(50, (1, 70))
    with torch.no_grad():
        a, b = model(ids, use_cache=True).logits.float(), exact(ids).logits
    assert a.isfinite().all() and (a - b).norm() < 0.1 * b.norm()


# --- generation


@torch.no_grad()
def test_generate_equals_recomputing(model, io):
    """Greedy decoding from ids, from embeddings and with left padding gives the tokens of a loop without cache."""
    ids = io["input_ids"][:, :30]
    expected = ids
    for _ in range(12):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **settings), expected[:, 30:])
    padded = torch.cat((torch.zeros_like(embeds[:, :7]), embeds), 1)
    mask = torch.cat((torch.zeros_like(ids[:, :7]), mask), 1)
    assert torch.equal(model.generate(inputs_embeds=padded, attention_mask=mask, **settings), expected[:, 30:])


@torch.no_grad()
def test_generate_uses_the_cache_without_use_cache_in_the_config(model, io):
    assert model.config.use_cache is False
    lengths = []
    model.model.layers[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    out = model.generate(
        io["input_ids"][:1, :30], attention_mask=torch.ones(1, 30), max_new_tokens=5, eos_token_id=None,
        do_sample=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert lengths == [30, 1, 1, 1, 1]
    assert isinstance(out.past_key_values, NirvanaCache)


@torch.no_grad()
def test_beam_search_reorders_the_cache(model, io):
    """The score of the best beam equals that of its tokens in one full pass."""
    ids = io["input_ids"][:, :20]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=8, eos_token_id=None, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    log_p = model(out.sequences).logits[:, 19:-1].log_softmax(-1)
    full = log_p.gather(-1, out.sequences[:, 20:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, full, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_wide_map_of_one_row_equals_the_product():
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((640, 160), (640, 167), (5000, 15), (640, 7), (96, 1)):
        linear = Linear(inputs, outputs)
        torch.nn.init.normal_(linear.weight, generator=generator)
        for shape in ((1, 1, inputs), (1, inputs), (inputs,)):
            x = torch.randn(shape, generator=generator)
            expected = (x.double() @ linear.weight.double().t()).float()
            torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_wide_models_decode_step_by_step():
    config = NirvanaConfig(vocab_size=300, hidden_size=640, num_hidden_layers=4, num_heads=5, initializer_range=0.02)
    torch.manual_seed(0)
    wide = NirvanaForCausalLM(config).eval()
    assert not any(m.fills_tiles for m in wide.modules() if isinstance(m, Linear))
    ids = torch.randint(300, (1, 90))
    full = wide(ids).logits
    out = wide(ids[:, :40], use_cache=True)
    parts = [out.logits]
    for t in range(40, 90):
        out = wide(ids[:, t : t + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=5e-5 * full.abs().max().item())


# --- arguments and configuration


def test_wrong_arguments_are_refused(model):
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(2, 5, 64))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 5\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    for empty in (ids[:, :0], ids[:0], ids[0]):
        with pytest.raises(ValueError, match=r"input_ids must have shape \(B, T\)"):
            model(empty)
    with pytest.raises(ValueError, match=r"d = 64.*got \(2, 5, 63\)"):
        model(inputs_embeds=torch.zeros(2, 5, 63))
    with pytest.raises(NotImplementedError, match="cropped"):
        NirvanaCache(model.config).crop(3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_heads", 5),
        ("vocab_size", 0),
        ("window_size", None),
        ("concept_dim", "64"),
        ("logit_dim", 4.0),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("hidden_size", 8),
        ("head_dim", 17),
        ("intermediate_size", 1024),
    ],
)
def test_config_refuses(key, value):
    with pytest.raises(ValueError, match=key):
        NirvanaConfig(**{"hidden_size": 64, "num_heads": 4, key: value})


def test_config_accepts_derived_sizes():
    """Other tools write them; a round trip keeps them."""
    config = NirvanaConfig(hidden_size=64, num_heads=4, head_dim=16, intermediate_size=256, dtype="bfloat16")
    copy = NirvanaConfig.from_dict(config.to_dict())
    assert (copy.head_dim, copy.intermediate_size) == (16, 256)


def test_published_config(tmp_path):
    shutil.copy(PUBLISHED, tmp_path / "config.json")
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, NirvanaConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.num_heads, config.head_dim) == (2048, 22, 16, 128)
    assert (config.intermediate_size, config.concept_dim, config.logit_dim, config.window_size) == (5632, 64, 32, 2048)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert 1.2e9 < sum(p.numel() for p in model.parameters()) < 1.4e9


def test_initial_weights():
    model = small(initializer_range=0.02)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.lm_head.weight is model.model.embeddings.weight
    w = model.model.rnn_router.weight_ln
    torch.testing.assert_close(w.sum(-1), torch.ones(6))
    delta = model.model.layers[0].Task_Aware_Delta_Net
    decay = delta.A_log.exp() * torch.nn.functional.softplus(delta.dt_bias)
    assert (decay > 0).all() and (decay < 2).all()


# --- offloading


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", "disk", "blocks on disk"])
def test_offloaded_weights_give_the_same(model, io, tmp_path, how):
    """accelerate's hooks load a module's weights when it is called; code that bypasses the call finds no weights."""
    ids, mask = io["input_ids"], io["attention_mask"]
    expected = model(ids, attention_mask=mask).logits
    text = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=4, min_new_tokens=4)
    if how == "cpu":
        offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        offloaded = accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        places = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.model.layers))}
        rest = dict.fromkeys(("model.embeddings", "model.norm", "lm_head"), "cpu")
        offloaded = accelerate.load_checkpoint_and_dispatch(
            model,
            str(GOLDEN / "model.safetensors"),
            device_map={**places, **rest, "model.rnn_router": "disk"},
            offload_folder=tmp_path,
        )
    names = ("q_conv1d.weight", "rnn_router.weight_linear")
    assert all(any(x.is_meta for n, x in offloaded.named_parameters() if n.endswith(name)) for name in names)
    assert torch.equal(offloaded(ids, attention_mask=mask).logits, expected)
    offloaded_text = offloaded.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=4, min_new_tokens=4
    )
    assert torch.equal(offloaded_text, text)
