"""The weights of a checkpoint as safetensors, under longspan's names or under those of Hugging Face's transformers."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from longspan.launcher.errors import UserError
from longspan.launcher.files import replace_text, strict_json
from longspan.launcher.huggingface import huggingface_config, huggingface_name
from longspan.launcher.stored_models import load_model, stored


def export_run(run: str, output: str, layout: str, dtype: str) -> None:
    """Writes model.safetensors and config.json to the folder `output`: of the newest checkpoint of `run`, or of that
    checkpoint. UserError for what does not fit."""
    info, config = stored(run)
    settings, rename = asdict(config.model), str
    if layout == "huggingface":
        settings, rename = huggingface_config(config.model, config.data.seq_len, dtype), huggingface_name
    weights = load_model(info, config).state_dict()
    weights = {rename(name): value.to(getattr(torch, dtype)).contiguous() for name, value in weights.items()}
    folder = Path(output)
    partial = folder / ".model.safetensors.partial"
    metadata = {"format": "pt", "longspan_checkpoint": str(info.path), "longspan_step": str(info.step)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial, metadata)
        partial.replace(folder / "model.safetensors")
        replace_text(folder / "config.json", strict_json(settings, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"--output {output}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    numbers = sum(value.numel() for value in weights.values())
    print(f"wrote {folder / 'model.safetensors'}: {len(weights)} tensors, {numbers:,} numbers in {dtype}")
