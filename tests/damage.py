"""Ways to break an adapter: files by their path in it → the same, damaged by a random number generator's choice."""

import json
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save

Files = dict[str, bytes]
Damage = Callable[[Files, random.Random], str]  # changes the files in place, and says what it did

WEIGHTS, CONFIG = ".safetensors", ".json"
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    2**16,
    10**9,
    2**31,
    2**63,
    2**64,
    2**64 + 1,
    10**30,
    -(10**30),
    10**300,
    10**4000,
)
ODD_JSON = (
    *(None, True, False, 1.5, float("nan"), float("inf"), "", "4", "conv2d", "nonsense", "x" * 5000, "a\nb\x1b[31m"),
    *("\ud800", [], [1], {}, {"m": 1}, [[]], ["to_q"], ["to_q", None], ["\ud800"], "(", "unet", 1.0),
)
ODD_NAMES = ("", ".", "..", "unet", "unet.", "x" * 3000, "a\nb", "\ud800", "\x1b[2J", "__metadata__", "unet.conv_in")
ODD_VALUES = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e20, 1e8, 1e7, -1e7, 1e5, 1e-45)
DTYPES = (
    *(torch.int8, torch.int32, torch.int64, torch.uint16, torch.uint64, torch.bool, torch.float64, torch.float16),
    *(torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64),
)
DTYPE_NAMES = ("F64", "F16", "BF16", "I8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "F31", "", 7, None)


def packed(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + data


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _file(files: Files, rng: random.Random, suffix: str = "") -> str:
    return rng.choice([name for name in sorted(files) if name.endswith(suffix)] or sorted(files))


# Bytes


def truncate(files: Files, rng: random.Random) -> str:
    name = _file(files, rng)
    length = rng.choice([0, 1, 7, 8, 9, rng.randrange(len(files[name])), rng.randrange(len(files[name]))])
    files[name] = files[name][:length]
    return f"{name}: the first {length} bytes"


def lengthen(files: Files, rng: random.Random) -> str:
    name, more = _file(files, rng), rng.choice([b"\0", b" ", b"}", b"\xff" * 100, rng.randbytes(64)])
    files[name] += more
    return f"{name}: {len(more)} bytes more"


def flip(files: Files, rng: random.Random) -> str:
    name = _file(files, rng)
    content = bytearray(files[name])
    header = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(WEIGHTS) else len(content)
    low, high = rng.choice([(0, 8), (8, header), (8, 60), (header, len(content)), (0, len(content))])
    places = [rng.randrange(low, max(low + 1, min(high, len(content)))) for _ in range(rng.choice([1, 1, 2, 20]))]
    for place in places:
        place = min(place, len(content) - 1)
        content[place] = rng.randrange(256) if rng.random() < 0.3 else content[place] ^ (1 << rng.randrange(8))
    files[name] = bytes(content)
    return f"{name}: bytes {places} flipped"


def overwrite(files: Files, rng: random.Random) -> str:
    name = _file(files, rng)
    content = bytearray(files[name])
    start, size = rng.randrange(len(content)), rng.choice([1, 4, 40])
    new = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size), b"9" * size, b"{" * size, b'"' * size])
    content[start : start + size] = new
    files[name] = bytes(content)
    return f"{name}: {new[:8]}… ({size}) over bytes {start} …"


def replace_whole(files: Files, rng: random.Random) -> str:
    name = _file(files, rng)
    others = {
        "nothing": b"",
        "a pickle": pickle.dumps({"a": [1, 2]}),
        "text": "grün".encode("latin-1"),
        "UTF-16": '{"format": "boft"}'.encode("utf-16"),
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "deep enough for the stack": b'{"format":' + b"[" * 900 + b"]" * 900 + b"}",
        "noise": rng.randbytes(500),
        "a list": b"[]",
        "a number": b"1" * 5000,
        "null": b"null",
        "no tensors": packed(b"{}", b""),
        "a header of blanks": packed(b" " * 1000, b""),
        "another file of it": files[_file(files, rng)],
    }
    what = rng.choice(list(others))
    files[name] = others[what]
    return f"{name}: {what}"


def prefix(files: Files, rng: random.Random) -> str:
    name = _file(files, rng, WEIGHTS)
    length = rng.choice([0, 1, len(files[name]), 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1])
    files[name] = struct.pack("<Q", length) + files[name][8:]
    return f"{name}: a header of {length} bytes"


# The header of the tensors


def header(files: Files, rng: random.Random) -> str:
    name = _file(files, rng, WEIGHTS)
    entries, data = unpacked(files[name])
    keys = sorted(key for key in entries if key != "__metadata__")
    key = rng.choice(keys)
    entry = entries[key]
    what = rng.choice(["shape", "empty", "offsets", "dtype", "lacks", "more", "name", "twice", "axes", "deep"])
    odd = rng.choice(NUMBERS + ODD_JSON[:10])
    if what == "shape" and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = odd
    elif what == "empty":
        data, entries[key] = b"", entry | {"shape": rng.sample([0, 2**62, 10**9, 4, 4], rng.choice([2, 3, 4, 4]))}
        entries = {key: entries[key] | {"data_offsets": [0, 0]}, "__metadata__": entries.get("__metadata__", {})}
    elif what == "offsets":
        entry["data_offsets"] = rng.choice([[0, 4], [odd, odd], [0, odd], entry["data_offsets"][::-1], [], "x", [0]])
    elif what == "dtype":
        entry["dtype"] = rng.choice(DTYPE_NAMES)
    elif what == "lacks":
        del entry[rng.choice(sorted(entry))]
    elif what == "more":
        entries[rng.choice(ODD_NAMES)] = rng.choice([entry, odd, {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}])
    elif what == "name":
        entries = {rng.choice(ODD_NAMES) if each == key else each: value for each, value in entries.items()}
    elif what == "axes":
        entry["shape"] = [1] * rng.choice([3, 5, 65, 200]) + entry["shape"]
    elif what == "deep":
        entry["shape"] = json.loads("[" * 120 + "]" * 120)
    text = dumped(entries)
    if what == "twice":
        text = text[:-1] + b", " + dumped({key: entries[rng.choice(keys)]})[1:]
    files[name] = packed(text, data)
    return f"{name}: {what} of '{key}' ({str(odd)[:20]})"


# The tensors


def tensors(files: Files, rng: random.Random) -> str:
    name = _file(files, rng, WEIGHTS)
    found, metadata = load(files[name]), unpacked(files[name])[0].get("__metadata__")
    key = rng.choice(sorted(found))
    what = rng.choice(["dtype", "value", "value", "all", "shape", "lacks", "more", "name", "alias", "swap"])
    tensor = found[key].clone()
    if what == "dtype":
        found[key] = tensor.to(rng.choice(DTYPES))
    elif what in ("value", "all"):
        tensor = tensor.to(rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
        chosen = slice(None) if what == "all" else rng.randrange(tensor.numel())
        tensor.view(-1)[chosen] = rng.choice(ODD_VALUES)
        found[key] = tensor
    elif what == "shape":
        found[key] = rng.choice(
            [tensor.flatten(), tensor.flatten()[0], tensor[None], tensor.flatten()[:1], tensor.T, tensor.flatten()[1:]]
        )
    elif what == "lacks":
        del found[key]
    elif what == "more":
        found[rng.choice(ODD_NAMES[:3] + ("lora_unet_x.alpha", "lora_te_x.boft_R", "a.boft_R", "x"))] = tensor
    elif what == "name":
        place = rng.randrange(len(key))
        cut = key[:place] + rng.choice(["", ".", "_", "x", "0", "\n"]) + key[place + rng.choice([0, 1]) :]
        found[cut] = found.pop(key)
    elif what == "alias":
        aliases = [
            ("lora_te_", "lora_te1_"),
            ("base_model.model.", ""),
            ("mid_block_resnets_0_conv1", "middle_block_0_in_layers_2"),
        ]
        found |= {each.replace(*rng.choice(aliases)): value.clone() for each, value in found.items()}
    else:
        other = rng.choice(sorted(found))
        found[key], found[other] = found[other].clone(), tensor
    found = {each: value.contiguous() for each, value in found.items()}
    files[name] = save(found, metadata)
    return f"{name}: {what} of '{key}'"


# The config, in the file beside the weights and in their metadata


def _edit(value: Any, rng: random.Random) -> tuple[Any, str]:
    """The JSON with one entry, at a random place, changed."""
    path, parent, key = [], None, None
    node = value
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.85):
        parent, key = node, rng.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
        node = node[key]
        path.append(str(key))
    if parent is None:
        return rng.choice(ODD_JSON), "all of it"
    what = rng.choice(["lacks", "more", "name", "number", "number", "odd", "odd", "odd"])
    if what == "lacks" or isinstance(parent, list) and what == "name":
        del parent[key]
    elif what == "more" and isinstance(parent, dict):
        parent[rng.choice(ODD_NAMES)] = node
    elif what == "name":
        parent[key + rng.choice(["x", ".", " ", ".x", "\n"])] = parent.pop(key)
    else:
        parent[key] = new = rng.choice(NUMBERS if what == "number" else ODD_JSON)
        what = f"{str(new)[:20]!r}"
    return value, f"{what} at {'/'.join(path)[:200]}"


def config(files: Files, rng: random.Random) -> str:
    name = _file(files, rng, rng.choice([WEIGHTS, CONFIG]))
    if name.endswith(WEIGHTS):
        entries, data = unpacked(files[name])
        metadata = entries.setdefault("__metadata__", {})
        key = rng.choice(sorted(metadata) or ["boft"])
        try:
            metadata[key], what = (lambda pair: (json.dumps(pair[0]), pair[1]))(_edit(json.loads(metadata[key]), rng))
        except (ValueError, KeyError):
            metadata[key] = rng.choice([*map(str, NUMBERS[:4]), "9" * 5000, "²", "", "\n", "[" * 5000, "{}", None, 1])
            what = str(metadata[key])[:20]
        files[name] = packed(dumped(entries), data)
        return f"{name}: metadata '{key}': {what}"
    value, what = _edit(json.loads(files[name]), rng)
    files[name] = dumped(value)
    if rng.random() < 0.7:  # both places alike, as where a program wrote them
        for weights in [each for each in files if each.endswith(WEIGHTS)]:
            entries, data = unpacked(files[weights])
            if "boft" in entries.get("__metadata__", {}):
                entries["__metadata__"]["boft"] = json.dumps(value)
                files[weights] = packed(dumped(entries), data)
        what += ", in both places"
    return f"{name}: {what}"


def config_text(files: Files, rng: random.Random) -> str:
    """What no JSON writer makes: an entry twice, depths near the stack's end, numbers beyond Python's."""
    name = _file(files, rng, CONFIG)
    if not name.endswith(CONFIG):
        return truncate(files, rng)
    text = files[name].decode()
    key = rng.choice(["m", "layers", "config", "format", "extra", "step", "r", "peft_type", "target_modules", "boft_R"])
    depth = rng.choice([100, 800, *range(880, 1000, 5)])
    value = rng.choice(
        ["1", "9" * 5000, "1e999", "-0", "NaN", "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]
    )
    quoted = f'"{key}": '
    if quoted in text and rng.random() < 0.5:
        place = text.index(quoted) + len(quoted)
        text = text[:place] + value + f', "{key}x": ' + text[place:]
    else:
        text = "{" + quoted + value + ", " + text.lstrip()[1:]
    files[name] = text.encode()
    return f"{name}: '{key}' is {value[:12]}… ({len(value)})"


def lacks_file(files: Files, rng: random.Random) -> str:
    name = _file(files, rng)
    content = files.pop(name)
    if rng.random() < 0.5:
        files[f"{name}.bin"] = content
    return f"{name} is missing"


ALL: tuple[Damage, ...] = (
    *(truncate, lengthen, flip, flip, flip, overwrite, replace_whole, prefix),
    *(header, header, header, tensors, tensors, tensors, config, config, config, config, config_text, lacks_file),
)
