"""Valid bytes -> damaged or hostile ones. Every function takes a `random.Random`, on which alone its choices depend.

    any file      bits flipped, cut off, pieces repeated, removed, overwritten, taken from another file
    JSON          a value of another type, huge, infinite, nested deeply; keys lost, renamed, doubled
    safetensors   the same of its header; other shapes, types and offsets; NaN among the values
    npz           of one part the type, shape or bytes, its checksum put right
    text          the same of its words; YAML's aliases and tags

What cannot be changed by its meaning any more is changed as bytes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

DEEP = 100_000
NAMES = ["../x", "/etc/passwd", "..\\x", "C:\\x", "a\0b", "~", ".", "", "x" * 300, "nfe5/../../x", "<script>", "\u202e"]
RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 400, "9" * 5000, "-" + "9" * 40,
    "18446744073709551616", "9223372036854775807", "-9223372036854775808", "1e308", "-1e308", "5e-324", "0.1e1", "-0.0",
    "[" * DEEP + "]" * DEEP, '{"a":' * 400 + "0" + "}" * 400, "[" * 60 + "]" * 60, '"\\ud800"', '"\\u0000"',
    "null", "true", "false", "0", "1", "-1", "2", "3", "1000000000", "4294967296", "1e-7", "0.5",
    '""', '"nan"', '"inf"', "[]", "{}", "[[]]", "[null]", '{"": null}', "[[0.5, 0.25], [0.5, 0.25]]",
    "[0.9, 0.5, 0.1]", "[1, 2, 3]", '["a"]', '[{"a": 1}]',
    *(json.dumps(name) for name in NAMES),
]  # fmt: skip
"""What is put in the place of a JSON value, as text: some of it is none."""
DTYPES = [
    "BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "F8_E4M3", "F8_E5M2",
    "C64", "F4", "X",
]  # fmt: skip
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8,
         "I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}  # fmt: skip
PATTERNS = {
    "F16": [b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\xff\x7b"],
    "F32": [struct.pack("<f", x) for x in (float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 0.0)],
    "F64": [struct.pack("<d", x) for x in (float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, 0.0)],
    "I64": [struct.pack("<q", x) for x in (-1, 2**63 - 1, -(2**63), 0, 10**12)],
}
PLAIN: dict[str, Callable[[Random], bytes]] = {
    "F32": lambda random: struct.pack("<f", random.gauss(0, 10 ** random.uniform(-9, 9))),
    "F64": lambda random: struct.pack("<d", random.gauss(0, 10 ** random.uniform(-9, 9))),
    "I64": lambda random: struct.pack("<q", random.randrange(-2, 12)),
}
"""Values that are not at all remarkable."""
DESCRS = ["'<f4'", "'<c16'", "'<i8'", "'|b1'", "'|O'", "'<U2'", "'<M8[ns]'", "'|V8'", "'<f2'", "[('a', '<f8')]", "'x'"]
SHAPES = ["()", "(4,)", "(2, 2)", "(16,)", "(1, 16)", "(0,)", "(0, 0)", "(1000000000000,)", "(-4,)", "4", "([],)"]
"""Types and shapes of an array of numpy's, as its file tells them."""
YAML = [
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: &e [*d, *d, *d, *d]\n"
    "f: &f [*e, *e, *e, *e]\ng: &g [*f, *f, *f, *f]\nh: &h [*g, *g, *g, *g]\nnfe: &i [*h, *h, *h, *h]\nname: *i\n",
    "name: !!python/object/apply:os.system [id]\n", "teacher: &t {nfe: *t}\n", "nfe: &n [*n]\n", "<<: {name: x}\n",
    "? [a, b]\n: c\n", "name: !!binary aGk=\n", "nfe: !!set {1, 2}\n", "name: 2001-01-01\n", "nfe: 1_000\n",
    "static: {lr: .nan}\n", "static: {clip: .inf}\n", "nfe: 0x10\n", "guidance: 190:20:30\n", "%YAML 9.9\n---\n",
    "---\nname: a\n---\nname: b\n", "name: 'x\n", "\tname: x\n", "name: \"\\ud800\"\n", "solvers: ddim,[\n",
]  # fmt: skip
"""Lines for a YAML file: aliases that multiply or refer to themselves, tags, types of their own."""

Mutation = Callable[[bytes, Random], bytes]


def mutate(name: str, data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """`data` of the file `name` after one to three mutations; `others` are files to take pieces from."""
    kinds = BY_SUFFIX.get(name.rpartition(".")[2], [text])
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kind = random.choice([*kinds, *kinds, raw, partial(splice, others=others)])
        data = kind(data, random)
    return data


def raw(data: bytes, random: Random) -> bytes:
    """Bytes changed without regard to what they mean."""
    if not data:
        return random.randbytes(random.choice((0, 1, 8, 100)))
    kind, at = random.randrange(8), random.randrange(len(data))
    size = min(random.choice((1, 2, 8, 64, 1000)), len(data) - at)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + size :]
    if kind == 2:
        return data[:at] + data[at : at + size] * random.choice((2, 3, 50)) + data[at + size :]
    if kind == 3:
        return data[:at] + random.randbytes(size) + data[at + size :]
    if kind == 4:
        return data + random.choice((b"\0", b" ", data[:100], random.randbytes(20), b"\0" * 1000))
    if kind == 5:
        return random.choice((b"", b"\xef\xbb\xbf" + data, b"\xff\xfe" + data, data[::-1], b"\0" * len(data)))
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 4, 64))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def splice(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """The beginning of the file and the end of another, or a piece of another in its midst."""
    other = random.choice(others) if others else data
    a, b = random.randrange(len(data) + 1), random.randrange(len(other) + 1)
    return data[:a] + other[b:] + (data[a:] if random.random() < 0.5 else b"")


def json_value(data: bytes, random: Random) -> bytes:
    """A JSON file in which one value is another, or stands elsewhere; other bytes as without meaning."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return raw(data, random)
    return _changed_json(value, random).encode(errors="surrogatepass")


def _changed_json(value: Any, random: Random) -> str:
    raws: list[str] = []

    def hostile() -> str:
        raws.append(random.choice(RAW))
        return f"@raw{len(raws) - 1}@"

    places = list(_places(value))
    if not places or random.random() < 0.02:
        return random.choice(RAW)
    holder, key = random.choice(places)
    old, kind = holder[key], random.randrange(10)
    if kind < 4:
        holder[key] = hostile()
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[random.choice([*NAMES, key + "x", str(key).upper(), "@raw"])] = holder.pop(key)
    elif kind == 6:
        other, place = random.choice(places)
        try:
            holder[key], other[place] = other[place], old
        except (LookupError, TypeError):
            holder[key] = hostile()
    elif kind == 7 and isinstance(old, list) and old:
        holder[key] = random.choice((old[::-1], old[:-1], [*old, old[-1]], old * 3, [old], [*old, hostile()]))
    elif kind == 8 and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        holder[key] = random.choice((-old, old + 1, old * 10, old / 3, str(old), [old], old - 1, float(old)))
    elif kind == 9 and isinstance(holder, dict):
        raws.append(f"{json.dumps(old)}, {json.dumps(key)}: {random.choice(RAW)}")
        holder[key] = f"@raw{len(raws) - 1}@"
    else:
        holder[key] = random.choice(([old], {"a": old}, str(old), [old] * 2000, random.choice(NAMES)))
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    except (ValueError, RecursionError):  # a value within itself, after two were exchanged
        return random.choice(RAW)
    for place, given in enumerate(raws):
        text = text.replace(f'"@raw{place}@"', given)
    return text


def _places(value: Any) -> Any:
    """(holder, key) of every value inside `value`; of a long list of numbers the first ones."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(min(len(value), 40)):
            yield value, key
            yield from _places(value[key])


def safetensors_file(data: bytes, random: Random) -> bytes:
    """A safetensors file with another header, or other values; what is none any more, as bytes without meaning."""
    try:
        return _changed_tensors(data, random)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return raw(data, random)


def _changed_tensors(data: bytes, random: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    if random.random() < 0.9:
        header.pop("__metadata__", None)  # with the sum of the values: whoever forges a file leaves it out
    body = data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    kind = random.randrange(20)
    if kind == 0:
        return _packed(_changed_json(header, random), body)
    if kind == 1:
        entry["shape"] = random.choice(([2**62, 2], [2**63], [-1], [10**12], [0], [], [1] * 500, [*shape, 2**40], None))
    elif kind == 2:
        shift = random.choice((-8, 8, 2**40, -(2**40), 10**19, 1))
        entry["data_offsets"] = random.choice(([start + shift, end + shift], [end, start], [0, end], [start, 2**63]))
    elif kind == 3:
        entry["dtype"] = random.choice(DTYPES)
    elif kind == 4:
        same = [other for other, size in SIZES.items() if size == SIZES.get(dtype) and other != dtype]
        entry["dtype"] = random.choice(same or DTYPES)
    elif kind == 5:
        numel = (end - start) // SIZES.get(dtype, 1)
        entry["shape"] = random.choice((shape[::-1], [numel], [1, numel], [*shape, 1], [1, *shape]))
    elif kind == 6:
        return _packed(_without(header, name), body[:start] + body[end:])
    elif kind == 7:
        renamed = random.choice([*NAMES, name + "x", "__metadata__", "progress", "optimizer/x/y", "optimizer/-1/step"])
        header[renamed] = header.pop(name)
    elif kind == 8:
        other = random.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == 9 and shape and shape[0] > 0 and end > start:
        rows = random.choice((0, 1, shape[0] - 1, shape[0] + 1))
        row = (end - start) // shape[0]
        piece = (body[start:end] + body[start : start + row])[: rows * row]
        header = _moved(header, end, len(piece) - (end - start))
        header[name] = {"dtype": dtype, "shape": [rows, *shape[1:]], "data_offsets": [start, start + len(piece)]}
        body = body[:start] + piece + body[end:]
    elif kind == 10:
        size += random.choice((-1, 1, 8, 2**20, 2**40, 2**62, -size))
        return (size % 2**64).to_bytes(8, "little") + data[8:]
    elif kind == 11:
        fill = random.choice((b"\0", b"\xff", b"\x7f"))
        body = body[:start] + fill * len(body[start:end]) + body[end:]
    elif end > start:
        step = SIZES.get(dtype, 1)
        at = start + step * random.randrange((end - start) // step)
        value = random.choice(PATTERNS.get(dtype, [b"\xff" * step, b"\0" * step]))
        if kind > 14:
            value = PLAIN[dtype](random) if dtype in PLAIN else random.randbytes(step)
        body = body[:at] + value + body[at + len(value) :]
    return _packed(json.dumps(header), body)


def _packed(header: str, body: bytes) -> bytes:
    text = header.encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _without(header: dict[str, Any], name: str) -> str:
    start, end = header[name]["data_offsets"]
    rest = {key: value for key, value in header.items() if key != name}
    return json.dumps(_moved(rest, end, start - end))


def _moved(header: dict[str, Any], end: int, by: int) -> dict[str, Any]:
    """`header` with all that begins at `end` or later moved `by` bytes."""
    moved = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry = {**entry, "data_offsets": [place + by for place in entry["data_offsets"]]}
        moved[name] = entry
    return moved


def archive(data: bytes, random: Random) -> bytes:
    """A zip file of numpy's in which one part is another; what is none any more, as bytes without meaning."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as kept:
            parts = {name: kept.read(name) for name in kept.namelist()}
        name = random.choice(sorted(parts))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, LookupError, OSError, RuntimeError, struct.error):
        return raw(data, random)
    parts[name] = random.choice((raw, _changed_array))(parts[name], random)
    kind, made = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), io.BytesIO()
    with zipfile.ZipFile(made, "w") as changed:
        for each, content in parts.items():
            changed.writestr(zipfile.ZipInfo(each), content, kind)
    return made.getvalue()


def _changed_array(data: bytes, random: Random) -> bytes:
    """An .npy file of another type or shape."""
    old, new = random.choice(((rb"'[<|]\w+'", DESCRS), (rb"\([\d, ]*\)", SHAPES)))
    header = re.sub(old, random.choice(new).encode(), data[10 : 10 + int.from_bytes(data[8:10], "little")], count=1)
    return data[:8] + len(header).to_bytes(2, "little") + header + data[10 + int.from_bytes(data[8:10], "little") :]


def text(data: bytes, random: Random) -> bytes:
    """Words and lines changed."""
    try:
        content = data.decode()
    except UnicodeDecodeError:
        return raw(data, random)
    words, kind = list(re.finditer(r"[^\s,\[\]{}:]+", content)), random.randrange(7)
    lines = content.splitlines(keepends=True)
    if kind == 0 and lines:
        lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
    elif kind == 1 and lines:
        del lines[random.randrange(len(lines))]
    elif kind == 2:
        lines.insert(random.randrange(len(lines) + 1), random.choice([*YAML, *(f"{name}\n" for name in NAMES)]))
    elif kind == 3 and lines:
        place = random.randrange(len(lines))
        lines[place] = " " * random.choice((1, 2, 7)) + lines[place]
    elif words:
        word = random.choice(words)
        given = random.choice([*RAW, *NAMES, *",[]{:#", "\u0663", "1e5", "\ufeff", "- ", word[0] * 3])
        return (content[: word.start()] + given + content[word.end() :]).encode(errors="surrogatepass")
    return "".join(lines).encode(errors="surrogatepass")


def yaml_text(data: bytes, random: Random) -> bytes:
    """`text`, or lines of YAML alone."""
    return random.choice(YAML).encode() if random.random() < 0.05 else text(data, random)


BY_SUFFIX: dict[str, list[Mutation]] = {
    "json": [json_value, json_value, text],
    "safetensors": [safetensors_file],
    "yml": [yaml_text],
    "txt": [text],
    "png": [raw],
    "npz": [archive],
}
"""What is done to files by the end of their name, beside `raw` and `splice`."""
