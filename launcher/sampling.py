"""Images drawn with the model of a checkpoint, written as a PNG file."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from longspan.launcher.environment import choose_device
from longspan.launcher.errors import UserError
from longspan.launcher.files import replace_bytes
from longspan.launcher.images import SPLITS, noise_of
from longspan.launcher.stored_models import cast, load_model, stored
from longspan.models.diffusion import sample
from longspan.models.morton import coordinates
from longspan.parallel import SequenceParallel, Span


def sample_run(run: str, output: str, images: int, steps: int, size: int | None, seed: int) -> None:
    """Draws so many images, `size` pixels on a side (None: as in training), with the newest checkpoint of `run`, and
    writes them side by side to `output`. Raises UserError for what does not fit."""
    info, config = stored(run)
    size = config.data.image_size if size is None else size
    if config.model.task != "images":
        raise UserError(f"{info.path} holds a model of model.task={config.model.task}; sampling needs images")
    if seed < 0:
        raise UserError(f"--seed {seed}: use 0 or more")
    for name, value in (("images", images), ("steps", steps), ("size", size)):
        if value < 1 or (name == "size" and value.bit_count() > 1):
            raise UserError(f"--{name} {value}: use {'a power of two' if name == 'size' else '1 or more'}")
    device = choose_device(config.run.device)
    model = cast(load_model(info, config), getattr(torch, config.train.dtype)).to(device)
    spans = [(Span(0, 0, size**2), seed, SPLITS["sample"], number) for number in range(images)]
    noise = torch.from_numpy(np.concatenate([noise_of(*span) for span in spans]).astype(np.float32))
    seq = SequenceParallel(device=device).context([size**2] * images)
    pixels = sample(model, noise.to(device), seq, steps).cpu().unflatten(0, (images, -1)).numpy()
    rows, columns = coordinates(np.arange(size**2))
    picture = np.zeros((size, images, size, pixels.shape[-1]), np.uint8)
    picture[rows, :, columns] = np.clip((pixels.swapaxes(0, 1) + 1) * 127.5 + 0.5, 0, 255)
    try:
        replace_bytes(Path(output), png(picture.reshape(size, images * size, -1)))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"wrote {output}")


def png(picture: np.ndarray) -> bytes:
    """A PNG file (ISO/IEC 15948) of uint8 [rows, columns, 3]."""
    rows, columns, _ = picture.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), picture.reshape(rows, -1)], 1)  # each starts with: no filter
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # 8 bits a channel, red green blue
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
