"""The messages of the Open Inference Protocol's gRPC service that are used here.

Names and numbers are those of Triton's grpc_service.proto and model_config.proto (BSD-3-Clause), which KServe's
open_inference_grpc.proto is a part of; enumerations are their numbers. On the wire neither a message's own name nor its
package is seen, so all of them, nested ones too, live in one package here. The test compares every line with the
descriptors that tritonclient ships.
"""

from __future__ import annotations

from serving.protobuf.tables import message_classes

INFERENCE_SERVICE = "inference.GRPCInferenceService"

_REQUEST = "name:string=1 version:string=2"
TABLE = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool=1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool=1",
    "ModelReadyRequest": _REQUEST,
    "ModelReadyResponse": "ready:bool=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string=1 version:string=2 extensions:string*=3",
    "ModelMetadataRequest": _REQUEST,
    "TensorMetadata": "name:string=1 datatype:string=2 shape:int64*=3",
    "ModelMetadataResponse": (
        "name:string=1 versions:string*=2 platform:string=3 inputs:TensorMetadata*=4 outputs:TensorMetadata*=5"
    ),
    "InferParameter": (
        "bool_param:bool=1| int64_param:int64=2| string_param:string=3| double_param:double=4| uint64_param:uint64=5|"
    ),
    "InferTensorContents": (
        "bool_contents:bool*=1 int_contents:int32*=2 int64_contents:int64*=3 uint_contents:uint32*=4"
        " uint64_contents:uint64*=5 fp32_contents:float*=6 fp64_contents:double*=7 bytes_contents:bytes*=8"
    ),
    "InferInputTensor": (
        "name:string=1 datatype:string=2 shape:int64*=3 parameters:map<InferParameter>=4 contents:InferTensorContents=5"
    ),
    "InferRequestedOutputTensor": "name:string=1 parameters:map<InferParameter>=2",
    "ModelInferRequest": (
        "model_name:string=1 model_version:string=2 id:string=3 parameters:map<InferParameter>=4"
        " inputs:InferInputTensor*=5 outputs:InferRequestedOutputTensor*=6 raw_input_contents:bytes*=7"
    ),
    "InferOutputTensor": (
        "name:string=1 datatype:string=2 shape:int64*=3 parameters:map<InferParameter>=4 contents:InferTensorContents=5"
    ),
    "ModelInferResponse": (
        "model_name:string=1 model_version:string=2 id:string=3 parameters:map<InferParameter>=4"
        " outputs:InferOutputTensor*=5 raw_output_contents:bytes*=6"
    ),
    "ModelStreamInferResponse": "error_message:string=1 infer_response:ModelInferResponse=2",
    "ModelConfigRequest": _REQUEST,
    "ModelInput": "name:string=1 data_type:int32=2 dims:int64*=4 optional:bool=8",
    "ModelOutput": "name:string=1 data_type:int32=2 dims:int64*=3",
    "ModelTransactionPolicy": "decoupled:bool=1",
    "ModelParameter": "string_value:string=1",
    "ModelConfig": (
        "name:string=1 platform:string=2 max_batch_size:int32=4 input:ModelInput*=5 output:ModelOutput*=6"
        " parameters:map<ModelParameter>=14 backend:string=17 model_transaction_policy:ModelTransactionPolicy=19"
    ),
    "ModelConfigResponse": "config:ModelConfig=1",
    "ModelStatisticsRequest": _REQUEST,
    "StatisticDuration": "count:uint64=1 ns:uint64=2",
    "InferStatistics": (
        "success:StatisticDuration=1 fail:StatisticDuration=2 queue:StatisticDuration=3"
        " compute_infer:StatisticDuration=5"
    ),
    "ModelStatistics": (
        "name:string=1 version:string=2 last_inference:uint64=3 inference_count:uint64=4 execution_count:uint64=5"
        " inference_stats:InferStatistics=6"
    ),
    "ModelStatisticsResponse": "model_stats:ModelStatistics*=1",
    "RepositoryIndexRequest": "repository_name:string=1 ready:bool=2",
    "ModelIndex": "name:string=1 version:string=2 state:string=3 reason:string=4",
    "RepositoryIndexResponse": "models:ModelIndex*=1",
}
MESSAGES = message_classes("gpt2_bundle.inference", TABLE)

CONFIG_TYPES = {
    "BOOL": 1, "UINT8": 2, "UINT16": 3, "UINT32": 4, "UINT64": 5, "INT8": 6, "INT16": 7, "INT32": 8, "INT64": 9,
    "FP16": 10, "FP32": 11, "FP64": 12, "BYTES": 13,
}  # fmt: skip
"""Numbers of model_config.proto's DataType by the protocol's names; BYTES is its TYPE_STRING."""
