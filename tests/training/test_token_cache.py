"""The token cache: the same numbers as without it, no stale or damaged entries, and safe with killed processes."""

import contextlib
import hashlib
import importlib
import multiprocessing
import os
import shutil
import time
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import systems
import torch
from safetensors import safe_open

from mrilib import processes
from mrilib.backbone import kernels
from mrilib.comparison import token_cache_speed
from mrilib.config import ROOT, ParameterError, Stage1Parameters, Stage2Parameters
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.data.splits import split_volumes
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.physics import masks
from mrilib.training import checkpoint, device, loop, setup, stages, token_cache, token_key
from mrilib.training.distributed import TrainingStopped
from mrilib.training.token_cache import TokenCache
from mrilib.training.token_shards import read_entry


def config_of(data: Path, backbone: Path, directory: Path, **others) -> Stage2Parameters:
    values = systems.values(data, backbone, stage1_checkpoint=str(backbone), **systems.DECODER)
    values |= {"masks_per_slice": 2, "epochs": 3, "token_cache_dir": str(directory)}
    return Stage2Parameters.create(values | others)


def system_of(config: Stage2Parameters) -> two_stage.TwoStageModel:
    stage1 = systems.stage1_config(Path(config.data_dir), Path(config.backbone_path))
    system = systems.build(stage1)
    torch.manual_seed(2)
    system.decoder = build_decoder(config, two_stage.hidden_size(system.backbone))
    return system


def datasets(config: Stage2Parameters) -> tuple[FastMRIDataset, FastMRIDataset]:
    volumes = split_volumes(config)
    train = FastMRIDataset(volumes["train"], config, training=True, masks_per_slice=config.masks_per_slice)
    return train, FastMRIDataset(volumes["val"], config)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def filled(phantom_dir, backbone_dir, tmp_path_factory):
    """A filled cache. Tests that change its files use a copy."""
    config = config_of(phantom_dir, backbone_dir, tmp_path_factory.mktemp("cache"))
    system = system_of(config)
    cache = TokenCache(system, config)
    return config, system, cache, cache.hold(*datasets(config))


def copy_of(filled, directory: Path):
    """Copy the cache to another folder."""
    config, system, _, _ = filled
    shutil.copytree(config.token_cache_dir, directory)
    config = config.model_copy(update={"token_cache_dir": str(directory)})
    cache = TokenCache(system, config)
    return config, cache, cache.hold(*datasets(config))


def forbid_computing(monkeypatch):
    monkeypatch.setattr(TokenCache, "_compute", lambda *_: pytest.fail("computed again"))


def test_entries_equal_the_slices_under_every_mask(filled):
    config, system, _, (train, val) = filled
    for direct, cached in zip(datasets(config), (train, val), strict=True):
        for epoch in (0, 1, 2):
            direct.epoch = cached.epoch = epoch
            for index in (0, len(direct) // 2, len(direct) - 1):
                a, b = direct[index], cached[index]
                for name in ("kspace", "mask", "target"):
                    assert torch.equal(getattr(a, name), getattr(b, name)), name
                names = ("scale", "maximum", "image_shape", "acceleration", "file", "slice_num", "patient", "report")
                assert all(getattr(a, name) == getattr(b, name) for name in names)
                with torch.no_grad():
                    tokens = system.image_tokens(systems.collate([a]))[0]
                torch.testing.assert_close(b.tokens.float(), tokens, rtol=1e-4, atol=1e-4)


def test_random_numbers_do_not_depend_on_the_cache(filled, tmp_path):
    config, system, _, _ = filled
    config = config.model_copy(update={"token_cache_dir": str(tmp_path)})
    states = []
    for _ in ("cold", "warm"):
        torch.manual_seed(3)
        TokenCache(system, config).hold(*datasets(config))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_resumed_training_with_the_cache_equals_uninterrupted_training(filled, tmp_path):
    """Compare a run with an empty cache with one that is stopped after two steps and uses a filled cache."""
    final = []
    for name, stops in (("whole", (False,)), ("resumed", (True, False))):
        for stopped in stops:
            config = filled[0].model_copy(
                update={"token_cache_dir": str(tmp_path / "cache"), "epochs": 2, "resume": True}
            )
            device.prepare(config)
            system = system_of(config)
            stage = stages.ReconstructionStage(system)
            loaders = setup.stage_loaders(config, stage, setup.make_loaders(config))
            assert loaders.cache is not None

            def stop(entry, name=name, stopped=stopped):
                if stopped and entry["step"] == 2:
                    processes.request_stop(tmp_path / name, "SIGTERM")

            with contextlib.suppress(TrainingStopped):
                loop.fit(stage, config, loaders.train, loaders.val, tmp_path / name, on_step=stop)
            processes.cancel_stop(tmp_path / name)
        path = tmp_path / name / "stage2_checkpoints" / "stage2_final_model.pt"
        final.append(checkpoint.load_checkpoint(path, "stage2"))
    whole, resumed = final
    assert whole["step"] == resumed["step"] > 2
    assert all(torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items())
    assert torch.equal(whole["rng"][0]["torch"], resumed["rng"][0]["torch"])


def test_key_depends_on_the_delta_rule_implementation(filled, monkeypatch):
    config, system, cache, _ = filled
    key = cache.key
    assert TokenCache(system, config).key == key
    fused = {"path": "fused", "package": "flash-linear-attention 0.5.0", "errors": {"o": 1e-3}}
    monkeypatch.setattr(kernels, "path", lambda *_: fused)
    keys = {key, TokenCache(system, config).key}
    fused["errors"] = {"o": 2e-3}  # a measurement without influence on tokens
    keys.add(TokenCache(system, config).key)
    fused["package"] = "flash-linear-attention 0.6.0"
    keys.add(TokenCache(system, config).key)
    assert len(keys) == 3


MASK_MODULE = "from fastmri.data.subsample import RandomMaskFunc\nclass OwnMask(RandomMaskFunc):\n    lines = {lines}\n"


def test_key_depends_on_the_code_of_a_custom_mask(filled, tmp_path, monkeypatch):
    config, system, _, _ = filled
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(masks, "MASK_CLASSES", dict(masks.MASK_CLASSES))
    keys = []
    for number, lines in enumerate((1, 1, 2)):
        (tmp_path / f"own_mask_{number}.py").write_text(MASK_MODULE.format(lines=lines))
        masks.MASK_CLASSES["own"] = importlib.import_module(f"own_mask_{number}").OwnMask
        keys.append(TokenCache(system, config.model_copy(update={"mask_type": "own"})).key)
    assert keys[0] == keys[1] != keys[2]


def test_key_depends_on_the_code_of_every_computing_package(filled, tmp_path, monkeypatch):
    config, system, cache, _ = filled
    (tmp_path / "added.py").write_text("value = 1")
    package = types.SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(token_key, "COMPUTING_PACKAGES", (*token_key.COMPUTING_PACKAGES, package))
    assert TokenCache(system, config).key != cache.key
    folders = [Path(package.__file__).parent.name for package in token_key.COMPUTING_PACKAGES]
    assert {"physics", "backbone", "data", "model"} <= set(folders)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_has_the_same_losses_with_and_without_the_cache(filled, tmp_path, monkeypatch, workers):
    config = filled[0].model_copy(update={"num_workers": workers})
    histories = []
    for cached in (False, True):
        device.prepare(config)
        system = system_of(config)
        pair = datasets(config)
        stage = stages.ReconstructionStage(system)
        if cached:
            forbid_computing(monkeypatch)
            cache = TokenCache(system, config)
            pair, stage.image_tokens = cache.hold(*pair), cache.image_tokens
            monkeypatch.setattr(two_stage.TwoStageModel, "image_tokens", lambda *_: pytest.fail("the backbone ran"))
        loaders = make_loader(pair[0], config.batch_size, 0, shuffle=True), make_loader(pair[1], config.batch_size)
        histories.append(loop.fit(stage, config, *loaders, tmp_path / str(cached)))
    direct, cached = histories
    assert [s["loss"] for s in cached.steps] == pytest.approx([s["loss"] for s in direct.steps], rel=1e-5)
    for a, b in zip(direct.epochs, cached.epochs, strict=True):
        assert {k: v for k, v in b.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in a.items() if k != "seconds"}, rel=1e-4
        )


def test_bf16_tokens_are_stored_in_bf16(filled, tmp_path):
    config, _, _, _ = filled
    half = config.model_copy(
        update={"mixed_precision": "bf16", "backbone_dtype": "bfloat16", "token_cache_dir": str(tmp_path), "epochs": 1}
    )
    stage1 = systems.stage1_config(Path(config.data_dir), Path(config.backbone_path), backbone_dtype="bfloat16")
    system = systems.build(stage1)
    cache = TokenCache(system, half)
    train, _ = cache.hold(*datasets(half))
    assert train[0].tokens.dtype == torch.bfloat16
    assert cache.facts["bytes"] == pytest.approx(sum(map(len, files(tmp_path).values())), rel=0.02)
    loader = make_loader(train, 3)
    batch = next(iter(loader))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        direct = system.image_tokens(batch)
    torch.testing.assert_close(cache.image_tokens(batch), direct, rtol=0.05, atol=0.05)


def test_size_is_known_beforehand_and_must_fit_on_the_disk(filled, tmp_path, monkeypatch):
    config, system, cache, _ = filled
    actual = sum(map(len, files(Path(config.token_cache_dir)).values()))
    assert cache.facts["bytes_to_write"] == pytest.approx(actual, rel=0.02)
    forbid_computing(monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=token_cache.SPARE_BYTES + actual // 2))
    small = config.model_copy(update={"token_cache_dir": str(tmp_path)})
    with pytest.raises(ParameterError, match=r"token_cache_dir: .* GB to be written to .*masks_per_slice"):
        TokenCache(system, small).hold(*datasets(small))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    TokenCache(system, config).hold(*datasets(config))  # an existing cache needs no room


def test_existing_shards_are_used(filled, monkeypatch):
    config, system, _, _ = filled
    forbid_computing(monkeypatch)
    for changed in ({"masks_per_slice": 1}, {"batch_size": 2}, {"learning_rate": 1e-3}, {"epochs": 9}):
        other = config.model_copy(update=changed)
        again = TokenCache(system, other)
        again.hold(*datasets(other))
        assert again.facts["bytes_to_write"] == 0


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"center_fractions": [0.08, 0.05]}, {"accelerations": [4, 6]}, {"num_coils": 5},
     {"mask_type": "random"}, {"mixed_precision": "bf16"}, {"crop": "image"}],
)  # fmt: skip
def test_key_depends_on_masks_and_settings(filled, changed):
    config, system, cache, _ = filled
    other = config.model_copy(update=changed)
    train, _ = datasets(other)
    digests = token_key.file_digests([v.path for v in train.volumes], Path(config.token_cache_dir) / "files.json")
    before = {shard.key for shard in cache.shards(datasets(config)[0], digests)}
    assert before.isdisjoint({shard.key for shard in TokenCache(system, other).shards(train, digests)})


def test_key_depends_on_every_bit_of_the_weights_and_on_the_head_count(filled):
    config, _, cache, _ = filled
    for part in ("encoder", "backbone"):
        system = system_of(config)
        assert TokenCache(system, config).key == cache.key
        parameter = list(getattr(system, part).parameters())[-1].data
        flat = parameter.view(torch.int32).reshape(-1)
        flat[-1] ^= 1
        assert TokenCache(system, config).key != cache.key
    system = system_of(config)
    system.encoder.vit.config.num_attention_heads = 4  # weight shapes do not depend on it
    assert TokenCache(system, config).key != cache.key


def test_changed_byte_of_a_data_file_recomputes_this_file_alone(filled, tmp_path):
    config, system, _, _ = filled
    data, directory = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(config.data_dir, data)
    shutil.copytree(config.token_cache_dir, directory)
    moved = config.model_copy(update={"data_dir": str(data), "token_cache_dir": str(directory)})
    cache = TokenCache(system, moved)
    train, _ = cache.hold(*datasets(moved))
    assert cache.facts["bytes_to_write"] == 0  # the same bytes in another folder
    volume = train.volumes[0]
    with h5py.File(volume.path) as h5:
        stored = h5["kspace"]
        place = stored.id.get_chunk_info(0).byte_offset if stored.chunks else stored.id.get_offset()
    state = volume.path.stat()
    with open(volume.path, "r+b") as file:  # same size, same modification time
        file.seek(place + 100)
        byte = file.read(1)[0]
        file.seek(place + 100)
        file.write(bytes([byte ^ 1]))
    os.utime(volume.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    before = files(directory)
    TokenCache(system, moved).hold(*datasets(moved))
    new = set(files(directory)) - set(before)
    assert len(new) == 2 and all(name.startswith(volume.file) for name in new)  # under both masks


def test_damage_to_any_byte_of_an_entry_is_detected(filled, tmp_path):
    _, _, _, (train, _) = filled
    shard, row = train.place(0)
    whole = shard.path.read_bytes()
    tensors, facts = read_entry(shard, row)
    broken = shard._replace(path=tmp_path / "broken.safetensors")
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    detected = 0
    for offset in [*rng.integers(0, header, 150), *rng.integers(header, len(whole), 150)]:
        content = bytearray(whole)
        content[offset] ^= 1 << rng.integers(8)
        broken.path.write_bytes(content)
        entry = read_entry(broken, row)
        if entry is None:
            detected += 1
        else:  # a byte of another slice or a space in the header
            assert entry[1] == facts
            assert all(torch.equal(entry[0][name], tensor) for name, tensor in tensors.items())
    assert detected > 100
    for cut in (0, 7, header - 1, header, len(whole) // 2, len(whole) - 1):
        broken.path.write_bytes(whole[:cut])
        assert read_entry(broken, row) is None
    broken.path.unlink()
    assert read_entry(broken, row) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_and_missing_shards_are_computed_again(filled, tmp_path, caplog, workers):
    config, cache, (train, _) = copy_of(filled, tmp_path / "cache")
    train.config = config.model_copy(update={"num_workers": workers})
    expected = [cache.image_tokens(batch) for batch in make_loader(train, config.batch_size)]
    before = files(tmp_path / "cache")
    shard, _ = train.place(4)
    missing, _ = train.place(0)
    content = bytearray(shard.path.read_bytes())
    content[-100] ^= 8
    shard.path.write_bytes(content)
    missing.path.unlink()
    with caplog.at_level("WARNING", logger="mrilib"):
        token_cache.logger.propagate = True
        again = [cache.image_tokens(batch) for batch in make_loader(train, config.batch_size)]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert files(tmp_path / "cache") == before
    assert shard.path.name in caplog.text and missing.path.name in caplog.text


def test_shard_of_other_slices_under_its_name_is_refused(filled, tmp_path):
    _, _, (train, _) = copy_of(filled, tmp_path / "cache")
    (a, row), (b, _) = train.place(0), train.place(len(train) - 1)
    shutil.copy(b.path, a.path)
    assert read_entry(a, row) is None


def test_write_error_names_the_file(filled, tmp_path, monkeypatch):
    config, system, _, _ = filled
    elsewhere = config.model_copy(update={"token_cache_dir": str(tmp_path)})
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "safetensors" in path.name:
            real(path, content[:100])
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"token_cache_dir: .*safetensors cannot be written .*No space left"):
        TokenCache(system, elsewhere).hold(*datasets(elsewhere))
    assert not [path for path in tmp_path.rglob("*") if "safetensors" in path.name]


def fill(config: Stage2Parameters) -> None:
    """Fill a cache; at the top level, for other processes."""
    TokenCache(system_of(config), config).hold(*datasets(config))


def test_killed_and_concurrent_processes_leave_a_correct_cache(filled, tmp_path):
    config = filled[0]
    expected = files(Path(config.token_cache_dir))
    elsewhere = config.model_copy(update={"token_cache_dir": str(tmp_path)})
    # Forks of this process would share the progress bar's lock, which a killed one may hold forever.
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload([__name__])
    for count in (2, 4, 6):  # shards at the time of the kill
        process = fork.Process(target=fill, args=(elsewhere,))
        process.start()
        deadline = time.monotonic() + 120
        while len(files(tmp_path)) < count:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
    existing = files(tmp_path)
    assert 6 <= len(existing) < len(expected)
    assert all(expected[name] == content for name, content in existing.items())
    both = [fork.Process(target=fill, args=(elsewhere,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        assert process.exitcode == 0
    assert files(tmp_path) == expected


def test_cache_needs_masks_per_slice(phantom_dir, backbone_dir, tmp_path):
    with pytest.raises(ParameterError, match="token_cache_dir: masks_per_slice is 0, so masks never repeat"):
        config_of(phantom_dir, backbone_dir, tmp_path, masks_per_slice=0)
    assert config_of(phantom_dir, backbone_dir, tmp_path, masks_per_slice=0, token_cache_dir="").masks_per_slice == 0


def test_raw_hidden_states_are_stored(filled):
    """Stored before the decoder's LayerNorm and in the backbone's type, so that any decoder can train on them."""
    _, system, _, (train, _) = filled
    train.epoch = 0
    shard, _ = train.place(0)
    with safe_open(shard.path, "pt") as file:
        stored = torch.stack([file.get_tensor(f"{row}.tokens") for row in range(len(shard.indices))])
    direct = token_cache.uncached(train, 0)
    batch = systems.collate([direct[i] for i in shard.indices])
    with torch.no_grad():
        raw = system.backbone.base_model(inputs_embeds=system.encoder(batch.kspace, batch.mask)).last_hidden_state
    assert torch.equal(stored, raw[:, 1:-1])


@pytest.mark.fullsize
@pytest.mark.skipif(not (ROOT / "data/demo").exists(), reason="needs data/demo: run `make demo` once")
def test_cached_epoch_of_the_demo_is_fast(capsys):
    """Compare with the decoder's steps on batches in memory; the encoder is untrained, which costs the same."""
    stage1 = Stage1Parameters.from_yaml(ROOT / "params/demo/stage1.yaml")
    config = Stage2Parameters.from_yaml(
        ROOT / "params/demo/stage2.yaml", {"stage1_checkpoint": stage1.backbone_path, "masks_per_slice": 1}
    )
    times = token_cache_speed.measure(stage1, config)
    with capsys.disabled():
        print(f"\n{torch.get_num_threads()} threads\n{token_cache_speed.table(times).to_string(index=False)}")
    assert times.overhead <= 1.3
    assert times.saved >= 10


def test_stop_while_filling_keeps_computed_shards(filled, tmp_path):
    config, system, _, _ = filled
    config = config.model_copy(update={"token_cache_dir": str(tmp_path / "cache"), "epochs": 1})
    cache = TokenCache(system, config)
    processes.lock_run(tmp_path)
    processes.request_stop(tmp_path, "SIGTERM")
    with pytest.raises(TrainingStopped, match="while filling the token cache"):
        cache.hold(*datasets(config))
    (first,) = files(tmp_path).items()
    processes.cancel_stop(tmp_path)
    cache.hold(*datasets(config))
    assert len(files(tmp_path)) > 1 and first in files(tmp_path).items()


@pytest.mark.parametrize("content", [b"", b'{"/data/a.h5": {"sta', b"[1]", b"\xff\x00", b'{"x": 1}'])
def test_damaged_manifest_is_written_again(tmp_path, content):
    path = tmp_path / "a.h5"
    path.write_bytes(b"slices")
    os.utime(path, (0, 0))
    manifest = tmp_path / "files.json"
    manifest.write_bytes(content)
    expected = {path: hashlib.sha256(b"slices").hexdigest()}
    assert token_key.file_digests([path], manifest) == expected
