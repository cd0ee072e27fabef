"""The messages of TensorFlow Serving's gRPC services that are used here, without TensorFlow.

Names and numbers are those of tensorflow_serving/apis/*.proto and tensorflow/core/framework/*.proto (Apache-2.0);
enumerations are their numbers. On the wire neither a message's own name nor its package is seen, so all of them live in
one package here. Its test compares every line with the official descriptors.
"""

from __future__ import annotations

from serving.protobuf.tables import message_classes

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"
SIGNATURE_MAP_URL = "type.googleapis.com/tensorflow.serving.SignatureDefMap"

DTYPES = dict(
    enumerate(
        [
            "INVALID",
            "FLOAT",
            "DOUBLE",
            "INT32",
            "UINT8",
            "INT16",
            "INT8",
            "STRING",
            "COMPLEX64",
            "INT64",
            "BOOL",
            "QINT8",
            "QUINT8",
            "QINT32",
            "BFLOAT16",
            "QINT16",
            "QUINT16",
            "UINT16",
            "COMPLEX128",
            "HALF",
            "RESOURCE",
            "VARIANT",
            "UINT32",
            "UINT64",
        ]
    )
)
"""Names of tensorflow/core/framework/types.proto by number, without their "DT_"."""

TABLE = {
    "Empty": "",
    "ModelSpec": "name:string=1 version:Int64Value=2| version_label:string=4| signature_name:string=3",
    "Dim": "size:int64=1 name:string=2",
    "TensorShapeProto": "dim:Dim*=2 unknown_rank:bool=3",
    "TensorProto": (
        "dtype:int32=1 tensor_shape:TensorShapeProto=2 version_number:int32=3 tensor_content:bytes=4 half_val:int32*=13"
        " float_val:float*=5 double_val:double*=6 int_val:int32*=7 string_val:bytes*=8 int64_val:int64*=10"
        " bool_val:bool*=11 uint32_val:uint32*=16 uint64_val:uint64*=17"
    ),
    "PredictRequest": (
        "model_spec:ModelSpec=1 inputs:map<TensorProto>=2 output_filter:string*=3"
        " predict_streamed_options:PredictStreamedOptions=5"
    ),
    "PredictStreamedOptions": "request_state:int32=1 split_dimensions:map<int32>=2 return_single_response:bool=3",
    "PredictResponse": "model_spec:ModelSpec=2 outputs:map<TensorProto>=1",
    "GetModelMetadataRequest": "model_spec:ModelSpec=1 metadata_field:string*=2",
    "GetModelMetadataResponse": "model_spec:ModelSpec=1 metadata:map<Any>=2",
    "TensorInfo": "name:string=1 dtype:int32=2 tensor_shape:TensorShapeProto=3",
    "SignatureDef": "inputs:map<TensorInfo>=1 outputs:map<TensorInfo>=2 method_name:string=3",
    "SignatureDefMap": "signature_def:map<SignatureDef>=1",
    "GetModelStatusRequest": "model_spec:ModelSpec=1",
    "StatusProto": "error_code:int32=1 error_message:string=2",
    "ModelVersionStatus": "version:int64=1 state:int32=2 status:StatusProto=3",
    "GetModelStatusResponse": "model_version_status:ModelVersionStatus*=1",
}
MESSAGES = message_classes("gpt2_bundle.tensorflow", TABLE)
