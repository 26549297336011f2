"""Broken, hostile and strange .caffemodel files: refused with file and layer, or read right."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fuzz.readers import assert_contract

import normface_ext as nf

pytest.importorskip("google.protobuf")
from normface_ext.caffe import proto

#: A list of problems.
LIST = 2000


def model(layers: dict[str, list[np.ndarray]], *, double: bool = False) -> bytes:
    """A binary NetParameter as Caffe writes it: a blob of one number has no shape."""
    net = proto.messages()["NetParameter"](name="net")
    for name, arrays in layers.items():
        stored = net.layer.add(name=name)
        for array in arrays:
            blob = stored.blobs.add()
            (blob.double_data if double else blob.data).extend(np.asarray(array, float).ravel().tolist())
            if np.ndim(array):
                blob.shape.dim.extend(np.shape(array))
    return net.SerializeToString()


def product(name: str, classes: int, bottom: str, top: str) -> str:
    return f"""layer {{ name: '{name}' type: 'InnerProduct' bottom: '{bottom}' top: '{top}'
      inner_product_param {{ num_output: {classes} bias_term: false }} }}"""


SCALE = "layer { name: 'scale' type: 'Scale' bottom: 'y' top: 'z' scale_param { num_axes: 0 } }"
TWO = product("it", 3, "x", "y") + SCALE
GOOD = {"it": [np.arange(6.0).reshape(3, 2)], "scale": [np.array(7.5)]}


@pytest.mark.parametrize("names", [("fc_1", "fc.1"), ("fc.1", "fc_1"), ("training", "training_")])
def test_names_that_nearly_match_stay_apart(names):
    text = "".join(product(name, 4, "x", f"y{i}") for i, name in enumerate(names))
    head = nf.caffe.load_head(text, in_features=3)
    assert head.load_caffemodel(model({n: [np.full((4, 3), i)] for i, n in enumerate(names)})) == list(names)
    assert [float(head.layers[n].weight.detach().mean()) for n in names] == [0, 1]
    assert len(head.state_dict()) == 2
    with pytest.raises(ValueError, match=f'layer "{names[1]}".*got none'):
        head.load_caffemodel(model({names[0]: [np.ones((4, 3))], names[1] + "_": [np.ones((4, 3))]}))


def test_a_blob_of_one_number_has_no_shape_in_caffe():
    head = nf.caffe.load_head(TWO, in_features=2)
    head.load_caffemodel(model(GOOD))
    assert head.layers["scale"].scale.item() == 7.5


@pytest.mark.parametrize("features", [2, None])
@pytest.mark.parametrize(
    ("data", "dtype", "part"),
    [
        (model({**GOOD, "it": [np.full((3, 2), 1e300)]}, double=True), None, "1e+300, too large for"),
        (model({**GOOD, "it": [np.full((3, 2), 70000)]}), torch.float16, "70000, too large for"),
        (model({**GOOD, "scale": [np.array(-1e39)]}, double=True), None, 'layer "scale"'),
        (model({**GOOD, "it": [np.full((3, 2), np.inf)]}), None, "finite, got inf"),
        (model({**GOOD, "it": [np.zeros((3, 0))]}), None, "got [3, 0] with 0 values"),
        (model({**GOOD, "it": [np.zeros((0, 2))]}), None, "got [0, 2] with 0 values"),
        (model({**GOOD, "it": [np.zeros(())]}), None, "got [] with 1 values"),
        (model({**GOOD, "scale": [np.zeros(3)]}), None, 'layer "scale"'),
        (model(GOOD) + model({"it": GOOD["it"]}), None, "once in the file, got it 2 times"),
        (model(GOOD)[:-1], None, "NetParameter"),
        (model({}), None, "1 to 100000 layers, got 0"),
        (b"", None, "1 to 100000 layers, got 0"),
        (b"\xa2\x06\x00" * 200_000, None, "1 to 100000 layers, got 200000"),
        (b"\x0b" * 50_000, None, "NetParameter"),
        (TWO.encode(), None, "NetParameter"),
        (model({**GOOD, "it": [np.zeros((3, 2))] * 50_000}), None, "1 blobs (weight), got 50000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_weights_that_do_not_fit_change_nothing(tmp_path, data, dtype, part, features):
    path = tmp_path / "my.caffemodel"
    path.write_bytes(data)
    head = nf.caffe.load_head(TWO, in_features=features, dtype=dtype)
    before = copy.deepcopy(head.state_dict())
    error = assert_contract(head.load_caffemodel, path, longest=LIST)
    assert isinstance(error, ValueError) and part in str(error), error
    after = head.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (head.layers["it"].weight is None) == (features is None)


@pytest.mark.parametrize("size", ["num", "height"])
def test_the_old_sizes_count_where_both_are_written(size):
    """As in Caffe."""
    net = proto.messages()["NetParameter"]()
    net.ParseFromString(model(GOOD))
    setattr(net.layer[0].blobs[0], size, 1)
    head = nf.caffe.load_head(TWO, in_features=2)
    with pytest.raises(ValueError, match=r"shape \[3, 2\], got \[(1, 0, 0, 0|0, 0, 1, 0)\]"):
        head.load_caffemodel(net.SerializeToString())


def test_layers_that_are_not_needed_may_be_anything():
    other = model({"xx": [np.zeros(3)]}).replace(b"xx", b"\xff\xfe")
    head = nf.caffe.load_head(TWO)
    assert head.load_caffemodel(other + model(GOOD) + other) == ["it", "scale"]
    assert head.layers["it"].weight.tolist() == GOOD["it"][0].tolist()


def test_many_empty_layers_take_little_memory(tmp_path):
    """Three bytes each in the file, hundreds as messages."""
    path = tmp_path / "my.caffemodel"
    path.write_bytes(b"\xa2\x06\x00" * 3_000_000)
    head = nf.caffe.load_head(TWO, in_features=2)
    assert isinstance(assert_contract(head.load_caffemodel, path), ValueError)
