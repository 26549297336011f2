"""Mutated prototxt and caffemodel files: read right, or refused as tests/fuzz/readers.py says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.readers import run

import normface_ext as nf

pytest.importorskip("google.protobuf")
from google.protobuf import text_format

from normface_ext.caffe import proto

FILES = Path(__file__).parent.parent / "prototxt"
#: A list of problems is longer than one sentence.
LIST = 2000
ROUNDS = [
    pytest.param(range(150), id="slice"),
    pytest.param(range(1000, 1500), id="more", marks=pytest.mark.slow),
    pytest.param(range(1000, 6000), id="long", marks=pytest.mark.fuzz),
]
FEATURES, LABELS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 4


def head_is_right(head: nf.caffe.Head, data: bytes) -> bool:
    """As protobuf itself reads the whole text, unknown options refused; and forward answers or refuses."""
    net = proto.messages()["NetParameter"]()
    text_format.Parse(data.decode("utf-8-sig", "surrogateescape"), net)
    layers = [layer for layer in net.layer if layer.type != "Input"]
    assert [layer.name for layer in layers] == list(head.layers)
    scores: set[str] = set()  # whose number the file tells
    for layer in layers:
        block = {
            "InnerProduct": layer.inner_product_param,
            "InnerDistance": layer.inner_distance_param,
            "MarginInnerProduct": layer.margin_inner_product_param,
        }
        if layer.type in block and (len(layer.bottom) == 1 or layer.type == "MarginInnerProduct"):
            rows, features = head.layers[layer.name].weight.shape
            assert rows == block[layer.type].num_output
            assert features == 5 or scores & set(layer.bottom)
        if layer.type in block or scores & set(layer.bottom):
            scores |= set(layer.top)
        if layer.type == "Parameter":
            assert list(head.layers[layer.name].weight.shape) == list(layer.parameter_param.shape.dim)
    assert all(torch.isfinite(p).all() for p in head.parameters())
    for phase in (True, False):
        blobs = {name: LABELS if "label" in name else FEATURES for name in head.train(phase).inputs}
        with suppress(ValueError, TypeError, IndexError):  # labels out of range, bottoms that fit no layer
            head(blobs)
    return True


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize(
    "name", ["scaled_cosine", "c_contrastive", "c_triplet", "combined", "margin_cosine", "angular"]
)
def test_prototxt(tmp_path, name, seeds):
    good = (FILES / f"{name}.prototxt").read_bytes()

    def read(path: Path) -> nf.caffe.Head:
        return nf.caffe.load_head(path, in_features=5)

    right, refused = run(read, "head.prototxt", good, seeds, tmp_path, right=head_is_right, longest=LIST)
    assert right > 0 and refused > 0


TEXT = """layer { name: "ip" type: "InnerProduct" bottom: "f" top: "a" inner_product_param { num_output: 3 } }
layer { name: "fc.1" type: "InnerDistance" bottom: "f" top: "b" inner_distance_param { num_output: 2 } }
layer { name: "scale" type: "Scale" bottom: "a" top: "c" scale_param { num_axes: 0 } }"""


WANTED = (b"ip", b"fc.1", b"scale")


def good_model() -> bytes:
    net, random = proto.messages()["NetParameter"](name="net"), np.random.default_rng(0)
    net.layer.add(name="conv", type="Convolution").blobs.add(data=[1, 2, 3]).shape.dim.append(3)
    for name, shapes in (("ip", ([3, 5], [3])), ("fc.1", ([2, 5],)), ("fc_1", ([2, 5],)), ("scale", ([],))):
        layer = (net.layers if name == "ip" else net.layer).add(name=name)
        for shape in shapes:
            blob = layer.blobs.add()
            (blob.double_data if name == "fc.1" else blob.data).extend(
                random.normal(size=shape).ravel().tolist()
            )
            if name == "ip":
                blob.num, blob.channels, blob.height, blob.width = [1] * (4 - len(shape)) + shape
            else:
                blob.shape.dim.extend(shape)
    return net.SerializeToString()


def fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, wire type, bytes) of a message, by the description of the wire format alone."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        number, wire = divmod(varint() & 0xFFFFFFFF, 8)
        start = place
        if wire == 0:
            varint()
        elif wire == 2:
            length = varint()
            start, place = place, place + length
        else:
            place += {1: 8, 5: 4}[wire]
        assert place <= len(data)
        yield number, wire, data[start:place]


def stored_weights(data: bytes) -> dict[bytes, list[list[np.ndarray]]]:
    """name -> the blobs of each layer of that name that has any, as float32."""
    found: dict[bytes, list[list[np.ndarray]]] = {}
    for kind, _, layer in fields(data):
        if kind in (2, 100):
            parts = list(fields(layer))
            name, blobs = (4, 6) if kind == 2 else (1, 7)
            names, arrays = [b""], []
            for number, _, part in parts:
                if number == name:
                    names.append(part)
                elif number == blobs:
                    values = {5: b"", 8: b""}
                    for array, wire, piece in fields(part) if names[-1] in WANTED else ():
                        if array in values and wire in (2, 5 if array == 5 else 1):
                            values[array] += piece
                    double = np.frombuffer(values[8], "<f8").astype(np.float32)
                    arrays.append(double if len(double) else np.frombuffer(values[5], "<f4"))
            if arrays:
                found.setdefault(names[-1], []).append(arrays)
    return found


def weights_are_right(head: nf.caffe.Head, data: bytes) -> bool:
    stored = stored_weights(data)
    for name, layer in head.layers.items():
        (arrays,) = stored[name.encode()]
        for array, parameter in zip(arrays, layer.blobs(), strict=False):
            assert np.isfinite(array).all()
            assert np.array_equal(array, parameter.detach().numpy().ravel())
    return True


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("features", [5, None])
def test_caffemodel(tmp_path, features, seeds):
    torch.manual_seed(0)
    fresh = nf.caffe.load_head(TEXT, in_features=features)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}

    def read(path: Path) -> nf.caffe.Head:
        head = nf.caffe.load_head(TEXT, in_features=features)
        head.load_state_dict(before)
        try:
            assert head.load_caffemodel(path) == ["ip", "fc.1", "scale"]
        except (ValueError, OSError):
            state = head.state_dict()
            assert state.keys() == before.keys() and all(torch.equal(before[k], state[k]) for k in state)
            raise
        return head

    right, refused = run(
        read, "net.caffemodel", good_model(), seeds, tmp_path, right=weights_are_right, longest=LIST
    )
    assert right > 0 and refused > 0
