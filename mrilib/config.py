"""Every parameter of every notebook: name, type, default, description with unit, and limits.

One pydantic class per notebook. Its fields are exactly the notebook's parameters cell and the keys of its params
files; a test compares them. YAML's ``1e-4`` and papermill's ``false`` arrive as strings and are converted to float and
bool. Anything else of a wrong type and every unknown name is an error (`parameters.Parameters`).

After a change, ``python -m mrilib.runs.parameter_reference`` updates docs/parameters.md and the parameters cells.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, field_validator, model_validator

# Re-exported: other packages import these from mrilib.config.
from mrilib.errors import ParameterError as ParameterError
from mrilib.errors import printable as printable
from mrilib.files import ROOT as ROOT
from mrilib.files import display_path as display_path
from mrilib.files import require_utf8 as require_utf8
from mrilib.files import resolve as resolve
from mrilib.parameters import HINTS, Parameters, parameter
from mrilib.plain_yaml import read_yaml as read_yaml

MAX_NETWORK_PARAMETERS = 2 * 10**9  # of any network whose sizes are parameters; the full-size encoder has about 10**8


class OutputParameters(Parameters):
    """Run folder, widgets, seed."""

    output_dir: str = parameter("", "run folder; empty: a new folder under outputs/, named after notebook and time")
    interactive: bool = parameter(True, "show widgets; false: plain outputs for a headless run")
    seed: int = parameter(0, "seed of the random numbers", ge=0, lt=2**32)


class DataParameters(OutputParameters):
    """Data, masks, coils."""

    existing_paths: ClassVar[tuple[str, ...]] = ("data_dir", "val_dir", "test_dir", "annotations_dir", "reports_path")

    data_dir: str = parameter("data/demo", "folder of fastMRI brain multicoil h5 files for training", min_length=1)
    val_dir: str = parameter("", "folder of validation files; empty: part of data_dir, split by patient")
    test_dir: str = parameter("", "folder of test files; empty: part of data_dir, split by patient")
    val_fraction: float = parameter(
        0.06, "fraction of data_dir's patients for validation; unused with val_dir", ge=0, lt=1
    )
    test_fraction: float = parameter(
        0.12, "fraction of data_dir's patients for testing; unused with test_dir", ge=0, lt=1
    )
    split_seed: int = parameter(0, "seed of the split by patient", ge=0, lt=2**32)
    on_bad_file: Literal["refuse", "skip"] = parameter(
        "refuse", "unusable data files: stop with an error, or skip them and list them in run.json"
    )
    annotations_dir: str = parameter(
        "", "folder of fastMRI+'s brain.csv and brain_file_list.csv; empty: those in data_dir, if any"
    )
    reports_path: str = parameter(
        "", "JSON Lines file of your own reports (file, slice, prompt, response); empty: none"
    )
    num_coils: int = parameter(4, "coils after SVD compression; slices with fewer coils keep theirs", ge=1, le=1024)
    img_size: int = parameter(128, "side of the ViT's input image [pixels], a multiple of 16", ge=16, le=4096)
    crop: Literal["readout", "image"] = parameter(
        "readout", "readout: remove readout oversampling only; image: crop both axes before masking"
    )
    mask_type: str = parameter(
        "equispaced_fraction",
        "fastMRI mask: random, equispaced, equispaced_fraction, magic, magic_fraction, "
        "or your own (mrilib/physics/masks.py)",
        min_length=1,
    )
    accelerations: list[int] = parameter([4, 8], "acceleration factors of the undersampling masks", min_length=1)
    center_fractions: list[float] = parameter(
        [0.08, 0.0625], "fraction of phase-encoding lines sampled at the centre, one value per acceleration"
    )
    num_workers: int = parameter(0, "data-loading processes; 0: load in the main process", ge=0, le=256)

    @model_validator(mode="after")
    def _check_image_size_and_masks(self) -> Self:
        if self.img_size % 16:
            raise ValueError(f"img_size: {self.img_size} is not a multiple of 16, the ViT's patch size")
        if len(self.accelerations) != len(self.center_fractions):
            raise ValueError("center_fractions: give as many values as accelerations; they are paired by index")
        if any(a < 1 for a in self.accelerations) or any(not 0 < f <= 1 for f in self.center_fractions):
            raise ValueError("accelerations must be at least 1 and center_fractions in (0, 1]")
        if max(self.accelerations) > 1000:
            raise ValueError(f"accelerations: {max(self.accelerations)} is more than 1000")
        if self.mask_type in ("equispaced_fraction", "magic_fraction"):
            # fastMRI's spacing of the outer lines divides by their number, which must not round to 0.
            for fraction, acceleration in zip(self.center_fractions, self.accelerations, strict=True):
                if fraction * acceleration > 0.9:
                    raise ValueError(
                        f"center_fractions {fraction:g} with accelerations {acceleration}: the centre alone takes "
                        f"{fraction * acceleration:.2f} of the lines that {acceleration}x may sample, which leaves "
                        f"too few for {self.mask_type}; at most {0.9 / acceleration:.3f} fits, or use equispaced"
                    )
        return self


def _check_cuda(device: str) -> str:
    if device == "cuda":
        import torch  # takes seconds, which only this check needs

        if not torch.cuda.is_available():
            raise ValueError("cuda is not available: PyTorch finds no CUDA device; use device: auto or cpu")
    return device


Device = Annotated[Literal["auto", "cuda", "cpu"], AfterValidator(_check_cuda)]
DEVICE = "auto: CUDA if available; cuda without a CUDA device is an error"


class BackboneParameters(DataParameters):
    """Frozen language model."""

    existing_paths: ClassVar[tuple[str, ...]] = (
        *DataParameters.existing_paths,
        "config_path",
        "backbone_path",
        "tokenizer_path",
    )

    config_path: str = parameter("", "JSON configuration of the backbone; unused if backbone_path is a folder")
    backbone_path: str = parameter(
        "models/tiny_backbone", "backbone weights, or folder of a Hugging Face causal language model", min_length=1
    )
    tokenizer_path: str = parameter(
        "", "tokenizer.json or its folder; empty: backbone folder's, else Mistral 7B v0.1's"
    )
    backbone_dtype: Literal["float32", "bfloat16"] = parameter(
        "float32", "data type of the frozen backbone's weights; bfloat16 halves their memory"
    )
    device: Device = parameter("auto", DEVICE)


class TrainingParameters(BackboneParameters):
    """Training loop, the same for both stages."""

    epochs: int = parameter(4, "passes over the training slices", ge=1, le=10**6)
    max_steps: int = parameter(0, "stop after this many optimizer steps at the latest; 0: no limit", ge=0, le=10**8)
    batch_size: int = parameter(
        16, "slices per batch; a step uses gradient_accumulation_steps × num_processes batches", ge=1, le=4096
    )
    learning_rate: float = parameter(2e-3, "peak learning rate", gt=0, le=10)
    optimizer: Literal["adamw", "muon"] = parameter(
        "muon", "muon: orthogonalised steps for matrices and kernels, AdamW for the rest; often needs fewer steps"
    )
    weight_decay: float = parameter(1e-4, "decoupled weight decay of the optimizer", ge=0, le=100)
    max_grad_norm: float = parameter(1.0, "gradients are clipped to this norm", gt=0, le=1e9)
    warmup_ratio: float = parameter(0.1, "fraction of the steps with rising learning rate", ge=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = parameter("cosine", "learning rate after the warm-up")
    adam_betas: list[float] = parameter([0.9, 0.99], "AdamW's decay rates of the gradient's mean and of its square")
    gradient_accumulation_steps: int = parameter(1, "batches per process and optimizer step", ge=1, le=4096)
    mixed_precision: Literal["no", "bf16", "fp16"] = parameter(
        "no", "bf16, fp16: autocast, fp16 with loss scaling; FFT and SSIM stay in float32"
    )
    compile: bool = parameter(False, "compile the networks with torch.compile; the first steps take minutes")
    activation_checkpointing: bool = parameter(False, "recompute activations in the backward pass to save memory")
    max_train_slices: int = parameter(0, "largest number of training slices per epoch; 0: all", ge=0, le=10**7)
    max_val_slices: int = parameter(0, "largest number of validation slices, spread evenly; 0: all", ge=0, le=10**7)
    save_interval: int = parameter(5, "epochs between the checkpoints stageN_epoch_M.pt", ge=1, le=10**6)
    log_interval: int = parameter(10, "steps between the lines of the text log", ge=1, le=10**6)
    early_stopping_patience: int = parameter(
        0, "stop after this many epochs without a better validation loss; 0: never", ge=0, le=10**6
    )
    resume: bool = parameter(False, "resume the training in output_dir; false: refuse a folder that contains one")
    checkpoint_minutes: float = parameter(
        10, "time between the checkpoints for resuming [minutes]; 0: after every step", ge=0, le=525600
    )
    max_checkpoints: int = parameter(0, "newest checkpoints stageN_epoch_M.pt to keep; 0: all", ge=0, le=10**4)
    on_nan: Literal["stop", "skip"] = parameter(
        "stop", "if loss or gradient is not finite: save the state and stop, or skip the step"
    )
    num_processes: int = parameter(
        1, "training processes, one per GPU; each adds its batches to the optimizer step", ge=1, le=1024
    )

    @field_validator("adam_betas")
    @classmethod
    def _check_betas(cls, value: list[float]) -> list[float]:
        if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
            raise ValueError("expected two numbers from 0 to below 1")
        return value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _undo_yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false


class ExploreParameters(DataParameters):
    """Parameters of 01_explore_data."""

    notebook = "01_explore_data"
    existing_paths = ("val_dir", "test_dir", "annotations_dir", "reports_path", "tokenizer_path")

    tokenizer_path: str = parameter(
        "models/tiny_backbone", "tokenizer.json or its folder, to show texts as tokens; empty: Mistral 7B v0.1's"
    )
    phantom_volumes: int = parameter(
        300, "phantom volumes to write if data_dir does not exist; 0: data_dir must exist", ge=0, le=10**5
    )
    phantom_slices: int = parameter(3, "slices per phantom volume", ge=1, le=256)
    phantom_coils: int = parameter(8, "typical number of coils of the phantom", ge=2, le=128)
    phantom_seed: int = parameter(0, "seed of the phantom", ge=0, lt=2**32)
    volume: str = parameter("", "file to show; empty: the first with a finding")
    slice_num: int = parameter(-1, "slice to show; -1: the one with most findings", ge=-1, le=4096)

    @classmethod
    def create(cls, values: Mapping[str, Any], written_later: Collection[str] = ()) -> Self:
        """Validate values; data_dir may be missing if phantom data will be written there."""
        config = super().create(values, written_later)
        if not config.phantom_volumes and not resolve(config.data_dir).exists():
            raise ParameterError(f"data_dir: '{config.data_dir}' does not exist. {HINTS['data_dir']}")
        return config


def _unet_size(chans: int, pools: int) -> int:
    """Return the approximate number of parameters of fastMRI's U-Net."""
    return int(30 * chans**2 * 4**pools)


def _check_size(names: str, count: int) -> None:
    if count > MAX_NETWORK_PARAMETERS:
        raise ValueError(
            f"{names}: together they give a network of about {count:.1g} parameters; "
            f"at most {MAX_NETWORK_PARAMETERS:.1g} are allowed"
        )


class Stage1Parameters(TrainingParameters):
    """Parameters of 02_train_stage1."""

    notebook = "02_train_stage1"
    existing_paths = (*TrainingParameters.existing_paths, "varnet_weights")

    vit_embed_dim: int = parameter(256, "embedding dimension of the ViT", ge=1, le=16384)
    vit_num_layers: int = parameter(2, "layers of the ViT", ge=1, le=256)
    vit_num_heads: int = parameter(8, "attention heads of the ViT", ge=1, le=256)
    varnet_num_cascades: int = parameter(1, "cascades of the VarNet", ge=1, le=64)
    varnet_chans: int = parameter(8, "channels of the U-Nets in the cascades", ge=1, le=512)
    varnet_pools: int = parameter(3, "down-sampling levels of the U-Nets in the cascades", ge=1, le=8)
    varnet_weights: str = parameter("", "state dict of fastMRI's VarNet to start from; empty: random weights")
    varnet_map_network: bool = parameter(False, "coil maps from VarNet's network; false: from the centre lines alone")
    label_smoothing: float = parameter(0.0, "label smoothing of the cross-entropy", ge=0, lt=1)
    finding_fraction: float = parameter(
        0.0, "fraction of an epoch replaced by random slices with a finding; 0: every slice once", ge=0, le=1
    )
    mirror_fraction: float = parameter(
        0.0, "fraction of training slices flipped left to right, with their text and boxes", ge=0, le=1
    )
    finding_labels: list[str] = parameter(
        [], "fastMRI+ labels that a U-Net locates and adds to the tokens of their patches; empty: none"
    )
    train_control: bool = parameter(
        True, "also train the constant_prefix baseline: a prefix without k-space, same steps"
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.vit_embed_dim % self.vit_num_heads:
            raise ValueError(f"vit_num_heads: {self.vit_num_heads} does not divide vit_embed_dim {self.vit_embed_dim}")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        _check_size("vit_embed_dim, vit_num_layers", 12 * self.vit_num_layers * self.vit_embed_dim**2)
        cascades = self.varnet_num_cascades * _unet_size(self.varnet_chans, self.varnet_pools)
        _check_size("varnet_num_cascades, varnet_chans, varnet_pools", cascades)
        return self

    @model_validator(mode="after")
    def _check_finding_labels(self) -> Self:
        if not all(map(str.strip, self.finding_labels)) or len(set(self.finding_labels)) < len(self.finding_labels):
            raise ValueError("finding_labels: a label is empty or given twice")
        if self.finding_labels and self.img_size < 32:
            raise ValueError("finding_labels: the U-Net for them halves the image four times; img_size is below 32")
        return self

    @model_validator(mode="after")
    def _check_varnet_weights(self) -> Self:
        if self.varnet_weights and not self.varnet_map_network:
            raise ValueError("varnet_weights: they contain a network for coil maps; set varnet_map_network: true")
        return self


class Stage2Parameters(TrainingParameters):
    """Parameters of 03_train_stage2."""

    notebook = "03_train_stage2"

    epochs: int = parameter(2, "passes over the training slices", ge=1, le=10**6)
    batch_size: int = parameter(
        8, "slices per batch; a step uses gradient_accumulation_steps × num_processes batches", ge=1, le=4096
    )
    learning_rate: float = parameter(5e-3, "peak learning rate", gt=0, le=10)
    warmup_ratio: float = parameter(0.3, "fraction of the steps with rising learning rate", ge=0, le=1)
    adam_betas: list[float] = parameter([0.9, 0.999], "AdamW's decay rates of the gradient's mean and of its square")
    stage1_checkpoint: str = parameter(
        "outputs/demo/stage1_checkpoints/stage1_best_model.pt",
        "trained k-space encoder; unused by a decoder without tokens",
    )
    decoder: str = parameter(
        "unet_dc",
        "image decoder: unet_dc, no_token_decoder, varnet, varnet_measured_lines, varnet_combined, fastmri_unet, "
        "or your own (mrilib/model/decoders.py)",
        min_length=1,
    )
    decoder_type: Literal["full", "lightweight", "small"] = parameter(
        "small", "size of the U-Net; with decoder_hidden_dim 512 full has 160M parameters, lightweight 80M, small 35M"
    )
    decoder_hidden_dim: int = parameter(128, "channels of the projected image tokens", ge=16, le=4096)
    use_bilinear_upsample: bool = parameter(True, "bilinear up-sampling in the U-Net; false: transposed convolutions")
    image_skip: bool = parameter(True, "the decoder also receives the measured data; false: image tokens alone")
    sense: bool = parameter(
        True,
        "the U-Net corrects a SENSE image and a second SENSE solve follows; false: it corrects the zero-filled image",
    )
    baseline_cascades: int = parameter(12, "cascades of the VarNet baselines", ge=1, le=64)
    baseline_chans: int = parameter(18, "channels of the baselines' U-Nets", ge=1, le=512)
    baseline_pools: int = parameter(4, "down-sampling levels of the baselines' U-Nets", ge=1, le=8)
    masks_per_slice: int = parameter(
        0, "different masks per training slice, used in turn; 0: a new one each time", ge=0, le=10**4
    )
    token_cache_dir: str = parameter(
        "", "folder of the token cache: image tokens and decoder inputs, shared by runs; empty: no cache"
    )
    train_control: bool = parameter(
        True,
        "also train the no_token_decoder baseline, the same decoder without image tokens; unused if there are none",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        cascades = self.baseline_cascades * _unet_size(self.baseline_chans, self.baseline_pools)
        _check_size("baseline_cascades, baseline_chans, baseline_pools", cascades)
        return self

    @model_validator(mode="after")
    def _check_token_cache(self) -> Self:
        if self.token_cache_dir and not self.masks_per_slice:
            raise ValueError(
                "token_cache_dir: masks_per_slice is 0, so masks never repeat and nothing can be read back; "
                "set masks_per_slice to 1 or more, or leave token_cache_dir empty"
            )
        return self

    @model_validator(mode="after")
    def _check_measured_data(self) -> Self:
        if self.sense and not self.image_skip:
            raise ValueError("sense: the decoder has no measured data; set image_skip: true")
        if self.train_control and not self.image_skip:
            raise ValueError("train_control: a decoder without tokens needs the measured data; set it to false")
        return self


class EvaluateParameters(BackboneParameters):
    """Parameters of 04_evaluate."""

    notebook = "04_evaluate"
    existing_paths = (
        *BackboneParameters.existing_paths,
        "stage1_checkpoint",
        "constant_prefix_checkpoint",
        "stage2_checkpoint",
        "no_token_decoder_checkpoint",
    )

    stage1_checkpoint: str = parameter(
        "outputs/demo/stage1_checkpoints/stage1_best_model.pt",
        "k-space encoder of stage 1; empty: the decoder uses no tokens",
    )
    constant_prefix_checkpoint: str = parameter(
        "outputs/demo/stage1_checkpoints/constant_prefix_best_model.pt",
        "constant_prefix baseline of stage 1, without k-space; empty: left out",
    )
    stage2_checkpoint: str = parameter(
        "outputs/demo/stage2_checkpoints/stage2_best_model.pt", "image decoder of stage 2", min_length=1
    )
    no_token_decoder_checkpoint: str = parameter(
        "outputs/demo/stage2_checkpoints/no_token_decoder_best_model.pt",
        "no_token_decoder baseline of stage 2, trained without tokens; empty: left out",
    )
    batch_size: int = parameter(16, "slices per batch", ge=1, le=4096)
    max_new_tokens: int = parameter(80, "largest length of a generated analysis [tokens]", ge=1, le=4096)
    shift: str = parameter(
        "", "distribution shift of the test files: noise FACTOR, coils N, head nibabel or patients SEED; empty: none"
    )
    bart_slices: int = parameter(0, "validation slices for tuning BART's l1-wavelet; 0: without BART", ge=0, le=10**4)

    @field_validator("accelerations")
    @classmethod
    def _check_distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a value is given twice; results are stored by acceleration, so give each once")
        return value


class QuickstartParameters(OutputParameters):
    """Parameters of 00_quickstart."""

    notebook = "00_quickstart"
    existing_paths = ("model_dir", "data_dir")

    model_dir: str = parameter("models/phantom", "folder of an exported model", min_length=1)
    data_dir: str = parameter("", "folder of fastMRI files; empty: a phantom patient in data/quickstart_SEED")
    acceleration: int = parameter(8, "acceleration of the undersampling mask, one of the model's", ge=1, le=1000)
    phantom_seed: int = parameter(23, "seed of the phantom patient", ge=0, lt=2**32)
    device: Device = parameter("auto", DEVICE)


class CompareParameters(OutputParameters):
    """Parameters of 05_compare_runs."""

    notebook = "05_compare_runs"

    runs: list[str] = parameter([], "run folders to compare; empty: every finished run under outputs/")


class ComparisonParameters(OutputParameters):
    """Parameters of 06_comparison."""

    notebook = "06_comparison"

    runs: list[str] = parameter(
        [], "run folders of the methods and their seeds; empty: every finished run outputs/comparison-*"
    )


class CostParameters(OutputParameters):
    """Parameters of 07_costs."""

    notebook = "07_costs"
    existing_paths = ("stage1_params", "stage2_params")

    stage1_params: str = parameter(
        "params/demo/stage1.yaml", "params file of stage 1 to time the token cache", min_length=1
    )
    stage2_params: str = parameter(
        "params/demo/stage2.yaml", "params file of stage 2 to time the token cache", min_length=1
    )
    device: Device = parameter("auto", DEVICE)
    num_threads: int = parameter(0, "CPU threads of PyTorch; 0: PyTorch's default", ge=0, le=1024)
    backbone_speed: bool = parameter(True, "time the backbone: decoding, prefill, memory")
    hidden_size: int = parameter(1024, "hidden size of the timed backbone", ge=16, le=16384)
    num_hidden_layers: int = parameter(8, "layers of the timed backbone", ge=1, le=256)
    num_heads: int = parameter(8, "heads of the timed backbone", ge=1, le=256)
    vocab_size: int = parameter(32000, "vocabulary size of the timed backbone", ge=2, le=10**6)
    concept_dim: int = parameter(64, "input and output width of the timed backbone's Trigger", ge=1, le=16384)
    logit_dim: int = parameter(32, "versions of each weight in the timed backbone's Trigger", ge=1, le=4096)
    prefill_tokens: int = parameter(1024, "tokens of the timed prefill", ge=1, le=10**6)
    prefix_tokens: int = parameter(400, "embeddings before the decoded tokens and in the backward pass", ge=1, le=10**6)
    new_tokens: int = parameter(128, "tokens decoded with the cache, and without it", ge=1, le=10**5)
    repeats: int = parameter(5, "repetitions of the prefill; the fastest counts", ge=1, le=1000)
    loader_speed: bool = parameter(
        True, "time the loader against fastMRI's on two full-size phantom volumes (0.9 GB, written once)"
    )
    token_cache_speed: bool = parameter(
        False, "time an epoch of stage 2 with and without the token cache, on the data of stage2_params"
    )
    full_size_step: bool = parameter(
        False, "one step of each stage at params/full: 15 GB of disk, 10 GB of memory, minutes without a GPU"
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        _check_backbone_size(self.hidden_size, self.num_hidden_layers, self.vocab_size)
        return self


def _check_backbone_size(hidden_size: int, num_hidden_layers: int, vocab_size: int) -> None:
    _check_size("hidden_size, num_hidden_layers", 12 * num_hidden_layers * hidden_size**2)
    _check_size("hidden_size, vocab_size", hidden_size * vocab_size)


class PretrainParameters(OutputParameters):
    """Parameters of appendix_pretrain_tiny_backbone."""

    notebook = "appendix_pretrain_tiny_backbone"

    model_dir: str = parameter("models/tiny_backbone", "output folder of the model and its tokenizer", min_length=1)
    vocab_size: int = parameter(768, "largest vocabulary size of the tokenizer", ge=512, le=10**6)
    hidden_size: int = parameter(96, "hidden size of the model", ge=16, le=16384)
    num_hidden_layers: int = parameter(4, "layers; the first two have neither Trigger nor attention", ge=1, le=256)
    num_heads: int = parameter(4, "heads of both branches", ge=1, le=256)
    concept_dim: int = parameter(32, "input and output width of the Trigger", ge=1, le=16384)
    logit_dim: int = parameter(8, "versions of each weight in the Trigger", ge=1, le=4096)
    max_steps: int = parameter(1800, "training steps", ge=1, le=10**7)
    batch_size: int = parameter(32, "texts per step", ge=1, le=4096)
    learning_rate: float = parameter(4e-3, "peak learning rate of Muon (layers) and AdamW (other weights)", gt=0, le=10)
    weight_decay: float = parameter(0.01, "weight decay of the layers' matrices", ge=0, le=100)
    warmup_ratio: float = parameter(0.05, "fraction of the steps with rising learning rate", ge=0, le=1)
    max_grad_norm: float = parameter(1.0, "gradients are clipped to this norm", gt=0, le=1e9)
    prefix_min: int = parameter(16, "shortest prefix [positions]", ge=16, le=4096)
    prefix_max: int = parameter(80, "longest prefix [positions]", ge=16, le=4096)
    noise: float = parameter(1.0, "largest noise of a prefix position [RMS of the token embeddings]", ge=0, le=100)
    num_threads: int = parameter(2, "CPU threads; the weights depend slightly on their number", ge=1, le=1024)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        _check_backbone_size(self.hidden_size, self.num_hidden_layers, self.vocab_size)
        return self


NOTEBOOKS: dict[str, tuple[str, type[Parameters]]] = {  # key in commands and records → notebook, its parameters
    "quickstart": (QuickstartParameters.notebook, QuickstartParameters),
    "pretrain": (PretrainParameters.notebook, PretrainParameters),
    "explore": (ExploreParameters.notebook, ExploreParameters),
    "stage1": (Stage1Parameters.notebook, Stage1Parameters),
    "stage2": (Stage2Parameters.notebook, Stage2Parameters),
    "evaluate": (EvaluateParameters.notebook, EvaluateParameters),
    "compare": (CompareParameters.notebook, CompareParameters),
    "comparison": (ComparisonParameters.notebook, ComparisonParameters),
    "costs": (CostParameters.notebook, CostParameters),
}
