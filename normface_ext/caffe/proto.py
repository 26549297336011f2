"""The part of caffe.proto that a NormFace head needs.

Field numbers are those of the Caffe fork that NormFace was released with (happynear/caffe-windows,
branch ``ms``), so binary ``.caffemodel`` files parse; whatever is not listed here is skipped in binary
files and reported with its line in text files. protobuf is imported when it is used, not before.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import Any

#: message -> its fields "<label><type> <name>=<number>[:<default>]"; the label is `?` optional,
#: `*` repeated or `#` repeated and packed.
MESSAGES: dict[str, str] = {
    "BlobShape": "#int64 dim=1",
    "BlobProto": """?BlobShape shape=7  #float data=5  #float diff=6  #double double_data=8
        #double double_diff=9  ?int32 num=1:0  ?int32 channels=2:0  ?int32 height=3:0  ?int32 width=4:0""",
    "FillerParameter": """?string type=1:constant  ?float value=2:0  ?float min=3:0  ?float max=4:1
        ?float mean=5:0  ?float std=6:1  ?int32 sparse=7:-1  ?VarianceNorm variance_norm=8:FAN_IN
        ?float alpha=9:0""",
    "NetParameter": """?string name=1  *V1LayerParameter layers=2  *string input=3  *int32 input_dim=4
        ?bool force_backward=5:false  ?NetState state=6  ?bool debug_info=7:false  *BlobShape input_shape=8
        *LayerParameter layer=100""",
    "NetState": "?Phase phase=1:TEST  ?int32 level=2:0  *string stage=3",
    "NetStateRule": """?Phase phase=1  ?int32 min_level=2  ?int32 max_level=3  *string stage=4
        *string not_stage=5""",
    "ParamSpec": "?string name=1  ?DimCheckMode share_mode=2  ?float lr_mult=3:1  ?float decay_mult=4:1",
    "LayerParameter": """?string name=1  ?string type=2  *string bottom=3  *string top=4
        *float loss_weight=5  *ParamSpec param=6  *BlobProto blobs=7  *NetStateRule include=8
        *NetStateRule exclude=9  ?Phase phase=10  *bool propagate_down=11  ?LossParameter loss_param=101
        ?AccuracyParameter accuracy_param=102  ?ConcatParameter concat_param=104
        ?ContrastiveLossParameter contrastive_loss_param=105
        ?DropoutParameter dropout_param=108  ?EltwiseParameter eltwise_param=110
        ?InnerProductParameter inner_product_param=117  ?PowerParameter power_param=122
        ?SoftmaxParameter softmax_param=125  ?SliceParameter slice_param=126
        ?FlattenParameter flatten_param=135
        ?ScaleParameter scale_param=142  ?InputParameter input_param=143
        ?ParameterParameter parameter_param=145  ?TripletLossParameter triplet_loss_param=203
        ?FlipParameter flip_param=212
        ?InnerDistanceParameter inner_distance_param=213  ?NormalizeParameter normalize_param=214
        ?GeneralContrastiveParameter general_contrastive_loss_param=215
        ?GeneralTripletParameter general_triplet_loss_param=217
        ?MarginInnerProductParameter largemargin_inner_product_param=227
        ?MarginInnerProductParameter margin_inner_product_param=232
        ?ChannelScaleParameter channel_scale_param=237
        ?LabelSpecificAddParameter label_specific_add_param=241
        ?CombinedMarginParameter combined_margin_param=1001  ?CosinAddmParameter cosin_add_m_param=1002
        ?NormParameter norm_param=1003""",
    # Layers of before 2014, beside the blocks of the newer ones, which `upgrade` makes of them. The type
    # is an enum there, to which forks added names of their own; here it is any word.
    "V1LayerParameter": """*string bottom=2  *string top=3  ?string name=4  ?string type=5  *BlobProto blobs=6
        *float blobs_lr=7  *float weight_decay=8  *NetStateRule include=32  *NetStateRule exclude=33
        *float loss_weight=35  *string param=1004  *DimCheckMode blob_share_mode=1005""",
    # The same bytes read one shell at a time: a net is its layers' bytes, a layer its blobs'. What the head
    # does not need stays bytes, and names are compared as they stand in the file.
    "StoredNet": "*bytes layers=2  *bytes layer=100",
    "StoredLayer": "?bytes name=1  *bytes blobs=7",
    "StoredV1Layer": "?bytes name=4  *bytes blobs=6",
    "StoredBlob": """?BlobShape shape=7  #float data=5  #double double_data=8  ?int32 num=1:0
        ?int32 channels=2:0  ?int32 height=3:0  ?int32 width=4:0""",
    "LossParameter": "?int32 ignore_label=1  ?bool normalize=2  ?NormalizationMode normalization=3:VALID",
    "AccuracyParameter": """?uint32 top_k=1:1  ?int32 axis=2:1  ?int32 ignore_label=3
        ?bool min_is_better=4:false""",
    "ContrastiveLossParameter": "?float margin=1:1  ?bool legacy_version=2:false",
    "TripletLossParameter": "?float margin=1:1",
    "ConcatParameter": "?uint32 concat_dim=1:1  ?int32 axis=2:1",
    "EltwiseParameter": "?EltwiseOp operation=1:SUM  *float coeff=2  ?bool stable_prod_grad=3:true",
    # distance_type is no field of Caffe's message: the released combine_softmax_contrastive.prototxt
    # writes it here for an InnerDistance layer, so it has a number that no file uses.
    "InnerProductParameter": """?uint32 num_output=1  ?bool bias_term=2:true
        ?FillerParameter weight_filler=3  ?FillerParameter bias_filler=4  ?int32 axis=5:1
        ?bool transpose=6:false  ?bool normalize=7:false  ?string distance_type=1000:L2""",
    "InnerDistanceParameter": """?uint32 num_output=1  ?bool bias_term=2:true
        ?FillerParameter weight_filler=3  ?FillerParameter bias_filler=4  ?int32 axis=5:1
        ?bool transpose=6:false  ?string distance_type=7:L2  ?bool normalize=8:false
        ?bool update_center_only=9:false""",
    "InputParameter": "*BlobShape shape=1",
    "ParameterParameter": "?BlobShape shape=1  ?FillerParameter blob_filler=2",
    "ScaleParameter": """?int32 axis=1:1  ?int32 num_axes=2:1  ?FillerParameter filler=3
        ?bool bias_term=4:false  ?FillerParameter bias_filler=5  ?float min_value=6  ?float max_value=7""",
    "SliceParameter": "?uint32 slice_dim=1:1  *uint32 slice_point=2  ?int32 axis=3:1",
    "SoftmaxParameter": """?Engine engine=1:DEFAULT  ?int32 axis=2:1  ?float hard_ratio=3:1
        *float class_weight=4  ?int32 hard_mining_label=5  ?float cutting_point=6
        ?string normalize_type=7:Softmax  ?float label_smooth_factor=8:0""",
    # From other forks, under numbers that no file uses, and NormParameter from SSD's.
    "CombinedMarginParameter": """?float m1=1:4  ?float m2=2:0.5  ?float m3=3:0.35
        ?bool transform_test=4:false""",
    "CosinAddmParameter": "?float m=1:0.5  ?bool transform_test=2:false",
    "NormParameter": """?bool across_spatial=1:true  ?FillerParameter scale_filler=2
        ?bool channel_shared=3:true  ?float eps=4:1e-10""",
    "DropoutParameter": "?float dropout_ratio=1:0.5",
    "FlattenParameter": "?int32 axis=1:1  ?int32 end_axis=2:-1",
    "PowerParameter": "?float power=1:1  ?float scale=2:1  ?float shift=3:0",
    "MarginInnerProductParameter": """?uint32 num_output=1  ?MarginType type=2:SINGLE
        ?FillerParameter weight_filler=3  ?int32 axis=4:1  ?float base=5:1  ?float gamma=6:0  ?float power=7:1
        ?int32 iteration=8:0  ?float lambda_min=9:0""",
    "LabelSpecificAddParameter": """?float bias=1:0  ?bool transform_test=2:false  ?float bias_base=3:0
        ?float bias_gamma=4:0  ?float bias_power=5:1  ?float bias_min=6:0  ?float bias_max=7:0
        ?uint32 iteration=8:0""",
    "ChannelScaleParameter": """?bool do_forward=1:true  ?bool do_backward_feature=2:true
        ?bool do_backward_scale=3:true  ?bool global_scale=4:false  ?float max_global_scale=5:1000
        ?float min_global_scale=6:0  ?float init_global_scale=7:1""",
    "FlipParameter": "?bool flip_width=1:true  ?bool flip_height=2:false",
    "NormalizeParameter": "?string normalize_type=1:L2  ?bool fix_gradient=2:false  ?bool bp_norm=3:false",
    "GeneralContrastiveParameter": """?float positive_margin=1:0  ?float negative_margin=2:1
        ?float positive_weight=3:1  ?float negative_weight=4:1  ?float normalize_negative=5:0
        ?float positive_outlier_thresh=6:4  ?bool square=7:false  ?bool max_negative_only=8:false
        ?bool max_positive_only=9:false  ?bool positive_first=10:false  ?float positive_upper_bound=11:1
        ?bool exp_negative_weight=12:false  ?bool add_intra_mae=13:false
        ?float max_negative_margin=14:1.2""",
    "GeneralTripletParameter": """?float margin=1:0.2  ?bool add_center_loss=2:true
        ?bool hardest_only=3:false  ?bool positive_first=4:false  ?float positive_upper_bound=5:1
        ?float positive_weight=6:1  ?float negative_weight=7:1""",
}

ENUMS: dict[str, dict[str, int]] = {
    "Phase": {"TRAIN": 0, "TEST": 1},
    "DimCheckMode": {"STRICT": 0, "PERMISSIVE": 1},
    "VarianceNorm": {"FAN_IN": 0, "FAN_OUT": 1, "AVERAGE": 2},
    "NormalizationMode": {"FULL": 0, "VALID": 1, "BATCH_SIZE": 2, "NONE": 3},
    "EltwiseOp": {"PROD": 0, "SUM": 1, "MAX": 2, "SORT": 3},
    "MarginType": {"SINGLE": 0, "DOUBLE": 1, "TRIPLE": 2, "QUADRUPLE": 3},
    "Engine": {"DEFAULT": 0, "CAFFE": 1, "CUDNN": 2},
}

_PACKAGE = "normface_caffe"

_blocks = re.findall(r"\?\w+ \w+_param=\d+", MESSAGES["LayerParameter"])
MESSAGES["V1LayerParameter"] += "  " + "  ".join(_blocks)


def require(module: str) -> Any:
    """A module of google.protobuf, or an ImportError that says what to install."""
    try:
        return importlib.import_module(f"google.protobuf.{module}")
    except ImportError as error:
        raise ImportError(
            "normface_ext.caffe: reading Caffe files needs protobuf, which is not installed;"
            " `pip install 'normface_ext[caffe]'` brings it"
        ) from error


@cache
def messages() -> dict[str, Any]:
    """message name -> its class, in a pool of their own: another caffe_pb2 in the process does not clash."""
    descriptor_pb2, pool = require("descriptor_pb2"), require("descriptor_pool").DescriptorPool()
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="normface_caffe.proto", package=_PACKAGE, syntax="proto2")
    for name, values in ENUMS.items():  # enum values are siblings of their enum, so each sits in a message
        holder = file.message_type.add(name=f"{name}Enum").enum_type.add(name=name)
        for value, number in values.items():
            holder.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        words = fields.split()
        for kind, declaration in zip(words[::2], words[1::2], strict=True):
            label, type_name = kind[0], kind[1:]
            declaration, _, default = declaration.partition(":")
            field_name, _, digits = declaration.partition("=")
            entry = message.field.add(name=field_name, number=int(digits))
            entry.label = kinds.LABEL_OPTIONAL if label == "?" else kinds.LABEL_REPEATED
            if label == "#":
                entry.options.packed = True
            if type_name in MESSAGES:
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{type_name}"
            elif type_name in ENUMS:
                entry.type = kinds.TYPE_ENUM
                entry.type_name = f".{_PACKAGE}.{type_name}Enum.{type_name}"
            else:
                entry.type = getattr(kinds, f"TYPE_{type_name.upper()}")
            if default:
                entry.default_value = default
    pool.AddSerializedFile(file.SerializeToString())
    factory = require("message_factory")
    return {
        name: factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in MESSAGES
    }
