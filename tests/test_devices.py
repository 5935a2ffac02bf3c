"""Every tensor on the model's device: training, validation, generation, token cache and evaluation on pretended ones.

A tensor that the package makes on the CPU, and an operation then mixes with the model's, is an error here as on a GPU.
CUDA is pretended for the forward pass, with and without autocast; META for training (see `pretended_device`). Values
are real, so the results are compared with the CPU's too.
"""

import contextlib

import pytest
import systems
import torch
from pretended_device import CUDA, META, PretendedTensor, pretended
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mrilib.backbone import kernels
from mrilib.config import Stage2Parameters
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.splits import load_annotations, split_volumes
from mrilib.evaluation import inference
from mrilib.evaluation.reconstructions import NearestTrainingSlice
from mrilib.model import two_stage
from mrilib.model.decoders import DECODERS, build_decoder
from mrilib.model.two_stage import TwoStageModel
from mrilib.pretrain import corpus, tiny_nirvana
from mrilib.training import device, loop, losses, setup, stages
from mrilib.training.token_cache import TokenCache

SIZES = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LABELS = ["Nonspecific white matter lesion", "Mass"]
CPU = torch.device("cpu")
PLACES = {"float32": False, "bf16": True}  # whether autocast is on


@pytest.fixture(autouse=True)
def plain_delta_rule(monkeypatch):
    """Fused kernels run in `test_fused_kernels.py`; here PyTorch computes the delta rule."""
    monkeypatch.setattr(kernels, "_supports_fused", lambda device: False)


def no_driver(*_, **__):
    """Stands for a function of PyTorch that asks CUDA's driver."""
    return contextlib.nullcontext()


@pytest.fixture(scope="module")
def folders(backbone_dir, tmp_path_factory):
    """A folder for each backbone."""
    torch.manual_seed(0)
    tokenizer = corpus.make_tokenizer(vocab_size=500, texts=50)
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    others = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **ends)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, **ends)),
    }
    paths = {"nirvana": backbone_dir}
    for name, model in others.items():
        paths[name] = tmp_path_factory.mktemp(name)
        tiny_nirvana.save(model.eval(), tokenizer, paths[name])
    return paths


@pytest.fixture(params=["nirvana", "llama", "qwen2"])
def folder(request, folders):
    return folders[request.param]


def stage1_config(phantom_dir, folder, **others):
    values = {"finding_labels": LABELS, "test_fraction": 0.25, "split_seed": 4, **others}
    return systems.stage1_config(phantom_dir, folder, **values)


def build(phantom_dir, folder, rows=2, **parameters):
    """The model on the CPU, and a batch of test slices."""
    config = stage1_config(phantom_dir, folder, **parameters)
    dataset = FastMRIDataset(split_volumes(config)["test"], config, load_annotations(config))
    model = systems.build(config)
    with torch.no_grad():  # maps that detect something
        model.encoder.finding_maps.unet.head.bias.fill_(2.0)
    return model, systems.batch_of(dataset, rows), dataset, config


def stage2_config(phantom_dir, folder, **others):
    values = systems.values(phantom_dir, folder, stage1_checkpoint=str(folder), **systems.DECODER)
    small = {"baseline_cascades": 1, "baseline_chans": 4, "baseline_pools": 2}
    return Stage2Parameters.create(values | small | others)


@contextlib.contextmanager
def on_gpu(place):
    """Pretend CUDA, with autocast or without."""
    with pretended(CUDA), torch.autocast("cuda", torch.bfloat16, enabled=PLACES[place]):
        yield


def close(values, expected, place):
    tolerance = {"float32": 1e-4, "bf16": 5e-2}[place]
    assert isinstance(values, PretendedTensor)
    expected = expected.float()
    assert (values.value.float() - expected).norm() <= tolerance * expected.norm()


# ------------------------------------------------------------------------------------------- the test of the tests


@pytest.mark.parametrize("place", [CUDA, META])
def test_a_tensor_on_the_wrong_device_is_an_error(place, monkeypatch):
    image, maximum = torch.rand(2, 16, 16), torch.ones(2)
    with pretended(place):
        arguments = [x.to(place) for x in (image, image, maximum)]
        assert losses.VolumeSSIMLoss()(*arguments).tolist() == pytest.approx([0, 0], abs=1e-6)
        right = losses.VolumeSSIMLoss._averaging
        monkeypatch.setattr(losses.VolumeSSIMLoss, "_averaging", lambda self, length, _: right(self, length, "cpu"))
        with pytest.raises(RuntimeError, match=r"expected all tensors on .* but on the CPU are .*16\)\]"):
            losses.VolumeSSIMLoss()(*arguments)
        with pytest.raises(RuntimeError, match="numpy"):
            arguments[0].numpy()


def test_a_backward_pass_on_the_wrong_device_is_an_error():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3)

    with pretended(META):
        x = torch.zeros(3, device=META, requires_grad=True)
        with pytest.raises(RuntimeError, match="expected all tensors on meta"):
            Wrong.apply(x).sum().backward()


# ------------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.parametrize("place", PLACES)
def test_stage1(phantom_dir, folder, place):
    model, batch, _, _ = build(phantom_dir, folder)
    stage = stages.AnalysisStage(model, map_weight=3.0)
    expected, scores = stage.loss(batch), stage.score(batch)
    with on_gpu(place):
        model.to(CUDA)
        moved = batch.to(CUDA)
        assert isinstance(moved.kspace, PretendedTensor) and isinstance(moved.acquired, PretendedTensor)
        result = stage.loss(moved)
        close(result.total, expected.total, place)
        assert result.statistics.keys() == expected.statistics.keys()
        assert "finding_map_loss" in result.statistics
        with torch.no_grad():
            for own, other in zip(stage.score(moved), scores, strict=True):
                assert own["tokens"] == other["tokens"]
                assert own["loss"] == pytest.approx(other["loss"], rel=5e-2 if place == "bf16" else 1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", DECODERS)
def test_stage2(phantom_dir, backbone_dir, name, place):
    model, batch, _, _ = build(phantom_dir, backbone_dir)
    sense = name in ("unet_dc", "no_token_decoder")
    model.decoder = build_decoder(stage2_config(phantom_dir, backbone_dir, decoder=name, sense=sense), 32).eval()
    model.freeze(None)
    with torch.no_grad():
        expected = model(batch)
    with on_gpu(place):
        model.to(CUDA)
        stage, moved = stages.ReconstructionStage(model), batch.to(CUDA)
        with torch.no_grad():
            close(model(moved), expected, place)
        assert isinstance(stage.loss(moved).total, PretendedTensor)
        with torch.no_grad():
            assert all(0 <= score["loss"] <= 2 for score in stage.score(moved))


@pytest.mark.parametrize("image_skip", [True, False])
@pytest.mark.parametrize("upsample", [True, False])
def test_image_decoder_with_other_parameters(phantom_dir, backbone_dir, image_skip, upsample):
    model, batch, _, _ = build(phantom_dir, backbone_dir)
    config = stage2_config(
        phantom_dir,
        backbone_dir,
        image_skip=image_skip,
        sense=False,
        use_bilinear_upsample=upsample,
        train_control=False,
    )
    model.decoder = build_decoder(config, 32).eval()
    model.freeze(None)
    with torch.no_grad():
        expected, zero_tokens = model(batch), model.reconstruct(batch, None)
        with on_gpu("float32"):
            model.to(CUDA)
            close(model(batch.to(CUDA)), expected, "float32")
            close(model.reconstruct(batch.to(CUDA), None), zero_tokens, "float32")


def test_slices_with_empty_coils(phantom_dir, backbone_dir):
    model, batch, _, _ = build(phantom_dir, backbone_dir)
    batch.kspace[0, 1] = 0
    batch.kspace[1] = 0
    with torch.no_grad():
        expected = model.encoder(batch.kspace, batch.mask)
        with on_gpu("float32"):
            model.to(CUDA)
            moved = batch.to(CUDA)
            close(model.encoder(moved.kspace, moved.mask), expected, "float32")


@pytest.mark.parametrize("place", PLACES)
def test_generation_with_cache(phantom_dir, folder, place):
    """Prompts of different lengths, so that rows are padded on the left."""
    model, batch, _, _ = build(phantom_dir, folder)
    prompts = ["Describe this slice.", "Describe."]
    with torch.no_grad():
        prefix = model.encoder(batch.kspace, batch.mask)
        expected = model.generate(prefix, prompts, 6)
        with on_gpu(place):
            model.to(CUDA)
            texts = model.generate(prefix.to(CUDA), prompts, 6)
    assert texts == expected or (place == "bf16" and len(texts) == 2)


@pytest.mark.parametrize("place", PLACES)
def test_token_cache(phantom_dir, backbone_dir, tmp_path, monkeypatch, place):
    precision = "bf16" if place == "bf16" else "no"
    model, _, _, _ = build(phantom_dir, backbone_dir)
    settings = {"token_cache_dir": str(tmp_path), "masks_per_slice": 2, "mixed_precision": precision}
    config = stage2_config(phantom_dir, backbone_dir, **settings)
    dataset = FastMRIDataset(split_volumes(config)["val"], config)
    # It keeps the state of CUDA's random numbers, for which it asks the driver.
    monkeypatch.setattr(torch.random, "fork_rng", no_driver)
    with on_gpu(place), torch.no_grad():
        model.to(CUDA)
        cache = TokenCache(model, config)
        held = cache.hold(dataset)[0]
        batch = systems.batch_of(held, 2).to(CUDA)
        assert batch.tokens is not None
        close(cache.image_tokens(batch), model.image_tokens(batch).value, "bf16")
        for path in tmp_path.rglob("*.safetensors"):
            path.unlink()
        close(cache.image_tokens(batch._replace(tokens=None)), model.image_tokens(batch).value, "bf16")
        assert list(tmp_path.rglob("*.safetensors"))


def test_evaluation(phantom_dir, backbone_dir, tmp_path):
    model, _, dataset, config = build(phantom_dir, backbone_dir)
    volumes = split_volumes(config)
    dataset = FastMRIDataset(volumes["test"][:3], config, load_annotations(config), max_slices=4)
    decoders = [build_decoder(stage2_config(phantom_dir, backbone_dir, decoder=name), 32).eval() for name in DECODERS]
    model.decoder = decoders[0]
    prefix = two_stage.build_constant_prefix(config, model.backbone)
    constant = TwoStageModel(prefix, model.backbone, model.tokenizer)
    plain = TwoStageModel(decoder=decoders[1])
    nearest = NearestTrainingSlice(volumes["train"])
    rows = []
    for place in (CPU, CUDA):
        context = pretended(CUDA) if place == CUDA else contextlib.nullcontext()
        with context, torch.no_grad():
            for part in (model, constant, plain):
                part.to(place)
                part.freeze(None)
            evaluator = inference.Evaluator(model, constant, plain, nearest, max_new_tokens=3)
            writer = inference.VolumeWriter(tmp_path / place.type, dataset.volumes)
            rows.append(evaluator.run(dataset, 2, writer))
            assert len(inference.example_texts(model, dataset, 2, 3)) == 2
            assert len(inference.preview(model, dataset, 2)) == 2
    for own, other in zip(*rows, strict=True):
        numbers = {name: value for name, value in own.items() if isinstance(value, int | float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-3)
        assert own["generated"] == other["generated"]


def test_building_on_the_device(phantom_dir, backbone_dir):
    """Models that are built or loaded on a GPU."""
    one = stage1_config(phantom_dir, backbone_dir)
    with pretended(CUDA):
        stage = setup.build_stage(one, CUDA)
        control = setup.build_control_stage(one, stage)
        two = stage2_config(phantom_dir, backbone_dir)
        stage2 = setup.build_stage(two, CUDA, encoder=stage.model.encoder)
        for model in (stage.model, control.model, stage2.model, setup.build_control_stage(two, stage2).model):
            assert {parameter.device for parameter in model.parameters()} == {CUDA}


@pytest.fixture
def driver(monkeypatch):
    """Stands for a driver with two GPUs: their random states, which can be read and set."""
    states = [torch.full((16,), number, dtype=torch.uint8) for number in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: states.__setitem__(slice(None), new))
    return states


def test_each_process_has_its_own_gpu(driver, monkeypatch):
    for rank in (0, 3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device.pick_device("auto") == device.pick_device("cuda") == torch.device("cuda", rank)
    assert device.pick_device("cpu") == CPU


def test_random_states_of_all_gpus_are_restored(driver):
    saved = device.rng_state()
    expected = [state.clone() for state in driver]
    driver[0], driver[1] = driver[1], driver[0]
    device.set_rng_state(saved)
    assert all(torch.equal(a, b) for a, b in zip(driver, expected, strict=True))


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training(phantom_dir, backbone_dir, tmp_path, optimizer):
    """Both stages in the training loop, with validation and checkpoints, have the losses of the CPU."""
    few = {"epochs": 1, "max_train_slices": 6, "max_val_slices": 2, "optimizer": optimizer}
    split = {"test_fraction": 0.25, "split_seed": 4, "activation_checkpointing": True, "warmup_ratio": 0.0}
    one = stage1_config(phantom_dir, backbone_dir, **few, **split)
    losses_on = {}
    for place in (CPU, META):
        directory, steps = tmp_path / place.type, []
        with pretended(META) if place == META else contextlib.nullcontext():
            setup.prepare(one)
            stage1, data = setup.build_stage(one, CPU), setup.make_loaders(one)
            stage1.model.to(place)
            steps += loop.fit(stage1, one, data.train, data.val, directory).steps
            checkpoint = directory / "stage1_checkpoints" / "stage1_final_model.pt"
            two = stage2_config(phantom_dir, backbone_dir, stage1_checkpoint=str(checkpoint), **few, **split)
            setup.prepare(two)
            stage2, data = setup.build_stage(two, CPU), setup.make_loaders(two)
            stage2.model.to(place)
            history = loop.fit(stage2, two, data.train, data.val, directory)
            assert stage2.model.device == place
            steps += history.steps + history.epochs
        losses_on[place] = [row.get("loss", row.get("val_loss")) for row in steps]
    assert losses_on[META][0] == pytest.approx(losses_on[CPU][0], rel=1e-4)
    assert losses_on[META] == pytest.approx(
        losses_on[CPU], rel=2e-2
    )  # AdamW turns rounding of small gradients to steps
