"""Writes src/diff/defaults.txt: the attribute defaults of ONNX's operators.

    python models/diff/defaults.py > src/diff/defaults.txt

One line for each operator and each version in which its defaults changed: domain (`-` for the standard
one), operator, first version, and its defaults. Floats are given by their bits. Read off the schemas of
the installed onnx package (models/requirements.txt pins it).
"""

import struct

import onnx
from onnx import AttributeProto as A


def text(attribute):
    kind, name = attribute.type, attribute.name
    bits = lambda f: format(struct.unpack("<I", struct.pack("<f", f))[0], "08x")
    quoted = lambda s: "".join(c if c.isalnum() or c in "_-." else f"%{ord(c):02x}" for c in s.decode())
    if kind == A.INT:
        return f"{name}=i:{attribute.i}"
    if kind == A.FLOAT:
        return f"{name}=f:{bits(attribute.f)}"
    if kind == A.STRING:
        return f"{name}=s:{quoted(attribute.s)}"
    if kind == A.INTS:
        return f"{name}=I:" + ",".join(str(i) for i in attribute.ints)
    if kind == A.FLOATS:
        return f"{name}=F:" + ",".join(bits(f) for f in attribute.floats)
    if kind == A.STRINGS:
        return f"{name}=S:" + ",".join(quoted(s) for s in attribute.strings)
    return None


def main():
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain in ("", "ai.onnx.ml")]
    schemas.sort(key=lambda s: (s.domain, s.name, s.since_version))
    print(f"# Attribute defaults of ONNX's operators, from the schemas of onnx {onnx.__version__} (models/diff/defaults.py).")
    last = {}
    for schema in schemas:
        stated = [a for a in schema.attributes.values() if a.default_value.type != A.UNDEFINED]
        texts = sorted(t for t in (text(a.default_value) for a in stated) if t)
        key, row = (schema.domain, schema.name), " ".join(texts)
        if last.get(key, "") != row:
            last[key] = row
            print(" ".join([schema.domain or "-", schema.name, str(schema.since_version), row]).rstrip())


main()
