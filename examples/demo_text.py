"""Text for ``train_gpt.py``: real text from this machine, a byte-level BPE trained on it, and windows of tokens.

Without a file of the user's own, the text is the source of Python's standard library: it is real, it is on every
machine, and nothing has to be fetched. Tokenizer and token ids are kept in a cache: only the first run pays for them.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shardwise.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 20  # one file (or, in a single file, one line) of so many is held out
# Tables of code points and of documentation are no code to learn from; tests and packages differ by machine.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"})
SKIPPED_PREFIX = "_sysconfigdata"  # generated: the paths of the machine that Python was built on


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from, documents held out, and the beginning that the trained model is asked to continue."""

    name: str
    train: list[str]
    validation: list[str]
    prompt: str


def read_corpus(train_file: Path | None) -> Corpus:
    """The user's own text, or else the standard library's sources; the same on every rank and in every run."""
    return _read_standard_library() if train_file is None else _read_own_file(train_file)


def _read_standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file
        for file in root.rglob("*.py")
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts) and not file.name.startswith(SKIPPED_PREFIX)
    )
    if len(files) < VALIDATION_SHARE:
        raise ConfigError(
            f"Found {len(files)} Python sources in {root}, expected the standard library's. Use --train-file."
        )
    documents = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    train = [text for index, text in enumerate(documents) if index % VALIDATION_SHARE]
    return Corpus(
        "Python's standard library", train, validation=documents[::VALIDATION_SHARE], prompt="    def read(self"
    )


def _read_own_file(file: Path) -> Corpus:
    """One file has no other files to hold out, so its last lines are."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--train-file {file} cannot be read as UTF-8 text: {error}.") from error
    held_out = max(1, len(lines) // VALIDATION_SHARE)
    train, validation = "".join(lines[:-held_out]), "".join(lines[-held_out:])
    if not train.strip() or not validation.strip():
        raise ConfigError(f"--train-file {file} has {len(lines)} lines: too few to train on some and hold out others.")
    return Corpus(file.name, [train], [validation], prompt=validation.lstrip()[:24])


@dataclass(frozen=True)
class TokenisedText:
    """A tokenizer and the corpus as one long row of token ids for training, one for validation."""

    tokenizer: Tokenizer
    train_ids: np.ndarray  # [num_train_tokens], uint32
    validation_ids: np.ndarray  # [num_validation_tokens], uint32


def load_tokenised(corpus: Corpus, cache_dir: Path, vocabulary_size: int, own_tokenizer: Path | None) -> TokenisedText:
    """The corpus as token ids, made on the first call and read from ``cache_dir`` afterwards.

    One process is to call this first and the others after it. ``own_tokenizer`` is a ``tokenizer.json`` that is used
    as it is; without one, a byte-level BPE of at most ``vocabulary_size`` entries is trained on the training documents.
    """
    folder = cache_dir.expanduser() / _fingerprint(corpus, vocabulary_size, own_tokenizer)
    tokenizer_file, train_file, validation_file = (
        folder / name for name in ("tokenizer.json", "train.npy", "validation.npy")
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not tokenizer_file.exists():
            tokenizer = (
                _train_tokenizer(corpus.train, vocabulary_size) if own_tokenizer is None else _read(own_tokenizer)
            )
            _write_whole(tokenizer_file, lambda path: tokenizer.save(str(path)))
        tokenizer = _read(tokenizer_file)
        for file, documents in ((train_file, corpus.train), (validation_file, corpus.validation)):
            if not file.exists():
                ids = _encode(tokenizer, documents)
                _write_whole(file, lambda path, ids=ids: np.save(path, ids))
    except OSError as error:
        raise ConfigError(f"The cache {cache_dir} cannot be used: {error}. Choose another with --cache-dir.") from error
    if tokenizer.get_vocab_size() > vocabulary_size:
        raise ConfigError(
            f"{own_tokenizer} has {tokenizer.get_vocab_size()} entries, but the model has room for {vocabulary_size}. "
            "Give a model and a tokenizer that belong together."
        )
    return TokenisedText(tokenizer, np.load(train_file, mmap_mode="r"), np.load(validation_file, mmap_mode="r"))


def _fingerprint(corpus: Corpus, vocabulary_size: int, own_tokenizer: Path | None) -> str:
    """A name that changes with everything that the cached files depend on."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {vocabulary_size}".encode())
    if own_tokenizer is not None:
        digest.update(own_tokenizer.read_bytes())
    for documents in (corpus.train, corpus.validation):
        digest.update(f"{len(documents)} documents".encode())
        for text in documents:
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def _train_tokenizer(documents: list[str], vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _read(tokenizer_file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises bare Exception for every fault of a file
        raise ConfigError(f"{tokenizer_file} is not a tokenizer: {error}.") from error


def _encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents in a row, each closed by END_OF_TEXT where the tokenizer knows it."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    closing = [] if end is None else [end]
    encoded = (encoding.ids + closing for encoding in tokenizer.encode_batch(documents, add_special_tokens=False))
    return np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in encoded])


def _write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Write beside the file and rename, so that an interrupted run never leaves half a file in the cache."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        draft = Path(folder) / file.name
        write(draft)
        os.replace(draft, file)


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of ``sequence_length`` tokens that do not overlap, in an order drawn once from ``seed``.

    An item is what a causal language model of ``transformers`` takes; it shifts the labels itself.
    """

    def __init__(self, ids: np.ndarray, sequence_length: int, seed: int) -> None:
        self._ids = ids
        self._sequence_length = sequence_length
        num_windows = len(ids) // sequence_length
        self._order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self._order[index] * self._sequence_length
        ids = torch.from_numpy(self._ids[start : start + self._sequence_length].astype(np.int64))  # [T]
        return {"input_ids": ids, "labels": ids}
