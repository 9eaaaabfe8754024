"""Functions and their docstrings: what becomes a pair, and on which side of the split it stands."""

import ast
from concurrent.futures.process import BrokenProcessPool

import pytest

from llmslm.data.sources import Docstrings, docstrings
from llmslm.data.sources.docstrings import code_without_docstring, first_paragraph


def pair(code):
    """The (prompt, target) of the first function in `code`."""
    node = next(n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return code_without_docstring(node, code.split("\n")), first_paragraph(ast.get_docstring(node, clean=False))


def test_the_prompt_is_the_code_and_the_target_its_first_paragraph():
    code = (
        "class A:\n"
        "    \f\n"
        "    @cached  # once\n"
        "    def area(self,\n"
        "             unit):\n"
        '        """Compute the area\n'
        "        in square metres.\n\n"
        '        More about it.\n        """\n'
        "        # comments stay\n"
        "        return unit * 2\n"
    )
    prompt, target = pair(code)
    assert prompt == "@cached  # once\ndef area(self,\n         unit):\n    # comments stay\n    return unit * 2"
    assert target == "Compute the area in square metres."


@pytest.mark.parametrize(
    "body",
    [
        "    '''Say what it does.'''",
        "    '''Say what it does.'''\n    ...",
        "    '''Say what it does.'''\n    raise NotImplementedError('later')",
        "    '''Say what it does.'''; return 1",
        " '''Say what it does.'''",
    ],
)
def test_functions_with_nothing_to_describe_are_left_out(body):
    assert pair(f"def f():\n{body}" if body[1] == " " else f"def f():{body}")[0] is None


@pytest.mark.parametrize(
    ("docstring", "target"),
    [
        ("Return the sum.\n:param x: a number", "Return the sum."),
        ("Return the sum.\n    Args:\n        x: a number", "Return the sum."),
        ("Return  the\tsum\nof all.", "Return the sum of all."),
        ("", None),
        ("Sum", None),
        ("TODO write what this does", None),
        (":param x: the number to add", None),
        ("x (int): the number to add", None),
        ("@param x the number to add", None),
        (">>> f(one, two, three)", None),
        ("返回所有数字的总和 of it all", None),
    ],
)
def test_targets_are_sentences(docstring, target):
    assert first_paragraph(docstring) == target


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Ninety installed distributions: a function of their own each, one that all share, a test, a broken file."""
    site = tmp_path / "site"
    for i in range(90):
        name = f"package{i}"
        files = {
            f"{name}/code.py": f'def own(x):\n    """Add the number {i} to x."""\n    return x + {i}\n',
            f"{name}/shared.py": 'def same(x):\n    """Return the same thing."""\n    return x\n',
            f"{name}/tests/test_code.py": 'def test_own():\n    """Own adds its number."""\n    assert own(1)\n',
            f"{name}/broken.py": 'def f(:\n    """Not a function."""\n',
            f"{name}/escape.py": f'def g{i}():\n    """Escape it all {i} times."""\n    return "\\d"\n',
        }
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file, text in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(text)
    monkeypatch.setattr("sys.path", [str(site)])
    return site


def make(tmp_path, **kwargs):
    return Docstrings(cache_dir=str(tmp_path / "cache"), **kwargs)


def test_no_package_and_no_text_is_on_two_sides(environment, tmp_path):
    splits = {split: make(tmp_path).load(split) for split in ("train", "validation", "test")}
    numbers = {s: {row["target"].split()[3] for row in rows if "Add" in row["target"]} for s, rows in splits.items()}
    assert sum(map(len, numbers.values())) == 90
    assert len(set.union(*numbers.values())) == 90
    assert all(numbers.values())
    for column in ("prompt", "target"):
        assert not set(splits["train"][column]) & {*splits["validation"][column], *splits["test"][column]}
    ids = [name for rows in splits.values() for name in rows["id"]]
    assert len(set(ids)) == len(ids) == 90 + 90 + 1  # what all packages share counts once


def test_the_data_is_that_of_the_installed_versions(environment, tmp_path, monkeypatch):
    source = make(tmp_path)
    source.prepare()
    monkeypatch.setattr(Docstrings, "build", lambda self: pytest.fail("built twice"))
    assert make(tmp_path).fingerprint() == source.fingerprint()
    info = environment / "package0-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: package0\nVersion: 2.0\n")
    info.rename(environment / "package0-2.0.dist-info")
    assert make(tmp_path).folder != source.folder


def test_limits_take_a_fixed_part_and_leave_the_test_split_alone(environment, tmp_path):
    whole, part = make(tmp_path), make(tmp_path, max_train=5, max_target_chars=10**6)
    assert len(part.load("train")) == 5
    assert set(part.load("train")["id"]) < set(whole.load("train")["id"])
    assert part.load("test")["id"][:] == whole.load("test")["id"][:]
    limited = make(tmp_path, max_prompt_chars=28, max_target_chars=22).load("train")
    assert max(map(len, limited["prompt"])) == 28
    assert max(map(len, limited["target"])) == 22


def test_several_processes_read_the_same(environment, monkeypatch):
    jobs = [docstrings._Job("p", str(path), 1200, 200) for path in sorted(environment.glob("*/*.py"))]
    monkeypatch.undo()  # the new processes need the real sys.path; what they read is given by its path
    monkeypatch.setattr(docstrings, "_WORTH_WORKERS", 0)
    assert list(docstrings._read_files(jobs)) == [docstrings._read_file(job) for job in jobs]


def test_a_caller_whose_script_cannot_be_imported_reads_alone(environment, monkeypatch, capfd):
    class Pool:
        def __init__(self, *_args, **_kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *_error): ...
        def map(self, read, jobs, chunksize):
            yield read(jobs[0])
            raise BrokenProcessPool

    jobs = [docstrings._Job(package, path, 1200, 200) for package, path in docstrings._files()]
    monkeypatch.setattr(docstrings, "_WORTH_WORKERS", 0)
    monkeypatch.setattr(docstrings, "ProcessPoolExecutor", Pool)
    assert list(docstrings._read_files(jobs)) == [docstrings._read_file(job) for job in jobs]
    assert "this one reads alone" in "".join(capfd.readouterr())
