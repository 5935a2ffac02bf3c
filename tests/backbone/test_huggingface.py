"""The backbone with Hugging Face libraries and torch: Trainer, pipelines, PEFT, TRL, torch.compile and export."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, DynamicCache, Trainer, TrainingArguments, pipeline

import mrilib
from mrilib.backbone.nirvana import NirvanaCache, NirvanaConfig, NirvanaForCausalLM

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny_backbone"


def small(**changes):
    """A small model with large random weights, so that every term matters."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    return NirvanaForCausalLM(NirvanaConfig(**{**sizes, "concept_dim": 6, "logit_dim": 3, **changes})).eval()


def texts(*lengths):
    """Rows of random tokens without padding: a data set for a Trainer."""
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, 50, (n,))} for n in lengths]


def pad(rows):
    """A batch of rows, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.full((len(rows), width), 2), "attention_mask": torch.zeros(len(rows), width).long()}
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row["input_ids"])] = row["input_ids"]
        batch["attention_mask"][i, : len(row["input_ids"])] = 1
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def trainer(model, directory, rows, **settings):
    arguments = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
                 "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
                 "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(directory), **{**arguments, **settings}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=pad,
    )


# --- the package's top level


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("first", ["import mrilib", "from transformers import AutoModelForCausalLM"])
def test_import_mrilib_registers_the_backbone(first):
    """In either order; `import mrilib` alone loads neither torch nor transformers."""
    out = run_python(
        f"{first}\nimport mrilib, sys\nprint('torch' in sys.modules)\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained('models/tiny_backbone')).__name__)\n"
        "print(mrilib.NirvanaForCausalLM.__module__)"
    )
    loaded, name, module = out.split()
    assert loaded == str(first != "import mrilib")
    assert (name, module) == ("NirvanaForCausalLM", "mrilib.backbone.nirvana")


def test_model_card_says_to_import_mrilib():
    assert "import mrilib" in (TINY / "README.md").read_text(encoding="utf-8")


def test_model_card_names_the_modules_that_lora_can_adapt():
    import peft

    card = (TINY / "README.md").read_text(encoding="utf-8")
    names = re.findall(r'"(\w+)"', re.search(r"target_modules=\[(.*?)\]", card, re.DOTALL)[1])
    linear = {name.split(".")[-1] for name, one in small().named_modules() if isinstance(one, torch.nn.Linear)}
    assert set(names) == {name for name in linear if name.endswith("_proj")}
    model = peft.get_peft_model(small(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names)).train()
    model(**pad(texts(9, 5))).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("NirvanaConfig", "backbone.nirvana"),
        ("NirvanaForCausalLM", "backbone.nirvana"),
        ("gated_delta_rule", "backbone.delta_rule"),
        ("KSpaceEncoder", "model.encoder"),
        ("ImageDecoder", "model.decoder"),
        ("TwoStageModel", "model.two_stage"),
        ("FastMRIDataset", "data.dataset"),
        ("evaluate_volumes", "evaluation.reconstructions"),
    ],
)
def test_public_names(name, module):
    assert getattr(mrilib, name).__module__ == f"mrilib.{module}"
    assert name in dir(mrilib)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = mrilib.nonsense


def test_supported_transformers_versions_are_tested():
    """The bounds in pyproject.toml are the versions of `make test-transformers`; the installed one is within."""
    bounds = next(
        line
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("transformers")
    )
    tested = re.findall(r"transformers==([\d.]+)", (ROOT / "Makefile").read_text())
    oldest, newest = tested
    major, minor, _ = newest.split(".")
    assert bounds == f"transformers>={oldest},<{major}.{int(minor) + 1}"
    number = [int(part) for part in transformers.__version__.split(".")]
    assert [int(x) for x in oldest.split(".")] <= number <= [int(x) for x in newest.split(".")]


# --- arguments


@torch.no_grad()
def test_usual_arguments_do_not_change_the_result():
    model = small()
    ids = torch.randint(50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(ids, attention_mask=mask).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for positions_of in (positions, torch.arange(9)[None]):
        out = model(ids, attention_mask=mask, position_ids=positions_of, output_attentions=False)
        assert torch.equal(out.logits, expected)
    first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        assert isinstance(cache, NirvanaCache)
        rest = model(ids[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], **{name: cache}).logits
        torch.testing.assert_close(torch.cat((first.logits, rest), 1)[0], expected[0], atol=1e-4, rtol=1e-4)


def test_unsupported_arguments_are_refused():
    model = small()
    ids = torch.zeros(2, 6, dtype=torch.long)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"position_ids start again.*own row"):
        model(ids, position_ids=packed)
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=1)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=NirvanaCache(model.config), past_key_values=NirvanaCache(model.config))
    for name in ("cache", "past_key_values"):
        with pytest.raises(TypeError, match=r"NirvanaCache, got DynamicCache.*use_cache=True.*prefix tuning"):
            model(ids, **{name: DynamicCache()})
    for kind in ("static", "offloaded", "quantized", "paged"):
        with pytest.raises(ValueError, match=rf"cache_implementation='{kind}' is not supported.*leave it out"):
            model.generate(ids, cache_implementation=kind, max_new_tokens=1)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="leave it out"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=packed)


@torch.no_grad()
def test_eager_attention_equals_sdpa():
    """With and without a mask and a window."""
    ids = torch.randint(50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for window_size in (2048, 4):
        model = small(window_size=window_size)
        for attention_mask in (None, mask):
            model.set_attn_implementation("sdpa")
            expected = model(ids, attention_mask=attention_mask).logits
            model.set_attn_implementation("eager")
            called = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("torch.nn.functional.scaled_dot_product_attention", called.append)
                logits = model(ids, attention_mask=attention_mask).logits
            assert not called
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


# --- generation


@torch.no_grad()
def test_stop_strings():
    model = NirvanaForCausalLM.from_pretrained(TINY)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompt = tokenizer("The", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    free = model.generate(**prompt, **settings)
    words = tokenizer.convert_ids_to_tokens(free[0, prompt["input_ids"].shape[1] :])
    at, stop = next((i, word[1:]) for i, word in enumerate(words) if word[0] == "Ġ" and word[1:].isalpha())
    stopped = model.generate(**prompt, **settings, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped.shape[1] == prompt["input_ids"].shape[1] + at + 1
    assert torch.equal(stopped, free[:, : stopped.shape[1]])


@torch.no_grad()
def test_text_generation_pipeline():
    """A left-padded batch of prompts of unequal length gives the texts of each prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    generate = pipeline("text-generation", model=str(TINY), tokenizer=tokenizer, device="cpu")
    prompts = ["The brain", "A mass in the left frontal lobe"]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = generate(prompts, batch_size=2, **settings)
    for prompt, output in zip(prompts, together, strict=True):
        assert output[0]["generated_text"] == generate(prompt, **settings)[0]["generated_text"]


# --- Trainer


def test_trainer_evaluates_and_predicts(tmp_path):
    model, rows = small(use_cache=True), texts(9, 9, 9)
    evaluated = trainer(model, tmp_path, rows)
    assert evaluated.evaluate()["eval_loss"] > 0
    assert evaluated.predict(rows).predictions.shape == (3, 9, 50)


def test_accumulated_gradients_equal_those_of_the_batch(tmp_path):
    """A step on two texts of unequal length equals accumulation over one after the other."""
    rows, updates = texts(30, 5), []
    for size, steps in ((2, 1), (1, 2)):
        model = small()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer(model, tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps).train()
        updates.append(torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()]))
    assert updates[0].norm() > 0
    assert (updates[0] - updates[1]).norm() < 1e-4 * updates[0].norm()


def test_trainer_in_bfloat16_with_checkpointing(tmp_path):
    model = small(use_cache=True)
    before = model.lm_head.weight.detach().clone()
    trainer(model, tmp_path, texts(9, 7), bf16=True, gradient_checkpointing=True).train()
    assert torch.isfinite(model.lm_head.weight).all() and not torch.equal(model.lm_head.weight, before)


# --- PEFT and TRL


def adapted(kind):
    import peft

    settings = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    return peft.get_peft_model(small(), settings[kind]())


@pytest.mark.parametrize("kind", ["lora", "prompt", "ia3"])
def test_peft_trains_and_generates(kind):
    model = adapted(kind).train()
    batch = pad(texts(9, 5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    ids = batch["input_ids"][:1]
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    cached, plain = (
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert cached.shape == (1, 13) and torch.equal(cached, plain)


def test_prefix_tuning_is_refused_with_an_alternative():
    with pytest.raises(TypeError, match=r"prefix tuning.*use prompt tuning or LoRA"):
        adapted("prefix")(**pad(texts(9, 5)))


def test_trl_trains_a_lora_adapter(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=0.1, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, max_length=32,
    )  # fmt: skip
    sft = SFTTrainer(
        NirvanaForCausalLM.from_pretrained(TINY),
        settings,
        train_dataset=Dataset.from_dict({"text": ["A mass in the left frontal lobe", "Normal for age"]}),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    )
    sft.train()
    changed = [p for name, p in sft.model.named_parameters() if "lora_B" in name]
    assert changed and all(p.abs().max() > 0 for p in changed)


# --- compile and export


@torch.no_grad()
def test_compiled_at_two_lengths():
    model = small(num_hidden_layers=1)  # only the delta rule depends on the length; test_export has the other layers
    compiled = torch.compile(model, backend="eager")
    for length in (9, 14):
        ids = torch.randint(50, (2, length))
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        torch.testing.assert_close(
            compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, atol=2e-5, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_export(masked):
    """In one graph; exported with a mask, it holds for other masks."""
    model = small()
    ids = torch.randint(50, (2, 9))
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if masked else {})
    exported = torch.export.export(model, (), inputs, strict=True).module()
    if masked:
        mask = mask.clone()
        mask[1, :4] = 0
        inputs["attention_mask"] = mask
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)
