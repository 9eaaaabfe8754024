"""Where a result comes from: commit, versions, hardware and command; and content hashes of saved systems."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("llmslm", "torch", "transformers", "lightning", "tokenizers", "datasets", "sacrebleu", "rouge-score")
_HASHED = (".safetensors", ".json", ".model", ".txt")


def provenance() -> dict[str, Any]:
    """Describe this process: commit, whether the tree is dirty, date (UTC), command, versions, hardware."""
    head, dirty = commit()
    return {
        "commit": head,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(),
    }


def commit() -> tuple[str | None, bool]:
    """Return the commit of the checkout that this package lies in and whether it has changes; (None, False) if none.

    A copy without its repository is of the commit that $LLMSLM_COMMIT names.
    """
    here = Path(__file__).resolve().parent
    head = _git("rev-parse", "HEAD", cwd=here)
    if head is None:
        return os.environ.get("LLMSLM_COMMIT"), False
    return head, bool(_git("status", "--porcelain", "--untracked-files=no", cwd=here))


def changes() -> str | None:
    """Hash what differs from the commit in the checkout that this package lies in (sha256, hex); None if nothing."""
    difference = _git("diff", "HEAD", "--binary", cwd=Path(__file__).resolve().parent)
    return hashlib.sha256(difference.encode()).hexdigest() if difference else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide about numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Describe the processor and, where there is one, the GPU."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_name(), "cores": cores, "threads": torch.get_num_threads(), "gpus": gpus}


def hardware_name(description: dict[str, Any]) -> str:
    """Name hardware in one short line, the key by which leaderboards keep machines apart."""
    gpus = description["gpus"]
    if gpus:
        return f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else str(gpus[0])
    return f"{description['cpu']}, {description['threads']} threads"


def folder_hash(folder: Path) -> str:
    """Hash the weights, configuration and tokenizers of a saved system (sha256, hex)."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _HASHED):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*args: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=cwd, capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
