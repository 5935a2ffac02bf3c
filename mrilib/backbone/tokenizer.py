"""The backbone's tokenizer: that of Mistral 7B v0.1, with 32,000 entries, rebuilt as a fast tokenizer.

The package mistral-common contains the original sentencepiece file. A `tokenizers` BPE is built from its pieces and
scores. It gives the same ids as sentencepiece, also for runs of spaces and unknown characters.
"""

from functools import cache
from pathlib import Path

import mistral_common
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mrilib.backbone.loading import read_json_object, transformers_errors

VOCAB_SIZE = 32000
_SPACE = "▁"


def sentencepiece_model() -> Path:
    """Return the path of the sentencepiece file in the package mistral-common.

    Raises
    ------
    FileNotFoundError
        If the installed version does not contain it.
    """
    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        raise FileNotFoundError(f"mistral-common {mistral_common.__version__} has no data/tokenizer.model.v1")
    return path


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Order the BPE's merges: sentencepiece merges the neighbours whose union has the highest score.

    Runs of spaces have equal scores. Sentencepiece merges the leftmost of equals, so a run grows from its left end.
    Here every merge needs its own rank: of equals, those with the longer left part come first, to the same effect.
    """
    merges = []
    for piece, score in scores.items():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(-score, -len(left), vocab[left], vocab[right], left, right) for left, right in halves
                   if left in scores and right in scores]  # fmt: skip
    return [(left, right) for *_, left, right in sorted(merges)]


@cache
def _mistral_json() -> str:
    """Text of tokenizer.json; it takes a second or two and is built once."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model()))
    size = model.get_piece_size()
    if size != VOCAB_SIZE:
        raise ValueError(f"{sentencepiece_model()} has {size} pieces, not {VOCAB_SIZE}")
    vocab = {model.id_to_piece(i): i for i in range(size)}
    special = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
    scores = {p: model.get_score(i) for p, i in vocab.items() if i not in special and not model.is_byte(i)}
    bpe = BPE(vocab, _merges(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    # no splitting into words: sentencepiece merges across spaces
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # special tokens, which decoding omits; "<s>" typed by a user stays text, as in sentencepiece
    tokenizer.encode_special_tokens = True
    names = [model.id_to_piece(i) for i in sorted(special)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer.to_str()


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of Mistral 7B v0.1.

    Returns
    -------
    PreTrainedTokenizerFast
        32,000 entries; bos "<s>" 1, eos "</s>" 2, pad = eos, as in the published backbone. Encoding adds no tokens.

    Raises
    ------
    FileNotFoundError, ValueError
        If mistral-common does not contain the file, or another version of it.
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
    """Load a backbone's tokenizer.

    Parameters
    ----------
    tokenizer_path : path
        A directory written by `save_pretrained`, or a tokenizer.json; empty for Mistral's.
    vocab_size : int, optional
        Number of rows of the backbone's embeddings; all ids must be below it.

    Raises
    ------
    FileNotFoundError
        If tokenizer_path does not exist or contains no tokenizer.
    ValueError
        If an id exceeds the backbone's embeddings, or there is no end-of-sequence token.
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
            "set tokenizer_path to the tokenizer of backbone_path"
        )
    return tokenizer


def _from_path(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory, with its tokenizer_config.json if there is one, or from a tokenizer.json."""
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{path} contains no tokenizer.json: give the backbone's tokenizer as tokenizer_path; "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…) converts other formats"
            )
        config = path / "tokenizer_config.json"
        if config.is_file():
            read_json_object(config)
            _vocabulary(path / "tokenizer.json")
            with transformers_errors(config):
                return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        path = path / "tokenizer.json"
    vocabulary = _vocabulary(path)
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special = {key: token for key, token in usual.items() if token in vocabulary}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), padding_side="left", split_special_tokens=True, **special)


def _vocabulary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer_path {path} does not exist")
    try:
        return Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"tokenizer_path {path} is not a tokenizer.json: {error}") from error
