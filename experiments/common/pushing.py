"""Uploads an adapter to the Hugging Face hub in both formats, with a model card, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from experiments.common.card import model_card, read_run
from experiments.common.closing import block, next_lines
from experiments.common.progress import tell
from experiments.common.wording import size
from tinylora_jax.files import write_atomically
from tinylora_jax.io import SavedAdapter
from tinylora_jax.io.hf import HUB, OWN_FOLDER, adapter_folder, push_folder

Write = Callable[[Path, str], object]


def push(
    adapter: Path,
    trained: SavedAdapter,
    repo: str,
    write: Write,
    private: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
) -> str:
    """Uploads an adapter, or shows what would be uploaded.

    Args:
      adapter: folder of the adapter, or its name on the hub.
      trained: opened adapter.
      repo: id of the repository, `owner/name`, created if absent.
      write: function from an output folder and a format to that export.
      private: whether only the owner may see the repository.
      licence: licence for the card, as the hub spells it; None if unknown.
      dry_run: whether to upload nothing.

    Returns:
      The end of the command.

    Raises:
      HubError: nothing was uploaded.
    """
    source = adapter_folder(adapter)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "repository"
        write(folder, "peft-lora")
        own = folder / OWN_FOLDER
        if trained.foreign:
            write(own, "tinylora")
        else:  # the same bytes, which the fingerprints in them seal
            own.mkdir()
            for name in ("adapter.json", "vector.bin", "factors.safetensors"):
                if (source / name).is_file():
                    shutil.copyfile(source / name, own / name)
        card = model_card(repo, trained, read_run(source, trained), OWN_FOLDER, own / "adapter.json", licence)
        write_atomically(folder / "README.md", card)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [f"  {path.relative_to(folder)}, {size(path.stat().st_size)}" for path in files]
        if dry_run:
            kind = "private" if private else "public"
            return block(card, [f"nothing was uploaded; without --dry_run these would go to {repo} ({kind}):", *listed])
        tell(f"uploading {len(files)} files to {repo}")
        commit = push_folder(folder, repo, f"Adapter with {trained.v.size} trained numbers", private)
    ask = ["python", "-m", "experiments.generate", f"--adapter={HUB}{repo}"]
    return block(f"uploaded to {repo}, commit {commit[:12]}", listed, next_lines([("ask it", ask)]))
