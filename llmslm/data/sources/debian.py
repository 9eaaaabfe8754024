"""Debian's package descriptions: translation pairs in any language that Debian has, and summaries.

`apt-get` delivers the lists into a folder of our own: nothing of the system's own lists is touched, and no root is
needed.
"""

import hashlib
import platform
import re
import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llmslm.data.sources.base import BuiltSource, Example, Split, drop_seen, split_by_group, take
from llmslm.errors import UserError

HELD_OUT_PERCENT = 3
_APT_HELPER = Path("/usr/lib/apt/apt-helper")
_MIRROR = "http://deb.debian.org/debian"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_VERSION = 2  # raise it when the extraction changes: cached data is then built again


class _Description(NamedTuple):
    package: str
    synopsis: str
    paragraphs: list[str]


class _Debian(BuiltSource):
    """What both sources share: package lists, and splits by source package.

    Args:
        max_chars: longer texts are left out, on either side: they are lists.
        max_eval: at most so many examples of validation and of test, chosen by hash.
        cache_dir: see `BuiltSource`.
        release: Debian release, for example bookworm; None takes the running system's.
        held_out_percent: share of the source packages in validation, and in test, 1 to 25.
        max_train: at most so many examples of train, chosen by hash.
    """

    languages: tuple[str, ...] = ()

    def __init__(
        self,
        max_chars: int = 2000,
        max_eval: int | None = None,
        cache_dir: str | None = None,
        release: str | None = None,
        held_out_percent: int = HELD_OUT_PERCENT,
        max_train: int | None = None,
    ) -> None:
        super().__init__(cache_dir)
        self.release = release or running_release()
        self.max_chars = max_chars
        self.max_eval = max_eval
        self.max_train = max_train
        if not 1 <= held_out_percent <= 25:
            raise UserError(
                f"{held_out_percent} was given; expected 1 to 25, of which validation and test get as much each "
                "(data.source.init_args.held_out_percent)"
            )
        self.held_out_percent = held_out_percent

    def key(self) -> dict[str, Any]:
        """Release, languages and limits; a stable release's lists change with its point releases only."""
        key = {
            "version": _VERSION,
            "release": self.release,
            "languages": self.languages,
            "max_chars": self.max_chars,
            "max_eval": self.max_eval,
        }
        # Data that was built before there was a choice keeps its name.
        chosen = {"held_out_percent": (self.held_out_percent, HELD_OUT_PERCENT), "max_train": (self.max_train, None)}
        return key | {name: value for name, (value, usual) in chosen.items() if value != usual}

    @abstractmethod
    def pairs(self, lists: Path) -> Iterator[tuple[str, str, str]]:
        """Yield (source package, prompt, target)."""

    def build(self) -> dict[Split, list[Example]]:
        """Fetch the lists, make pairs, split them by source package; no text of train is in validation or test."""
        lists = self.cache_dir / f"debian-lists-{self.release}"
        fetch_lists(lists, self.languages, None if self.release == running_release() else self.release)
        splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
        seen: set[str] = set()
        for source, prompt, target in self.pairs(lists):
            if prompt not in seen and max(len(prompt), len(target)) <= self.max_chars:
                seen.add(prompt)
                name = hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()[:16]
                side = split_by_group(source, self.held_out_percent)
                splits[side].append({"id": name, "prompt": prompt, "target": target})
        for split in ("validation", "test"):
            splits[split] = take(drop_seen(splits[split], splits["train"]), self.max_eval)
        splits["train"] = take(splits["train"], self.max_train)
        return splits


class DebianTranslation(_Debian):
    """Descriptions in English and their human translation, paragraph by paragraph.

    Args:
        target_language: code that Debian uses ("it", "da", "de", "fr", "pt_BR", ...).
        max_chars: longer texts are left out, on either side: they are lists.
        max_eval: at most so many examples of validation and of test, chosen by hash.
        cache_dir: see `BuiltSource`.
        release: Debian release, None takes the running system's.
        held_out_percent: share of the source packages in validation, and in test.
        max_train: at most so many examples of train, chosen by hash.
    """

    def __init__(
        self,
        target_language: str = "it",
        max_chars: int = 2000,
        max_eval: int | None = None,
        cache_dir: str | None = None,
        release: str | None = None,
        held_out_percent: int = HELD_OUT_PERCENT,
        max_train: int | None = None,
    ) -> None:
        super().__init__(max_chars, max_eval, cache_dir, release, held_out_percent, max_train)
        self.target_language = target_language
        self.languages = ("en", target_language)
        self.name = f"debian-translation-en-{target_language}"

    def pairs(self, lists: Path) -> Iterator[tuple[str, str, str]]:
        """Join by Description-md5; synopsis to synopsis, paragraph to paragraph where their numbers agree."""
        translated = read_descriptions(lists, self.target_language)
        sources = read_sources(lists)
        for md5, english in read_descriptions(lists, "en").items():
            other = translated.get(md5)
            if other is None:
                continue
            source = sources.get(english.package, english.package)
            both = [(english.synopsis, other.synopsis)]
            if len(english.paragraphs) == len(other.paragraphs):
                both += zip(english.paragraphs, other.paragraphs, strict=True)
            for prompt, target in both:
                # An untranslated paragraph says nothing about translation.
                if prompt and target and prompt != target:
                    yield source, prompt, target


class DebianSummary(_Debian):
    """The long English description as the prompt, the one-line synopsis as the target."""

    name = "debian-summary"
    languages = ("en",)

    def pairs(self, lists: Path) -> Iterator[tuple[str, str, str]]:
        """One pair a package."""
        sources = read_sources(lists)
        for english in read_descriptions(lists, "en").values():
            if english.paragraphs and english.synopsis:
                yield (
                    sources.get(english.package, english.package),
                    "\n".join(english.paragraphs),
                    english.synopsis,
                )


def fetch_lists(folder: Path, languages: Iterable[str], release: str | None = None) -> None:
    """Let apt fetch package lists and translations into `folder`.

    Args:
        folder: for lists of one release.
        languages: their codes.
        release: another one than the running system's, from Debian's own mirrors; else apt's sources decide.

    Raises:
        UserError: if there is no apt on this machine, or the update fails.
    """
    if shutil.which("apt-get") is None or not _APT_HELPER.exists():
        raise UserError("the Debian sources need apt-get, which this machine does not have; use another data.source")
    if all(_files(folder, language) for language in languages) and _package_files(folder):
        return
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "update", "-q", *(f"-o{option}" for option in _apt_options(folder, languages, release))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as apt:
        assert apt.stdout is not None
        output = list(tqdm(apt.stdout, "fetching Debian's package lists", unit=" lines"))
    if apt.returncode or not (_files(folder, "en") and _package_files(folder)):
        complaints = [line.strip() for line in output if line.startswith(("E:", "W:"))]
        raise UserError(
            f"apt-get update brought no package lists: {(complaints or ['no reason given'])[0]}; "
            "the Debian sources need the network once, and "
            + ("Debian's repositories in apt's sources" if release is None else f"{release} on {_MIRROR}, with {_KEYS}")
        )
    for language in languages:
        if not _files(folder, language):
            raise UserError(
                f"Debian has no descriptions in {language!r} (data.source.init_args.target_language); "
                "codes look like it, de, pt_BR"
            )


def _apt_options(folder: Path, languages: Iterable[str], release: str | None) -> list[str]:
    wanted = sorted({"en", *languages} | set(_languages_there(folder)))
    options = [f"Dir::State::Lists={folder}", "Acquire::Languages="]
    options += [f"Acquire::Languages::={language}" for language in wanted]
    options += [f"Dir::Cache::{name}=" for name in ("pkgcache", "srcpkgcache")]
    if release is not None:
        sources = folder / "release.list"
        sources.write_text(f"deb [signed-by={_KEYS}] {_MIRROR} {release} main\n", encoding="utf-8")
        options += [f"Dir::Etc::SourceList={sources.resolve()}", "Dir::Etc::SourceParts=/dev/null"]
    return options


def read_descriptions(folder: Path, language: str) -> dict[str, _Description]:
    """Read a Translation list: Description-md5 to synopsis and paragraphs."""
    found = {}
    for path in _files(folder, language):
        for fields in _stanzas(path):
            text = fields.get(f"Description-{language}")
            if text is None or "Description-md5" not in fields:
                continue
            synopsis, _, rest = text.partition("\n")
            found[fields["Description-md5"]] = _Description(
                fields.get("Package", ""), _clean(synopsis), list(_paragraphs(rest))
            )
    return found


def read_sources(folder: Path) -> dict[str, str]:
    """Read the source package of each binary package whose source has another name."""
    sources = {}
    for path in _package_files(folder):
        for fields in _stanzas(path):
            if "Source" in fields and "Package" in fields:
                sources[fields["Package"]] = fields["Source"].split()[0]
    return sources


def _paragraphs(text: str) -> Iterator[str]:
    """Join the lines of each paragraph; " ." separates them, lines with two spaces are verbatim and end one."""
    lines: list[str] = []
    for line in [*text.split("\n"), " ."]:
        if line.strip() == "." or line.startswith("  "):
            if lines:
                yield _clean(" ".join(lines))
            lines = []
        elif line.strip():
            lines.append(line)


def running_release() -> str:
    """Return the code name of the running system, for example bookworm."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")
    except OSError:
        return "unknown"


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Read an apt list (compressed or not) as dicts of fields; continuation lines keep their first space."""
    process = subprocess.Popen([str(_APT_HELPER), "cat-file", str(path)], stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    fields: dict[str, str] = {}
    name = ""
    with process.stdout as lines:
        for raw in tqdm(lines, f"reading {path.name.rpartition('_')[2]}", unit=" lines", mininterval=1.0, leave=False):
            line = raw.rstrip("\n")
            if not line:
                yield fields
                fields = {}
            elif line[0] == " ":
                fields[name] = f"{fields[name]}\n{line}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
    if fields:
        yield fields
    if process.wait():
        raise UserError(f"{path} cannot be read; remove the folder {path.parent}, and it is fetched again")


def _files(folder: Path, language: str) -> list[Path]:
    return sorted(p for p in folder.glob(f"*_i18n_Translation-{language}*") if _language_of(p) == language)


def _language_of(path: Path) -> str:
    return path.name.rpartition("Translation-")[2].partition(".")[0]


def _languages_there(folder: Path) -> set[str]:
    return {_language_of(path) for path in folder.glob("*_i18n_Translation-*")}


def _package_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_binary-*_Packages*"))
