"""The backbone's tokenizer: Mistral 7B v0.1's, with 32,000 entries, rebuilt as a fast tokenizer.

The package mistral-common carries the original sentencepiece file. It is turned into a `tokenizers` BPE from its
pieces and scores, which gives the ids of sentencepiece itself, runs of spaces and unknown characters included.
"""

from functools import cache
from pathlib import Path

import mistral_common
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mrilib.backbone.loading import names_file, read_json_object

VOCAB_SIZE = 32000
_SPACE = "▁"


def sentencepiece_model() -> Path:
    """Path of the sentencepiece file, in the installed package mistral-common.

    Raises
    ------
    FileNotFoundError
        The installed version does not carry it.
    """
    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        raise FileNotFoundError(f"mistral-common {mistral_common.__version__} has no data/tokenizer.model.v1")
    return path


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """BPE's merges in order: sentencepiece joins the neighbours whose union has the best score.

    Runs of spaces all have the same score, and of equals it takes the leftmost: a run grows from its left end. Here
    every merge has a rank of its own, so the same comes of ranking those with the longer left part first.
    """
    merges = []
    for piece, score in scores.items():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(-score, -len(left), vocab[left], vocab[right], left, right) for left, right in halves
                   if left in scores and right in scores]  # fmt: skip
    return [(left, right) for *_, left, right in sorted(merges)]


@cache
def _mistral_json() -> str:
    """The tokenizer as tokenizer.json's text; built once, in a second or two."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model()))
    size = model.get_piece_size()
    if size != VOCAB_SIZE:
        raise ValueError(f"{sentencepiece_model()} has {size} pieces, not {VOCAB_SIZE}")
    vocab = {model.id_to_piece(i): i for i in range(size)}
    special = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
    scores = {p: model.get_score(i) for p, i in vocab.items() if i not in special and not model.is_byte(i)}
    bpe = BPE(vocab, _merges(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    # no splitting into words: sentencepiece merges across everything but what the pieces forbid
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # as special tokens, that decode leaves out; "<s>" typed by a user stays text, as in sentencepiece
    tokenizer.encode_special_tokens = True
    names = [model.id_to_piece(i) for i in sorted(special)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer.to_str()


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral 7B v0.1's tokenizer.

    Returns
    -------
    PreTrainedTokenizerFast
        32,000 entries; bos "<s>" 1, eos "</s>" 2, and eos for padding too, as the published backbone has it. It adds
        neither of them by itself.

    Raises
    ------
    FileNotFoundError, ValueError
        mistral-common does not carry the file that is meant.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_mistral_json()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, not {VOCAB_SIZE}")
    return tokenizer


def load_tokenizer(tokenizer_path: str | Path = "", vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a backbone.

    Parameters
    ----------
    tokenizer_path : path
        A directory that `save_pretrained` wrote or a tokenizer.json; empty for Mistral's.
    vocab_size : int, optional
        Number of rows of the backbone's embeddings, to be checked against.

    Raises
    ------
    FileNotFoundError
        tokenizer_path is not there or holds no tokenizer.
    ValueError
        An id would be outside the backbone's embeddings, or there is no end-of-sequence token to stop at.
    """
    if not str(tokenizer_path):
        tokenizer: PreTrainedTokenizerBase = mistral_tokenizer()
    else:
        tokenizer = _from_path(Path(tokenizer_path))
    name = str(tokenizer_path) or "Mistral's"
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name} has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise ValueError(f"tokenizer {name} has an empty vocabulary")
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"tokenizer {name} has ids up to {highest}, the backbone has {vocab_size} embeddings: "
            "set tokenizer_path to the tokenizer that belongs to backbone_path"
        )
    return tokenizer


def _from_path(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory, or from a tokenizer.json, whose neighbours say what its special tokens are."""
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{path} holds no tokenizer.json: give the backbone's tokenizer as tokenizer_path; from other files, "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…) makes one"
            )
        config = path / "tokenizer_config.json"
        if config.is_file():
            read_json_object(config)
            _vocabulary(path / "tokenizer.json")
            with names_file(config):
                return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        path = path / "tokenizer.json"
    known = _vocabulary(path)
    named = {key: token for key, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
             if token in known}  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_file=str(path), padding_side="left", split_special_tokens=True, **named)


def _vocabulary(path: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer.json."""
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer_path {path} is not there")
    try:
        return Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"tokenizer_path {path} is not a tokenizer.json: {error}") from error
