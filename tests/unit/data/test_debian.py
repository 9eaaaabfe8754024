"""Debian's descriptions, read from lists as apt leaves them."""

import hashlib

import pytest

from llmslm.data.sources import DebianSummary, DebianTranslation, debian
from llmslm.data.sources.base import split_by_group
from llmslm.errors import UserError

needs_apt = pytest.mark.skipif(not debian._APT_HELPER.exists(), reason="apt is not installed on this machine")


def description(number, language, *paragraphs):
    body = "\n .\n".join(paragraphs)
    return (
        f"Package: p{number}\nDescription-md5: {hashlib.md5(str(number).encode()).hexdigest()}\n"
        f"Description-{language}: {language} synopsis {number}\n{body}\n"
    )


@pytest.fixture
def cache(tmp_path):
    """Lists of 300 packages of 150 sources; packages 0 to 5 are special, all share one paragraph."""
    english, italian = [], []
    for i in range(300):
        english.append(description(i, "en", f" First of {i}\n goes on.\n   verbatim", " Shared by all."))
        italian.append(description(i, "it", f" Primo di {i}\n continua.\n   verbatim", " Di tutti."))
    italian[0] = description(0, "it", " Due in uno.")
    italian[1] = description(1, "it", " First of 1\n goes on.", " Di tutti.")
    italian[2] = "Package: p2\nDescription-md5: 0\nDescription-it: orphan\n Non si trova.\n"
    english[3] = english[3].partition("\n First")[0] + "\n"
    lists = tmp_path / f"debian-lists-{debian.running_release()}"
    lists.mkdir()
    for language, stanzas in (("en", english), ("it", italian)):
        (lists / f"mirror_dists_stable_main_i18n_Translation-{language}").write_text("\n".join(stanzas))
    packages = "\n".join(f"Package: p{i}\nSource: s{i // 2} (1.0)\n" for i in range(300))
    (lists / "mirror_dists_stable_main_binary-amd64_Packages").write_text(packages)
    return str(tmp_path)


def rows(source):
    return {split: list(source.load(split)) for split in ("train", "validation", "test")}


@needs_apt
def test_translations_are_joined_paragraph_by_paragraph(cache):
    found = {row["prompt"]: row["target"] for part in rows(DebianTranslation(cache_dir=cache)).values() for row in part}
    assert found["en synopsis 7"] == "it synopsis 7"
    assert found["First of 7 goes on."] == "Primo di 7 continua."
    assert found["Shared by all."] == "Di tutti."
    assert "First of 0 goes on." not in found  # another number of paragraphs
    assert "First of 1 goes on." not in found  # not translated
    assert "en synopsis 2" not in found  # translated from another text
    assert "verbatim" not in " ".join(found)


@needs_apt
def test_a_source_package_is_on_one_side(cache):
    splits = rows(DebianSummary(cache_dir=cache))
    assert splits["train"][0]["prompt"] == "First of 0 goes on.\nShared by all."
    for split, part in splits.items():
        for row in part:
            assert split_by_group(f"s{int(row['target'].split()[-1]) // 2}", 3) == split
    assert sum(map(len, splits.values())) == 299  # one package has no long description


@needs_apt
def test_texts_of_train_are_in_no_other_split(cache):
    splits = rows(DebianTranslation(cache_dir=cache))
    texts = {row["prompt"] for row in splits["train"]}
    assert "Shared by all." in texts
    assert not texts & {row["prompt"] for split in ("validation", "test") for row in splits[split]}
    limited = DebianTranslation(max_eval=2, cache_dir=cache)
    assert [len(limited.load(split)) for split in ("validation", "test")] == [2, 2]
    few = DebianTranslation(max_train=3, cache_dir=cache)
    assert len(few.load("train")) == 3
    assert rows(few)["test"] == splits["test"]
    more = DebianTranslation(held_out_percent=10, cache_dir=cache)
    assert len(more.load("test")) > len(splits["test"])


def test_a_machine_without_apt(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"need apt-get, which this machine does not have; use another data\.source"):
        DebianTranslation(cache_dir=str(tmp_path)).prepare()


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """Put a script in apt-get's place."""

    def install(script):
        path = tmp_path / "bin" / "apt-get"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=":")

    return install


@needs_apt
def test_a_language_that_debian_has_not(cache, apt_get):
    apt_get("echo Hit:1 http://mirror stable InRelease")
    with pytest.raises(UserError, match=r"no descriptions in 'xx' \(data\.source\.init_args\.target_language\)"):
        DebianTranslation("xx", cache_dir=cache).prepare()


@needs_apt
def test_a_machine_without_network(tmp_path, apt_get):
    apt_get("echo 'Err:1 http://mirror'; echo 'W: Failed to fetch http://mirror/InRelease' >&2")
    with pytest.raises(
        UserError, match=r"brought no package lists: W: Failed to fetch http://mirror/InRelease; .*network"
    ):
        DebianSummary(cache_dir=str(tmp_path)).prepare()
    assert not list(tmp_path.glob("debian-summary*"))


@needs_apt
def test_another_release_is_asked_of_debian_itself(tmp_path, apt_get):
    apt_get('for o; do case $o in -oDir::Etc::SourceList=*) cat "${o#*=}" >&2;; esac; done; echo "E: no sarge" >&2')
    with pytest.raises(UserError, match=r"E: no sarge; .* sarge on http://deb\.debian\.org/debian, with /usr/share"):
        debian.DebianSummary(cache_dir=str(tmp_path), release="sarge").prepare()
    (sources,) = tmp_path.glob("debian-lists-sarge/*.list")
    assert " http://deb.debian.org/debian sarge main\n" in sources.read_text()


def test_what_is_in_the_cache_of_another_release_needs_no_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    source = debian.DebianSummary(cache_dir=str(tmp_path), release="sarge")
    source.folder.mkdir()
    source.prepare()
