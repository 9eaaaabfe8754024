"""`llmslm generate`: streams, files of prompts, verified by the LLM; and what it refuses."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from llmslm.cli import main
from llmslm.errors import UserError
from llmslm.generation.sampling import Sampling
from llmslm.predict_file import predict_file
from llmslm.system import System
from llmslm.verified_system import VerifiedSystem
from tests.unit import toy
from tests.unit.data.test_codec import byte_tokenizer
from tests.unit.test_cli import fails, fit

PROMPTS = ["say alpha 1", "say beta", "say a much longer thing", "say omega 77", "y"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained systems that belong together."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLMSLM_CACHE", str(folder / "cache"))
        recipe = toy.write_recipe(folder)
        for name in ("llm", "llm_to_slm"):
            fit(recipe, name)
            shake(Path("runs/toy", name, "system"))
    return folder / "runs/toy"


def shake(folder):
    """Give a system weights that write: four steps of training leave it silent."""
    system = System.load(folder)
    torch.manual_seed(1)
    for name, parameter in system.model.named_parameters():
        if not name.startswith("encoder.") or system.name == "llm":
            parameter.data += 0.5 * torch.randn_like(parameter)
    system.model.save_pretrained(folder)


@pytest.fixture
def checkpoint(runs, workdir):
    return str(runs / "llm_to_slm")


def output(capsys, *args):
    main(["generate", *args])
    return capsys.readouterr().out


def test_a_stream_is_the_text(checkpoint, capsys, monkeypatch):
    whole = output(capsys, "--checkpoint", checkpoint, *PROMPTS)
    pieces = []
    generation = System.load(checkpoint).stream(PROMPTS[0], max_new_tokens=8, on_text=pieces.append)
    assert "".join(pieces) == generation.text == whole.splitlines()[0]
    assert len(pieces) > 1
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert output(capsys, "--checkpoint", checkpoint, "--stream") == whole


def test_draws_repeat_with_their_seed(checkpoint, capsys):
    draw = ["--checkpoint", checkpoint, "--temperature", "5", *PROMPTS]
    assert output(capsys, *draw, "--seed", "1") == output(capsys, *draw, "--seed", "1")
    assert output(capsys, *draw, "--seed", "1") != output(capsys, *draw, "--seed", "2")


def test_what_was_seen_is_penalised(runs, checkpoint, capsys):
    given = ["--checkpoint", checkpoint, *PROMPTS]
    penalised = output(capsys, *given, "--repetition-penalty", "3")
    assert penalised != output(capsys, *given) == output(capsys, *given, "--repetition-penalty", "1")
    settings = {"max_new_tokens": 8, "sampling": Sampling(temperature=0, repetition_penalty=3)}
    assert penalised.splitlines() == [one.text for one in System.load(checkpoint).generate(PROMPTS, **settings)]
    verified = ["--verify", str(runs / "llm"), "--repetition-penalty", "3", *PROMPTS]
    llm = output(capsys, "--checkpoint", str(runs / "llm"), "--repetition-penalty", "3", *PROMPTS)
    assert output(capsys, "--checkpoint", checkpoint, *verified) == llm


@pytest.mark.parametrize("name", ["llm", "llm_to_slm"])
def test_weights_of_8_bits_are_counted_as_weights(runs, name):
    whole, rounded = System.load(runs / name), System.load(runs / name, dtype=torch.int8)
    assert rounded.parameters()["total"] >= whole.parameters()["total"], "a tied head has weights of its own then"
    assert len(rounded.generate(PROMPTS, max_new_tokens=4)) == len(PROMPTS)
    assert rounded.engine.reason is None


def test_a_type_is_chosen(checkpoint, capsys):
    outputs = {
        name: output(capsys, "--checkpoint", checkpoint, "--dtype", name, *PROMPTS) for name in ("bfloat16", "int8")
    }
    assert all(text.count("\n") == len(PROMPTS) for text in outputs.values())
    assert "--dtype float32" in fails(
        capsys, "generate", "--checkpoint", checkpoint, "--verify", "x", "--dtype", "int8"
    )


def test_verified_output_is_the_llms(runs, checkpoint, capsys):
    expected = output(capsys, "--checkpoint", str(runs / "llm"), *PROMPTS)
    assert output(capsys, "--checkpoint", checkpoint, *PROMPTS) != expected, "the case is void otherwise"
    main(["generate", "--checkpoint", checkpoint, "--verify", str(runs / "llm"), *PROMPTS])
    out, err = capsys.readouterr()
    assert out == expected
    assert "drafted tokens accepted per block" in err
    assert output(capsys, "--checkpoint", checkpoint, "--verify", str(runs / "llm"), "--stream", *PROMPTS) == expected


def test_a_verified_system_is_its_llm_in_the_evaluation(runs, checkpoint):
    pair, llm = VerifiedSystem.load_pair(checkpoint, runs / "llm"), System.load(runs / "llm")
    assert pair.name == "verified"
    assert pair.generate(PROMPTS, max_new_tokens=8) == llm.generate(PROMPTS, max_new_tokens=8)
    assert pair.log_likelihood(PROMPTS, PROMPTS) == llm.log_likelihood(PROMPTS, PROMPTS)
    assert pair.acceptance.blocks > 0
    draft = System.load(checkpoint)
    expected = {"trained": draft.parameters()["trained"]}
    expected["total"] = llm.parameters()["total"] + expected["trained"]
    expected["decoding"] = llm.parameters()["decoding"] + draft.parameters()["decoding"]
    assert pair.parameters() == expected
    shared = {p.data_ptr() for p in pair.model.parameters()}
    assert all(p.data_ptr() in shared for p in pair.draft.model.encoder.parameters())


def test_a_bare_model_takes_the_drafts_prompts(runs, checkpoint):
    shutil.copytree(runs / "llm/system", "bare")
    Path("bare/system.json").unlink()
    pair = VerifiedSystem.load_pair(checkpoint, "bare")
    assert pair.generate(PROMPTS, max_new_tokens=8) == System.load(runs / "llm").generate(PROMPTS, max_new_tokens=8)


def test_pairs_that_do_not_belong_together_are_refused(runs, checkpoint, capsys):
    llm = str(runs / "llm")
    assert "a llm system cannot draft" in fails(capsys, "generate", "--checkpoint", llm, "--verify", llm, "x")
    line = fails(capsys, "generate", "--checkpoint", checkpoint, "--verify", checkpoint, "x")
    assert "an llm_to_slm system cannot verify" in line
    assert "nowhere" in fails(capsys, "generate", "--checkpoint", checkpoint, "--verify", "nowhere", "x")
    for change, message in (
        ({"prompt_template": "do: {prompt}"}, "prompt_template='do: {prompt}', the draft with"),
        ({"vocabulary": {"<new>": 299}}, "the llm's tokenizer is not the one"),
    ):
        shutil.copytree(runs / "llm/system", "other", dirs_exist_ok=True)
        card, tokenizer = (json.loads(Path("other", name).read_text()) for name in ("system.json", "tokenizer.json"))
        tokenizer["model"]["vocab"] |= change.pop("vocabulary", {})
        card["text_format"] |= change
        Path("other/system.json").write_text(json.dumps(card))
        Path("other/tokenizer.json").write_text(json.dumps(tokenizer))
        assert message in fails(capsys, "generate", "--checkpoint", checkpoint, "--verify", "other", "x")


def write_prompts(count):
    rows = [{"prompt": PROMPTS[i % 5] + "!" * (i % 3)} | ({"id": f"row {i}"} if i % 2 else {}) for i in range(count)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_file_is_answered_in_its_order(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("llmslm.predict_file._WINDOW", 2)
    rows = write_prompts(11)
    files = ["--checkpoint", checkpoint, "--batch-size", "3"]
    main(["generate", *files, "--input", "in.jsonl", "--output", "new/out.jsonl"])
    assert "11 prompts" in capsys.readouterr().err
    found = [json.loads(line) for line in Path("new/out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [row.get("id", str(i)) for i, row in enumerate(rows, start=1)]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    predictions = [row["prediction"] for row in found]
    assert predictions == output(capsys, *files, *(row["prompt"] for row in rows)).splitlines()
    assert [path.name for path in Path("new").iterdir()] == ["out.jsonl"]
    Path("in.txt").write_text("".join(row["prompt"] + "\n" for row in rows))
    main(["generate", *files, "--input", "in.txt", "--output", "out.jsonl"])
    assert [json.loads(line)["prediction"] for line in Path("out.jsonl").read_text().splitlines()] == predictions


def test_a_stopped_file_goes_on_where_it_was(checkpoint, monkeypatch):
    monkeypatch.setattr("llmslm.predict_file._WINDOW", 1)
    write_prompts(10)
    system, source = System.load(checkpoint), Path("in.jsonl")
    settings = {"max_new_tokens": 4, "batch_size": 2}
    predict_file(system, source, Path("whole.jsonl"), **settings)
    original, asked = system.generate, []

    def stop_after_three(prompts, **kwargs):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return original(prompts, **kwargs)

    monkeypatch.setattr(system, "generate", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        predict_file(system, source, Path("out.jsonl"), **settings)
    assert not Path("out.jsonl").exists()
    part = next(Path().glob(".out.jsonl.*.part"))
    part.write_bytes(part.read_bytes()[:-5])  # the last line was cut by the fall
    monkeypatch.setattr(system, "generate", original)
    assert predict_file(system, source, Path("out.jsonl"), **settings).prompts == 5
    assert Path("out.jsonl").read_text() == Path("whole.jsonl").read_text()


def test_a_refused_call_leaves_no_file(checkpoint, monkeypatch):
    write_prompts(3)

    def refuse(*_args, **_kwargs):
        raise UserError("that does not fit into memory")

    system = System.load(checkpoint)
    monkeypatch.setattr(system, "generate", refuse)
    with pytest.raises(UserError, match="does not fit"):
        predict_file(system, Path("in.jsonl"), Path("new/out.jsonl"), max_new_tokens=4, batch_size=2)
    assert not list(Path("new").iterdir())


def test_what_is_there_stays(checkpoint, capsys):
    write_prompts(3)
    Path("out.jsonl").write_text("hours of work\n")
    Path("link.jsonl").symlink_to("nowhere")
    Path("folder.jsonl").mkdir()
    given = ["generate", "--checkpoint", "nowhere", "--input", "in.jsonl", "--output"]
    for name in ("out.jsonl", "link.jsonl", "folder.jsonl", "in.jsonl"):
        line = fails(capsys, *given, name)
        assert f"{name} exists; give a file that does not (--output)" in line, "before anything is read"
    with pytest.raises(UserError, match=r"out\.jsonl exists"):
        predict_file(System.load(checkpoint), Path("in.jsonl"), Path("out.jsonl"), max_new_tokens=4, batch_size=2)
    assert Path("out.jsonl").read_text() == "hours of work\n"
    assert not list(Path().glob(".out.jsonl.*"))


def test_lines_of_other_prompts_are_not_taken_over(checkpoint):
    write_prompts(6)
    system, source, settings = System.load(checkpoint), Path("in.jsonl"), {"max_new_tokens": 4, "batch_size": 2}
    predict_file(system, source, Path("whole.jsonl"), **settings)
    lines = Path("whole.jsonl").read_text().splitlines(keepends=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: None)
        predict_file(system, source, Path("out.jsonl"), **settings)
    part = next(Path().glob(".out.jsonl.*.part"))
    part.write_text("".join([*lines[:3], lines[3].replace("say", "tell"), *lines[4:]]))
    assert predict_file(system, source, Path("out.jsonl"), **settings).prompts == 3
    assert Path("out.jsonl").read_text() == Path("whole.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "in.jsonl, line 2: not valid JSON"),
        ("in.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', "in.jsonl, line 3: prompt is missing"),
        ("in.jsonl", b'{"prompt": 3}\n', "line 1: prompt is missing, empty or no text"),
        ("in.txt", b"a\n\nb\n", "in.txt, line 2: prompt is missing, empty"),
        ("in.txt", b"a\n\xff\n", "in.txt, line 2: not UTF-8"),
        ("in.txt", b"a\nb\n" + b"long " * 40, "in.txt, line 3: a prompt has"),
        ("in.csv", b"a\n", "neither .txt"),
        ("other", None, "neither .txt"),
        ("other.txt", None, "other.txt cannot be read"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(checkpoint, capsys, name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    line = fails(capsys, "generate", "--checkpoint", checkpoint, "--input", name, "--output", "out.jsonl")
    assert message in line
    assert not Path("out.jsonl").exists()


def test_mistakes_in_the_command_are_named(checkpoint, capsys):
    Path("in.txt").write_text("x\n")
    Path("in.jsonl").write_text('{"prompt": "x", "note": "kept"}\n')
    for args, message in (
        (["--input", "in.txt"], "give --input and --output together"),
        (["--input", "in.txt", "--output", "o.jsonl", "--stream"], "leave out --stream"),
        (["--batch-size", "0", "x"], "--batch-size 0"),
        (["--max-new-tokens", "0", "x"], "--max-new-tokens 0 was given; expected 1 or more"),
        (["--top-k", "5", "x"], "give a --temperature above 0, too"),
        (["--device", "gpu", "x"], "--device gpu cannot be used"),
        (["--device", "cuda:99", "x"], "--device cuda:99 cannot be used"),
        (["--input", "in.txt", "--output", "o.csv"], "--output o.csv was given; expected a name that ends in .jsonl"),
        (["--input", "in.txt", "--output", "in.txt/o.jsonl"], "in.txt/o.jsonl cannot be written"),
    ):
        assert message in fails(capsys, "generate", "--checkpoint", checkpoint, *args)
    for args, message in (
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--temperature", "1", "--top-k", "-1"], "top_k=-1"),
        (["--temperature", "1", "--top-p", "2"], "top_p=2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty=0.0"),
    ):  # before anything is read
        assert message in fails(capsys, "generate", "--checkpoint", "nowhere", *args, "x")
    assert "kept" in Path("in.jsonl").read_text()


def test_a_draft_in_another_vocabulary_is_refused(runs, checkpoint):
    llm, draft = System.load(runs / "llm"), System.load(checkpoint)
    draft.codec.encoder_tokenizer, draft.codec.slm_tokenizer = draft.codec.slm_tokenizer, byte_tokenizer()
    with pytest.raises(UserError, match="another vocabulary than the llm"):
        VerifiedSystem(llm, draft)
