"""Where a result comes from: the commit of the code and the versions of the libraries that decide about numbers."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

LIBRARIES = ("llmslm", "torch", "transformers", "lightning", "tokenizers", "datasets", "sacrebleu", "rouge-score")


def commit() -> tuple[str | None, bool]:
    """Return the commit of the checkout that this package lies in and whether it has changes; (None, False) if none."""
    here = Path(__file__).resolve().parent
    head = _git("rev-parse", "HEAD", cwd=here)
    if head is None:
        return None, False
    return head, bool(_git("status", "--porcelain", "--untracked-files=no", cwd=here))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide about numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*args: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
