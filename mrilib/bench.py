"""The bench: every method trained alike, scored alike, side by side.

Parts run by themselves and in any number of calls: what a part has made lies in files below the run folder, and a part
whose files are there is not run again. ``done.json`` of a trained method is written last and holds what it was made
with; a call with other parameters is refused rather than mixed in.

    <run>/costs/done.json          seconds a step of every network, measured in turn, a number a round
    <run>/seed0/stage1/            the k-space encoder and its control without k-space
    <run>/seed0/<method>/          checkpoints, logs, done.json
    <run>/seed0/reconstructions/<method>/<acceleration>/<file>.h5, and scores.json, lesions.json made from them
    <run>/seed0/shifts/<shift>/<method>/<acceleration>/<file>.h5
    <run>/bart_4x.json             BART's settings and everything that was tried
"""

import functools
import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from mrilib import bart, inference, phantom, shifts, training
from mrilib.baselines import UNetBaseline, VarNetBaseline, chans_for
from mrilib.checkpoint import load_checkpoint, load_weights
from mrilib.config import (
    BenchParameters,
    ParameterError,
    Stage1Parameters,
    Stage2Parameters,
    display_path,
    read_yaml,
    resolve,
    with_defaults,
)
from mrilib.data import (
    Batch,
    FastMRIDataset,
    ShapeBatchSampler,
    Volume,
    collate,
    index_volumes,
    load_annotations,
    make_loader,
    require_boxes,
    require_lesions,
    require_targets,
    split_volumes,
)
from mrilib.decoder import zero_filled
from mrilib.distributed import TrainingStopped
from mrilib.evaluation import NearestTrainingSlice
from mrilib.gradients import rest_where_nothing_is_learned
from mrilib.model import (
    TwoStageModel,
    build_backbone,
    build_control,
    build_decoder,
    build_encoder,
    count_parameters,
    start_with_encoder,
)
from mrilib.optimizer import build_optimizer
from mrilib.resume import FREE_ON_RESUME
from mrilib.runs import git_state, read_json, request_stop, withdraw_stop, write_json

logger = logging.getLogger("mrilib")
Builder = Callable[[Stage1Parameters, Stage2Parameters, PreTrainedModel], nn.Module]


class Method(NamedTuple):
    """A learned method."""

    build: Builder  # what stands in the image decoder's place
    tokens: bool = False  # whether it reads image tokens
    image: bool = False  # whether it starts from the encoder's image, where stage 2 does
    own_cascades: bool = False  # whether its VarNet has as many as the encoder's, not `varnet_cascades`
    ours: bool = False  # whether it is this project's decoder, trained by all of stage 2's loss
    network_of: str = ""  # the method whose network this is, with other steps: what a step costs is the same


def _varnet(one: Stage1Parameters, chans: int = 0, measured_lines: bool = False) -> VarNetBaseline:
    return VarNetBaseline(
        one.varnet_num_cascades,
        chans or one.varnet_chans,
        one.varnet_pools,
        one.varnet_sens_chans,
        one.varnet_sens_pools,
        measured_lines,
    )


def _equal_varnet(one: Stage1Parameters, two: Stage2Parameters, backbone: PreTrainedModel) -> VarNetBaseline:
    wanted = count_parameters(build_decoder(two, backbone))
    sizes = one.varnet_num_cascades, one.varnet_pools, one.varnet_sens_chans, one.varnet_sens_pools
    return _varnet(one, chans=chans_for(wanted, *sizes))


METHODS: dict[str, Method] = {
    "model": Method(lambda one, two, backbone: build_decoder(two, backbone), tokens=True, image=True, ours=True),
    "trained_without_tokens": Method(
        lambda one, two, backbone: build_decoder(two, backbone, use_tokens=False), image=True, ours=True
    ),
    # nothing of stage 1
    "decoder_alone": Method(lambda one, two, backbone: build_decoder(two, backbone, use_tokens=False), ours=True),
    # as many steps as take as long as the model's, which also has encoder and backbone to run
    "without_tokens_equal_time": Method(
        lambda one, two, backbone: build_decoder(two, backbone, use_tokens=False),
        image=True,
        ours=True,
        network_of="trained_without_tokens",
    ),
    "tokens_alone": Method(
        lambda one, two, backbone: build_decoder(
            two.model_copy(update={"image_skip": False, "sense": False, "encoder_image": False}), backbone
        ),
        tokens=True,
        ours=True,
    ),
    "unet": Method(lambda one, two, backbone: UNetBaseline(chans=32, pools=4)),
    "varnet": Method(lambda one, two, backbone: _varnet(one)),
    "varnet_equal_size": Method(_equal_varnet),
    "varnet_measured_lines": Method(lambda one, two, backbone: _varnet(one, measured_lines=True)),
    "varnet_of_encoder": Method(lambda one, two, backbone: _varnet(one), own_cascades=True),
    # more steps: those of both our stages
    "varnet_both_stages": Method(lambda one, two, backbone: _varnet(one), network_of="varnet"),
}
VARNET_SIZES = (
    "varnet_num_cascades",
    "varnet_chans",
    "varnet_pools",
    "varnet_sens_chans",
    "varnet_sens_pools",
)
TRAINING_PARTS = ("stage1", "train")
END = "bench_seconds are over"
COST_ROUNDS = 3
SCORES = "scores.json"  # of a method at an acceleration, beside its images
TEXTS = "texts.json"  # what the texts of a seed's stage 1 are worth
SWAPPED = ("other_patient_tokens", "no_tokens")  # the model given others at test
UNLEARNED = ("zero_filled", "nearest_training_slice", "bart")
ALL_COILS = ("zero_filled", "bart")  # not learned on compressed coils: they get every coil of a file


class FixedSteps(ShapeBatchSampler):
    """So many shuffled batches each time, whatever the size of the data set; a function of (seed, epoch) alone."""

    def __init__(
        self, dataset: FastMRIDataset, batch_size: int, seed: int, steps: int, finding_share: float = 0.0, echo: int = 1
    ) -> None:
        super().__init__(dataset, batch_size, seed, shuffle=True, finding_share=finding_share, echo=echo)
        self.steps = steps

    def plan(self, number: int = 0) -> list[list[int]]:
        """The epoch's batches, each once; there is no further pass."""
        assert not number
        return self.draw(-(-self.steps // self.echo))

    def draw(self, count: int) -> list[list[int]]:
        """Passes over the shuffled slices, one after the other, cut off after so many batches."""
        rng = np.random.default_rng([self.seed, self.dataset.epoch])
        batches: list[list[int]] = []
        while len(batches) < count:
            seed = int(rng.integers(2**32))
            share = self.finding_share
            batches += ShapeBatchSampler(self.dataset, self.batch_size, seed, True, finding_share=share).plan()
        return batches[:count]

    @property
    def total(self) -> int:
        """The steps."""
        return self.steps


class Bench:
    """The bench's parameters, data and frozen parts, and its parts as methods.

    Parameters
    ----------
    config : BenchParameters
    directory : Path
        The run folder.
    """

    def __init__(self, config: BenchParameters, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.stage1 = Stage1Parameters.from_yaml(resolve(config.stage1_params))
        # its stage1_checkpoint is not read: the bench has one a seed, made by its first part
        values = read_yaml(resolve(config.stage2_params))
        self.stage2 = Stage2Parameters.create(values, written_later=("stage1_checkpoint",))
        inference.check_same_input(self.stage2, self.stage1)
        # the VarNets that it is compared with: the width of the encoder's own, and as many cascades as serve them best
        self.rivals = self.stage1.model_copy(update={"varnet_num_cascades": config.varnet_cascades})
        self.volumes = split_volumes(self.stage2)
        require_targets([volume for part in self.volumes.values() for volume in part], "the comparison")
        self.annotations = load_annotations(self.stage2)
        self.device = training.pick_device(self.stage2.device)
        self.backbone, self.tokenizer = build_backbone(self.stage2, self.device)
        self._ends = math.inf  # when `bench_seconds` are over
        self._under_way: Path | None = None  # the folder of a training

    # ---------------------------------------------------------------------------------------- training

    def measure_costs(self) -> dict[str, list[float]]:
        """Seconds of an optimizer step of stage 1, its control and every method, measured once; a number a round.

        What a training took (``done.json``) depends on what else the machine did; this says what the steps are worth,
        each alone with the threads that a training has (`seeds_at_once`).
        """
        folder = self.directory / "costs"
        names = ["stage1", "control", *self.config.methods]
        # what a training was made with decides what its steps cost too
        made_with = {
            "varnet_cascades": self.config.varnet_cascades,
            "stage1": _kept(self.stage1),
            "stage2": _kept(self.stage2),
        }
        if not self._claim(folder, made_with):
            write_json(folder / "done.json", {"made_with": made_with, "seconds": measure_rounds(self, names)})
        seconds = read_json(folder / "done.json")["seconds"]
        if missing := [name for name in names if name not in seconds]:
            raise ParameterError(
                f"{display_path(folder)} was measured without {', '.join(missing)}; remove the folder, so that all are "
                "measured in the same rounds"
            )
        return seconds

    def _loaders(self, config: Any, steps: int, texts: bool) -> tuple[DataLoader, DataLoader]:
        annotations = self.annotations
        train = FastMRIDataset(self.volumes["train"], config, annotations, training=True)
        train.masks_per_slice = config.masks_per_slice
        if texts:
            train.mirror_share, train.teacher_forcing = self.stage1.mirror_share, self.stage1.teacher_forcing
            require_boxes(train, self.stage1.finding_labels)
        elif config.lesion_weight:
            require_lesions(train)
        val = FastMRIDataset(self.volumes["val"], config, annotations, max_slices=config.max_val_slices)
        share = config.finding_share if texts else 0.0
        sampler = FixedSteps(train, config.batch_size, config.seed, steps, share, config.data_echo)
        # its own: the model's random numbers must not depend on it
        generator = torch.Generator().manual_seed(config.seed)
        loader = DataLoader(
            train, batch_sampler=sampler, collate_fn=collate, num_workers=config.num_workers, generator=generator
        )
        return loader, make_loader(val, config.batch_size)

    def _claim(self, folder: Path, made_with: dict[str, Any]) -> bool:
        """Whether a folder is done already; refused if it was made with something else."""
        path = folder / "done.json"
        if not path.exists():
            return False
        before = with_defaults(read_json(path)["made_with"], made_with)
        if before != json.loads(json.dumps(made_with)):
            names = {**before, **made_with}  # in order
            changed = [name for name in names if made_with.get(name) != before.get(name)]
            raise ParameterError(
                f"{display_path(folder)} was made with other values of {', '.join(changed)}; remove the folder, or "
                "give another output_dir"
            )
        return True

    def _forget(self, seed: int, name: str) -> None:
        """Remove what was made with a method's weights that are gone: a training anew is scored anew."""
        folder = self.directory / f"seed{seed}"
        names = [name, *SWAPPED] if name == "model" else [name]
        for place in [folder / "reconstructions", *(folder / "shifts").glob("*")]:
            for each in names:
                if (place / each).exists():
                    shutil.rmtree(place / each)
        if name == "model":
            (folder / TEXTS).unlink(missing_ok=True)

    def _fit(self, stage: training.Stage, config: Any, folder: Path, steps: int, texts: bool) -> dict[str, Any]:
        """Train for so many steps, validating `validations` times on the way; what done.json says of it."""
        each = -(-steps // self.config.validations)
        validations = self.config.validations
        # An interrupted training goes on where it stopped: done.json is missing, its checkpoint is there.
        config = config.model_copy(update={"epochs": validations, "save_interval": validations, "resume": True})
        loaders = self._loaders(config, each, texts)

        def stop_when_late(_: dict[str, float]) -> None:
            if time.perf_counter() > self._ends:
                request_stop(folder, END)

        self._under_way = folder
        try:
            history = training.fit(stage, config, *loaders, folder, on_step=stop_when_late)
        finally:
            self._under_way = None
            if time.perf_counter() > self._ends:
                withdraw_stop(folder)
        return {
            "git": git_state(),
            "steps": len(history.steps),
            # what training costs: forward, backward and update, without loading and validation
            "seconds": sum(step["seconds"] for step in history.steps),
            "seconds_with_validation": history.seconds,
            "parameters": count_parameters(stage.part),
            "validation": [{"step": each * int(epoch["epoch"]), **_plain(epoch)} for epoch in history.epochs],
        }

    def train_stage1(self, seed: int) -> dict[str, Any]:
        """Stage 1 and its control without k-space, both of `stage1_steps`; what done.json says."""
        folder = self.directory / f"seed{seed}" / "stage1"
        config = self.stage1.model_copy(update={"seed": seed})
        made_with = self._stage1_made_with()
        if self._claim(folder, made_with):
            return read_json(folder / "done.json")
        for name in filter(self.reads_encoder, METHODS):  # they have read another one
            self._forget(seed, name)
            if (folder.parent / name).exists():
                shutil.rmtree(folder.parent / name)
        results: dict[str, Any] = {}
        for name, steps in (("stage1", self.config.stage1_steps), ("control", self.control_steps)):
            training.prepare(config)
            results[name] = self._fit(self._analysis_stage(name, config), config, folder, steps, texts=True)
        write_json(folder / "done.json", {"made_with": made_with, **results["stage1"], "control": results["control"]})
        return read_json(folder / "done.json")

    @property
    def control_steps(self) -> int:
        """Of stage 1's control. It has no maps to learn first: as many as stage 1 has with its text."""
        return round((1 - self.stage1.text_from) * self.config.stage1_steps)

    def _analysis_stage(self, name: str, config: Stage1Parameters) -> training.AnalysisStage:
        """Stage 1 or its control, untrained."""
        if name == "stage1":
            encoder = build_encoder(config, self.backbone, self.tokenizer).to(self.device)
            return training.AnalysisStage.of(TwoStageModel(encoder, self.backbone, self.tokenizer), config)
        system = TwoStageModel(build_control(config, self.backbone).to(self.device), self.backbone, self.tokenizer)
        return training.AnalysisStage(system, name, config.label_smoothing)

    def train_method(self, name: str, seed: int) -> dict[str, Any]:
        """Train one method for its steps; what done.json says.

        Raises
        ------
        ParameterError
            If the method reads the encoder and stage 1 of this seed is not trained.
        """
        folder = self.directory / f"seed{seed}" / name
        steps, config, made_with = self._plan(name, seed)
        if self._claim(folder, made_with):
            return read_json(folder / "done.json")
        self._forget(seed, name)
        training.prepare(config)
        system = self._system(name, seed)
        stage = training.ReconstructionStage.of(system, config, name)
        result = self._fit(stage, config, folder, steps, texts=False)
        write_json(folder / "done.json", {"made_with": made_with, **result})
        return read_json(folder / "done.json")

    def _stage2(self, name: str) -> Stage2Parameters:
        """Stage 2's parameters as a method has them: tokens join late where there is something beside them.

        Rivals are trained by their authors' loss, whatever ours is beside it.
        """
        changed: dict[str, Any] = {} if name == "model" else {"tokens_from": 0.0}
        if not METHODS[name].image:
            changed |= {"encoder_image": False, "encoder_weights": False}
        if not (METHODS[name].image or METHODS[name].tokens):
            changed["data_echo"] = 1  # nothing frozen that could be kept: new slices are better than old ones
        if not METHODS[name].ours:
            changed["lesion_weight"] = 0.0
        return self.stage2.model_copy(update=changed)

    def reads_encoder(self, name: str) -> bool:
        """Whether a method takes tokens or the image it starts from out of stage 1."""
        return METHODS[name].tokens or self._stage2(name).encoder_image

    def _stage1_made_with(self) -> dict[str, Any]:
        return {"steps": self.config.stage1_steps, **_kept(self.stage1)}

    def _needed(self, name: str) -> dict[str, Any]:
        """What a method takes from stage 1: the whole of it with its tokens or image, a VarNet's sizes, or nothing."""
        if self.reads_encoder(name):
            return {"stage1": self._stage1_made_with()}
        if name.startswith("varnet"):
            return {key: value for key, value in self._sizes(name).to_dict().items() if key in VARNET_SIZES}
        return {}

    def _sizes(self, name: str) -> Stage1Parameters:
        return self.stage1 if METHODS[name].own_cascades else self.rivals

    def build(self, name: str) -> Any:
        """A method's untrained module in the decoder's place."""
        module = METHODS[name].build(self._sizes(name), self._stage2(name), self.backbone)
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _plan(self, name: str, seed: int) -> tuple[int, Stage2Parameters, dict[str, Any]]:
        """A method's steps, its parameters, and what its done.json says that it was made with."""
        if name not in self.config.methods:
            raise ParameterError(f"methods: '{name}' is not among {', '.join(self.config.methods)}")
        place = self.config.methods.index(name)
        steps, rate = self.config.steps[place], self.config.learning_rates[place]
        config = self._stage2(name).model_copy(update={"seed": seed, "learning_rate": rate})
        return steps, config, {"steps": steps, **self._needed(name), **_kept(config)}

    def _system(self, name: str, seed: int) -> TwoStageModel:
        """A method's untrained module in the decoder's place of a frozen model."""
        module = self.build(name)
        if self.reads_encoder(name):
            checkpoint = self._encoder_checkpoint(seed)
            system, _ = inference.load_stage1(checkpoint, self.backbone, self.tokenizer)
            if self._stage2(name).encoder_weights:
                start_with_encoder(module, system.encoder)
            system.decoder = module
            system.freeze(None)
            return system
        # Read by nothing: such a method takes neither encoder nor backbone.
        unread = build_control(self.stage1, self.backbone).to(self.device)
        return TwoStageModel(unread, self.backbone, self.tokenizer, module)

    def _encoder_checkpoint(self, seed: int) -> Path:
        path = self.directory / f"seed{seed}" / "stage1" / "stage1_checkpoints" / "stage1_best_model.pt"
        if not (path.parent.parent / "done.json").exists():
            raise ParameterError(f"stage 1 of seed {seed} is not trained: let part 'stage1' run first")
        return path

    def trained(self, name: str, seed: int) -> TwoStageModel:
        """A model with a trained method in the decoder's place; refused if it was made with other parameters."""
        folder = self.directory / f"seed{seed}" / name
        if not self._claim(folder, self._plan(name, seed)[2]):
            raise ParameterError(f"{name} of seed {seed} is not trained: let part 'train' run first")
        system = self._system(name, seed)
        path = folder / "stage2_checkpoints" / f"{name}_final_model.pt"
        assert system.decoder is not None
        load_weights(system.decoder, load_checkpoint(path, name)["weights"], display_path(path))
        system.freeze(None)
        return system

    # ---------------------------------------------------------------------------------------- scoring

    def choose_bart(self, acceleration: int) -> bart.Settings:
        """BART's settings at one acceleration, chosen on validation slices once."""
        path = self.directory / f"bart_{acceleration}x.json"
        if not path.exists():
            config = self._at(acceleration)
            data = FastMRIDataset(
                self.volumes["val"], config, acceleration=acceleration, max_slices=self.config.bart_slices
            )
            settings, tried = bart.choose(make_loader(data.uncompressed(), 4))
            chosen = {"version": bart.version(), "coils": "all", "chosen": settings._asdict(), "tried": tried}
            write_json(path, chosen)
        kept = read_json(path)
        if kept.get("coils") != "all":
            raise ParameterError(
                f"{display_path(path)}: BART's settings were chosen on compressed coils, but it gets all coils; remove "
                "this file, and the folders bart and zero_filled below reconstructions and shifts"
            )
        return bart.Settings(**kept["chosen"])

    def _at(self, acceleration: int) -> Stage2Parameters:
        if acceleration in self.stage2.accelerations:
            return self.stage2
        # as many centre lines as lie between those of the trained accelerations
        fraction = float(np.interp(acceleration, self.stage2.accelerations, self.stage2.center_fractions))
        return self.stage2.model_copy(update={"accelerations": [acceleration], "center_fractions": [fraction]})

    @torch.no_grad()
    def reconstruct(
        self, name: str, seed: int, volumes: Sequence[Volume], folder: Path, accelerations: Sequence[int], **masks: str
    ) -> None:
        """Write a method's reconstructions of volumes at some accelerations; those that are whole are left as they are.

        Parameters
        ----------
        name : str
            One of `METHODS` or `UNLEARNED`.
        seed : int
            Of the training; without meaning for what is not learned.
        volumes : sequence of Volume
        folder : Path
            Receives ``<method>/<acceleration>/<file>.h5``.
        accelerations : sequence of int
        **masks
            ``mask_type``, if it is another than the trained one.
        """
        system: TwoStageModel | None = None
        for acceleration in accelerations:
            there = folder / name / str(acceleration)
            if (there / SCORES).exists():  # scored already, wherever the images are
                continue
            missing = [v for v in volumes if not (there / v.path.name).exists()]
            if not missing:
                continue
            if name in METHODS and system is None:
                system = self.trained(name, seed)
            settings = self.choose_bart(acceleration) if name == "bart" else None
            nearest = NearestTrainingSlice(self.volumes["train"]) if name == "nearest_training_slice" else None
            config = self._at(acceleration).model_copy(update=masks)
            data = FastMRIDataset(missing, config, self.annotations, acceleration=acceleration)
            if name in ALL_COILS:
                data = data.uncompressed()
            writer = inference.VolumeWriter(folder, missing)
            for batch in make_loader(data, self.stage2.batch_size):
                moved = batch.to(self.device)
                writer.add(name, acceleration, batch.slices, _images(moved, system, settings, nearest))

    def token_swap(self, seed: int) -> dict[str, Any]:
        """The model with its own tokens, another patient's and none, and what its texts are worth.

        Images go to ``reconstructions/``; the scores of the texts, at each acceleration and at all, to ``texts.json``,
        which is returned.
        """
        folder = self.directory / f"seed{seed}"
        if (folder / TEXTS).exists():
            return read_json(folder / TEXTS)
        system = self.trained("model", seed)
        path = folder / "stage1" / "stage1_checkpoints" / "control_best_model.pt"
        control = inference.load_control(path, self.backbone, self.tokenizer)
        tester = inference.Tester(system, control, max_new_tokens=self.config.max_new_tokens)
        writer = inference.VolumeWriter(folder / "reconstructions", self.volumes["test"])
        rows: list[dict[str, Any]] = []
        for acceleration in self.stage2.accelerations:
            data = FastMRIDataset(self.volumes["test"], self.stage2, self.annotations, acceleration=acceleration)
            rows += tester.run(data, self.stage2.batch_size, writer, seed)
        train = FastMRIDataset(self.volumes["train"], self.stage2, self.annotations)
        facts = [train.facts(index) for index in range(len(train))]
        scores = {
            str(acceleration): inference.score_texts([r for r in rows if r["acceleration"] == acceleration], facts)
            for acceleration in self.stage2.accelerations
        }
        write_json(folder / TEXTS, {"all": inference.score_texts(rows, facts), **scores})
        return read_json(folder / TEXTS)

    def shifted(self, shift: str) -> tuple[list[Volume], list[int], dict[str, str]]:
        """Test volumes, accelerations and masks of one shift.

        Parameters
        ----------
        shift : str
            "acceleration 6", "mask random", "noise 2", "coils 4"; "head nibabel": the head of nibabel's tests, of
            `num_coils` coils; "patients SEED": as many files of brains that nobody has seen, made as the phantom in
            `data_dir` was but from another seed; or "folder DIR": every file of another folder.

        Raises
        ------
        ParameterError
            "patients" where `data_dir` is no phantom, or is of that seed.
        """
        kind, _, value = shift.partition(" ")
        home = list(self.stage2.accelerations)
        if kind == "acceleration":
            return self.volumes["test"], [int(value)], {}
        if kind == "mask":
            return self.volumes["test"], home, {"mask_type": value}
        if kind == "folder":
            return index_volumes(value), home, {}
        if kind == "patients":
            return self._other_patients(int(value)), home, {}
        if shift == "head nibabel":
            folder = self.directory / "shifted_files" / shift_name(shift)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "head.h5").exists():
                shifts.write_head(folder / "head.h5", self.stage2.num_coils)
            return index_volumes(folder), home, {}
        made = shifts.copies(self.volumes["test"], self.directory / "shifted_files", shift, self.config.seed)
        return made, home, {}

    def _other_patients(self, seed: int) -> list[Volume]:
        """As many volumes as for testing, made as the phantom in `data_dir` was, from another seed."""
        home, folder = resolve(self.stage2.data_dir), self.directory / "shifted_files" / f"patients_{seed}"
        if not (home / phantom.PARAMETERS_FILE).exists():
            raise ParameterError(
                f"shifts: patients {seed}: {display_path(home)} is no phantom that others could be made as"
            )
        made = read_json(home / phantom.PARAMETERS_FILE)
        if made["seed"] == seed:
            raise ParameterError(
                f"shifts: patients {seed}: these are the patients of {display_path(home)}; another seed"
            )
        wanted = {"volumes": len(self.volumes["test"]), "seed": seed}
        size = {name: made[name] for name in ("slices", "img_size", "coils")}
        if not (folder / "brain_file_list.csv").exists():  # written last
            phantom.make_dataset(folder, **wanted, **size, progress=False)
        if read_json(folder / phantom.PARAMETERS_FILE) != {**made, **wanted}:
            raise ParameterError(f"{display_path(folder)} was made with other parameters; remove the folder")
        return index_volumes(folder)

    def score(self, name: str, seed: int) -> None:
        """Reconstruct the test volumes at the trained accelerations, at home."""
        folder = self.directory / f"seed{seed}" / "reconstructions"
        self.reconstruct(name, seed, self.volumes["test"], folder, self.stage2.accelerations)

    def score_shift(self, shift: str, name: str, seed: int) -> None:
        """Reconstruct the test volumes under one shift."""
        volumes, accelerations, masks = self.shifted(shift)
        folder = self.directory / f"seed{seed}" / "shifts" / shift_name(shift)
        self.reconstruct(name, seed, volumes, folder, accelerations, **masks)

    # ---------------------------------------------------------------------------------------- all of it

    def jobs(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Every job of the parts that the parameters name, in order: what it is, and a call that does it."""
        config = self.config
        scored = [name for name in UNLEARNED if name != "bart" or bart.version()] + config.methods
        if "costs" in config.bench_parts:
            yield "costs", self.measure_costs
        if config.seeds_at_once > 1 and any(part in config.bench_parts for part in TRAINING_PARTS):
            yield "train the seeds", self.train_seeds
        else:
            for seed in config.bench_seeds:
                yield from self._trainings(seed)
        for number, seed in enumerate(config.bench_seeds):
            # what is not learned is the same for every seed
            names = scored if number == 0 else config.methods
            if "score" in config.bench_parts:
                for name in names:
                    yield f"score {name}, seed {seed}", functools.partial(self.score, name, seed)
                if "model" in config.methods:
                    yield f"swap tokens, seed {seed}", functools.partial(self.token_swap, seed)
            if "shifts" in config.bench_parts and number == 0:
                for shift in config.shifts:
                    for name in names:
                        yield f"{shift}: {name}", functools.partial(self.score_shift, shift, name, seed)

    def _trainings(self, seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        if "stage1" in self.config.bench_parts:
            yield f"stage 1, seed {seed}", functools.partial(self.train_stage1, seed)
        for name in self.config.methods if "train" in self.config.bench_parts else ():
            yield f"train {name}, seed {seed}", functools.partial(self.train_method, name, seed)

    def untrained(self, seed: int) -> list[str]:
        """The trainings of a seed that are not done yet; refused if one was made with other parameters."""
        folder = self.directory / f"seed{seed}"
        claimed = [self._claim(folder / "stage1", self._stage1_made_with())] * ("stage1" in self.config.bench_parts)
        if "train" in self.config.bench_parts:
            claimed += [self._claim(folder / name, self._plan(name, seed)[2]) for name in self.config.methods]
        return [job for (job, _), done in zip(self._trainings(seed), claimed, strict=True) if not done]

    def train_seeds(self) -> None:
        """Stage 1 and all methods, `seeds_at_once` seeds at a time; TrainingStopped if time was over before the end."""
        from mrilib.bench_seeds import train_side_by_side  # which imports this module

        train_side_by_side(self, self._ends - time.perf_counter())

    def end(self) -> None:
        """Let `bench_seconds` be over now: a training under way saves its state and stops, no further job begins."""
        self._ends = -math.inf
        if self._under_way is not None:
            request_stop(self._under_way, END)

    def run(self) -> list[str]:
        """Do the jobs one after the other; what is done already takes no time.

        Returns
        -------
        list of str
            Jobs that were not begun, or not ended, because `bench_seconds` were over: run again to go on. A training
            stops after the step that was under way then, and goes on with the next.
        """
        self._ends = time.perf_counter() + (self.config.bench_seconds or math.inf)
        left = []
        try:
            for name, call in self.jobs():
                if time.perf_counter() > self._ends:
                    left.append(name)
                    continue
                logger.info("bench: %s", name)
                try:
                    call()
                except TrainingStopped:
                    if time.perf_counter() <= self._ends:
                        raise  # by someone else
                    left.append(name)
        finally:
            self._ends = math.inf
        return left


def shift_name(shift: str) -> str:
    """A shift as a folder's name: "folder data/other" → "folder_data_other"."""
    return "_".join(shift.replace("/", " ").split())


def _images(
    batch: Batch, system: TwoStageModel | None, settings: bart.Settings | None, nearest: NearestTrainingSlice | None
) -> Tensor:
    if system is not None:
        return system(batch)
    if settings is not None:
        return bart.reconstruct(batch, settings)
    if nearest is not None:
        assert batch.target is not None
        return torch.from_numpy(np.stack([nearest.answer(target) for target in batch.target.cpu().numpy()]))
    return zero_filled(batch.kspace, batch.scale, batch.recon)


def _kept(config: Stage1Parameters | Stage2Parameters) -> dict[str, Any]:
    """What decides a training's result; not where it is written, shown or logged."""
    unread = FREE_ON_RESUME | {"log_interval", "epochs", "seed"}  # steps and seed are the bench's own
    return {name: value for name, value in config.to_dict().items() if name not in unread}


def _plain(epoch: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in epoch.items() if name != "epoch"}


def measure_rounds(bench: Bench, names: Sequence[str]) -> dict[str, list[float]]:
    """`seconds_per_step` of some, in turn, a number a round: a machine's pace drifts.

    Methods of the same network share its numbers. Each has the threads of one of the `seeds_at_once`.
    """
    network = {name: METHODS[name].network_of if name in METHODS else "" for name in names}
    network = {name: other if other in names else name for name, other in network.items()}
    each: dict[str, list[float]] = {name: [] for name in network.values()}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // bench.config.seeds_at_once))
    try:
        for _ in range(COST_ROUNDS):
            for name, seconds in each.items():
                seconds.append(seconds_per_step(bench, name))
    finally:
        torch.set_num_threads(threads)
    return {name: each[network[name]] for name in names}


def seconds_per_step(bench: Bench, name: str, steps: int = 8) -> float:
    """Seconds of an optimizer step of a method, "stage1" or "control", as trained.

    Each part of the training, before and after VarNet stands or all has joined, by its share: the median of some steps
    after the first. With the loading of its slices by this process, which an echo costs again.
    An untrained encoder costs what a trained one does, so nothing needs to be trained before.
    """
    texts = name not in METHODS
    config: Any = bench.stage1 if texts else bench._stage2(name)
    stage: training.Stage
    if texts:
        joins = {config.varnet_until, config.text_from} if name == "stage1" else set()
        stage = bench._analysis_stage(name, config)
    else:
        joins = {config.tokens_from}
        build_first = build_encoder if bench.reads_encoder(name) else build_control
        first = build_first(bench.stage1, bench.backbone).to(bench.device)
        system = TwoStageModel(first, bench.backbone, bench.tokenizer, bench.build(name))
        stage = training.ReconstructionStage.of(system, config, name)
    optimizer = build_optimizer(stage.model.freeze(stage.trainable), config.model_copy(update={"learning_rate": 1e-6}))
    stage.model.train()
    stage.data_echo = config.data_echo
    loader, _ = bench._loaders(config.model_copy(update={"seed": 0, "data_echo": 1}), steps, texts)
    # what learns and what is kept changes on the way: where each part of the training begins, and its share of it
    starts = sorted({0.0, *(share for share in joins if share < 1)})
    shares = np.diff([*starts, 1.0])
    seconds: list[list[float]] = [[] for _ in starts]
    batches = iter(loader)
    for _ in range(len(loader)):
        begin = time.perf_counter()
        batch = next(batches)
        loading = time.perf_counter() - begin
        for stage.progress, times in zip(starts, seconds, strict=True):
            stage.begin_epoch()
            comes = config.data_echo if stage.echoes_now else 1
            begin = time.perf_counter()
            for _ in range(comes):
                with torch.autocast(bench.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                    loss = stage.loss(batch.to(bench.device)).total / config.batch_size
                loss.backward()
                if stage.partial:
                    rest_where_nothing_is_learned(stage.part.parameters())
                optimizer.step()
                optimizer.zero_grad()
            times.append(loading + (time.perf_counter() - begin) / comes)
    stage.model.freeze(None)
    return float(sum(share * np.median(times[1:] or times) for share, times in zip(shares, seconds, strict=True)))


def calibrate(params: str, seconds: float = 300.0) -> Iterator[tuple[str, float, int]]:
    """Median seconds a step, and the steps that take `seconds`, of stage 1 and every learned method here and now."""
    for name, rounds in measure_rounds(Bench(_without_running(params), Path()), ["stage1", *METHODS]).items():
        each = float(np.median(rounds))
        yield name, each, round(seconds / each)


def _without_running(params: str, **changes: Any) -> BenchParameters:
    values = {name: value for name, value in read_yaml(resolve(params)).items() if name in BenchParameters.model_fields}
    return BenchParameters.create({**values, "bench_parts": [], **changes})


def try_rates(
    params: str, names: Sequence[str], rates: Sequence[float] = (5e-3, 1e-2, 2e-2, 4e-2), share: float = 0.2
) -> Iterator[tuple[str, float, float]]:
    """Validation loss of short trainings, each of `share` of a method's steps, at some learning rates.

    Parameters
    ----------
    params : str
        Params file of the comparison.
    names : sequence of str
        Methods that read no tokens: before stage 1 there are none. VarNets that differ in nothing trained share a rate.
    rates : sequence of float
    share : float

    Yields
    ------
    (method, rate, validation loss)
    """
    given = _without_running(params)
    for name in names:
        for rate in rates:
            steps = [max(1, round(share * count)) for count in given.steps]
            changed = {"learning_rates": [rate] * len(steps), "steps": steps, "validations": 1}
            with tempfile.TemporaryDirectory() as folder:
                made = Bench(_without_running(params, **changed), Path(folder)).train_method(name, 0)
            yield name, rate, made["validation"][-1]["val_loss"]


if __name__ == "__main__":
    # python -m mrilib.bench: what the steps in params/bench/benchmark.yaml are to be taken from
    # python -m mrilib.bench varnet unet: what their learning rates are to be taken from
    file = "params/bench/benchmark.yaml"
    if len(sys.argv) == 1:
        for method, each, count in calibrate(file):
            print(f"{method:24s} {each:6.3f} s a step, {count:5d} steps in 5 minutes", flush=True)
    for method, rate, loss in try_rates(file, sys.argv[1:]):
        print(f"{method:24s} {rate:.0e}: validation loss {loss:.4f}", flush=True)
