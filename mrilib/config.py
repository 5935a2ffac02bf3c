"""Every parameter of every notebook: name, type, default, meaning and unit, validated.

One pydantic class a notebook. The parameters cell of a notebook and the keys of its params files are exactly the
fields of its class (a test keeps it so). YAML's ``1e-4`` and ``papermill -p x false`` arrive as strings, so numbers
and truth values are converted; what cannot be converted, or is not known, is refused in one plain sentence.
"""

import ast
import difflib
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mrilib import plain_yaml
from mrilib.errors import shortened

ROOT = Path(__file__).resolve().parent.parent
MASK_TYPES = ("random", "equispaced", "equispaced_fraction", "magic", "magic_fraction")
PARAMETERS_HEADER = "# Parameters of this notebook"


MAX_NETWORK_PARAMETERS = 2 * 10**9  # of a network that is made here; the full-size encoder has 10**8
MAX_NAMES_SHOWN = 5  # unknown names in one message
MAX_LIST_LENGTH = 1000  # of a list
MAX_TEXT_LENGTH = 4096  # characters; no path is longer
# line ends, terminal escapes, marks of the direction of writing, half surrogate pairs
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class ParameterError(ValueError):
    """A parameter that is unknown, of the wrong type or out of range, or names a file that is not there.

    Parameters
    ----------
    message : str
    names : sequence of str
        The wrong parameters, if they are known.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)


def resolve(path: str | Path) -> Path:
    """Absolute path of a parameter's path; relative ones are taken from the repository's root.

    A notebook's working directory is the root under papermill and notebooks/ in JupyterLab; the root is the same.

    Raises
    ------
    ParameterError
        For a loop of links, or the home folder of a user who does not exist.
    """
    try:
        # realpath, as Path.resolve raises on links in a circle: who opens the file tells what it is
        return Path(os.path.realpath(ROOT / Path(path).expanduser()))
    except (RuntimeError, OSError, ValueError) as error:
        raise ParameterError(f"the path '{shortened(str(path))}' cannot be resolved: {error}") from None


def display_path(path: str | Path) -> str:
    """The path as records show it: relative to the repository's root if it lies below it."""
    absolute = resolve(path)
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else str(absolute)


def require_utf8(path: str | Path) -> None:
    """Refuse a path that is not valid UTF-8: no record, table or params file can hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ParameterError(f"the name of '{path}' is no UTF-8; choose another name") from None


def printable(text: str, keep: str = "") -> str:
    """A text without control characters, which a terminal would obey: they become escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Parameters(BaseModel):
    """Base of the notebooks' parameters.

    Raises
    ------
    ParameterError
        From `create`, `from_yaml` and `from_notebook`: names each parameter, what was given and what is wanted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=False, allow_inf_nan=False)
    existing_paths: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="before")
    @classmethod
    def _no_surprising_conversions(cls, value: Any, info: Any) -> Any:
        # pydantic would read True as 1 and 1 as True: a slip in a params file that should be told, not guessed.
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError("a number is wanted, not true or false")
        if isinstance(value, int | float) and not isinstance(value, bool) and annotation is bool:
            raise ValueError("true or false is wanted, not a number")
        if isinstance(value, list) and annotation in (list[int], list[float]) and bool in map(type, value):
            raise ValueError("numbers are wanted, not true or false")
        if value is None:
            raise ValueError("no value is given; an empty text is written ''")
        if isinstance(value, list) and len(value) > MAX_LIST_LENGTH:
            raise ValueError(f"a list of {len(value)} items; at most {MAX_LIST_LENGTH} are allowed")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > MAX_TEXT_LENGTH:
                raise ValueError(f"a text of {len(text)} characters; at most {MAX_TEXT_LENGTH} are allowed")
            if isinstance(text, str) and CONTROL.search(text):
                raise ValueError("a control character is in the text; remove it")
        return value

    @classmethod
    def create(cls, values: Mapping[str, Any], written_later: Collection[str] = ()) -> Self:
        """Validate values into parameters; see the class for the errors.

        Parameters
        ----------
        values : mapping of str to plain values
        written_later : collection of str
            Path parameters whose files need not exist yet.
        """
        unknown = [name for name in values if name not in cls.model_fields]
        if unknown:
            sentence = _other_notebook(cls, values, unknown) or "; ".join(
                _unknown_sentence(cls, name) for name in unknown[:MAX_NAMES_SHOWN]
            )
            if len(unknown) > MAX_NAMES_SHOWN:
                sentence = f"{len(unknown)} names are not known. {sentence}"
            raise ParameterError(sentence, unknown)
        try:
            config = cls(**values)
        except ValidationError as error:
            names = [str(problem["loc"][0]) if problem["loc"] else "" for problem in error.errors()]
            raise ParameterError("; ".join(_error_sentence(problem) for problem in error.errors()), names) from None
        for name in cls.existing_paths:
            path = getattr(config, name)
            if not path or name in written_later:
                continue
            config.require_path(name)
        return config

    def require_path(self, name: str) -> None:
        """Refuse a path parameter that names nothing, or a file where a folder is wanted, or the reverse.

        Raises
        ------
        ParameterError
        """
        path = getattr(self, name)
        if not path:
            raise ParameterError(f"{name}: '' does not exist. {_hint(name)}".strip(), [name])
        try:
            mode = resolve(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise ParameterError(f"{name}: '{path}' does not exist. {_hint(name)}".strip(), [name]) from None
        except (ParameterError, OSError) as error:
            told = error.strerror if isinstance(error, OSError) else error
            raise ParameterError(f"{name}: '{shortened(path)}' cannot be used: {told}", [name]) from None
        if not stat.S_ISDIR(mode) and (name.endswith("_dir") or not stat.S_ISREG(mode)):
            kind = "folder" if name.endswith("_dir") else "regular file"
            raise ParameterError(f"{name}: '{path}' is no {kind}", [name])

    @classmethod
    def check_replaced(cls, values: Mapping[str, Any], names: Collection[str]) -> None:
        """Refuse a params file's wrong values of `names`, which something else takes the place of in a run.

        Raises
        ------
        ParameterError
        """
        try:
            cls(**{name: value for name, value in values.items() if name in cls.model_fields})
        except ValidationError as error:
            problems = [problem for problem in error.errors() if problem["loc"] and problem["loc"][0] in names]
            if problems:
                raise ParameterError("; ".join(map(_error_sentence, problems))) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read one flat YAML file, with `overrides` on top."""
        values, given = read_yaml(path), overrides or {}
        try:
            return cls.create({**values, **given})
        except ParameterError as error:
            if error.names and given.keys() >= set(error.names):
                raise  # the file is not to blame
            raise ParameterError(f"{display_path(path)}: {error}") from None

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters that a notebook was given: its parameters cell, then the cell that papermill injects.

        Parameters
        ----------
        namespace : mapping
            The notebook's ``globals()``. IPython's input history in it tells which names those cells assign, so that
            a misspelt parameter, which papermill only warns of, is refused.
        """
        names = _assigned_names(list(namespace.get("In", [])))
        return cls.create({name: namespace[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as JSON and checkpoints want them."""
        return self.model_dump(mode="json")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A flat YAML mapping from a file; errors name the file."""
    shown = display_path(path)
    values = parse_yaml(read_small(path), shown)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ParameterError(f"{shown} must hold one 'name: value' a line")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML text (see `plain_yaml.parse`); a ParameterError names `where`."""
    try:
        return plain_yaml.parse(text, where)
    except plain_yaml.YamlError as error:
        raise ParameterError(str(error)) from None


def read_small(path: str | Path) -> str:
    """The text of a params file.

    Raises
    ------
    ParameterError
        If it is not there, no regular file, too large, or not UTF-8.
    """
    shown = display_path(path)
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):  # a FIFO or a device might be read for ever
            raise ParameterError(f"the params file '{shown}' is no regular file")
        with open(path, "rb") as file:
            content = file.read(plain_yaml.LARGEST + 1)
    except FileNotFoundError:
        raise ParameterError(f"the params file '{shown}' does not exist") from None
    except OSError as error:
        raise ParameterError(f"the params file '{shown}' cannot be read: {error.strerror}") from None
    if len(content) > plain_yaml.LARGEST:
        raise ParameterError(f"the params file '{shown}' is larger than {plain_yaml.LARGEST} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ParameterError(f"{shown} is not YAML: it is no UTF-8 text") from None


def _assigned_names(history: list[str]) -> list[str]:
    names: list[str] = []
    for source in reversed(history):
        if not source.lstrip().startswith("# Parameters"):
            continue
        for node in ast.walk(ast.parse(source)):  # x = 1, x: int = 1 and x, y = 1, 2 all store to names
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in names:
                names.append(node.id)
        if source.lstrip().startswith(PARAMETERS_HEADER):
            return names
    raise ParameterError(f"run the parameters cell first (it begins with '{PARAMETERS_HEADER}')")


def _other_notebook(cls: type[Parameters], values: Mapping[str, Any], unknown: Sequence[str]) -> str:
    """A sentence for values that are another notebook's; empty if they are not."""
    stems = {parameters: stem for stem, parameters in NOTEBOOKS.values()}
    for other, stem in stems.items():
        if other is not cls and len(unknown) > 1 and other.model_fields.keys() >= set(values):
            told = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
            return f"these are the parameters of {stem} ({told}), not of {stems.get(cls, cls.__name__)}"
    return ""


def _unknown_sentence(cls: type[Parameters], name: str) -> str:
    others = [stem for stem, parameters in NOTEBOOKS.values() if name in parameters.model_fields]
    if others and cls in {parameters for _, parameters in NOTEBOOKS.values()}:
        return f"'{name}' is not a parameter of this notebook; it is one of {', '.join(others)}"
    near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"the known ones are {', '.join(cls.model_fields)}"
    return f"'{shortened(name)}' is not a parameter of this notebook; {hint}"


def _error_sentence(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "parameters"
    message = re.sub(r"^Value error, ", "", problem["msg"])
    given = f" (given: {_shown(problem['input'])})" if problem["loc"] else ""
    return f"{name}: {message[0].lower()}{message[1:]}{given}"


def _shown(value: Any) -> str:
    try:
        return shortened(repr(value))
    except ValueError:  # an integer of thousands of digits
        return "a very large number"


def _hint(name: str) -> str:
    return {
        "data_dir": "Put fastMRI brain files there, or make phantom data: python -m mrilib make-data DIR",
        "stage1_checkpoint": "Run stage 1 first: python -m mrilib run params/demo --stage1-only",
        "stage2_checkpoint": "Run stage 2 first: python -m mrilib run params/demo",
        "backbone_path": "See docs/your-data.md for where the weights go.",
    }.get(name, "")


def parameter(default: Any, description: str, **limits: Any) -> Any:
    """A parameter: its default, what it is with its unit, and pydantic's limits."""
    return Field(default, description=description, validate_default=True, **limits)


class OutputParameters(Parameters):
    """Where results go and how the notebook shows itself."""

    output_dir: str = parameter(
        "", "run folder; empty: a new one under outputs/, named after the notebook and the time"
    )
    interactive: bool = parameter(True, "show widgets; false in headless records")
    seed: int = parameter(0, "seed of every random number", ge=0, lt=2**32)


class DataParameters(OutputParameters):
    """The data, the masks, the coils."""

    existing_paths: ClassVar[tuple[str, ...]] = ("data_dir", "val_dir", "test_dir", "annotations_dir", "reports_path")

    data_dir: str = parameter(
        "data/demo", "folder of fastMRI brain multicoil h5 files (the training files)", min_length=1
    )
    val_dir: str = parameter("", "folder of validation files; empty: a part of data_dir, split by patient")
    test_dir: str = parameter("", "folder of test files; empty: a part of data_dir, split by patient")
    val_fraction: float = parameter(
        0.06, "share of data_dir's patients for validation, if val_dir is empty", ge=0, lt=1
    )
    test_fraction: float = parameter(0.12, "share of data_dir's patients for testing, if test_dir is empty", ge=0, lt=1)
    split_seed: int = parameter(0, "seed of the split by patient", ge=0, lt=2**32)
    on_bad_file: Literal["refuse", "skip"] = parameter(
        "refuse", "unusable data files; skip: left out and listed in run.json"
    )
    annotations_dir: str = parameter(
        "", "folder of fastMRI+ brain.csv and brain_file_list.csv; empty: data_dir's own if there"
    )
    reports_path: str = parameter("", "JSON lines of your own reports (file, slice, prompt, response); empty: none")
    num_coils: int = parameter(4, "coils after SVD compression; slices with fewer keep theirs", ge=1, le=1024)
    img_size: int = parameter(128, "side of the ViT's input [pixels], a multiple of 16", ge=16, le=4096)
    crop: Literal["readout", "image"] = parameter(
        "readout", "readout: native phase encoding; image: both axes cropped first"
    )
    mask_type: str = parameter(
        "equispaced_fraction", "fastMRI's masks: random, equispaced, equispaced_fraction, magic or magic_fraction"
    )
    accelerations: list[int] = parameter([4, 8], "accelerations", min_length=1)
    center_fractions: list[float] = parameter(
        [0.08, 0.0625], "share of lines sampled at the centre, one per acceleration"
    )
    num_workers: int = parameter(0, "processes that load data; 0: none", ge=0, le=256)

    @model_validator(mode="after")
    def _masks_and_size(self) -> Self:
        if self.img_size % 16:
            raise ValueError(f"img_size: {self.img_size} is not a multiple of 16, the ViT's patch")
        if len(self.accelerations) != len(self.center_fractions):
            raise ValueError("center_fractions: as many values as accelerations are wanted; they are paired by index")
        if any(a < 1 for a in self.accelerations) or any(not 0 < f <= 1 for f in self.center_fractions):
            raise ValueError("accelerations must be at least 1 and center_fractions in (0, 1]")
        if max(self.accelerations) > 1000:
            raise ValueError(f"accelerations: {max(self.accelerations)} is more than 1000")
        if self.mask_type not in MASK_TYPES:
            raise ValueError(f"mask_type: '{self.mask_type}' is not one of fastMRI's: {', '.join(MASK_TYPES)}")
        if self.mask_type.endswith("_fraction"):
            # These spread over the rest what the centre leaves of the lines, and divide by it, rounded to whole lines.
            for fraction, acceleration in zip(self.center_fractions, self.accelerations, strict=True):
                if fraction * acceleration > 0.9:
                    raise ValueError(
                        f"center_fractions {fraction:g} with accelerations {acceleration}: the centre alone is "
                        f"{fraction * acceleration:.2f} of the lines that {acceleration}x may sample, which leaves "
                        f"{self.mask_type} too few to spread; at most {0.9 / acceleration:.3f} fits, or take equispaced"
                    )
        return self


def _cuda_is_there(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("cuda was asked for, but PyTorch sees no CUDA device; use device: auto or cpu")
    return device


class BackboneParameters(DataParameters):
    """The frozen language model."""

    existing_paths: ClassVar[tuple[str, ...]] = (
        *DataParameters.existing_paths,
        "config_path",
        "backbone_path",
        "tokenizer_path",
    )

    config_path: str = parameter("", "backbone configuration; unused if backbone_path is a folder")
    backbone_path: str = parameter(
        "models/tiny_backbone", "backbone weights, or a Hugging Face causal-LM folder", min_length=1
    )
    tokenizer_path: str = parameter(
        "", "tokenizer.json or its folder; empty: the backbone folder's, else Mistral 7B v0.1's"
    )
    backbone_dtype: Literal["float32", "bfloat16"] = parameter(
        "float32", "type that the frozen backbone's weights are kept in; bfloat16 takes half the memory"
    )
    device: Literal["auto", "cuda", "cpu"] = parameter("auto", "cuda asked for and absent is an error")

    @field_validator("device")
    @classmethod
    def _cuda(cls, value: str) -> str:
        return _cuda_is_there(value)


class TrainingParameters(BackboneParameters):
    """The training loop, the same for both stages."""

    epochs: int = parameter(6, "passes over the training slices", ge=1, le=10**6)
    max_steps: int = parameter(
        0, "optimizer steps after which training ends, if the epochs have not ended; 0: no limit", ge=0, le=10**8
    )
    batch_size: int = parameter(
        16, "slices a batch; a step is gradient_accumulation_steps × num_processes of them", ge=1, le=4096
    )
    learning_rate: float = parameter(2e-3, "peak learning rate", gt=0, le=10)
    optimizer: Literal["adamw", "muon"] = parameter(
        "muon", "muon: orthogonalised steps for matrices and kernels, AdamW for the rest; often learns in fewer steps"
    )
    weight_decay: float = parameter(1e-4, "the optimizer's weight decay, decoupled", ge=0, le=100)
    max_grad_norm: float = parameter(1.0, "gradients are clipped to this norm", gt=0, le=1e9)
    warmup_ratio: float = parameter(0.1, "share of the steps with rising learning rate", ge=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = parameter("cosine", "learning rate after the warm-up")
    adam_betas: list[float] = parameter([0.9, 0.99], "AdamW's decay of the mean gradient and of its square")
    gradient_accumulation_steps: int = parameter(1, "batches a process adds up before a step", ge=1, le=4096)
    mixed_precision: Literal["no", "bf16"] = parameter("no", "bf16: autocast, FFT and SSIM stay in float32")
    activation_checkpointing: bool = parameter(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    max_train_slices: int = parameter(0, "use so many training slices an epoch at most; 0: all", ge=0, le=10**7)
    max_val_slices: int = parameter(0, "use so many validation slices at most, spread evenly; 0: all", ge=0, le=10**7)
    save_interval: int = parameter(5, "epochs between the kept checkpoints stageN_epoch_M.pt", ge=1, le=10**6)
    log_interval: int = parameter(10, "steps between the lines of the text log", ge=1, le=10**6)
    early_stopping_patience: int = parameter(
        0, "epochs without a better validation loss before stopping; 0: never", ge=0, le=10**6
    )
    resume: bool = parameter(False, "go on with the run folder's own training; false: refuse a folder that holds one")
    checkpoint_minutes: float = parameter(
        10, "minutes between the checkpoints to resume from; 0: after every step", ge=0, le=525600
    )
    max_checkpoints: int = parameter(0, "kept checkpoints stageN_epoch_M.pt, the newest; 0: all", ge=0, le=10**4)
    on_nan: Literal["stop", "skip"] = parameter(
        "stop", "loss or gradient not finite: stop with the state saved, or skip"
    )
    num_processes: int = parameter(
        1, "processes that share a step's batches, a GPU each; the step grows with them", ge=1, le=1024
    )

    @field_validator("adam_betas")
    @classmethod
    def _two_decays(cls, value: list[float]) -> list[float]:
        if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
            raise ValueError("two numbers from 0 to below 1 are wanted")
        return value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yamls_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false


class ExploreParameters(DataParameters):
    """01_explore_data."""

    existing_paths = ("val_dir", "test_dir", "annotations_dir", "reports_path", "tokenizer_path")

    tokenizer_path: str = parameter(
        "models/tiny_backbone", "tokenizer.json or its folder, to show a text's tokens; empty: Mistral 7B v0.1's"
    )
    phantom_volumes: int = parameter(
        300, "phantom volumes to make if data_dir does not exist; 0: none, it must exist", ge=0, le=10**5
    )
    phantom_slices: int = parameter(3, "slices a phantom volume", ge=1, le=256)
    phantom_coils: int = parameter(8, "typical coil count of the phantom", ge=2, le=128)
    phantom_seed: int = parameter(0, "seed of the phantom", ge=0, lt=2**32)
    volume: str = parameter("", "file to look at; empty: the first with a finding")
    slice_num: int = parameter(-1, "slice to look at; -1: the one with most findings", ge=-1, le=4096)

    @classmethod
    def create(cls, values: Mapping[str, Any], written_later: Collection[str] = ()) -> Self:
        """As for the other notebooks; data_dir may be missing if a phantom is to be made there."""
        config = super().create(values, written_later)
        if not config.phantom_volumes and not resolve(config.data_dir).exists():
            raise ParameterError(f"data_dir: '{config.data_dir}' does not exist. {_hint('data_dir')}")
        return config


def _unet_size(chans: int, pools: int) -> int:
    """Parameters of fastMRI's U-Net, about."""
    return int(30 * chans**2 * 4**pools)


def _check_size(names: str, count: int) -> None:
    if count > MAX_NETWORK_PARAMETERS:
        raise ValueError(
            f"{names}: together they make a network of about {count:.1g} parameters; "
            f"at most {MAX_NETWORK_PARAMETERS:.1g} are allowed"
        )


class Stage1Parameters(TrainingParameters):
    """02_train_stage1."""

    existing_paths = (*TrainingParameters.existing_paths, "varnet_weights")

    vit_embed_dim: int = parameter(256, "ViT embedding dimension", ge=1, le=16384)
    vit_num_layers: int = parameter(2, "ViT layers", ge=1, le=256)
    vit_num_heads: int = parameter(8, "ViT attention heads", ge=1, le=256)
    varnet_num_cascades: int = parameter(1, "VarNet cascades", ge=1, le=64)
    varnet_chans: int = parameter(8, "channels of the cascades' U-Nets", ge=1, le=512)
    varnet_pools: int = parameter(3, "down-sampling levels of the cascades' U-Nets", ge=1, le=8)
    varnet_weights: str = parameter("", "fastMRI VarNet state dict to start from; empty: random")
    varnet_map_network: bool = parameter(
        False, "VarNet's network for the sensitivity maps; false: the centre lines' images"
    )
    label_smoothing: float = parameter(0.0, "label smoothing of the cross-entropy", ge=0, lt=1)
    finding_fraction: float = parameter(
        0.0,
        "share of an epoch that random slices with a finding (of the same shape) replace; 0: every slice once",
        ge=0,
        le=1,
    )
    mirror_fraction: float = parameter(
        0.0, "share of training slices seen flipped left to right, their text and boxes too", ge=0, le=1
    )
    finding_labels: list[str] = parameter(
        [], "findings that a U-Net maps, said in the tokens of their patches (fastMRI+ labels); empty: none"
    )
    train_control: bool = parameter(
        True, "also train the control without k-space: a learned constant prefix, same steps"
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.vit_embed_dim % self.vit_num_heads:
            raise ValueError(f"vit_num_heads: {self.vit_num_heads} does not divide vit_embed_dim {self.vit_embed_dim}")
        return self

    @model_validator(mode="after")
    def _size(self) -> Self:
        _check_size("vit_embed_dim, vit_num_layers", 12 * self.vit_num_layers * self.vit_embed_dim**2)
        cascades = self.varnet_num_cascades * _unet_size(self.varnet_chans, self.varnet_pools)
        _check_size("varnet_num_cascades, varnet_chans, varnet_pools", cascades)
        return self

    @model_validator(mode="after")
    def _maps(self) -> Self:
        if not all(map(str.strip, self.finding_labels)) or len(set(self.finding_labels)) < len(self.finding_labels):
            raise ValueError("finding_labels: a label is empty or given twice")
        if self.finding_labels and self.img_size < 32:
            raise ValueError(
                "finding_labels: the U-Net that maps them halves the image four times; img_size is below 32"
            )
        return self

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.varnet_weights and not self.varnet_map_network:
            raise ValueError("varnet_weights: they hold a network for the maps; set varnet_map_network: true")
        return self


class Stage2Parameters(TrainingParameters):
    """03_train_stage2."""

    epochs: int = parameter(2, "passes over the training slices", ge=1, le=10**6)
    batch_size: int = parameter(
        8, "slices a batch; a step is gradient_accumulation_steps × num_processes of them", ge=1, le=4096
    )
    learning_rate: float = parameter(5e-3, "peak learning rate", gt=0, le=10)
    warmup_ratio: float = parameter(0.3, "share of the steps with rising learning rate", ge=0, le=1)
    adam_betas: list[float] = parameter([0.9, 0.999], "AdamW's decay of the mean gradient and of its square")
    stage1_checkpoint: str = parameter(
        "outputs/demo/stage1_checkpoints/stage1_best_model.pt",
        "trained k-space encoder; unused by a decoder without tokens",
    )
    decoder: str = parameter(
        "unet_dc",
        "what makes the image: unet_dc, no_token_decoder, varnet, varnet_measured_lines, varnet_combined, "
        "fastmri_unet, or your own (mrilib/model/decoders.py)",
        min_length=1,
    )
    decoder_type: Literal["full", "lightweight", "small"] = parameter(
        "small", "full: 160M parameters at the defaults; lightweight: 80M; small: 35M"
    )
    decoder_hidden_dim: int = parameter(128, "width of the image tokens' map in the decoder", ge=16, le=4096)
    use_bilinear_upsample: bool = parameter(True, "bilinear up-sampling in the U-Net; false: transposed convolutions")
    image_skip: bool = parameter(True, "the decoder also gets the measured data; false: image tokens alone")
    sense: bool = parameter(
        True, "the U-Net starts from a SENSE image, and what it makes is brought into line with all coils"
    )
    baseline_cascades: int = parameter(12, "cascades of the VarNets", ge=1, le=64)
    baseline_chans: int = parameter(18, "channels of the VarNets' and fastMRI's U-Nets", ge=1, le=512)
    baseline_pools: int = parameter(4, "down-sampling levels of the VarNets' and fastMRI's U-Nets", ge=1, le=8)
    masks_per_slice: int = parameter(
        0, "masks a training slice sees in turn; 0: a new one each time that it is seen", ge=0, le=10**4
    )
    token_cache_dir: str = parameter(
        "", "folder of the token cache, shared by runs: image tokens and decoder inputs are computed once; empty: none"
    )
    train_control: bool = parameter(False, "also train the control: a decoder without image tokens, same steps")

    @model_validator(mode="after")
    def _size(self) -> Self:
        cascades = self.baseline_cascades * _unet_size(self.baseline_chans, self.baseline_pools)
        _check_size("baseline_cascades, baseline_chans, baseline_pools", cascades)
        return self

    @model_validator(mode="after")
    def _cache_has_masks(self) -> Self:
        if self.token_cache_dir and not self.masks_per_slice:
            raise ValueError(
                "token_cache_dir: with masks_per_slice 0 every epoch has new masks and nothing to read back; "
                "set masks_per_slice to 1 or more, or leave token_cache_dir empty"
            )
        return self

    @model_validator(mode="after")
    def _has_measured_data(self) -> Self:
        if self.sense and not self.image_skip:
            raise ValueError("sense: there is nothing but tokens without the measured data; set image_skip: true")
        return self

    @model_validator(mode="after")
    def _control_has_input(self) -> Self:
        if self.train_control and not self.image_skip:
            raise ValueError("train_control: a decoder without tokens needs the measured data; set image_skip: true")
        return self


class EvaluateParameters(BackboneParameters):
    """04_evaluate."""

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
        "stage 1's control without k-space; empty: the text is scored without it",
    )
    stage2_checkpoint: str = parameter(
        "outputs/demo/stage2_checkpoints/stage2_best_model.pt", "image decoder of stage 2", min_length=1
    )
    no_token_decoder_checkpoint: str = parameter(
        "", "stage 2's control, a decoder trained without tokens; empty: left out"
    )
    batch_size: int = parameter(16, "slices a batch", ge=1, le=4096)
    max_new_tokens: int = parameter(80, "longest generated analysis [tokens]", ge=1, le=4096)
    shift: str = parameter("", "test under a shift: noise FACTOR, coils N, head nibabel or patients SEED; empty: none")
    bart_slices: int = parameter(
        0, "validation slices to choose the settings of BART's l1-wavelet on; 0: without BART", ge=0, le=10**4
    )
    bootstrap_samples: int = parameter(1000, "bootstrap samples over patients for the intervals", ge=100, le=10**6)
    figure_slices: int = parameter(3, "slices shown in the figures", ge=1, le=100)

    @field_validator("accelerations")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a value is given twice; results are kept by acceleration, so give each once")
        return value


class CompareParameters(OutputParameters):
    """05_compare_runs."""

    existing_paths = ()

    runs: list[str] = parameter([], "run folders to compare; empty: every finished run under outputs/")


class BenchmarkParameters(OutputParameters):
    """06_benchmark: what the parts cost."""

    existing_paths = ("stage1_params", "stage2_params")

    stage1_params: str = parameter("params/demo/stage1.yaml", "stage 1 of the token cache's times", min_length=1)
    stage2_params: str = parameter("params/demo/stage2.yaml", "stage 2 of the token cache's times", min_length=1)
    device: Literal["auto", "cuda", "cpu"] = parameter("auto", "cuda asked for and absent is an error")
    num_threads: int = parameter(0, "processor threads of PyTorch; 0: as many as it takes by itself", ge=0, le=1024)
    backbone_speed: bool = parameter(True, "time the backbone: decoding, prefill, memory")
    hidden_size: int = parameter(1024, "width of the timed backbone", ge=16, le=16384)
    num_hidden_layers: int = parameter(8, "blocks of the timed backbone", ge=1, le=256)
    num_heads: int = parameter(8, "heads of the timed backbone", ge=1, le=256)
    vocab_size: int = parameter(32000, "vocabulary of the timed backbone", ge=2, le=10**6)
    concept_dim: int = parameter(64, "width of the timed backbone's Trigger", ge=1, le=16384)
    logit_dim: int = parameter(32, "adaptable factors per weight of the timed backbone's Trigger", ge=1, le=4096)
    prefill_tokens: int = parameter(1024, "tokens of the timed prefill", ge=1, le=10**6)
    prefix_tokens: int = parameter(
        400, "embeddings before the decoded tokens, and of the backward pass", ge=1, le=10**6
    )
    new_tokens: int = parameter(128, "decoded tokens, with the cache and recomputing", ge=1, le=10**5)
    repeats: int = parameter(5, "the best of so many is told for a prefill", ge=1, le=1000)
    loader_speed: bool = parameter(
        True, "time the loader beside fastMRI's, on two full-size phantom volumes (0.9 GB, made once)"
    )
    token_cache_speed: bool = parameter(
        False, "time an epoch of stage 2 with and without the token cache, on the data of stage2_params"
    )
    full_size_step: bool = parameter(
        False, "one step of each stage at params/full: 15 GB of disk, 10 GB of memory, minutes without a GPU"
    )

    @field_validator("device")
    @classmethod
    def _cuda(cls, value: str) -> str:
        return _cuda_is_there(value)

    @model_validator(mode="after")
    def _size(self) -> Self:
        _check_size("hidden_size, num_hidden_layers", 12 * self.num_hidden_layers * self.hidden_size**2)
        _check_size("hidden_size, vocab_size", self.hidden_size * self.vocab_size)
        return self


class PretrainParameters(OutputParameters):
    """00_pretrain_tiny_backbone."""

    model_dir: str = parameter(
        "models/tiny_backbone", "folder that the model and its tokenizer are written to", min_length=1
    )
    vocab_size: int = parameter(768, "upper limit of the tokenizer's entries", ge=512, le=10**6)
    hidden_size: int = parameter(96, "width of the model", ge=16, le=16384)
    num_hidden_layers: int = parameter(4, "blocks; the first two have neither Trigger nor attention", ge=1, le=256)
    num_heads: int = parameter(4, "heads of both branches", ge=1, le=256)
    concept_dim: int = parameter(32, "width of the Trigger's input and output", ge=1, le=16384)
    logit_dim: int = parameter(8, "adaptable factors per weight of the Trigger", ge=1, le=4096)
    max_steps: int = parameter(1800, "training steps", ge=1, le=10**7)
    batch_size: int = parameter(32, "texts a step", ge=1, le=4096)
    learning_rate: float = parameter(
        4e-3, "peak learning rate of Muon (layers) and AdamW (embeddings, norms)", gt=0, le=10
    )
    weight_decay: float = parameter(0.01, "weight decay of the layers' matrices", ge=0, le=100)
    warmup_ratio: float = parameter(0.05, "share of the steps with rising learning rate", ge=0, le=1)
    max_grad_norm: float = parameter(1.0, "gradients are clipped to this norm", gt=0, le=1e9)
    prefix_min: int = parameter(16, "shortest prefix [positions]", ge=16, le=4096)
    prefix_max: int = parameter(80, "longest prefix [positions]", ge=16, le=4096)
    noise: float = parameter(
        1.0, "largest noise of a prefix position [root mean square of the token embeddings]", ge=0, le=100
    )
    num_threads: int = parameter(
        2, "processor threads; another number sums in another order and gives other weights", ge=1, le=1024
    )

    @model_validator(mode="after")
    def _size(self) -> Self:
        _check_size("hidden_size, num_hidden_layers", 12 * self.num_hidden_layers * self.hidden_size**2)
        _check_size("hidden_size, vocab_size", self.hidden_size * self.vocab_size)
        return self


NOTEBOOKS: dict[str, tuple[str, type[Parameters]]] = {
    "pretrain": ("00_pretrain_tiny_backbone", PretrainParameters),
    "explore": ("01_explore_data", ExploreParameters),
    "stage1": ("02_train_stage1", Stage1Parameters),
    "stage2": ("03_train_stage2", Stage2Parameters),
    "evaluate": ("04_evaluate", EvaluateParameters),
    "compare": ("05_compare_runs", CompareParameters),
    "benchmark": ("06_benchmark", BenchmarkParameters),
}
