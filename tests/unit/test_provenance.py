"""Where a result comes from."""

from llmslm import provenance


def test_a_copy_without_its_repository_is_of_the_commit_that_the_environment_names(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *args, cwd: None)
    monkeypatch.delenv("LLMSLM_COMMIT", raising=False)
    assert provenance.commit() == (None, False)
    monkeypatch.setenv("LLMSLM_COMMIT", "abc")
    assert provenance.commit() == ("abc", False)
    monkeypatch.setattr(provenance, "_git", lambda *args, cwd: "def" if args[0] == "rev-parse" else " M file")
    assert provenance.commit() == ("def", True)


def test_changes_are_told_apart(monkeypatch):
    found = {"a": "+one line", "b": "+another", "clean": ""}
    hashes = {}
    for name, difference in found.items():
        monkeypatch.setattr(provenance, "_git", lambda *args, cwd, difference=difference: difference)
        hashes[name] = provenance.changes()
    assert hashes["clean"] is None
    assert hashes["a"] != hashes["b"]
