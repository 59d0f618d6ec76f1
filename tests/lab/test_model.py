"""Tokenizers and models: round trips, weights from a seed, saved and loaded again, clear errors for wrong paths."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cppo.lab.model import build_char_tokenizer, build_tiny_model, load_pretrained

pytestmark = pytest.mark.train
TOKENIZER = build_char_tokenizer("0123456789=")


@given(st.text("0123456789=", max_size=40))
def test_one_token_a_character_and_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert [TOKENIZER.convert_ids_to_tokens(i) for i in ids] == list(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id], skip_special_tokens=True) == text
    assert TOKENIZER(text + ".")["input_ids"] == [*ids, TOKENIZER.eos_token_id]


def test_ids_follow_the_alphabet_and_the_special_tokens_come_after():
    tokenizer = build_char_tokenizer("b a\n")
    assert tokenizer("a b\n.<pad>")["input_ids"] == [2, 1, 0, 3, 4, 5]
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (".", "<pad>", 7)
    assert tokenizer.decode([2, 1, 1, 0, 3]) == "a  b\n"
    assert tokenizer("aZ")["input_ids"] == [2, tokenizer.unk_token_id]


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["12=", "3="], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1, 0] == TOKENIZER.pad_token_id
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("alphabet", ["", "aa", "a."])
def test_bad_alphabets_are_refused(alphabet):
    with pytest.raises(ValueError, match=f"alphabet={alphabet!r}: expected distinct characters"):
        build_char_tokenizer(alphabet)


def test_the_default_model_is_the_one_described():
    model = build_tiny_model(TOKENIZER)
    assert sum(p.numel() for p in model.parameters()) == 108_672
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.config.model_type, model.config.head_dim, model.config._attn_implementation) == ("qwen3", 16, "sdpa")
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert not model.training


def test_a_seed_decides_the_weights_and_the_global_generator_stays():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (build_tiny_model(TOKENIZER, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    later = build_tiny_model(TOKENIZER, seed=3).state_dict()
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], later[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_generation_samples_from_the_whole_policy():
    # An untrained policy is near uniform: over many samples every token comes up, which a top-k or top-p cut prevents.
    model = build_tiny_model(TOKENIZER)
    batch = TOKENIZER(["12="] * 400, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(**batch, max_new_tokens=1)
    assert set(output[:, -1].tolist()) == set(range(len(TOKENIZER)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers=0: expected an integer >= 1"),
        ({"width": 20}, "width=20: expected a multiple of 8"),
        ({"heads": 0}, "heads=0"),
        ({"heads": True}, "heads=True"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_model(TOKENIZER, **options)


def test_a_saved_model_loads_with_the_same_logits(tmp_path):
    model = build_tiny_model(TOKENIZER, seed=1)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded, tokenizer = load_pretrained(tmp_path)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    ids = torch.tensor([tokenizer("0123=012")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert tokenizer.decode(ids[0]) == "0123=012"
    assert {p.dtype for p in load_pretrained(str(tmp_path), dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_the_end_token_pads_where_there_is_no_pad_token(tmp_path):
    model = build_tiny_model(TOKENIZER)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer = build_char_tokenizer("0123456789=")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = load_pretrained(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    build_tiny_model(TOKENIZER).save_pretrained(tmp_path)
    tokenizer = build_char_tokenizer("0123456789=")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has no end token"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/no such model", "a/b/c", "model.gguf"])
def test_a_path_that_does_not_exist_is_said_so_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("asked a loader"))
    with pytest.raises(FileNotFoundError, match=f"name_or_path='{name}': there is no such folder"):
        load_pretrained(name)


def test_folders_without_a_model_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json; expected a saved model; its GGUF files .*: none"
    ):
        load_pretrained(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"its GGUF files \(gguf_file=\): small\.gguf"):
        load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gguf_file='other\.gguf': .* has no such file.*small\.gguf"):
        load_pretrained(tmp_path, gguf_file="other.gguf")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        load_pretrained(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="name_or_path=''"):
        load_pretrained("")


def test_a_damaged_checkpoint_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.__suppress_context__
    assert "\n" not in str(caught.value)


def write_gguf(path, model):
    """A one-layer Llama in float32 with a byte-level tokenizer of thirteen tokens."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*"0123456789=", "12", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    layer = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    names |= {f"layers.0.{ours}": f"blk.0.{theirs}" for ours, theirs in layer.items()}
    for ours, theirs in names.items():
        tensor = weights[f"model.{ours}.weight"]
        if theirs.endswith(("attn_q", "attn_k")):  # GGUF interleaves the two halves of a head
            heads, rows = config.num_attention_heads, tensor.shape[0]
            tensor = tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(tensor))
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_checkpoint_loads_trains_and_saves(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=13, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        original = LlamaForCausalLM(config)
    write_gguf(tmp_path / "small.gguf", original)
    model, tokenizer = load_pretrained(tmp_path, gguf_file="small.gguf")
    ids = torch.tensor([tokenizer("123=3")["input_ids"]])
    assert ids.tolist() == [[11, 3, 10, 3]]
    assert tokenizer.pad_token_id is not None
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert not model.is_quantized
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_pretrained(tmp_path / "saved")
    direct, _ = load_pretrained(tmp_path / "small.gguf")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(direct(ids).logits, model(ids).logits)
