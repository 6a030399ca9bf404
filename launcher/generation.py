"""Text that a stored model continues, on one rank. Nothing is kept between tokens: each one costs a forward pass over
all that came before it, which is for looking at what a model has learned, not for serving it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from longspan.launcher.environment import choose_device
from longspan.launcher.errors import UserError
from longspan.launcher.stored_models import cast, changed, open_model
from longspan.launcher.tokenizer import load_tokenizer
from longspan.launcher.validation import LARGEST_SEED
from longspan.parallel import SequenceParallel


def generate_run(
    run: str, prompt: str, prompt_file: str | None, tokens: int, temperature: float, top_p: float, seed: int,
    tokenizer: str | None, overrides: Sequence[str],
) -> None:  # fmt: skip
    """Prints the prompt and up to `tokens` tokens after it, fewer where the document ends, as they come.

    temperature: 0 for the likeliest token. top_p: only the likeliest tokens that have this share of the probability
    together. tokenizer: as of `longspan prepare`; None: of the run's first corpus, or of the folder of weights.
    overrides: key=value settings. UserError for what does not fit.
    """
    for name, value, fits in (
        ("tokens", tokens, tokens >= 1), ("seed", seed, 0 <= seed <= LARGEST_SEED),
        ("temperature", temperature, temperature >= 0), ("top-p", top_p, 0 < top_p <= 1),
    ):  # fmt: skip
        if not fits:
            raise UserError(f"--{name} {value}: use {ALLOWED[name]}")
    if prompt and prompt_file is not None:
        raise UserError("--prompt and --prompt-file are both given: give one of them")
    if prompt != prompt.encode(errors="ignore").decode():  # bytes that are no letters
        raise UserError("--prompt: is not UTF-8 text, such as --prompt-file reads from a file")
    stored = open_model(run)
    config = changed(stored.config, overrides)
    stored.check(config.model)
    if config.model.task != "text":
        raise UserError(
            f"{stored.path} holds a model of model.task={config.model.task}; `longspan sample` draws with it"
        )
    if prompt_file is not None:
        prompt = _read(Path(prompt_file))
    encoder = load_tokenizer(tokenizer) if tokenizer else stored.tokenizer()
    if encoder.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer {encoder.name} has {encoder.vocab_size} token ids, the model model.vocab_size="
            f"{config.model.vocab_size}: name its own with --tokenizer"
        )
    device = choose_device(config.run.device)
    model = cast(stored.load(config.model), getattr(torch, config.train.dtype)).to(device)
    start = [] if encoder.bos is None else [encoder.bos]
    start += encoder.encode_batch([prompt])[0].tolist()
    start = start or [encoder.eod]  # behind which documents begin
    print(prompt, end="", flush=True)
    found, shown = [], ""
    for token in continuation(model, start, device, temperature=temperature, top_p=top_p, seed=seed):
        if token == encoder.eod or token >= encoder.vocab_size:
            break
        found.append(token)
        last = len(found) == tokens
        text = encoder.decode(found)
        if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character wait for its others
            print(text[len(shown) :], end="", flush=True)
            shown = text
        if last:
            break
    print()


ALLOWED = {
    "tokens": "1 or more", "seed": f"0 to {LARGEST_SEED}", "temperature": "0 or more",
    "top-p": "a share above 0, up to 1",
}  # fmt: skip


@torch.no_grad()
def continuation(
    model, start: list[int], device: torch.device, *, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Endless token ids, each drawn by what `model` says of all before it; the same for the same seed."""
    chance = torch.Generator().manual_seed(seed)
    parallel = SequenceParallel(device=device)
    ids = torch.tensor(start, device=device)
    while True:
        hidden = model.hidden(ids, parallel.context([len(ids)]))
        logits = (hidden[-1:] @ model.head_weight().t())[0].double().cpu()
        token = draw(logits, temperature, top_p, chance)
        yield token
        ids = torch.cat([ids, ids.new_tensor([token])])


def draw(logits: torch.Tensor, temperature: float, top_p: float, chance: torch.Generator) -> int:
    """A token id, from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    scores = (logits - logits.max()) / temperature  # 0 for the likeliest, however low the temperature
    shares, order = scores.softmax(0).sort(descending=True, stable=True)
    shares[shares.cumsum(0) - shares >= top_p] = 0  # what the likelier ones have is enough
    return int(order[torch.multinomial(shares, 1, generator=chance)])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot be read ({error}); name a text file in UTF-8") from None
