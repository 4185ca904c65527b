"""Reads a GGUF, llama.cpp's file format: metadata, and tensors that are mostly quantised.

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

Not covered: any other type of tensor, other versions than 3, another alignment, big-endian files.

`read_gguf(path.read_bytes())` gives (metadata, weights). Only data/smollm2.py uses it, which comes
next.
"""
import math
import struct

import numpy as np

# ------------------------------------------ read a GGUF -------------------------------------------
# a type of a metadata value -> how Python's struct reads it
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}
STRING = 8
ARRAY = 9
ALIGNMENT = 32  # of each tensor's first byte, unless a file names another


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

    ValueError: no GGUF of version 3, or something in it that is not read here. struct.error or
    ValueError: it is cut short.
    """
    if content[:8] != b"GGUF" + struct.pack("<I", 3):
        raise ValueError(f"not a GGUF of version 3: it begins with {content[:8]!r}")
    reader = Reader(content)
    reader.position = 8  # behind the version
    n_tensors = reader.number("<Q")
    n_entries = reader.number("<Q")

    metadata = {}
    for _ in range(n_entries):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if alignment != ALIGNMENT:
        raise ValueError(f"its tensors are aligned to {alignment} bytes; {ALIGNMENT} is read here")

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


# -------------------------------------- numbers from blocks ---------------------------------------


def as_f32(blocks):
    """blocks (N, 4) bytes -> (N,) fp32, as they are."""
    return blocks.view("<f4")[:, 0].copy()  # torch wants an array of its own, not the file's bytes


def dequantize_q8_0(blocks):
    """blocks (N, 34) bytes -> (N, 32) fp32."""
    scale = blocks[:, 0:2].view("<f2").astype(np.float32)  # (N, 1)
    integers = blocks[:, 2:34].view(np.int8)  # (N, 32)
    return scale * integers.astype(np.float32)


def dequantize_q4_1(blocks):
    """blocks (N, 20) bytes -> (N, 32) fp32."""
    scale = blocks[:, 0:2].view("<f2").astype(np.float32)  # (N, 1)
    minimum = blocks[:, 2:4].view("<f2").astype(np.float32)  # (N, 1)
    pairs = blocks[:, 4:20]  # (N, 16), two integers a byte
    # not one after the other: a byte's neighbours are 16 numbers apart, which suits a CPU's vectors
    integers = np.concatenate((pairs & 15, pairs >> 4), axis=1)  # (N, 32)
    return scale * integers.astype(np.float32) + minimum


FORMATS = {  # a GGUF's number for a type -> (numbers a block, bytes a block, function)
    0: (1, 4, as_f32),
    3: (32, 20, dequantize_q4_1),
    8: (32, 34, dequantize_q8_0),
}
