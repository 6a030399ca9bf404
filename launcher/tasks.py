"""Where the batches of each task come from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from longspan.launcher.batches import StepBuilder, TextBuilder
from longspan.launcher.config import Config, DataConfig
from longspan.launcher.corpus import Corpus, open_corpus
from longspan.launcher.errors import UserError
from longspan.launcher.images import ImageBuilder
from longspan.launcher.samples import SampleStream
from longspan.parallel import SequenceParallel
from longspan.parallel.mesh import Mesh


def step_builder(config: Config, parallel: SequenceParallel, mesh: Mesh) -> Callable[[str, int], StepBuilder]:
    """What makes this rank's builder of steps of so many samples of a split, "train" or "validation"."""
    return partial(TASKS[config.model.task](config, parallel), dp=mesh.dp, dp_rank=mesh.dp_rank, device=mesh.device)


def _text(config: Config, parallel: SequenceParallel):
    data = {"train": config.data, "validation": config.data}
    if config.data.validation_corpora:
        data["validation"] = replace(config.data, corpora=config.data.validation_corpora)
    paths = list(dict.fromkeys(path for source in data.values() for path in _paths(source)))
    opened = dict(zip(paths, open_corpora(paths, config.model.vocab_size), strict=True))

    def build(split, samples, **placement):
        return TextBuilder(
            SampleStream([opened[path] for path in _paths(data[split])], data[split], config.run.seed, split),
            parallel,
            samples=samples,
            respect_documents=config.data.respect_documents,
            vocab_size=config.model.vocab_size,
            **placement,
        )

    return build


def open_corpora(paths: Sequence[str], vocab_size: int) -> list[Corpus]:
    """The corpora of a model with so many token ids. UserError where one has more."""
    corpora = [open_corpus(path) for path in paths]
    for corpus in corpora:
        if corpus.vocab_size is not None and corpus.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size} is smaller than the {corpus.vocab_size} token ids of "
                f"corpus {corpus.prefix}: prepare it with the model's tokenizer, or train one with model.vocab_size="
                f"{corpus.vocab_size} or more"
            )
    return corpora


def _paths(data: DataConfig) -> list[str]:
    return [corpus.path for corpus in data.corpora]


def _images(config: Config, parallel: SequenceParallel):
    def build(split, samples, **placement):
        data, seed = config.data, config.run.seed
        return ImageBuilder(parallel, data.image_size, data.seq_len, seed, split, samples=samples, **placement)

    return build


TASKS = {"text": _text, "images": _images}
