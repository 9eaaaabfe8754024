"""The composition: the six contracts, for every pair of families."""

import itertools
import subprocess
import sys

import pytest
import torch

from llmslm.errors import UserError
from llmslm.models.alignment import EncoderTokenizer, SameTokenizer
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add, CrossAttend, Prefix, Replace, ReplaceEncoder
from llmslm.models.layer_mix import LayerMix
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import LinearProjector
from tests import tiny
from tests.unit.models.compositions import NEW, bare, compose, generate, left, training_batch, until_end

PAIRS = list(itertools.product(tiny.FAMILIES, tiny.FAMILIES))


@pytest.mark.parametrize(("encoder", "slm"), PAIRS)
def test_training_changes_all_but_the_encoder(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path).train()
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = training_batch(model, *tiny.prompts())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        states = model.encode(batch["prompt_ids"], batch["prompt_attention_mask"])[0]
    assert saved == []
    assert not states.requires_grad
    model(**batch).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())


@pytest.mark.parametrize(("encoder", "slm"), PAIRS)
def test_cache_batch_and_padding_do_not_change_predictions(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path)
    ids, mask = tiny.prompts()
    batched = generate(model, ids, mask)
    assert torch.equal(batched, generate(model, ids, mask, use_cache=False))
    wide = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = generate(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert until_end(alone[0]) == until_end(batched[row])
        assert until_end(generate(model, *wide)[row]) == until_end(batched[row])


@pytest.mark.parametrize(("encoder", "slm"), PAIRS)
def test_training_logits_ignore_the_padding(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path)
    batch = training_batch(model, *tiny.prompts())
    logits = model(**batch).logits
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        prompt = int(batch["prompt_attention_mask"][row].sum())
        single = {k: v[row : row + 1] for k, v in batch.items()}
        single = {
            k: v[:, :prompt] if k.startswith("prompt") else v[:, :length] if k != "labels" else v
            for k, v in single.items()
        }
        single["labels"] = (
            single["labels"][:, : single["input_ids"].shape[1]]
            if not _is_seq2seq(model)
            else batch["labels"][row : row + 1]
        )
        alone = model(**single).logits
        torch.testing.assert_close(logits[row, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_a_prompt_without_a_mask_is_read_whole(slm, tmp_path):
    model = compose("llama", slm, tmp_path)
    ids, mask = tiny.prompts()
    batch = training_batch(model, ids, torch.ones_like(mask))
    logits = model(**batch).logits
    del batch["prompt_attention_mask"]
    assert torch.equal(model(**batch).logits, logits)
    states, _ = model.encode(batch.pop("prompt_ids"), torch.ones_like(mask))
    torch.testing.assert_close(model(**batch, hidden_states=states).logits, logits)


@pytest.mark.parametrize("slm", ["llama", "gpt2", "t5"])
def test_the_vocabulary_grows(slm, tmp_path):
    model = compose("llama", slm, tmp_path)
    batch = training_batch(model, *tiny.prompts())
    before = model(**batch).logits
    model.resize_token_embeddings(tiny.VOCABULARY + 7)
    after = model(**batch).logits
    assert after.shape[-1] == tiny.VOCABULARY + 7
    torch.testing.assert_close(after[..., : tiny.VOCABULARY], before)
    model.save_pretrained(tmp_path / "grown")
    torch.testing.assert_close(LlmToSlm.from_pretrained(tmp_path / "grown").eval()(**batch).logits, after)


def test_a_subfolder_finds_its_encoder_in_the_dtype_asked_for_by_either_name(tmp_path):
    compose("llama", "llama", tmp_path).save_pretrained(tmp_path / "outer" / "inner")
    for name in ("dtype", "torch_dtype"):
        model = LlmToSlm.from_pretrained(tmp_path / "outer", subfolder="inner", **{name: torch.bfloat16})
        assert model.dtype == model.encoder.model.dtype == torch.bfloat16


def test_lengths_do_not_count_the_states_in_front(tmp_path):
    model = compose("llama", "llama", tmp_path, fusion=Prefix)
    ids, mask = tiny.prompts()
    ids, mask = left(ids, mask), left(mask, mask)
    length = ids.shape[1] + 3
    sides = {"prompt_ids": ids, "prompt_attention_mask": mask}
    assert model.generate(**sides, max_length=length, min_length=length, do_sample=False).shape[1] == length


def _is_seq2seq(model):
    return model.config.is_encoder_decoder


@pytest.mark.parametrize("slm", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("fusion", [Add, Replace])
def test_features_enter_on_prompt_positions_only_in_training_as_in_decoding(slm, fusion, tmp_path):
    model = compose("t5", slm, tmp_path, fusion=fusion)
    ids, mask = tiny.prompts()
    batch = training_batch(model, ids, mask)
    batch.pop("labels")
    trained = model.embed_prompt(**batch).inputs_embeds
    plain = model.get_input_embeddings()(batch["input_ids"])
    touched = (trained != plain).any(-1)
    assert torch.equal(touched[:, : ids.shape[1]], mask.bool())
    assert not touched[:, ids.shape[1] :].any()
    decoded = model.embed_prompt(left(ids, mask), left(mask, mask), ids, mask).inputs_embeds
    for row, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(decoded[row, -length:], trained[row, :length])


@pytest.mark.parametrize(("encoder", "slm"), PAIRS)
def test_destroyed_features_change_the_logits(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path)
    batch = training_batch(model, *tiny.prompts())
    logits = model(**batch).logits
    swapped = batch | {
        "prompt_ids": batch["prompt_ids"].roll(1, 0),
        "prompt_attention_mask": batch["prompt_attention_mask"],
    }
    assert (model(**swapped).logits - logits).abs().max() > 1e-3
    model.projector.register_forward_hook(lambda _m, _a, states: torch.zeros_like(states))
    assert (model(**batch).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize(("encoder", "slm"), PAIRS)
def test_zero_features_with_add_are_the_bare_slm_bit_for_bit(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path)
    model.projector.register_forward_hook(lambda _m, _a, states: torch.zeros_like(states))
    batch = training_batch(model, *tiny.prompts())
    assert torch.equal(model(**batch).logits, model.slm(**bare(model, batch)).logits)


RELOAD = """
import sys, torch
from llmslm.models.modeling import LlmToSlm
model = LlmToSlm.from_pretrained(sys.argv[1]).eval()
batch = torch.load(sys.argv[2])
torch.save(model.generate(**batch, max_new_tokens=8, do_sample=False), sys.argv[3])
"""


def test_a_new_process_predicts_the_same(tmp_path):
    model = compose("bart", "gpt2", tmp_path)
    ids, mask = tiny.prompts(rows=2)
    batch = {"prompt_ids": left(ids, mask), "prompt_attention_mask": left(mask, mask)}
    torch.save(batch, tmp_path / "batch.pt")
    model.save_pretrained(tmp_path / "system")
    paths = [str(tmp_path / name) for name in ("system", "batch.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *paths], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), model.generate(**batch, **NEW))


@pytest.mark.parametrize(("encoder", "slm"), PAIRS)
def test_reloaded_it_is_the_same_and_the_encoder_is_not_in_the_file(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path)
    model.save_pretrained(tmp_path / "system")
    trained = sum({p.data_ptr(): p.numel() for p in (*model.slm.parameters(), *model.projector.parameters())}.values())
    assert (tmp_path / "system" / "model.safetensors").stat().st_size <= 4 * trained + 2**16
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    batch = training_batch(model, *tiny.prompts())
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("encoder", tiny.ENCODERS)
def test_every_other_family_encodes_and_is_found_again(encoder, tmp_path):
    model = compose(encoder, "llama", tmp_path)
    model.save_pretrained(tmp_path / "system")
    ids, mask = tiny.prompts()
    batched = generate(model, ids, mask)
    assert torch.equal(generate(LlmToSlm.from_pretrained(tmp_path / "system").eval(), ids, mask), batched)
    assert until_end(generate(model, ids[2:, :5], mask[2:, :5])[0]) == until_end(batched[2])


@pytest.mark.parametrize("slm", ["opt", "gemma", "mt5"])
def test_every_other_family_decodes(slm, tmp_path):
    for fusion in (Add, CrossAttend, ReplaceEncoder):
        if fusion is ReplaceEncoder and slm in ("opt", "gemma"):
            continue
        model = compose("bert", slm, tmp_path, fusion=fusion)
        ids, mask = tiny.prompts()
        batched = generate(model, ids, mask)
        assert until_end(generate(model, ids[2:, :5], mask[2:, :5])[0]) == until_end(batched[2])
        if fusion is Add:
            model.projector.register_forward_hook(lambda _m, _a, states: torch.zeros_like(states))
        if fusion is not ReplaceEncoder:
            batch = training_batch(model, ids, mask)
            assert torch.equal(model(**batch).logits, model.slm(**bare(model, batch)).logits)


def test_a_learned_mix_of_layers_is_trained_saved_and_shown(tmp_path):
    source = tiny.folder("llama", tmp_path)
    parts = {"projector": LinearProjector(32, 32), "alignment": SameTokenizer(32, 32), "fusion": Add(32, 32)}
    encoder = Encoder.from_source(source, layer=[1, 0.5, "last"])
    model = LlmToSlm.compose(encoder, tiny.build("gpt2"), encoder_source=source, **parts)
    batch = training_batch(model, *tiny.prompts())
    model(**batch).loss.backward()
    assert model.layer_mix.logits.grad.abs().min() > 0
    assert model.layer_mix.scale.grad.abs() > 0
    torch.nn.init.normal_(model.layer_mix.logits)
    model.save_pretrained(tmp_path / "system")
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    shown = again.metrics()
    assert list(shown) == ["layer_mix/1", "layer_mix/0.5", "layer_mix/last", "layer_mix/scale"]
    torch.testing.assert_close(sum(list(shown.values())[:3]), torch.tensor(1.0))


def test_a_mix_of_one_layer_is_that_layer_normalised():
    mix, states = LayerMix(["last"]), torch.randn(2, 3, 8) * 50
    torch.testing.assert_close(mix(states), torch.nn.functional.rms_norm(states, (8,)))


def test_a_moved_pair_of_folders_still_finds_its_encoder(tmp_path):
    (tmp_path / "here").mkdir()
    model = compose("t5", "t5", tmp_path / "here")
    model.save_pretrained(tmp_path / "here" / "system")
    (tmp_path / "here").rename(tmp_path / "there")
    assert LlmToSlm.from_pretrained(tmp_path / "there" / "system").encoder is not None


def test_an_encoder_that_is_not_beside_the_system_is_missed_where_it_lay(tmp_path):
    (tmp_path / "here").mkdir()
    compose("t5", "t5", tmp_path / "here").save_pretrained(tmp_path / "here" / "system")
    moved = (tmp_path / "here" / "system").rename(tmp_path / "system")
    with pytest.raises(UserError) as caught:
        LlmToSlm.from_pretrained(moved)
    assert f"there is no folder {tmp_path}" in str(caught.value)
    assert f"say so in {moved / 'config.json'} (encoder_source)" in str(caught.value)


def test_another_encoder_is_refused(tmp_path):
    model = compose("t5", "t5", tmp_path)
    model.save_pretrained(tmp_path / "system")
    torch.manual_seed(1)
    other = tiny.folder("t5", tmp_path / "other")
    with pytest.raises(UserError, match="is not the one that this system was trained with"):
        LlmToSlm.from_pretrained(tmp_path / "system", encoder_source=other)
    model.config.encoder_quantization = "8bit"
    with pytest.raises(UserError, match="encoder_source, or install the quantiser that made its 8bit weights"):
        model.attach_encoder(Encoder.from_source(other))


def test_the_encoder_is_hashed_once_when_it_is_composed(tmp_path, monkeypatch):
    hashed, once = [], Encoder.content_hash
    monkeypatch.setattr(Encoder, "content_hash", lambda encoder: hashed.append(encoder) or once(encoder))
    model = compose("t5", "t5", tmp_path)
    assert hashed == [model.encoder]
    assert model.config.encoder_hash


def test_a_projector_that_does_not_fit_is_refused(tmp_path):
    source = tiny.folder("t5", tmp_path)
    with pytest.raises(UserError, match="states are 32 wide, the projector takes 48"):
        LlmToSlm.compose(
            Encoder.from_source(source),
            tiny.build("t5"),
            projector=LinearProjector(48, 32),
            alignment=SameTokenizer(32, 32),
            fusion=Add(32, 32),
        )


@pytest.mark.parametrize(("encoder", "slm"), [("t5", "gpt2"), ("llama", "t5")])
def test_two_tokenizers_the_papers_way(encoder, slm, tmp_path):
    model = compose(encoder, slm, tmp_path, alignment=EncoderTokenizer)
    ids, mask = tiny.prompts()
    out = generate(model, ids, mask)
    model.save_pretrained(tmp_path / "system")
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    assert torch.equal(generate(again, ids, mask), out)
    placeholders = torch.zeros_like(ids)
    embeds = model.embed_prompt(placeholders, mask, ids, mask).inputs_embeds
    assert (embeds[mask.bool()] != model.get_input_embeddings()(placeholders)[mask.bool()]).any(-1).all()
    with pytest.raises(UserError, match="different tokenizers"):
        model.generate(ids, **NEW)


def test_beams_and_the_static_cache_work(tmp_path):
    model = compose("llama", "llama", tmp_path)
    ids, mask = tiny.prompts()
    assert generate(model, ids, mask, num_beams=3).shape[0] == 3
    assert torch.equal(generate(model, ids, mask), generate(model, ids, mask, cache_implementation="static"))


def test_projected_states_start_at_the_scale_of_the_embeddings(tmp_path):
    model = compose("llama", "gpt2", tmp_path)
    ids, mask = tiny.prompts()
    projected = model.projector(model.encode(ids, mask)[0])
    scale = model.get_input_embeddings().weight.square().mean().sqrt()
    torch.testing.assert_close(projected.square().mean().sqrt(), scale, rtol=0.05, atol=0)
