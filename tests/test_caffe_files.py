"""Broken, hostile and strange files for nf.caffe: refused with file and line or layer, or read right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from fuzz.readers import LONGEST, assert_contract

import normface_ext as nf

pytest.importorskip("google.protobuf")
from normface_ext.caffe import build, fillers, prototxt

#: A list of problems; each of its lines has at most LONGEST.
LIST = 2000


def refused(path: Path, text: str | bytes, part: str, **options: object) -> str:
    """The message that refuses a prototxt, from the file and from its text."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    error = assert_contract(lambda path: nf.caffe.load_head(path, **options), path, longest=LIST)
    assert isinstance(error, ValueError) and part in str(error), error
    if isinstance(text, str) and len(text) < 1000:
        with pytest.raises(ValueError) as again:
            nf.caffe.load_head(text, **options)
        assert str(again.value).replace("<text>", str(path)) == str(error)
    return str(error)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # so that names are short, and the same in every message
    return Path("my.prototxt")


def layer(kind: str, body: str) -> str:
    return f"layer {{\n name: 'it' type: '{kind}' bottom: 'x' top: 'y'\n {body}\n}}\n"


def product(options: str) -> str:
    return layer("InnerProduct", f"inner_product_param {{ {options} }}")


def parameter(block: str) -> str:
    return layer("Parameter", f"parameter_param {block}").replace("bottom: 'x'", "")


# The text


@pytest.mark.parametrize("sign", ["", "\f", "\v", "\r", "\x1c", "\x1d", "\x85", "\u2028", "\u2029"])
def test_a_comment_ends_with_its_line_only(path, sign):
    """An option behind it is refused with its line, as protobuf counts lines."""
    text = f"# old:{sign} layer {{ name: 'x' }}\n{layer('Flip', 'oops: 1')}"
    assert "my.prototxt:4: " in refused(path, text, "unknown option `oops`")
    head = nf.caffe.load_head(text.replace("oops: 1", ""))
    assert list(head.layers) == ["it"]


@pytest.mark.parametrize("encoding", ["latin-1", "gbk"])
def test_comments_may_have_any_encoding_and_names_not(path, encoding):
    word = {"latin-1": "é", "gbk": "\u7279"}[encoding].encode(encoding)
    path.write_bytes(b"# " + word + b"\n" + layer("Flip", "").encode())
    assert list(nf.caffe.load_head(path).layers) == ["it"]
    refused(
        path, layer("Flip", "").encode().replace(b"it", word), "my.prototxt:2: expected a text file in UTF-8"
    )


def test_a_byte_order_mark_is_read_over(path):
    path.write_bytes(b"\xef\xbb\xbf" + layer("Flip", "").encode())
    assert list(nf.caffe.load_head(path).layers) == ["it"]
    refused(path, layer("Flip", "").encode("utf-16"), "my.prototxt:1: expected a text file")


@pytest.mark.parametrize("brackets", ["{}", "<>"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_nesting_without_end(path, brackets, known, closed):
    depth = 20_000
    text = "layer {\n" + f"{'param' if known else 'a'} {brackets[0]} " * depth
    message = refused(path, text + brackets[1] * depth * closed + "}" * closed, "my.prototxt:2: ")
    assert len(message) <= LONGEST


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("inner_product_param { num_output: 1_0 }", "'1_0'"),
        ("inner_product_param { num_output: " + "9" * 10_000 + " }", "10000 characters"),
        ("inner_product_param { num_output: -1 }", "-1"),
        ("inner_product_param { num_output: 4294967296 }", "4294967296"),
        ("inner_product_param { num_output: 1.5 }", "1.5"),
        (r"top: '\q'", "unknown escape"),
        (r"top: '\u00e9'", "unknown escape"),
        (r"top: '\777'", "unknown escape"),
        ("top: 'y", "without its end"),
        ("top: 'y\nz'", "without its end"),
        ("top: 3", "expected a prototxt"),
        ("top: \x85", "UTF-8"),
        ("]", "']'"),
        ("top: [ 'a' 'b' , ]", "expected a prototxt"),
        ("name: 'other'", "multiple"),
        ("loss_weight: 1e39", "finite"),
        ("loss_weight: nan", "finite"),
        ("a" * 5000 + ": 1", "unknown option"),
    ],
)
def test_what_is_no_prototxt_is_named_with_its_line(path, body, part):
    assert "my.prototxt:3: " in refused(path, layer("Flip", body), part)


def test_escapes_are_read():
    head = nf.caffe.load_head(layer("Flip", "").replace("'it'", r"'a\n\"\x41\101\7' 'b'"))
    assert list(head.layers) == ['a\n"AA\x07b']


def test_texts_and_names_of_files_have_a_largest_length(path):
    refused(path, "#" * (prototxt.LONGEST_TEXT + 1), "at most")
    with pytest.raises(ValueError, match="at most"):
        nf.caffe.load_head("{" * (prototxt.LONGEST_TEXT + 1))
    refused(path, layer("Flip", "") * (build.MOST_LAYERS + 1), f"at most {build.MOST_LAYERS} layers")
    with pytest.raises(OSError, match="File name too long") as error:
        nf.caffe.load_head("x" * 100_000)
    assert len(str(error.value)) <= LONGEST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "part"),
    [
        ("layer{name:'a'type:'Flip'bottom:'x'top:'a'}\n", "at most 5000 `layer`"),
        ("layer{type:'F'}", "at most 5000 `layer`"),
        ("input:'a' ", "at most 5000 `input`"),
        ("a:1 ", "things that are not supported"),
        ("a{} ", "things that are not supported"),
        (" ", "layer"),
        ("{", "prototxt"),
        ("1", "number"),
    ],
)
def test_the_longest_text_is_read_in_time(path, unit, part):
    refused(path, unit * (prototxt.LONGEST_TEXT // len(unit)), part)


def test_problems_are_listed_up_to_a_length(path):
    names = [f"{i}" + "n" * 200 for i in range(150)]
    text = "".join(
        layer("Flip", "oops: 1").replace("'it'", f"'{name}'").replace("'y'", f"'{name}'") for name in names
    )
    message = refused(path, text, "has 150 things that are not supported")
    rows = message.splitlines()
    assert len(message) <= LIST and all(len(row) <= LONGEST for row in rows)
    listed = len([row for row in rows if row.startswith("my.prototxt:")])
    assert listed > 10 and f"... and {150 - listed} more" in rows


# Names


NAMES = ["forward", "training", "words", "_modules", "a.b", "..", "keys", "9", "x" * 1000]


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_may_have_any_name(name):
    text = layer("Normalize", "").replace("'it'", f"'{name}'")
    text += product("num_output: 4").replace("'it'", "'ip'")
    text = text.replace("top: 'y'", "top: 'n'", 1)
    head = nf.caffe.load_head(text, in_features=2)
    assert list(head.layers) == [name, "ip"] and name in head.layers and len(head.layers) == 2
    assert dict(head.layers.items())[name] is head.layers[name]
    unit = head(x=torch.tensor([[3.0, 4.0]])).tops["n"]
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8]]))
    assert not head.eval().training and head.phase == "TEST"
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        other.load_state_dict(head.state_dict())
        assert list(other.layers) == [name, "ip"]


# Sizes and fillers


@pytest.mark.parametrize("features", [5, None])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (product("\n num_output: 4294967295"), 4),
        (product("\n num_output: 2147483648 bias_term: false"), 4),
        (layer("InnerDistance", "inner_distance_param { \n num_output: 3000000000 }"), 4),
        (
            parameter("{\n shape { dim: 1099511627776 } }"),
            4,
        ),
        (
            parameter("{ shape { dim: [65536, 65536] } }"),
            3,
        ),
        (
            parameter(f"{{ shape {{ dim: {[1] * 40} }} }}"),
            3,
        ),
        (parameter("{ shape { dim: -3 } }"), 3),
    ],
)
def test_giant_sizes(path, text, line, features):
    assert f"my.prototxt:{line}: " in refused(path, text, 'layer "it"', in_features=features)


@pytest.mark.parametrize("features", [5, None])
def test_sizes_are_added_up_before_memory_is_taken(path, monkeypatch, features):
    monkeypatch.setattr(build, "free_memory", lambda device: 4 * 5 * 150)
    texts = [product(f"num_output: {n} bias_term: false").replace("'it'", f"'l{n}'") for n in (90, 80)]
    texts[1] = texts[1].replace("top: 'y'", "top: 'z'")
    assert "'z'" in texts[1] and len(nf.caffe.load_head(texts[0], in_features=5).state_dict()) == 1
    texts.append(parameter("{ shape { dim: 2000 } }").replace("'y'", "'w'").replace("'it'", "'p'"))
    monkeypatch.setattr("normface_ext.caffe.layer.new_blob", None)  # nothing may be made
    wanted = 'layer "l80"' if features else 'layer "p"'
    assert wanted in refused(path, "".join(texts), "the free memory", in_features=features)


def test_a_late_blob_that_does_not_fit_is_refused(monkeypatch):
    head = nf.caffe.load_head(product("num_output: 90 bias_term: false"))
    monkeypatch.setattr(fillers, "free_memory", lambda device: 1000)
    with pytest.raises(
        ValueError, match=r'layer "it" .*:1\): expected `weight` of at most .* shape \[90, 7\]'
    ):
        head(x=torch.zeros(2, 7))
    assert head.layers["it"].weight is None


def test_features_of_no_width_are_refused():
    head = nf.caffe.load_head(product("num_output: 3 bias_term: false"))
    with pytest.raises(ValueError, match=r'layer "it".*at least one feature'):
        head(x=torch.zeros(2, 0))


WITH_FILLER = {
    "weight": "inner_product_param {{ num_output: 3\n weight_filler {{ {} }} }}",
    "bias": "inner_product_param {{ num_output: 3\n bias_filler {{ {} }} }}",
    "scale": "scale_param {{ num_axes: 0\n filler {{ {} }} }}",
    "parameter": "parameter_param {{ shape {{ dim: 3 }}\n blob_filler {{ {} }} }}",
}


@pytest.mark.parametrize("features", [5, None])
@pytest.mark.parametrize("blob", list(WITH_FILLER))
@pytest.mark.parametrize(
    ("filler", "dtype"),
    [
        ("type: 'gaussian' std: -1", None),
        ("type: 'uniform' min: 2 max: 1", None),
        ("type: 'uniform' min: -3e38 max: 3e38", None),
        ("type: 'constant' value: 1e39", None),
        ("type: 'gaussian' mean: -inf", None),
        ("type: 'constant' value: 70000", torch.float16),
        ("type: 'gaussian' std: 1e6", torch.float16),
        ("type: 'uniform' max: 65505", torch.float16),
        ("type: 'bilinear'", None),
        ("variance_norm: 7", None),
    ],
)
def test_filler_values(path, blob, filler, dtype, features):
    kind = {"scale": "Scale", "parameter": "Parameter"}.get(blob, "InnerProduct")
    text = layer(kind, WITH_FILLER[blob].format(filler))
    text = text.replace("bottom: 'x'", "") if kind == "Parameter" else text
    assert "my.prototxt:4: " in refused(path, text, "", in_features=features, dtype=dtype)


def test_a_filler_reads_only_its_own_values():
    text = product("num_output: 3 weight_filler { type: 'constant' value: 2 std: -1 min: 3 max: 1 }")
    assert (nf.caffe.load_head(text, in_features=2).layers["it"].weight == 2).all()
