"""Tokenizers of `longspan prepare`: UTF-8 bytes, or any Hugging Face `tokenizer.json`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longspan.launcher.errors import UserError

# What published tokenizers call the token that ends a document, the most specific names first.
END_OF_DOCUMENT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|endofdocument|>",
    "<|end\u2581of\u2581sentence|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
)


class ByteTokenizer:
    """The 256 byte values, and 256 for the end of a document."""

    name = "bytes"
    eod = 256
    bos = None
    vocab_size = 257

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, without the end-of-document token: uint8 [number of UTF-8 bytes]."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids below 256; what is no UTF-8 becomes U+FFFD."""
        return bytes(ids).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. eod: the token that ends a document, or its id, by default one of END_OF_DOCUMENT_TOKENS.
    bos: one that begins it, by default none.

    Raises UserError when the file is missing or malformed, or has no such token.
    """

    def __init__(self, path: str | Path, eod: str | int | None = None, bos: str | int | None = None):
        from tokenizers import Tokenizer

        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file; give 'bytes' or the path of a tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error})") from error
        # A text that merely contains "<|endoftext|>" must not end a document, nor may a length limit cut one.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = str(path)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps

        def id_of(option, kind, candidates):
            found = [vocabulary.get(token, token) for token in candidates]
            for number in found:
                if isinstance(number, int):
                    return number
            raise UserError(
                f"tokenizer {path}: no {kind}-of-document token ({', '.join(candidates)}) in its vocabulary of "
                f"{len(vocabulary)} tokens; name one that it has with {option}"
            )

        self.eod = id_of("--eod", "end", END_OF_DOCUMENT_TOKENS if eod is None else (eod,))
        self.bos = None if bos is None else id_of("--bos", "beginning", (bos,))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, without those that begin and end a document: int64 [number of tokens]."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def begin(self) -> int | None:
        """The token that the file itself says to put in front of a text, as Llama 3's does; None for none."""
        texts = [self._tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True)]
        return texts[1][0] if texts[0] and texts[1][0] != texts[0][0] else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def vocabulary(path: Path) -> dict[str, int]:
    """Tokens with their ids of a tokenizer.json. UserError where it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error})") from error


def load_tokenizer(
    spec: str | Path, eod: str | int | None = None, bos: str | int | None = None
) -> ByteTokenizer | HuggingFaceTokenizer:
    """The tokenizer called `spec`: "bytes", or the path of a tokenizer.json or of the folder that holds one, whose
    documents end with `eod` and begin with `bos`, tokens or their ids.

    Raises UserError when there is no such tokenizer or token.
    """
    if spec != ByteTokenizer.name:
        return HuggingFaceTokenizer(spec, eod, bos)
    if eod not in (None, ByteTokenizer.eod):
        raise UserError(f"--eod {eod}: the byte tokenizer ends documents with its own id 256; drop --eod")
    if bos is not None:
        raise UserError(f"--bos {bos}: the byte tokenizer has no token that begins a document; drop --bos")
    return ByteTokenizer()
