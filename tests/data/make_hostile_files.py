"""Writes checkpoints that were made to do harm into a folder: make_hostile_files.py FOLDER

Each is small, whatever it claims. tests/server/checkpoint/hostile_files_test.cc says what each must
be answered with. Needs nothing but Python.
"""

import json
import os
import struct
import sys
import zlib


def u16(n):
    return struct.pack("<H", n & 0xFFFF)


def u32(n):
    return struct.pack("<I", n & 0xFFFFFFFF)


def u64(n):
    return struct.pack("<Q", n & 0xFFFFFFFFFFFFFFFF)


# safetensors


def safetensors(header, data=b"", length=None):
    header = header.encode() if isinstance(header, str) else header
    return u64(len(header) if length is None else length) + header + data


def entry(begin=0, end=4, dtype='"F32"', shape="[1]", more=""):
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]{more}}}'


def one(data=b"abcd", name='"a"', before="", **fields):
    return safetensors(f"{{{before}{name}:{entry(**fields)}}}", data)


def safetensors_files():
    good = one()
    yield "empty.safetensors", b""
    yield "seven-bytes.safetensors", bytes(7)
    yield "length-over-file.safetensors", safetensors("{}", length=1000)
    yield "length-over-limit.safetensors", safetensors("{}", length=100_000_001)
    yield "length-2-63.safetensors", safetensors("{}", length=1 << 63)
    yield "length-max.safetensors", safetensors("{}", length=(1 << 64) - 1)
    yield "length-zero.safetensors", safetensors("", b"{}")
    yield "cut-in-header.safetensors", good[:20]
    yield "cut-after-header.safetensors", good[:-4]
    yield "cut-in-data.safetensors", good[:-1]
    yield "trailing-bytes.safetensors", good + b"x"
    yield "no-json.safetensors", safetensors("{not json}")
    yield "space-before.safetensors", safetensors(' {"a":' + entry() + "}", b"abcd")
    yield "byte-order-mark.safetensors", safetensors(b"\xef\xbb\xbf{}")
    yield "array.safetensors", safetensors("[]")
    yield "two-objects.safetensors", safetensors("{}{}")
    yield "raw-nul.safetensors", safetensors(b"{}\0")
    yield "name-twice.safetensors", safetensors(f'{{"a":{entry()},"a":{entry(4, 8)}}}', b"abcdefgh")
    yield "name-twice-escaped.safetensors", safetensors(
        f'{{"a":{entry()},"\\u0061":{entry(4, 8)}}}', b"abcdefgh")
    yield "name-twice-same-range.safetensors", safetensors(f'{{"a":{entry()},"a":{entry()}}}', b"abcd")
    yield "field-twice.safetensors", one(more=',"dtype":"I32"')
    yield "field-unknown.safetensors", one(more=',"exec":"os.system"')
    yield "field-missing.safetensors", safetensors('{"a":{"dtype":"F32","shape":[1]}}', b"abcd")
    yield "overlap.safetensors", safetensors(f'{{"a":{entry()},"b":{entry(2, 6)}}}', b"abcdef")
    yield "same-range.safetensors", safetensors(f'{{"a":{entry()},"b":{entry()}}}', b"abcd")
    yield "hole.safetensors", safetensors(f'{{"a":{entry()},"b":{entry(8, 12)}}}', bytes(12))
    yield "hole-at-begin.safetensors", one(bytes(8), begin=4, end=8)
    yield "end-before-begin.safetensors", one(begin=4, end=0)
    yield "three-offsets.safetensors", safetensors(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', b"abcd")
    yield "offset-2-64.safetensors", one(end=1 << 64)
    yield "offset-max.safetensors", one(begin=(1 << 64) - 4, end=(1 << 64) - 1)
    yield "shape-overflows.safetensors", one(shape=f"[{1 << 32},{1 << 32}]")
    yield "shape-overflows-to-4-bytes.safetensors", one(shape=f"[{(1 << 62) + 1},4]")
    yield "shape-overflows-before-zero.safetensors", one(b"", end=0, shape=f"[{(1 << 64) - 1},2,0]")
    yield "shape-overflows-after-zero.safetensors", one(b"", end=0, shape=f"[0,{(1 << 63) - 1},2]")
    yield "shape-negative.safetensors", one(shape="[-1]")
    yield "shape-float.safetensors", one(shape="[1.0]")
    yield "shape-exponent.safetensors", one(shape="[1e0]")
    yield "shape-text.safetensors", one(shape='["1"]')
    yield "shape-of-arrays.safetensors", one(shape="[" * 50_000 + "]" * 50_000)
    yield "shape-of-1000-dimensions.safetensors", one(shape="[" + "1," * 999 + "1]")
    yield "size-is-not-shape.safetensors", one(shape="[2]")
    yield "dtype-unknown.safetensors", one(dtype='"Q4_K"')
    yield "dtype-number.safetensors", one(dtype="4")
    yield "dtype-complex128.safetensors", one(bytes(16), end=16, dtype='"C128"')
    yield "half-a-byte.safetensors", one(b"a", end=1, dtype='"F4"', shape="[1]")
    yield "objects-50000-deep.safetensors", safetensors('{"a":' * 50_000 + "1" + "}" * 50_000)
    yield "name-empty.safetensors", one(name='""')
    yield "name-with-nul.safetensors", one(name='"a\\u0000b"')
    yield "name-lone-surrogate.safetensors", one(name='"\\ud800"')
    yield "name-not-utf8.safetensors", safetensors(b'{"\xff":' + entry().encode() + b"}", b"abcd")
    yield "metadata-number.safetensors", one(before='"__metadata__":{"step":1},')
    yield "metadata-list.safetensors", one(before='"__metadata__":[],')
    yield "metadata-twice.safetensors", one(before='"__metadata__":{},"__metadata__":{},')
    yield "metadata-key-twice.safetensors", one(before='"__metadata__":{"k":"1","k":"2"},')
    yield "digest-wrong.safetensors", one(
        before='"__metadata__":{"modelstate.xxh3":"{\\"a\\":\\"0123456789abcdef\\"}"},')
    yield "digest-no-hex.safetensors", one(before='"__metadata__":{"modelstate.xxh3":"{\\"a\\":\\"zz\\"}"},')
    yield "digest-no-json.safetensors", one(before='"__metadata__":{"modelstate.xxh3":"[[[["},')
    yield "kinds-no-json.safetensors", one(before='"__metadata__":{"modelstate.kinds":"{"},')
    many = ",".join(f'"t{i}":{entry(0, 0, shape="[0]")}' for i in range(20_000))
    yield "last-of-20000-is-wrong.safetensors", safetensors(
        "{" + many + f',"z":{entry(0, 4, shape="[2]")}}}', b"abcd")


# torch.save's zip


class Record:
    def __init__(self, name, data, **lies):
        self.name = name.encode() if isinstance(name, str) else name
        self.data = data
        self.local_name = lies.get("local_name", self.name)
        self.crc = lies.get("crc", zlib.crc32(data))
        self.size = lies.get("size", len(data))
        self.stored = lies.get("stored", self.size)
        self.flags = lies.get("flags", 0x0808)
        self.method = lies.get("method", 0)
        self.shift = lies.get("shift", 0)
        self.extra = lies.get("extra", b"")
        self.disk = lies.get("disk", 0)


def zip_parts(records, count=None, directory_shift=0, end64_count=None, end64_size=44, locator_shift=0,
              comment=b""):
    """The bytes of each part in turn, so that a file can be cut between them."""
    parts, directory, at = [], b"", 0
    for r in records:
        header = at + r.shift
        for part in (
            b"PK\3\4" + u16(0) + u16(r.flags) + u16(r.method) + bytes(16) + u16(len(r.local_name)) + u16(0)
            + r.local_name,
            r.data,
            b"PK\7\x08" + u32(r.crc) + u32(r.stored) + u32(r.size),
        ):
            parts.append(part)
            at += len(part)
        directory += (
            b"PK\1\2" + u32(0) + u16(r.flags) + u16(r.method) + u32(0) + u32(r.crc) + u32(r.stored)
            + u32(r.size) + u16(len(r.name)) + u16(len(r.extra)) + u16(0) + u16(r.disk) + bytes(6)
            + u32(header) + r.name + r.extra)
    count = len(records) if count is None else count
    size, offset = len(directory), at + directory_shift
    parts.append(directory)
    at += size
    parts.append(b"PK\6\6" + u64(end64_size) + u32(0) + bytes(8)
                 + u64(count if end64_count is None else end64_count) * 2 + u64(size) + u64(offset))
    parts.append(b"PK\6\7" + u32(0) + u64(at + locator_shift) + u32(1))
    parts.append(b"PK\5\6" + u32(0) + u16(count) * 2 + u32(size) + u32(offset) + u16(len(comment)) + comment)
    return parts


def zip_file(records, **lies):
    return b"".join(zip_parts(records, **lies))


def text(t):
    t = t.encode() if isinstance(t, str) else t
    return b"X" + u32(len(t)) + t


def number(n):
    return b"\x8a\x08" + struct.pack("<q", n)


def numbers(values):
    return b"(" + b"".join(number(v) for v in values) + b"t"


def tensor(key="0", count=4, offset=0, size=(4,), stride=(1,), storage="torch\nFloatStorage\n", more=b"",
           part=b""):
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"c" + storage.encode() + text(key)
            + text("cpu") + number(count) + part + b"tQ" + number(offset) + numbers(size) + numbers(stride)
            + b"\x89}" + more + b"tR")


def state_dict(*items):
    return b"\x80\2}(" + b"".join(text(name) + value for name, value in items) + b"u."


def torch_records(pickle=None, data=bytes(16), **lies):
    pickle = state_dict(("w", tensor())) if pickle is None else pickle
    return [Record("archive/data.pkl", pickle), Record("archive/data/0", data, **lies),
            Record("archive/version", b"3\n")]


def zip_files():
    good = zip_parts(torch_records())
    names = ["local-header", "pickle", "descriptor", "second-header", "data", "second-descriptor"]
    for i, name in enumerate(names):
        yield f"cut-after-{name}.pt", b"".join(good[: i + 1])
    for i, name in ((-4, "records"), (-3, "directory"), (-2, "zip64-end"), (-1, "locator")):
        yield f"cut-after-{name}.pt", b"".join(good[:i])
    yield "cut-in-end-record.pt", b"".join(good)[:-5]
    yield "bytes-after-the-end.pt", b"".join(good) + b"x"
    yield "bytes-before-the-begin.pt", b"PK\3\4junk" + b"".join(good)
    bomb = zlib.compress(bytes(1 << 20), 9)[2:-4]
    yield "deflate-bomb.pt", zip_file(torch_records(data=bomb, method=8, size=1 << 20, stored=len(bomb)))
    yield "encrypted.pt", zip_file(torch_records(flags=0x0809))
    yield "crc-wrong.pt", zip_file(torch_records(crc=1))
    yield "crc-zero.pt", zip_file(torch_records(crc=0))
    records = torch_records()
    records[0].crc ^= 1
    yield "crc-of-the-pickle-wrong.pt", zip_file(records)
    yield "record-twice.pt", zip_file(torch_records() + [Record("archive/data/0", b"x" * 16)])
    second = sum(map(len, good[:3]))
    records = torch_records() + [Record("archive/data/0", bytes(16))]
    records[3].name = records[3].local_name = b"archive/data/0"
    records[3].shift = second - sum(map(len, good[:9]))
    yield "record-twice-on-the-same-bytes.pt", zip_file(records)
    yield "records-overlap.pt", zip_file(
        [Record("archive/data.pkl", state_dict(("w", tensor()))),
         Record("archive/data/0", b"PK\3\4" + u16(0) + u16(0x808) + bytes(18) + u16(14) + u16(0)
                + b"archive/data/1" + bytes(16)),
         Record("archive/data/1", bytes(16), shift=-(30 + 14 + 16 + 30 + 14 + 16))])
    yield "local-name-differs.pt", zip_file(torch_records(local_name=b"archive/data/1"))
    yield "two-roots.pt", zip_file(torch_records() + [Record("other/version", b"3\n")])
    yield "no-root.pt", zip_file([Record("data.pkl", state_dict())])
    yield "size-over-file.pt", zip_file(torch_records(size=1 << 30))
    yield "two-sizes.pt", zip_file(torch_records(stored=15))
    huge = u16(1) + u16(24) + u64(1 << 63) + u64(1 << 63) + u64(0)
    yield "zip64-size-2-63.pt", zip_file(torch_records(size=0xFFFFFFFF, extra=huge))
    yield "zip64-extra-missing.pt", zip_file(torch_records(size=0xFFFFFFFF))
    yield "zip64-extra-cut-off.pt", zip_file(torch_records(size=0xFFFFFFFF, extra=u16(1) + u16(24) + u64(1)))
    yield "zip64-2-40-entries.pt", zip_file(torch_records(), count=0xFFFF, end64_count=1 << 40)
    yield "zip64-end-size-wrong.pt", zip_file(torch_records(), end64_size=1 << 60)
    yield "zip64-locator-wrong.pt", zip_file(torch_records(), locator_shift=-1)
    yield "more-entries-than-there-are.pt", zip_file(torch_records(), count=4)
    yield "fewer-entries-than-there-are.pt", zip_file(torch_records(), count=2)
    yield "directory-elsewhere.pt", zip_file(torch_records(), directory_shift=-10)
    yield "header-past-the-end.pt", zip_file(torch_records(shift=1 << 20))
    yield "on-another-disk.pt", zip_file(torch_records(disk=1))
    yield "record-name-with-nul.pt", zip_file(torch_records() + [Record(b"archive/a\0b", b"")])
    yield "record-name-empty.pt", zip_file(torch_records() + [Record(b"", b"")])
    yield "record-name-not-utf8.pt", zip_file(torch_records() + [Record(b"archive/\xff", b"")])
    yield "version-999.pt", zip_file(torch_records()[:2] + [Record("archive/version", b"999\n")])
    yield "byteorder-pdp.pt", zip_file(torch_records() + [Record("archive/byteorder", b"pdp")])
    yield "no-pickle.pt", zip_file(torch_records()[1:])
    yield "no-storage.pt", zip_file([torch_records()[0], torch_records()[2]])
    yield "storage-of-8-bytes-for-16.pt", zip_file(torch_records(data=bytes(8)))
    yield "torchscript.pt", zip_file(torch_records() + [Record("archive/constants.pkl", b"\x80\2).")])


# pickles, in a zip that is right


def pickle_files():
    def pickled(name, body, data=bytes(16)):
        return name + ".pt", zip_file(torch_records(body, data))

    def call(module, function, arguments):
        return b"\x80\2c" + module + b"\n" + function + b"\n" + arguments + b"R."

    touch = text("touch hostile-was-here") + b"\x85"
    yield pickled("os-system", call(b"os", b"system", touch))
    yield pickled("posix-system", call(b"posix", b"system", touch))
    yield pickled("subprocess-popen", call(b"subprocess", b"Popen", touch))
    yield pickled("builtins-eval", call(b"builtins", b"eval", touch))
    yield pickled("builtins-getattr", call(b"__builtin__", b"getattr", b"\x88" + text("x") + b"\x86"))
    yield pickled("torch-load", call(b"torch", b"load", touch))
    yield pickled("name-of-a-global-in-a-value", state_dict(("w", b"cos\nsystem\n")))
    yield pickled("newobj-of-popen", b"\x80\2csubprocess\nPopen\n" + touch + b"\x81.")
    yield pickled("inst-of-system", b"\x80\2(" + text("x") + b"ios\nsystem\n.")
    yield pickled("obj-of-system", b"\x80\2(cos\nsystem\n" + text("x") + b"o.")
    yield pickled("stack-global", b"\x80\2" + text("os") + text("system") + b"\x93" + touch + b"R.")
    yield pickled("extension-code", b"\x80\2\x82\x01.")
    yield pickled("build-with-setstate", b"\x80\2cos\nsystem\n)\x81}b.")
    yield pickled("reduce-of-a-dict", b"\x80\2})R.")
    yield pickled("bytearray-2-36", state_dict(("w", b"c__builtin__\nbytearray\n" + number(1 << 36) + b"\x85R")))
    yield pickled("storage-2-36-by-reduce",
                  state_dict(("w", b"ctorch.storage\nUntypedStorage\n" + number(1 << 36) + b"\x85R")))
    yield pickled("protocol-4", b"\x80\4\x95" + u64(2) + b"}.")
    yield pickled("no-protocol", b"}.")
    yield pickled("no-stop", b"\x80\2}")
    yield pickled("empty-pickle", b"")
    yield pickled("bytes-after-stop", b"\x80\2}.}.")
    yield pickled("stack-underflow", b"\x80\2t.")
    yield pickled("setitems-without-mark", b"\x80\2}u.")
    yield pickled("setitem-on-a-list", b"\x80\2]" + text("k") + b"K\1s.")
    yield pickled("append-to-a-dict", b"\x80\2}K\1a.")
    yield pickled("key-without-value", b"\x80\2}(" + text("k") + b"u.")
    yield pickled("memo-never-put", b"\x80\2h\x05.")
    yield pickled("memo-2-31", b"\x80\2}r\xff\xff\xff\x7fj\xff\xff\xff\x7f.")
    yield pickled("string-of-4-gib", b"\x80\2X\xff\xff\xff\xffabc.")
    yield pickled("long-cut-off", b"\x80\2\x8a\xff\1.")
    yield pickled("lists-100000-deep", b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield pickled("marks-100000", b"\x80\2" + b"(" * 100_000 + b".")
    yield pickled("tuples-100000-deep", b"\x80\2)" + b"\x85" * 100_000 + b".")
    laughs = b"\x80\2(]q\0"
    for i in range(30):
        laughs += b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
    yield pickled("billion-laughs", laughs + b"t.")
    yield pickled("dict-in-itself", b"\x80\2}q\0(" + text("model") + b"h\0u.")
    yield pickled("list-as-root", b"\x80\2].")
    yield pickled("number-as-key", b"\x80\2}(K\1" + tensor() + b"u.")
    yield pickled("name-twice", state_dict(("w", tensor()), ("w", tensor())))
    yield pickled("tensor-name-with-nul", state_dict(("a\0b", tensor())))
    yield pickled("tensor-name-empty", state_dict(("", tensor())))
    yield pickled("tensor-name-not-utf8", state_dict((b"\xff", tensor())))
    yield pickled("value-is-no-tensor", state_dict(("w", tensor()), ("x", b"K\1")))
    yield pickled("count-2-62", state_dict(("w", tensor(count=1 << 62))))
    yield pickled("count-negative", state_dict(("w", tensor(count=-4))))
    yield pickled("count-over-record", state_dict(("w", tensor(count=8, size=(8,)))))
    yield pickled("size-negative", state_dict(("w", tensor(size=(-4,)))))
    yield pickled("stride-negative", state_dict(("w", tensor(offset=3, stride=(-1,)))))
    yield pickled("offset-negative", state_dict(("w", tensor(offset=-1))))
    yield pickled("offset-past-the-end", state_dict(("w", tensor(offset=1))))
    yield pickled("offset-2-62", state_dict(("w", tensor(offset=1 << 62, size=(1,)))))
    yield pickled("stride-overflows", state_dict(("w", tensor(size=(3,), stride=(1 << 62,)))))
    yield pickled("size-overflows", state_dict(("w", tensor(size=(1 << 40, 1 << 40), stride=(0, 0)))))
    yield pickled("stride-zero-bomb", state_dict(("w", tensor(size=(10**6, 10**6), stride=(0, 0)))))
    yield pickled("many-stride-zero-views",
                  state_dict(*((f"w{i}", tensor(size=((1 << 22) - i,), stride=(0,))) for i in range(200))))
    yield pickled("sizes-and-strides-differ", state_dict(("w", tensor(size=(2, 2)))))
    yield pickled("dimensions-1000", state_dict(("w", tensor(size=(1,) * 1000, stride=(1,) * 1000))))
    yield pickled("storage-class-unknown", state_dict(("w", tensor(storage="torch\nQInt8Storage\n"))))
    yield pickled("storage-key-with-dots", state_dict(("w", tensor(key="../../../etc/passwd"))))
    yield pickled("persistent-id-of-4", state_dict(
        ("w", b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
         + text("cpu") + b"tQK\0)\x89}tR")))
    yield pickled("persistent-id-of-a-module", b"\x80\2" + text("module") + b"Q.")
    yield pickled("unknown-flag", state_dict(("w", tensor(more=b"}" + text("evil") + b"\x88s"))))


# the stream from before torch 1.6

MAGIC = b"\x80\2\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def legacy(protocol=b"\x80\2M\xe9\3.", machine=b"\x80\2}.", body=None, keys=("0",), storages=None):
    body = state_dict(("w", tensor(part=b"N"))) if body is None else body
    storages = u64(4) + bytes(16) if storages is None else storages
    return [MAGIC, protocol, machine, body, b"\x80\2](" + b"".join(map(text, keys)) + b"e.", storages]


def legacy_files():
    good = legacy()
    for i, name in enumerate(["magic", "protocol", "machine", "object", "keys"]):
        yield f"legacy-cut-after-{name}.pt", b"".join(good[: i + 1])
    yield "legacy-cut-in-data.pt", b"".join(good)[:-1]
    yield "legacy-bytes-after-data.pt", b"".join(good) + b"x"
    yield "legacy-protocol.pt", b"".join(legacy(protocol=b"\x80\2M\xea\3."))
    yield "legacy-machine-is-a-list.pt", b"".join(legacy(machine=b"\x80\2]."))
    yield "legacy-no-keys.pt", b"".join(legacy(keys=(), storages=b""))
    yield "legacy-key-twice.pt", b"".join(legacy(keys=("0", "0"), storages=(u64(4) + bytes(16)) * 2))
    yield "legacy-key-unknown.pt", b"".join(legacy(keys=("0", "1")))
    yield "legacy-count-differs.pt", b"".join(legacy(storages=u64(5) + bytes(20)))
    yield "legacy-count-2-61.pt", b"".join(
        legacy(body=state_dict(("w", tensor(count=1 << 61, part=b"N"))), storages=u64(1 << 61)))
    yield "legacy-os-system.pt", b"".join(legacy(body=b"\x80\2cos\nsystem\n" + text("x") + b"\x85R."))


# sharded checkpoints: folders


def index(weights, more=""):
    pairs = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in weights)
    return ('{"metadata":{"total_size":4},"weight_map":{' + pairs + "}" + more + "}").encode()


def sharded_files():
    def folder(name, text_of_index, shards=()):
        yield f"{name}/model.safetensors.index.json", text_of_index
        for shard, content in shards:
            yield f"{name}/{shard}", content

    a = ("s.safetensors", one())
    yield from folder("shard-above", index([("a", "../a.safetensors")]))
    yield from folder("shard-absolute", index([("a", "/etc/passwd")]))
    yield from folder("shard-dot-dot", index([("a", "..")]))
    yield from folder("shard-empty-name", index([("a", "")]))
    yield from folder("shard-name-with-nul", index([("a", "s.safetensors\0")]), [a])
    yield from folder("shard-missing", index([("a", "t.safetensors")]), [a])
    yield from folder("shard-without-the-tensor", index([("a", a[0]), ("b", a[0])]), [a])
    yield from folder("shard-with-another-tensor", index([("a", a[0])]),
                      [(a[0], safetensors(f'{{"a":{entry()},"b":{entry(4, 8)}}}', bytes(8)))])
    yield from folder("shards-with-the-same-tensor", index([("a", a[0]), ("b", "t.safetensors")]),
                      [a, ("t.safetensors", safetensors(f'{{"a":{entry()},"b":{entry(4, 8)}}}', bytes(8)))])
    yield from folder("shard-is-an-index", index([("a", "model.safetensors.index.json")]))
    yield from folder("shards-of-two-formats", index([("a", a[0]), ("w", "w.bin")]),
                      [a, ("w.bin", zip_file(torch_records()))])
    yield from folder("index-name-twice", index([("a", a[0]), ("a", a[0])]), [a])
    yield from folder("index-map-twice", index([("a", a[0])], ',"weight_map":{}'), [a])
    yield from folder("index-map-is-a-list", b'{"weight_map":[]}')
    yield from folder("index-shard-is-a-number", b'{"weight_map":{"a":1}}')
    yield from folder("index-deep", b'{"metadata":' + b"[" * 100_000)
    yield from folder("index-of-1001-shards", index([(f"t{i}", f"s{i}") for i in range(1001)]))
    yield from folder("index-cut-off", index([("a", a[0])])[:-3], [a])
    yield from folder("shard-is-a-link-out", index([("a", a[0])]))
    yield from folder("shard-is-a-link-inside", index([("a", a[0])]), [("t.safetensors", a[1])])
    yield from folder("shard-is-a-folder", index([("a", a[0])]))
    yield from folder("shard-is-a-pipe", index([("a", a[0])]))


def main():
    folder = sys.argv[1]
    outside = os.path.join(folder, "outside.safetensors")
    root = os.path.join(folder, "root")
    for files in (safetensors_files, zip_files, pickle_files, legacy_files, sharded_files):
        for name, content in files():
            path = os.path.join(root, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            assert not os.path.exists(path), name
            with open(path, "wb") as f:
                f.write(content)
    with open(outside, "wb") as f:
        f.write(one())
    with open(os.path.join(root, "good.safetensors"), "wb") as f:
        f.write(one())
    with open(os.path.join(root, "good.pt"), "wb") as f:
        f.write(zip_file(torch_records()))
    with open(os.path.join(root, "good-legacy.pt"), "wb") as f:
        f.write(b"".join(legacy()))
    at = lambda name: os.path.join(root, name)
    os.symlink("../../outside.safetensors", at("shard-is-a-link-out/s.safetensors"))
    os.symlink("t.safetensors", at("shard-is-a-link-inside/s.safetensors"))
    os.mkdir(at("shard-is-a-folder/s.safetensors"))
    os.mkfifo(at("shard-is-a-pipe/s.safetensors"))
    os.symlink("../outside.safetensors", at("link-out.safetensors"))
    os.symlink("/etc/passwd", at("link-to-passwd.pt"))
    os.symlink("good.pt", at("link-inside.pt"))
    os.symlink("..", at("link-above"))
    os.mkfifo(at("pipe.pt"))


main()
