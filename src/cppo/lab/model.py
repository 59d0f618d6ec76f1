"""The laboratory's models: a tiny Qwen3 with a character tokenizer, built in process, or a pretrained one from disk."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END_TOKEN = "."
PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"


def build_char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character; ids follow the alphabet, then ".", "<pad>", "<unk>".

    Args:
        alphabet: distinct characters, at least one, "." not among them: it is the end token. Others become "<unk>".

    Raises:
        ValueError: for an alphabet that is empty, repeats a character or contains ".".
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet or len(set(alphabet)) != len(alphabet) or END_TOKEN in alphabet:
        raise ValueError(f"alphabet={alphabet!r}: expected distinct characters, at least one, without {END_TOKEN!r}")
    tokens = [*alphabet, END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_tiny_model(
    tokenizer: PreTrainedTokenizerBase, *, layers: int = 2, width: int = 64, heads: int = 4, seed: int = 0
) -> Qwen3ForCausalLM:
    """A Qwen3 in float32 with random weights; 0.109M parameters with the defaults and a dozen tokens.

    Args:
        tokenizer: gives the vocabulary and the ids of the end and pad tokens.
        layers: decoder layers, >= 1.
        width: hidden size, a multiple of 2 ``heads`` (rotary positions pair up the dimensions of a head).
        heads: attention heads, >= 1, each with its own keys and values.
        seed: of the initial weights; torch's global generator is left as it was.

    Raises:
        ValueError: for an argument outside its range, or a tokenizer without end and pad tokens.
    """
    for name, value in (("layers", layers), ("width", width), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer >= 1")
    if width % (2 * heads):
        raise ValueError(f"width={width}: expected a multiple of {2 * heads}, twice the heads")
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, token_id in special.items():
        if token_id is None:
            raise ValueError(f"tokenizer.{name}=None: expected a tokenizer with an end token and a pad token")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=2048,
        # The usual 10,000 turns half of a 16-wide head's planes too slowly to tell dozens of positions apart: with 100
        # imitation reaches the same loss in half the steps.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # an argument of the base class, which types none
        dtype=torch.float32,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    model.eval()
    return model


def load_pretrained(
    name_or_path: str | os.PathLike[str], *, gguf_file: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder, a GGUF file or the hub.

    The weights of a GGUF file become ordinary parameters, so the model trains and saves like any other. A tokenizer
    without a pad token takes the end token for it.

    Args:
        name_or_path: a folder that ``save_pretrained`` wrote, a folder or file with a GGUF checkpoint, or a hub id.
        gguf_file: the name of the GGUF file in that folder.
        dtype: of the parameters. On a CPU bfloat16 is slower than float32.

    Raises:
        FileNotFoundError: for a path that does not exist, or a folder without a checkpoint.
        ValueError: for a checkpoint that cannot be loaded, or a tokenizer without an end token.
    """
    source, gguf_file = _locate(os.fspath(name_or_path), gguf_file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:  # noqa: BLE001  loaders, hub client and file formats each raise errors of their own
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        where = source if gguf_file is None else os.path.join(source, gguf_file)
        raise ValueError(
            f"name_or_path={where!r}: cannot be loaded ({reason}); expected a causal language model with its tokenizer"
        ) from None
    if gguf_file is not None:
        _forget_quantization(model)
    _check_tokenizer(tokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def check_pretrained(name_or_path: str, gguf_file: str | None = None) -> None:
    """Raise what :func:`load_pretrained` would raise for a name that leads nowhere, without loading weights."""
    source, gguf_file = _locate(name_or_path, gguf_file)
    if gguf_file is None and os.path.isdir(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # noqa: BLE001  loaders raise errors of many kinds
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ValueError(f"name_or_path={source!r}: its tokenizer cannot be loaded ({reason})") from None
        _check_tokenizer(tokenizer, source)
    elif gguf_file is None:
        try:
            AutoConfig.from_pretrained(source)
        except Exception as error:  # noqa: BLE001  the hub client raises errors of many kinds
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ValueError(f"name_or_path={source!r}: cannot be found ({reason})") from None


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"name_or_path={source!r}: its tokenizer has no end token; expected one that has")
    if not len(tokenizer("0")["input_ids"]):
        # Transformers makes an empty tokenizer up where a folder has none.
        raise ValueError(
            f"name_or_path={source!r}: has no tokenizer that knows any text; expected one beside the model"
        )


def _locate(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or hub id, and the GGUF file in it; says what is missing before any loader or network is asked."""
    if not name:
        raise ValueError("name_or_path='': expected a folder, a .gguf file or a hub id")
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file() and gguf_file is None:
        path, gguf_file = path.parent, path.name
    if path.is_dir():
        if gguf_file is not None:
            if not (path / gguf_file).is_file():
                raise FileNotFoundError(f"gguf_file={gguf_file!r}: {name!r} has no such file{_list_gguf(path)}")
        elif not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(
                f"name_or_path={name!r}: the folder has no config.json; expected a saved model{_list_gguf(path)}"
            )
        return str(path), gguf_file
    if path.exists():
        raise ValueError(f"name_or_path={name!r}: is a file; expected a folder, a .gguf file or a hub id")
    # A hub id is NAME or OWNER/NAME.
    if name[0] in "./~" or "\\" in name or name.count("/") > 1 or path.suffix in (".gguf", ".safetensors"):
        raise FileNotFoundError(f"name_or_path={name!r}: there is no such folder or file; expected one, or a hub id")
    return name, gguf_file


def _list_gguf(folder: pathlib.Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; its GGUF files (gguf_file=): {', '.join(files) or 'none'}"


def _forget_quantization(model: Any) -> None:
    # Transformers 5 keeps the marks of the quantizer after it has dequantized, and refuses to save such a model.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
