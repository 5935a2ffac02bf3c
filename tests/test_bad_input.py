"""Bad input on the command line and in params files is refused in one line that names it.

A row for each kind: its name, a function that writes the input and returns the arguments, words of the error line.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import systems
import yaml
from refusals import Refusal, assert_refused

from mrilib.config import ROOT

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 30)
)
ESCAPE = "\x1b[31mred\x1b[0m"
NO_UTF8 = os.fsdecode(b"data\xff")


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory, phantom_dir: Path, backbone_dir: Path) -> dict[str, object]:
    """Valid parameters of stage 1."""
    return {**systems.values(phantom_dir, backbone_dir), **systems.ENCODER}


def option(*given: str) -> Callable[[Path], list[str]]:
    """`train` with a valid params file and these -p options."""
    return lambda folder: [
        *("train", str(folder / "stage1.yaml"), "--stage", "1"),
        *(part for text in given for part in ("-p", text)),
    ]


def of_run(*arguments: str) -> Callable[[Path], list[str]]:
    """`run` of stage 1 with a valid params file and these arguments."""
    return lambda folder: ["run", str(folder), "--name", str(folder / "run"), "--stage1-only", *arguments]


def of_sweep(*arguments: str) -> Callable[[Path], list[str]]:
    """`sweep` of stage 1 with a valid params file and these arguments."""
    return lambda folder: ["sweep", str(folder), "--name", str(folder / "run"), "--stage1-only", *arguments]


def make_data(*arguments: str) -> Callable[[Path], list[str]]:
    """`make-data` into an empty folder."""
    return lambda folder: ["make-data", str(folder / "data"), *arguments]


def line(text: str) -> Callable[[Path], list[str]]:
    """`train` with a params file in which this text replaces the line of the same key, or is added."""

    def prepare(folder: Path) -> list[str]:
        path = folder / "stage1.yaml"
        key = text.partition(":")[0] + ":"
        others = [other for other in path.read_text().splitlines() if not other.startswith(key)]
        path.write_text("\n".join([*others, text]) + "\n", encoding="utf-8")
        return option()(folder)

    return prepare


def content(data: bytes | str) -> Callable[[Path], list[str]]:
    """`train` with a params file of this content."""

    def prepare(folder: Path) -> list[str]:
        (folder / "stage1.yaml").write_bytes(data if isinstance(data, bytes) else data.encode())
        return option()(folder)

    return prepare


def in_place(make: Callable[[Path], object], command: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """A command with something else at the path of the params file."""

    def prepare(folder: Path) -> list[str]:
        (folder / "stage1.yaml").unlink()
        make(folder / "stage1.yaml")
        return command(folder)

    return prepare


def symlink_loop(path: Path) -> None:
    path.symlink_to(path)


VALUES = [
    Refusal(
        "sweep over equal numbers", of_sweep("-p", "stage1.learning_rate=1e-3,0.001"), ("stage1.learning_rate", "twice")
    ),
    Refusal("runs of a missing folder", lambda folder: ["runs", str(folder / "none")], ("none", "not a folder")),
    Refusal("missing params folder", lambda _: ["run", "params/nowhere"], ("params/nowhere", "does not exist")),
    Refusal("runs of a file", lambda folder: ["runs", str(folder / "stage1.yaml")], ("stage1.yaml", "not a folder")),
    Refusal(
        "params file as params folder",
        lambda folder: ["run", str(folder / "stage1.yaml")],
        ("stage1.yaml", "is a file"),
    ),
    Refusal(
        "reconstruct with an empty --out",
        lambda folder: ["reconstruct", str(folder), str(folder), "--out", ""],
        ("--out", "folder"),
    ),
    Refusal("unfinished list", option("epochs=["), ("-p epochs=[", "not YAML")),
    Refusal("python tag", option("epochs=!!python/object/apply:os.system [id]"), ("-p epochs=", "tag")),
    Refusal("date", option("epochs=2024-11-28"), ("epochs", "2024-11-28")),
    Refusal("alias", option("accelerations=[&a 4, *a]"), ("-p accelerations=", "alias")),
    Refusal("two documents", option("epochs=1\n---\n2"), ("-p epochs=1", "not YAML")),
    Refusal("huge integer", option("epochs=" + "9" * 5000), ("-p epochs=9", "integer")),
    Refusal("octal integer", option("epochs=010"), ("-p epochs=010", "octal")),
    Refusal("sexagesimal integer", option("epochs=1:30"), ("-p epochs=1:30", "base 60")),
    Refusal("deep nesting", option("epochs=" + "[" * 5000), ("-p epochs=[", "nested")),
    Refusal("long text", option("tokenizer_path=" + "x" * 100_000), ("tokenizer_path", "characters")),
    Refusal("very long value", option("epochs=" + "x " * 1_000_000), ("-p epochs=x", "characters")),
    Refusal("null", option("epochs=null"), ("epochs", "no value")),
    Refusal("empty value", option("epochs="), ("epochs", "no value")),
    Refusal("no equals sign", option("epochs"), ("-p epochs", "NAME=VALUE")),
    Refusal("name with a notebook", option("stage1.epochs=3"), ("'stage1.epochs'", "NAME=VALUE")),
    Refusal("empty name", option("=3"), ("-p =3", "NAME=VALUE")),
    Refusal("same name twice", option("epochs=3", "epochs=4"), ("-p epochs=4", "twice")),
    Refusal("number too large for a float", option("learning_rate=1e999"), ("learning_rate", "1e999")),
    Refusal("escape sequence in a value", option(f"epochs={ESCAPE}"), ("-p epochs=\\x1b[31mred", "not YAML")),
    Refusal("escaped escape sequence", option('output_dir="\\e[31mred"'), ("output_dir", "control character")),
    Refusal("escape sequence in a name", option(f"{ESCAPE}=3"), ("\\x1b[31mred",)),
    Refusal("right-to-left override", option("reports_path=\u202efdp.exe"), ("reports_path", "control character")),
    Refusal("half a surrogate pair", option("reports_path=\udcff"), ("-p reports_path=\\udcff",)),
    Refusal("path with NUL", option('data_dir="a\\0b"'), ("data_dir", "control character")),
    Refusal("unknown user's home", option("data_dir=~nobody-of-this-name/x"), ("data_dir", "~nobody-of-this-name")),
    Refusal("path component too long", option("data_dir=" + "x" * 300), ("data_dir", "name too long")),
    Refusal("interactive is not a truth value", line("interactive: maybe"), ("stage1.yaml: interactive", "'maybe'")),
    Refusal("device as reports", option("reports_path=/dev/zero"), ("reports_path", "not a regular file")),
    Refusal("device as backbone", option("backbone_path=/dev/zero"), ("backbone_path", "not a regular file")),
    Refusal("device as data folder", option("data_dir=/dev/null"), ("data_dir", "not a folder")),
    Refusal("file as annotations folder", option("annotations_dir=LICENSE"), ("annotations_dir", "not a folder")),
    Refusal("finding without a name", option("finding_labels=['']"), ("finding_labels", "empty")),
    Refusal("finding twice", option("finding_labels=[Mass, Mass]"), ("finding_labels", "twice")),
    Refusal("10^20 coils", option("num_coils=100000000000000000000"), ("num_coils",)),
]

FILES = [
    Refusal("billion laughs", content(LAUGHS), ("stage1.yaml, line 2", "alias")),
    Refusal("huge integer in a file", line("epochs: " + "9" * 5000), ("stage1.yaml, line", "epochs", "integer")),
    Refusal("deep lists in a file", line("epochs: " + "[" * 5000), ("stage1.yaml, line", "nested")),
    Refusal(
        "deep mappings in a file", content("".join(" " * n + "a:\n" for n in range(99))), ("stage1.yaml", "nested")
    ),
    Refusal("merge key", line("<<: {epochs: 3}"), ("stage1.yaml, line", "<<")),
    Refusal("key twice", line("epochs: 3\nepochs: 4"), ("stage1.yaml", "'epochs' is given twice")),
    Refusal("list as key", line("[a]: 3"), ("stage1.yaml, line", "name: value")),
    Refusal("UTF-16", content("epochs: 3\n".encode("utf-16")), ("stage1.yaml", "UTF-8")),
    Refusal("random bytes", content(bytes(range(128, 256))), ("stage1.yaml", "UTF-8")),
    Refusal("megabytes", content("# x\n" * 1_000_000), ("stage1.yaml", "larger than")),
    Refusal("folder as file", in_place(Path.mkdir, option()), ("stage1.yaml", "not a regular file")),
    Refusal("FIFO as file", in_place(os.mkfifo, option()), ("stage1.yaml", "not a regular file")),
    Refusal(
        "FIFO as file of a sweep", in_place(os.mkfifo, of_sweep("-p", "stage1.epochs=1,2")), ("not a regular file",)
    ),
    Refusal("device as file", lambda _: ["train", "/dev/zero", "--stage", "1"], ("/dev/zero", "not a regular file")),
    Refusal("link loop as file", in_place(symlink_loop, option()), ("stage1.yaml", "symbolic links")),
    Refusal("link to nothing", in_place(lambda path: path.symlink_to("nowhere"), of_run()), ("nowhere", "not exist")),
    Refusal("unknown key", line("epochz: 3"), ("stage1.yaml", "'epochz'", "did you mean 'epochs'?")),
    Refusal(
        "thousands of keys", content("".join(f"k{n}: 3\n" for n in range(5000))), ("'k0'", "5000 names are unknown")
    ),
    Refusal("escape sequence as key", line('"\\e[31mx": 3'), ("stage1.yaml", "\\x1b[31mx")),
]


def shipped(right: int, given: int) -> Callable[[Path], list[str]]:
    """`train --stage GIVEN` with the shipped params file of stage RIGHT."""
    return lambda _: ["train", str(ROOT / f"params/full/stage{right}.yaml"), "--stage", str(given)]


def other_folder(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    (folder / "data" / "thesis.tex").touch()
    return option(f"output_dir={folder / 'data'}")(folder)


def damaged_overrides(text: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / "run" / "params").mkdir(parents=True)
        (folder / "run" / "params" / "stage1.yaml").write_text((folder / "stage1.yaml").read_text())
        (folder / "run" / "params" / "overrides.yaml").write_text(text)
        (folder / "run" / "run.json").write_text(
            '{"planned": ["stage1"], "notebooks": {}, "status": "failed", "started": "2026-01-01T00:00:00+0000"}'
        )
        return of_run("--resume")(folder)

    return prepare


def of_bad_record(make: Callable[[Path], object], *command: str) -> Callable[[Path], list[str]]:
    """A command on the folder run/, in which something that is no file is called run.json."""

    def prepare(folder: Path) -> list[str]:
        (folder / "run").mkdir()
        make(folder / "run" / "run.json")
        return [part.replace("FOLDER", str(folder)) for part in command]

    return prepare


RECONSTRUCT = ("reconstruct", "FOLDER/run", "FOLDER/stage1.yaml")
RUN = ("run", "FOLDER", "--name", "FOLDER/run", "--stage1-only", "--resume")


def checked(name: str) -> Callable[[Path], list[str]]:
    """`check` of a folder of this name."""

    def prepare(folder: Path) -> list[str]:
        (folder / name).mkdir()
        (folder / name / "a.h5").touch()
        return ["check", str(folder / name)]

    return prepare


COMMAND_LINES = [
    Refusal("check of a folder that is no UTF-8", checked(NO_UTF8), ("data\\udcff", "no UTF-8", "another name")),
    Refusal("check of a missing folder that is no UTF-8", lambda f: ["check", str(f / NO_UTF8)], ("not a folder",)),
    Refusal(
        "make-data in a folder that is no UTF-8",
        lambda f: ["make-data", str(f / NO_UTF8 / "x")],
        ("data\\udcff", "no UTF-8", "another name"),
    ),
    Refusal(
        "make-data in a file",
        lambda f: ["make-data", str(f / "stage1.yaml")],
        ("stage1.yaml' is a file; give a folder",),
    ),
    Refusal(
        "reconstruct with its arguments swapped",
        lambda f: ["reconstruct", str(f / "stage1.yaml"), str(f)],
        ("stage1.yaml' is a file", "the first argument is the run folder, the second the file"),
    ),
    Refusal("FIFO as record", of_bad_record(os.mkfifo, *RECONSTRUCT), ("run.json' is no regular file",)),
    Refusal("folder as record", of_bad_record(Path.mkdir, *RECONSTRUCT), ("run.json' is no regular file",)),
    Refusal("FIFO as record of all runs", of_bad_record(os.mkfifo, "runs", "FOLDER"), ("is no regular file",)),
    Refusal("FIFO as record to go on with", of_bad_record(os.mkfifo, *RUN), ("run.json' is no regular file",)),
    Refusal(
        "network of the other stage",
        lambda f: [*option()(f), "--only", "stage2"],
        ("--only stage2", "constant_prefix"),
    ),
    Refusal("unknown network", lambda f: [*option()(f), "--only", "x"], ("--only x", "stage1", "constant_prefix")),
    Refusal(
        "baseline that is not trained",
        lambda f: [*option("train_control=false")(f), "--only", "constant_prefix"],
        ("--only constant_prefix", "train_control"),
    ),
    Refusal("other folder as output_dir", other_folder, ("output_dir", "not a run folder")),
    Refusal(
        "a file as output_dir",
        lambda f: option(f"output_dir={f / 'stage1.yaml'}")(f),
        ("output_dir", "stage1.yaml", "not a folder"),
    ),
    Refusal(
        "stage 1's file for stage 2", shipped(1, 2), ("params/full/stage1.yaml", "a stage-1 params file", "to stage 1")
    ),
    Refusal(
        "stage 2's file for stage 1", shipped(2, 1), ("params/full/stage2.yaml", "a stage-2 params file", "to stage 2")
    ),
    Refusal("overrides.yaml is a list", damaged_overrides("[3]"), ("overrides.yaml",)),
    Refusal("overrides.yaml of scalars", damaged_overrides("stage1: 3"), ("overrides.yaml",)),
    Refusal("run of an unfinished list", of_run("-p", "stage1.epochs=["), ("-p stage1.epochs=[", "not YAML")),
    Refusal("run with another output_dir", of_run("-p", "stage1.output_dir=x"), ("stage1.output_dir", "--name")),
    Refusal("run with an unknown notebook", of_run("-p", f"{ESCAPE}.a=1"), ("\\x1b[31mred", "NOTEBOOK.NAME=VALUE")),
    Refusal("sweep of a tag", of_sweep("-p", "stage1.epochs=!!int 3,4"), ("-p stage1.epochs=", "tag")),
    Refusal("sweep of deep lists", of_sweep("-p", "stage1.epochs=" + "[" * 999), ("-p stage1.epochs=[", "nested")),
    Refusal(
        "sweep of 10^9 runs",
        of_sweep(*(f for n in ("epochs", "batch_size", "seed") for f in ("-p", f"stage1.{n}={'1,' * 999}1"))),
        ("1000000000 runs", "at most"),
    ),
    Refusal("sweep of an unknown method", of_sweep("--methods", "varnett"), ("--methods", "varnett.yaml")),
    Refusal("sweep of seeds in words", of_sweep("--seeds", "one,two"), ("--seeds one,two", "whole numbers")),
    Refusal("sweep with a bracket too many", of_sweep("-p", "stage1.seed=1,2]#"), ("-p stage1.seed=1,2]#", "not YAML")),
    Refusal("empty name of a run", lambda f: ["run", str(f), "--name", ""], ("--name is empty",)),
    Refusal("empty name of a sweep", lambda f: ["sweep", str(f), "--name", " "], ("--name is empty",)),
    Refusal("unknown command", lambda _: [ESCAPE], ("invalid choice",)),
    Refusal("unknown option", lambda f: [*option()(f), f"--{ESCAPE}"], ("unrecognized arguments", "\\x1b[31m")),
    Refusal("0 volumes", make_data("--volumes", "0"), ("--volumes", "0", "1 to")),
    Refusal("10^20 volumes", make_data("--volumes", "1" + "0" * 20), ("--volumes", "1 to")),
    Refusal("image of 10^9 pixels a side", make_data("--img-size", "1000000000"), ("--img-size", "16 to")),
    Refusal("odd image", make_data("--img-size", "63"), ("img_size is 63", "even")),
    Refusal("files larger than memory", make_data("--img-size", "2048", "--coils", "128"), ("img_size", "coils")),
    Refusal("volumes in words", make_data("--volumes", "many"), ("--volumes", "'many'")),
    Refusal("acceleration 0", lambda f: ["reconstruct", "x", "y", "--acceleration", "0"], ("--acceleration", "0")),
    Refusal("0 processes", lambda f: ["check", str(f), "--processes", "0"], ("--processes", "0")),
]


@pytest.mark.parametrize("refusal", [*VALUES, *FILES, *COMMAND_LINES], ids=str)
def test_bad_input_is_refused_in_one_line(
    refusal: Refusal, params: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump({**params, "output_dir": str(tmp_path / "run")}))
    arguments = refusal.prepare(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert_refused(arguments, refusal.words, capsys)
    assert {path for path in set(tmp_path.rglob("*")) - before if path.name != ".lock"} == set(), "nothing is written"
