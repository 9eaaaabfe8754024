"""Packages that are missing or too old are named."""

from importlib import metadata

import pytest

from evaluation import requirements as module
from evaluation import series
from evaluation.requirements import requirements, unmet


def test_what_is_missing_or_of_another_release_is_named(monkeypatch):
    here = {"rouge-score": "0.0.4", "torch": "2.12.0a0+cu130", "peft": "0.20.1"}

    def version(name):
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(metadata, "version", version)
    required = [
        "rouge-score>=0.1.2",
        "torch>=2.11,<3",
        "peft>=0.20,<1",
        "mlflow>=3",
        "nvidia-ml-py>=12; extra == 'nvml'",
    ]
    assert unmet(required) == [
        "rouge-score is 0.0.4; >=0.1.2 is needed",
        "mlflow is not installed; >=3 is needed",
    ]


@pytest.mark.parametrize("checkout", [True, False])
def test_they_are_the_packages_own(checkout, monkeypatch, tmp_path):
    if not checkout:
        monkeypatch.setattr(module, "PYPROJECT", tmp_path / "none")
    found = requirements()
    assert any(line.startswith("rouge-score") for line in found)
    assert unmet(found) == []


def test_a_series_says_so_before_it_begins(monkeypatch, tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text("stages: {}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(series, "FOLDER", tmp_path)
    monkeypatch.setattr(series, "requirements", lambda: ["a-package-that-nobody-has>=1"])
    with pytest.raises(series.UserError, match="no stage 'x'"):
        series.run("toy", only=["x"])
    assert "beware: a-package-that-nobody-has is not installed" in capsys.readouterr().out
