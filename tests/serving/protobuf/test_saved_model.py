"""SavedModels that open files or run foreign code: refused by what they hold, before anything of them runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorflow.core.framework import attr_value_pb2, function_pb2, graph_pb2, node_def_pb2, op_def_pb2
from tensorflow.core.protobuf import (
    meta_graph_pb2,
    saved_model_pb2,
    saved_object_graph_pb2,
    saver_pb2,
)

from builder.keras_backend import tf
from serving.errors import BundleError
from serving.protobuf import saved_model as messages
from serving.protobuf import saved_model_ops
from serving.protobuf.saved_model_ops import ALLOWED_OPS, FOREIGN_OPS, check_saved_model, find_problems

Change = Callable[[Any], Any]
OFFICIAL = {
    message.DESCRIPTOR.name: message.DESCRIPTOR
    for message in (
        saved_model_pb2.SavedModel,
        meta_graph_pb2.MetaGraphDef,
        meta_graph_pb2.MetaGraphDef.MetaInfoDef,
        meta_graph_pb2.AssetFileDef,
        meta_graph_pb2.CollectionDef,
        meta_graph_pb2.CollectionDef.NodeList,
        meta_graph_pb2.CollectionDef.AnyList,
        meta_graph_pb2.SignatureDef,
        meta_graph_pb2.TensorInfo,
        saver_pb2.SaverDef,
        graph_pb2.GraphDef,
        node_def_pb2.NodeDef,
        attr_value_pb2.AttrValue,
        attr_value_pb2.AttrValue.ListValue,
        attr_value_pb2.NameAttrList,
        function_pb2.FunctionDefLibrary,
        function_pb2.GradientDef,
        function_pb2.FunctionDef,
        op_def_pb2.OpDef,
        op_def_pb2.OpDef.ArgDef,
        saved_object_graph_pb2.SavedObjectGraph,
        saved_object_graph_pb2.SavedConcreteFunction,
        saved_object_graph_pb2.SavedObject,
        saved_object_graph_pb2.SavedUserObject,
        saved_object_graph_pb2.SavedAsset,
    )
}


@pytest.fixture
def version(real_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real_bundle / "savedmodel/1", tmp_path / "1"))


def change(version: Path, how: Change) -> None:
    """Rewrite the SavedModel by the official messages."""
    path = version / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    how(saved.meta_graphs[0])
    path.write_bytes(saved.SerializeToString())


def saver_function(graph: Any, kind: str) -> Any:
    (found,) = [each for each in graph.graph_def.library.function if f"traced_{kind}" in each.signature.name]
    return found


def some_function(graph: Any) -> Any:
    return next(each for each in graph.graph_def.library.function if "traced" not in each.signature.name)


def call(graph: Any, function: str, **more: Any) -> Any:
    node = graph.graph_def.node.add(name="extra", op="StatefulPartitionedCall", **more)
    node.attr["f"].func.name = function
    return node


def test_the_table_is_the_official_one() -> None:
    assert set(messages.MESSAGES) == set(OFFICIAL)
    for name, message in messages.MESSAGES.items():
        theirs = OFFICIAL[name].fields_by_name
        for field in message.DESCRIPTOR.fields:
            official = theirs[field.name]
            assert (field.number, field.is_repeated) == (official.number, official.is_repeated), (name, field.name)
            assert (field.message_type is None) == (official.message_type is None), (name, field.name)
            if field.type == field.TYPE_MESSAGE:
                # A map's entry is called by its field.
                assert field.message_type.name == official.message_type.name, (name, field.name)
            else:
                assert field.type == official.type, (name, field.name)


def test_an_export_has_nothing_to_be_refused(real_bundle: Path) -> None:
    assert [*find_problems(real_bundle / "savedmodel/1")] == []
    check_saved_model(real_bundle / "savedmodel/1")


def test_the_lists_are_of_ops_that_exist() -> None:
    ops = set(dir(tf.raw_ops)) | {"NoOp", "Placeholder"}
    assert set(ALLOWED_OPS) <= ops
    foreign = {op for op in ops if FOREIGN_OPS.fullmatch(op)}
    assert {"PyFunc", "ReadFile", "WriteFile", "TextLineDataset", "DebugIdentityV3", "SaveV2", "PrintV2"} <= foreign
    assert not foreign & ALLOWED_OPS


@pytest.mark.parametrize(
    "op",
    ["ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "EagerPyFunc", "PrintV2", "TextLineDataset", "TFRecordDataset",
     "SqlDataset", "DebugIdentityV3", "SaveV2", "RestoreV2", "ImmutableConst", "NoSuchOp",
     "InitializeTableFromTextFileV2"],
)  # fmt: skip
def test_an_op_outside_of_the_list_is_named_wherever_it_is(version: Path, op: str, tmp_path: Path) -> None:
    before = Path(shutil.copytree(version, tmp_path / "before"))
    change(version, lambda graph: graph.graph_def.node.add(name="quiet\x1b[31m", op=op))
    with pytest.raises(BundleError, match=rf"graph: the op '{op}' \(node 'quiet\\x1b\[31m'\)"):
        check_saved_model(version)

    def nested(graph: Any) -> None:
        # In a function that nothing calls: Python's loader makes all of them.
        function = graph.graph_def.library.function.add()
        function.signature.name = "deep"
        function.node_def.add(name="hidden", op=op, input=["elsewhere"])
        call(graph, "deep")

    change(before, nested)
    with pytest.raises(
        BundleError, match=op if op not in ("SaveV2", "RestoreV2") else "calls the saver's function 'deep'"
    ):
        check_saved_model(before)


def const(function: Any) -> str:
    function.node_def.add(name="path", op="Const").attr["value"].tensor.string_val.append(b"/etc/passwd")
    return "path:output:0"


def restores_a_file_of_its_own(graph: Any) -> None:
    function = saver_function(graph, "restore")
    (node,) = [each for each in function.node_def if each.op == "RestoreV2"]
    node.input[0] = const(function)


def calls_the_saver_in_a_function(graph: Any) -> None:
    node = some_function(graph).node_def.add(name="extra", op="StatefulPartitionedCall", input=["x"])
    node.attr["f"].func.name = saver_function(graph, "save").signature.name


def calls_the_saver_in_a_branch_of_a_call(graph: Any) -> None:
    node = some_function(graph).node_def.add(name="extra", op="If")
    inner = node.attr["then_branch"].func
    inner.name = "harmless"
    inner.attr["f"].list.func.add().name = saver_function(graph, "save").signature.name


def calls_the_saver_in_the_graph(graph: Any) -> None:
    call(graph, saver_function(graph, "restore").signature.name, input=["elsewhere"])


def restores_by_writing(graph: Any) -> None:
    graph.saver_def.restore_op_name = graph.saver_def.save_tensor_name.removesuffix(":0")


def restores_by_a_branch(graph: Any) -> None:
    (node,) = [each for each in graph.graph_def.node if each.name == graph.saver_def.restore_op_name]
    node.op = "If"


def feeds_the_saver_itself(graph: Any) -> None:
    (node,) = [each for each in graph.graph_def.node if each.name == graph.saver_def.restore_op_name]
    node.input[0] = "elsewhere"


def waits_for_the_saver(graph: Any) -> None:
    graph.graph_def.node.add(name="extra", op="NoOp", input=["^" + graph.saver_def.save_tensor_name.partition(":")[0]])


def fetches_the_saver(graph: Any) -> None:
    graph.signature_def["score"].outputs["saved"].name = graph.saver_def.save_tensor_name


def feeds_the_savers_file_name(graph: Any) -> None:
    graph.signature_def["score"].inputs["file"].name = graph.saver_def.filename_tensor_name


def saves_when_loaded(graph: Any) -> None:
    graph.collection_def["saved_model_main_op"].node_list.value.append(graph.saver_def.save_tensor_name)


def offers_the_saver_to_python(graph: Any) -> None:
    graph.object_graph_def.concrete_functions[saver_function(graph, "save").signature.name].bound_inputs.append(1)


def has_an_asset(graph: Any) -> None:
    graph.asset_file_def.add(filename="../../../etc/passwd")


def has_an_object_of_a_package(graph: Any) -> None:
    graph.object_graph_def.nodes.add().user_object.identifier = "_tf_keras_layer"


def has_a_registered_object(graph: Any) -> None:
    graph.object_graph_def.nodes.add(registered_name="Package.Class")


def has_a_gradient(graph: Any) -> None:
    graph.graph_def.library.gradient.add(function_name="a", gradient_func="b")


def has_a_function_twice(graph: Any) -> None:
    graph.graph_def.library.function.add().CopyFrom(some_function(graph))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (restores_a_file_of_its_own, "reads a file of the graph's own choice"),
        (calls_the_saver_in_a_function, "calls the saver's function"),
        (calls_the_saver_in_a_branch_of_a_call, "calls the saver's function"),
        (calls_the_saver_in_the_graph, "calls the saver's function"),
        (restores_by_writing, "not as an export writes it"),
        (restores_by_a_branch, "not as an export writes it"),
        (feeds_the_saver_itself, "not as an export writes it"),
        (waits_for_the_saver, "takes what belongs to the saver"),
        (fetches_the_saver, "score: the signature feeds or fetches"),
        (feeds_the_savers_file_name, "score: the signature feeds or fetches"),
        (saves_when_loaded, "the collection runs the saver"),
        (offers_the_saver_to_python, "is offered to be called"),
        (has_an_asset, "opens the file"),
        (has_an_object_of_a_package, "kind '_tf_keras_layer'"),
        (has_a_registered_object, "class 'Package.Class'"),
        (has_a_gradient, "has gradients"),
        (has_a_function_twice, "two functions are called"),
    ],
)
def test_ways_to_the_savers_ops(version: Path, how: Change, words: str) -> None:
    change(version, how)
    with pytest.raises(BundleError, match="it was not loaded") as caught:
        check_saved_model(version)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_graph_of_the_file_is_looked_at(version: Path) -> None:
    path = version / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    second = saved.meta_graphs.add()
    second.meta_info_def.tags.append("train")
    second.graph_def.node.add(name="a", op="ReadFile")
    path.write_bytes(saved.SerializeToString())
    with pytest.raises(BundleError, match="it has 2 graphs"):
        check_saved_model(version)
    assert [problem.op for problem in find_problems(version)] == ["", "ReadFile"]
    # Protobuf puts the parts of a message that comes twice together; so does this reader.
    first = saved_model_pb2.SavedModel()
    first.meta_graphs.add().graph_def.node.add(name="b", op="WriteFile")
    path.write_bytes(first.SerializeToString() + saved.SerializeToString())
    assert "WriteFile" in [problem.op for problem in find_problems(version)]


@pytest.mark.parametrize(
    "how",
    [
        lambda graph: graph.graph_def.node.extend([graph.graph_def.node[0]] * 20_000),
        lambda graph: some_function(graph).node_def[0].input.extend(["x"] * 20_000),
        lambda graph: [graph.object_graph_def.nodes.add() for _ in range(20_000)],
    ],
)
def test_lists_that_no_export_has_are_not_looked_through(
    version: Path, how: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_model_ops, "_MOST", 10_000)
    change(version, how)
    with pytest.raises(BundleError, match="more than any export has"):
        check_saved_model(version)


@pytest.mark.parametrize(
    "name",
    [
        "saved_model.pbtxt",
        "saved_model.cpb",
        "assets/words.txt",
        "model.tflite",
        "variables/other",
        "batching_params.pbtxt",
    ],
)
def test_files_that_a_loader_may_take_instead(version: Path, name: str) -> None:
    (version / name).parent.mkdir(exist_ok=True)
    (version / name).write_bytes(b"")
    with pytest.raises(BundleError, match="is of no kind that an export writes"):
        check_saved_model(version)


def test_what_is_no_savedmodel(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = version / "saved_model.pb"
    data = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(messages, "MAX_BYTES", len(data) - 1)
        with pytest.raises(BundleError, match="larger than"):
            check_saved_model(version)
    for size in (1, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(BundleError, match="not a SavedModel"):
            check_saved_model(version)
    path.unlink()
    with pytest.raises(BundleError, match="no such file"):
        check_saved_model(version)
    path.mkdir()
    with pytest.raises(BundleError, match="not a plain file"):
        check_saved_model(version)
