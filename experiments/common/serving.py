"""Commands that serve an exported LoRA folder with vLLM and SGLang."""

from __future__ import annotations

# Values that vLLM accepts for its largest rank (`MaxLoRARanks` in its vllm/config/lora.py); its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_command(base: str, adapter: object, rank: int) -> list[str]:
    """The command that serves a LoRA adapter with vLLM under the name `mine`.

    Args:
      base: id or folder of the base model.
      adapter: folder or hub id of the adapter.
      rank: rank of the adapter; vLLM reserves memory for the smallest rank of `VLLM_RANKS` that is not below it.

    >>> vllm_command("org/base", "/tmp/lora", 2)
    ['vllm', 'serve', 'org/base', '--enable-lora', '--max-lora-rank=8', '--lora-modules', 'mine=/tmp/lora']
    """
    most = next((each for each in VLLM_RANKS if each >= rank), VLLM_RANKS[-1])
    return ["vllm", "serve", base, "--enable-lora", f"--max-lora-rank={most}", "--lora-modules", f"mine={adapter}"]
